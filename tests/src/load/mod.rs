//! The traffic of demo and benchmark. A server thread set on one port, and three clients:
//!
//! * [`udp`]: 64-byte datagrams, at most a window of them unacknowledged; the receiver acknowledges, so the rate is what
//!   arrived and a lost datagram is seen.
//! * [`tcp`]: request/response of one byte with its latencies, connections per second, bulk, and a checked stream.
//! * [`paced`]: requests at a fixed rate, each on a new connection; [`flood`]: what hostile pods and strangers send.
//!
//! Every client is bounded in time and prints one JSON object.

pub mod flood;
pub mod paced;
pub mod tcp;
pub mod udp;

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Percentiles of a run, in microseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl Latency {
    /// Of these samples, in any order.
    pub fn of(mut samples: Vec<Duration>) -> Self {
        samples.sort_unstable();
        let at = |quantile: f64| {
            let last = samples.len().saturating_sub(1);
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "an index"
            )]
            let index = (last as f64 * quantile).round() as usize;
            samples.get(index).map_or(0.0, |d| d.as_secs_f64() * 1e6)
        };
        Self {
            p50: at(0.5),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// What a client saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// Datagrams acknowledged, requests answered, connections closed, or bytes that arrived.
    pub done: u64,
    /// Datagrams that were never acknowledged.
    pub lost: u64,
    pub seconds: f64,
    pub latency: Latency,
}

impl Outcome {
    /// Things done per second.
    pub fn rate(&self) -> f64 {
        self.done as f64 / self.seconds.max(1e-9)
    }
}
