//! How many packets and new connections a link may carry in a second.

use crate::bandwidth::{Direction, Kind};
use crate::twin::Slot;
use core::num::NonZeroU32;
use sluice_contract::row::RatesRow;
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The rates of a link; 0: no limit.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub struct Rates {
    /// To the pod and from it.
    packets: [u32; 2],
    connections: [u32; 2],
}

impl Slot for Rates {}

impl Rates {
    pub fn new(row: &RatesRow) -> Self {
        let number = |rate: Option<NonZeroU32>| rate.map_or(0, NonZeroU32::get);
        Self {
            packets: [row.ingress_packets, row.egress_packets].map(number),
            connections: [row.ingress_connections, row.egress_connections].map(number),
        }
    }

    /// So many in a second; `None`: whatever comes.
    pub fn rate(&self, kind: Kind, direction: Direction) -> Option<NonZeroU32> {
        let rates = match kind {
            Kind::Packets => self.packets,
            Kind::Connections => self.connections,
        };
        NonZeroU32::new(rates.get(direction as usize).copied().unwrap_or(0))
    }

    /// Whether packets, and new connections, are limited in any direction.
    pub fn limits(&self) -> (bool, bool) {
        (self.packets != [0; 2], self.connections != [0; 2])
    }
}
