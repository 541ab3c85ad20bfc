//! The lab: what the demo, the benchmarks and the tests of the whole product stand on.
//!
//! Everything here drives the built binaries from outside, as a person would: namespaces stand for pods and nodes, `sluice`
//! and `sluice-node` are started as processes, and nothing is left behind when a lab ends, however it ends.
//!
//! * [`need`]: what a test needs of the machine; absent needs are a skip that the summary shows.
//! * [`netns`], [`command`]: namespaces and child processes that end with their owner.
//! * [`load`]: the traffic: windowed UDP, request/response, connection rate.
//! * [`snapshot`]: what the machine looks like, before and after.

pub mod command;
pub mod load;
pub mod need;
pub mod netns;
pub mod snapshot;
