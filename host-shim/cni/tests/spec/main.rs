//! The CNI specification's statements, each as a test that drives the built binary with environment and standard input as
//! a runtime does. Behind its socket the real verbs and the real address pool work on a node made of memory.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that is surprised has failed"
)]

mod add;
mod check;
mod config;
mod del;
mod fixture;
mod gc;
mod input;
mod invocation;
mod ipam;
mod ports;
mod results;
mod status;
