//! The dataplane: a pure function of (frame, tables, now).
//!
//! ```text
//! frame → parse → classify → conntrack ─ hit of this generation ──────────────┐
//!                                └ miss → service → policy → commit ──────────┴→ route → encap → Verdict
//! ```
//!
//! Nothing here reads a clock, allocates after construction, knows a device or contains `unsafe`. The guest image gives it
//! frames from virtio rings, `sluice-replay` from a capture, the tests from arrays: all run this same code.
//!
//! What everything stands on: [`time`] (`now`, an argument everywhere), [`arena`] (memory, carved once), [`frame`] (one frame,
//! and what the far side promised about its checksums), [`verdict`] (how a packet ends, always exactly one way), [`address`],
//! [`hash`], [`twin`] (a table in two copies), [`wire`] (headers as they lie on the wire).
//!
//! The stages, in order of travel: [`parse`], [`classify`], [`policy`] (which connections may begin), [`route`]; [`conntrack`] (connections, found by their [`flow`]
//! from both directions; its head says how it is used); beside them [`reply`] (what the appliance says itself)
//! and [`limiter`] (how often), and the way to other nodes: [`overlay`] (who they are, by [`lpm`]), [`encap`], [`decap`], [`ecn`], [`mtu`]. [`pipeline`] knows their order. [`tables`] is what they read, [`apply`] what changes it,
//! [`session`] who asks for the change, [`stats`] what is counted.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod address;
pub mod apply;
pub mod arena;
pub mod bandwidth;
pub mod classify;
pub mod connection;
pub mod conntrack;
pub mod decap;
pub mod ecn;
pub mod encap;
pub mod flow;
pub mod fragments;
pub mod frame;
pub mod group;
pub mod hash;
pub mod limiter;
pub mod lpm;
pub mod mtu;
pub mod names;
pub mod nat;
pub mod observe;
pub mod overlay;
pub mod parse;
pub mod pipeline;
pub mod policy;
pub mod recent;
pub mod reply;
pub mod rewrite;
pub mod route;
pub mod service;
pub mod session;
pub mod stats;
pub mod tables;
#[cfg(feature = "testing")]
pub mod testing;
pub mod time;
pub mod twin;
pub mod verdict;
pub mod wire;

pub use address::{Address, Family};
pub use arena::{Arena, OutOfMemory};
pub use conntrack::Conntrack;
pub use flow::{Direction, Flow, FlowHash};
pub use frame::{Frame, Gso, GsoKind, Offload, Partial, Tunnel, TunnelKind};
pub use pipeline::Pipeline;
pub use tables::Capacity;
pub use time::Instant;
pub use verdict::{Originate, Verdict};
