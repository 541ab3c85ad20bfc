//! The node's own policy (row N-21): NodePolicies through the model into the pipeline, judged by the packets that arrive.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test ends where its ground is not as it expects; JSON is built from values"
)]

mod changes;
mod ground;
mod manifest;
mod rules;
mod tables;
