//! What is written into a connection's two rows and how it is read back: flows, tracking, checksums.

use crate::address::Address;
use crate::conntrack::Attached;
use crate::conntrack::region::{Detail, Region, Row, TRANSLATED, V6, unpack};
use crate::conntrack::sctp::Tags;
use crate::conntrack::state::{Standing, State};
use crate::conntrack::tcp::{Half, Tcp};
use crate::flow::{Direction, Flow};
use crate::hash::Hasher;

/// What the states of a protocol need besides their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tracking {
    None,
    Tcp(Tcp),
    Sctp(Tags),
}

impl Row {
    #[inline]
    pub(crate) const fn is_v6(&self) -> bool {
        self.flags & V6 != 0
    }

    #[inline]
    pub(crate) const fn is_translated(&self) -> bool {
        self.flags & TRANSLATED != 0
    }

    /// Source and destination of IPv4 from the place `at` on.
    fn narrow(&self, at: usize) -> (Address, Address) {
        let address =
            |place: usize| Address::v4(self.addresses.get(place).copied().unwrap_or_default());
        (address(at), address(at + 1))
    }

    /// Source and destination of IPv6.
    fn wide(&self) -> (Address, Address) {
        let address = |half: &[[u8; 4]; 4]| {
            let mut octets = [0; 16];
            octets.copy_from_slice(half.as_flattened());
            Address(octets)
        };
        let [a, b, c, d, e, f, g, h] = self.addresses;
        (address(&[a, b, c, d]), address(&[e, f, g, h]))
    }

    /// Stores source and destination of a flow; of IPv4 from the place `at` on.
    pub(crate) fn set_addresses(&mut self, at: usize, flow: &Flow) {
        if flow.is_v6() {
            let bytes = self.addresses.as_flattened_mut();
            bytes[..16].copy_from_slice(&flow.source().0);
            bytes[16..].copy_from_slice(&flow.destination().0);
        } else {
            self.addresses[at] = flow.source().v4_octets();
            self.addresses[at + 1] = flow.destination().v4_octets();
        }
    }

    /// The flow that opened the connection.
    pub(crate) fn original(&self) -> Flow {
        if self.is_v6() {
            self.flow(self.wide(), self.original_ports)
        } else {
            self.flow(self.narrow(0), self.original_ports)
        }
    }

    /// The reply flow of a connection of IPv4.
    pub(crate) fn reply4(&self) -> Flow {
        self.flow(self.narrow(2), self.reply_ports)
    }

    /// The reply flow of a connection of IPv6 whose extension this row is.
    pub(crate) fn reply6(&self) -> Flow {
        self.flow(self.wide(), self.reply_ports)
    }

    fn flow(&self, (source, destination): (Address, Address), ports: [u16; 2]) -> Flow {
        Flow::new(source, destination, self.protocol, ports[0], ports[1])
    }

    /// The checksum of what stays as it was committed.
    pub(crate) fn expected_check(&self, attached: &[u32; 7], hasher: &Hasher) -> u32 {
        let bytes = self.addresses.as_flattened();
        let word = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[at..at + 8]);
            u64::from_le_bytes(word)
        };
        let pair = |a: u32, b: u32| u64::from(a) | (u64::from(b) << 32);
        let ports = |p: [u16; 2]| u32::from(p[0]) | (u32::from(p[1]) << 16);
        let [a, b, c, d, e, f, g] = *attached;
        let kind = u32::from(self.protocol) | (u32::from(self.flags) << 8);
        let sum = hasher.hash([
            word(0),
            word(8),
            word(16),
            word(24),
            pair(ports(self.original_ports), ports(self.reply_ports)),
            pair(unpack(self.extension), u32::from(self.owner) | (kind << 16)),
            pair(a, b),
            pair(c, d),
            pair(e, f),
            u64::from(g),
        ]);
        (sum >> 32) as u32 ^ sum as u32
    }
}

impl Region<'_> {
    /// The direction in which a packet of `flow` travels, if it belongs to the connection in `slot`.
    #[inline]
    pub(crate) fn direction_of(&self, slot: u32, flow: &Flow) -> Option<Direction> {
        let row = self.rows.get(slot as usize)?;
        if row.protocol != flow.protocol() || row.is_v6() != flow.is_v6() {
            return None;
        }
        if flow.is_v6() {
            return self.direction_of_v6(row, flow);
        }
        let [a, b, c, d, ..] = row.addresses;
        let ports = [flow.source_port(), flow.destination_port()];
        let pair = [flow.source().v4_octets(), flow.destination().v4_octets()];
        if (row.original_ports == ports) & ([a, b] == pair) {
            return Some(Direction::Original);
        }
        ((row.reply_ports == ports) & ([c, d] == pair)).then_some(Direction::Reply)
    }

    fn direction_of_v6(&self, row: &Row, flow: &Flow) -> Option<Direction> {
        let ports = [flow.source_port(), flow.destination_port()];
        let (source, destination) = (flow.source(), flow.destination());
        if row.original_ports == ports && row.wide() == (source, destination) {
            return Some(Direction::Original);
        }
        if row.reply_ports != ports {
            return None;
        }
        let replies = if row.is_translated() {
            let extension = self.rows.get(unpack(row.extension) as usize)?;
            extension.wide() == (source, destination)
        } else {
            row.wide() == (destination, source)
        };
        replies.then_some(Direction::Reply)
    }

    /// The flow of a connection's answers.
    pub(crate) fn reply_of(&self, row: &Row) -> Flow {
        reply_of(self.rows, row)
    }
}

