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
//! * [`source`]: where objects come from. [`store`]: the cluster as it is known now.
//! * [`compile`]: the store as tables. [`diff`]: those tables, and what has to be said to get there.
//! * [`taint`]: what the cluster is told in turn: whether this node takes pods.
//! * [`explain`], [`trace`]: which rules hold for whom, and which one decides. [`overview`]: what there is.

pub mod compile;
pub mod diff;
pub mod document;
pub mod explain;
pub mod finding;
pub mod object;
pub mod overview;
pub mod source;
pub mod store;
pub mod taint;
pub mod trace;
pub mod validate;
