//! What the trunk's driver accepts of the features a device offers.

use crate::transport::F_EVENT_IDX;

const F_CSUM: u64 = 1 << 0;
const F_GUEST_CSUM: u64 = 1 << 1;
const F_GUEST_TSO4: u64 = 1 << 7;
const F_GUEST_TSO6: u64 = 1 << 8;
const F_GUEST_ECN: u64 = 1 << 9;
const F_HOST_TSO4: u64 = 1 << 11;
const F_HOST_TSO6: u64 = 1 << 12;
const F_HOST_ECN: u64 = 1 << 13;
/// One header layout for all frames; without it a large frame could not arrive in small buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
const F_GUEST_USO4: u64 = 1 << 54;
const F_GUEST_USO6: u64 = 1 << 55;
const F_HOST_USO: u64 = 1 << 56;

/// What to accept of the offered features: every offload in both directions or in none, because a
/// frame that came unsegmented must be able to leave so.
pub fn choose_features(offered: u64) -> u64 {
    let has = |bits: u64| offered & bits == bits;
    let checksum = F_CSUM | F_GUEST_CSUM;
    let mut chosen = offered & F_EVENT_IDX;
    if !has(checksum) {
        return chosen;
    }
    chosen |= checksum;
    for pair in [
        F_HOST_TSO4 | F_GUEST_TSO4,
        F_HOST_TSO6 | F_GUEST_TSO6,
        F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6,
    ] {
        if has(pair) {
            chosen |= pair;
        }
    }
    let ecn = F_HOST_ECN | F_GUEST_ECN;
    if has(ecn) && chosen & (F_GUEST_TSO4 | F_GUEST_TSO6) != 0 {
        chosen |= ecn;
    }
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offloads_are_taken_in_both_directions_or_not_at_all() {
        let all = u64::MAX;
        let chosen = choose_features(all);
        assert_eq!(chosen & F_MRG_RXBUF, 0, "that one is required, not chosen");
        for pair in [
            F_HOST_TSO4 | F_GUEST_TSO4,
            F_HOST_USO | F_GUEST_USO4 | F_GUEST_USO6,
        ] {
            assert_eq!(chosen & pair, pair);
            assert_eq!(
                choose_features(all & !(pair & pair.wrapping_neg())) & pair,
                0
            );
        }
        assert_eq!(choose_features(all & !F_CSUM), F_EVENT_IDX);
        assert_eq!(choose_features(0), 0);
    }
}
