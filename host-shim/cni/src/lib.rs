//! The CNI plugin: the protocol between a container runtime and the node.
//!
//! A call travels [`mod@env`] + [`config`] (what the runtime says, checked) → [`plugin`] (what needs no node) → [`rpc`] (the
//! node's socket) → [`server`] → [`verbs`] (what ADD, DEL, CHECK, GC and STATUS do) and comes back as a [`result`] in the
//! caller's [`version`] or as an [`error`]. A DEL that finds no node is [`deferred`].
//!
//! The binary is the first half, the node daemon holds the second and lends it its wiring ([`verbs::node::Node`]).

pub mod capability;
pub mod config;
pub mod deferred;
pub mod env;
pub mod error;
pub mod gate;
pub mod peer;
pub mod plugin;
pub mod result;
pub mod rpc;
pub mod server;
pub mod verbs;
pub mod version;
