//! What the cluster looks like, and what follows from it for this node's appliance.
//!
//! ```text
//! manifest directory ─┐
//!                     ├→ validate → store → compile → desired rows → diff → batches for the guest
//! Kubernetes API ─────┘
//! ```
//!
//! * [`document`]: YAML and JSON with line numbers. [`finding`]: what is wrong, and where.
//! * [`object`]: the objects as far as the network needs them. [`validate`]: the only way to make one.
pub mod compile;
pub mod diff;
pub mod document;
pub mod finding;
pub mod object;
pub mod source;
pub mod store;
pub mod validate;
