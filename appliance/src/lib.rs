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
//! * [`time`]: `now`, an argument everywhere.
//! * [`arena`]: memory, carved once.
//! * [`frame`]: one frame, where it came from, and what the far side promised about its checksums.
//! * [`policy`]: which connections may begin.
//! * [`verdict`]: how a packet ends; always exactly one way.
#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod arena;
pub mod frame;
pub mod policy;
pub mod time;
pub mod verdict;

pub use arena::{Arena, OutOfMemory};
pub use frame::{Frame, Gso, GsoKind, Offload};
pub use time::Instant;
pub use verdict::{Originate, Verdict};
