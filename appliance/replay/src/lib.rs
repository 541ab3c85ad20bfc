//! Replay: a capture goes through the very dataplane that runs in the microVM, with tables from a file, and the result says
//! what became of each frame, and why.
//!
//! ```text
//! tables.json → tables → rows ─┐
//! traffic.pcapng → pcapng ─────┴→ replay → pipeline of the appliance → result.pcapng, verdicts
//! ```
//!
//! Links are the interfaces of the capture, time is the capture's, randomness comes from a seed: the same input is the same
//! output, byte by byte, on every machine. Nothing here decides about a packet; [`replay`] only drives, [`verdict`] only words
//! what the stages noted.
#![forbid(unsafe_code)]

pub mod pcapng;
pub mod replay;
pub mod tables;
pub mod verdict;
