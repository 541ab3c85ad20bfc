//! A pod's bandwidth, as the runtime says it, as a row of the appliance.

use sluice_cni::capability::{self, Bandwidth};
use sluice_contract::row::{BandwidthRow, Rate};
use sluice_contract::{LinkId, Row};

/// What containerd (and the kubelet before it) says for the burst of a pod whose annotations know only a rate.
const UNSAID: [u64; 2] = [u32::MAX as u64, i32::MAX as u64];
/// The burst of such a pod: so much of a second, and room for two of the largest frames.
const BURST_PER_SECOND: u64 = 10;
const LEAST_BURST: u64 = 128 << 10;

/// The row, if there is a limit at all.
pub(super) fn row(link: LinkId, bandwidth: &Bandwidth) -> Option<Row> {
    if *bandwidth == Bandwidth::default() {
        return None;
    }
    Some(Row::Bandwidth(BandwidthRow {
        link,
        ingress: bandwidth.ingress.map(rate),
        egress: bandwidth.egress.map(rate),
    }))
}

fn rate(asked: capability::Rate) -> Rate {
    let burst = if UNSAID.contains(&asked.burst_bits) {
        (asked.bits_per_second / 8 / BURST_PER_SECOND).max(LEAST_BURST)
    } else {
        asked.burst_bits.div_ceil(8)
    };
    Rate {
        bits_per_second: asked.bits_per_second,
        burst: u32::try_from(burst).unwrap_or(u32::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn b07_a_burst_is_honoured_and_one_that_nobody_said_is_a_tenth_of_a_second() {
        let burst = |bits_per_second, burst_bits| {
            rate(capability::Rate {
                bits_per_second,
                burst_bits,
            })
            .burst
        };
        assert_eq!(burst(8_000_000, 12_001), 1_501);
        assert_eq!(burst(8_000_000_000, u64::from(u32::MAX)), 100_000_000);
        assert_eq!(burst(8_000, 0x7fff_ffff), 128 << 10);
        let link = LinkId::new(16).unwrap();
        assert_eq!(row(link, &Bandwidth::default()), None);
    }
}
