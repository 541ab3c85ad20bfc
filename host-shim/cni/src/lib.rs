//! The CNI plugin: the protocol between a container runtime and the node.
//!
//! A call travels `env` + `config` (what the runtime says, checked) → `plugin` (what needs no node) → `rpc` (the node's
//! socket) and comes back as a `result` in the caller's `version` or as an `error`. A DEL without a node is `deferred`.

pub mod capability;
pub mod config;
pub mod deferred;
pub mod env;
pub mod error;
pub mod plugin;
pub mod result;
pub mod rpc;
pub mod version;
