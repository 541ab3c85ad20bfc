//! What the backend offers on the trunk, and what the VMM accepted of it.

use sluice_ports::offloads::Offloads;

/// Numbers of feature bits (virtio 1.2 §5.1.3, §6; vhost-user "VHOST_USER_F_PROTOCOL_FEATURES").
mod bit {
    pub(super) const CSUM: u64 = 0;
    pub(super) const GUEST_CSUM: u64 = 1;
    pub(super) const GUEST_TSO4: u64 = 7;
    pub(super) const GUEST_TSO6: u64 = 8;
    pub(super) const HOST_TSO4: u64 = 11;
    pub(super) const HOST_TSO6: u64 = 12;
    pub(super) const MRG_RXBUF: u64 = 15;
    pub(super) const INDIRECT_DESC: u64 = 28;
    pub(super) const EVENT_IDX: u64 = 29;
    pub(super) const PROTOCOL_FEATURES: u64 = 30;
    pub(super) const VERSION_1: u64 = 32;
    pub(super) const GUEST_USO4: u64 = 54;
    pub(super) const GUEST_USO6: u64 = 55;
    pub(super) const HOST_USO: u64 = 56;
}

/// A set of feature bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features(pub u64);

impl Features {
    /// What is offered on a host whose taps can do this much.
    pub fn offered(taps: Offloads) -> Self {
        let mut bits = vec![
            bit::MRG_RXBUF,
            bit::INDIRECT_DESC,
            bit::EVENT_IDX,
            bit::PROTOCOL_FEATURES,
            bit::VERSION_1,
        ];
        let wanted = [
            (taps.checksum, [bit::CSUM, bit::GUEST_CSUM].as_slice()),
            (taps.tso4, &[bit::HOST_TSO4, bit::GUEST_TSO4]),
            (taps.tso6, &[bit::HOST_TSO6, bit::GUEST_TSO6]),
            (taps.uso, &[bit::HOST_USO, bit::GUEST_USO4, bit::GUEST_USO6]),
        ];
        bits.extend(
            wanted
                .iter()
                .filter(|(on, _)| *on)
                .flat_map(|(_, bits)| *bits),
        );
        Self(bits.into_iter().fold(0, |all, bit| all | 1 << bit))
    }

    fn has(self, bit: u64) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// What the guest takes from the taps.
    pub fn guest_takes(self) -> Offloads {
        Offloads {
            checksum: self.has(bit::GUEST_CSUM),
            tso4: self.has(bit::GUEST_TSO4),
            tso6: self.has(bit::GUEST_TSO6),
            uso: self.has(bit::GUEST_USO4) && self.has(bit::GUEST_USO6),
        }
    }

    /// Whether notification is by event index.
    pub fn event_idx(self) -> bool {
        self.has(bit::EVENT_IDX)
    }

    /// Whether rings begin disabled and wait for `SET_VRING_ENABLE`.
    pub fn rings_begin_disabled(self) -> bool {
        self.has(bit::PROTOCOL_FEATURES)
    }

    /// Whether every frame begins with a 12-byte header: the only kind served.
    pub fn long_header(self) -> bool {
        self.has(bit::VERSION_1) && self.has(bit::MRG_RXBUF)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn w12_what_is_offered_is_what_the_guest_takes_when_all_is_accepted() {
        for taps in [
            Offloads::ALL,
            Offloads::NONE,
            Offloads {
                uso: false,
                ..Offloads::ALL
            },
        ] {
            assert_eq!(Features::offered(taps).guest_takes(), taps);
            assert!(Features::offered(taps).long_header());
        }
    }

    #[test]
    fn offer_has_no_bits_beyond_the_contract() {
        let mut expected = 0u64;
        for bit in [0, 1, 7, 8, 11, 12, 15, 28, 29, 30, 32, 54, 55, 56] {
            expected |= 1 << bit;
        }
        assert_eq!(Features::offered(Offloads::ALL), Features(expected));
    }
}