/// The flow of the answers of the connection in `row`, one of `rows`.
pub(crate) fn reply_of(rows: &[Row], row: &Row) -> Flow {
    match (row.is_v6(), row.is_translated()) {
        (false, _) => row.reply4(),
        (true, false) => row.original().reversed(),
        // An extension lives as long as its connection (invariant 3 of the lists).
        (true, true) => rows[unpack(row.extension) as usize].reply6(),
    }
}

impl Detail {
    pub(crate) const EMPTY: Self = Self {
        attached: [0; 7],
        end: [0; 2],
        max_end: [0; 2],
        window: [0; 2],
        scale: 0,
        marks: 0,
        seal: 0,
    };

    pub(crate) const fn attached(&self) -> Attached {
        Attached::from_words(self.attached)
    }

    /// TCP as it was last stored in `state`. While the connection stands on a list `max_end` is used for that, and follows
    /// from the rest: nobody has more than a window under way then.
    #[inline]
    pub(crate) fn tcp(&self, state: State) -> Tcp {
        let windows = [widen_window(self.window[0]), widen_window(self.window[1])];
        let mut tcp = Tcp {
            half: [Half::default(); 2],
            marks: self.marks,
        };
        let listed = is_listed(state);
        for (side, half) in tcp.half.iter_mut().enumerate() {
            let end = self.end[side];
            *half = Half {
                end,
                max_end: if listed {
                    end.wrapping_add(windows[1 - side])
                } else {
                    self.max_end[side]
                },
                window: windows[side],
                scale: (self.scale >> (4 * side)) & 15,
            };
        }
        tcp
    }

    #[inline]
    pub(crate) fn store_tcp(&mut self, state: State, tcp: &Tcp) {
        let [a, b] = &tcp.half;
        self.end = [a.end, b.end];
        if !is_listed(state) {
            self.max_end = [a.max_end, b.max_end];
        }
        for (stored, half) in self.window.iter_mut().zip(&tcp.half) {
            // Windows grow seldom.
            if widen_window(*stored) != half.window {
                *stored = narrow_window(half.window);
            }
        }
        self.scale = a.scale | (b.scale << 4);
        self.marks = tcp.marks;
    }

    pub(crate) fn tags(&self, state: State) -> Tags {
        Tags {
            tag: self.end,
            restart: if is_listed(state) {
                [0; 2]
            } else {
                self.max_end
            },
        }
    }

    pub(crate) fn store_tags(&mut self, state: State, tags: &Tags) {
        self.end = tags.tag;
        if !is_listed(state) {
            self.max_end = tags.restart;
        }
    }

    pub(crate) fn store(&mut self, state: State, tracking: &Tracking) {
        match tracking {
            Tracking::None => {}
            Tracking::Tcp(tcp) => self.store_tcp(state, tcp),
            Tracking::Sctp(tags) => self.store_tags(state, tags),
        }
    }

    /// The checksum of what packets change.
    ///
    /// Not cryptographic and cheap enough (three multiplications) to be kept right with every packet: it tells a torn or
    /// flipped row from a whole one after a crash, no more.
    #[inline]
    pub(crate) fn expected_seal(&self, state: u8) -> u16 {
        let pair = |a: u32, b: u32| u64::from(a) | (u64::from(b) << 32);
        let listed = State::from_raw(state).is_none_or(is_listed);
        let max_end = if listed {
            0
        } else {
            pair(self.max_end[0], self.max_end[1])
        };
        let rest = u32::from(self.window[0]) | (u32::from(self.window[1]) << 16);
        let kind = u32::from(self.scale) | (u32::from(self.marks) << 8) | (u32::from(state) << 16);
        let mut sum = pair(self.end[0], self.end[1]).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        sum = (sum.rotate_left(29) ^ max_end).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        sum = (sum.rotate_left(29) ^ pair(rest, kind)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (sum >> 48) as u16
    }
}

/// Whether connections in this state stand on an eviction list.
#[inline]
pub(crate) fn is_listed(state: State) -> bool {
    state.standing() != Standing::Established
}

const MANTISSA: u32 = 11;

/// A window of up to 2³⁰ bytes in 16 bits: 11 bits and an exponent, rounded up by at most a thousandth, so that nothing
/// is refused that the exact number would let pass.
#[inline]
const fn narrow_window(window: u32) -> u16 {
    let bits = u32::BITS - window.leading_zeros();
    let exponent = bits.saturating_sub(MANTISSA);
    let mantissa = (window >> exponent) + ((window & ((1 << exponent) - 1)) != 0) as u32;
    if mantissa >> MANTISSA == 0 {
        ((exponent << MANTISSA) | mantissa) as u16
    } else {
        (((exponent + 1) << MANTISSA) | (mantissa >> 1)) as u16
    }
}

#[inline]
const fn widen_window(narrow: u16) -> u32 {
    ((narrow & ((1 << MANTISSA) - 1)) as u32) << (narrow >> MANTISSA)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn windows_are_rounded_up_by_a_thousandth_at_most(shift in 0u32..32, noise: u32) {
            let window = (noise >> shift) & 0x7fff_ffff;
            let back = widen_window(narrow_window(window));
            prop_assert!(back >= window);
            prop_assert!(back - window <= window / 1000);
            // Storing again changes nothing.
            prop_assert_eq!(narrow_window(back), narrow_window(window));
        }
    }
}
