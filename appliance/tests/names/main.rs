//! Domain names in policy: what pods are told decides where they may go, for as long as it holds and for nobody else.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where its ground is not as it expects"
)]

mod learning;
mod message;
mod streams;
mod telling;
