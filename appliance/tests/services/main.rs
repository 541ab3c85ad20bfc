//! Services, packet by packet: kube-proxy's table of sources and destinations, and everything around it.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on fails"
)]

mod choice;
mod dns;
mod live;
mod reach;
