//! The arithmetic of the trunk frame: vnet header and 802.1Q tag, on plain bytes.
//!
//! A tap frame is `virtio_net_hdr_v1`, MAC addresses, EtherType, payload. On the trunk the tag stands between the MAC
//! addresses and the EtherType, so every offset that counts from the frame's start grows by four towards the guest and
//! shrinks by four on the way back (docs/machine.md, "The trunk frame"). Multi-byte fields are little endian (virtio 1.2 §5.1.6).

use thiserror::Error;

pub use sluice_ports::tap::{HEADER, LONG_HEADER};
/// Length of the two MAC addresses.
pub const MACS: usize = 12;
/// Length of an 802.1Q tag.
pub const TAG: usize = 4;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const TUNNEL_CSUM: u8 = 8;
/// In the GSO type: the packet to be cut lies in a UDP tunnel over IPv4, or over IPv6.
const TUNNEL4: u8 = 0x20;
const TUNNEL6: u8 = 0x40;
/// And that its TCP speaks of congestion (RFC 3168).
const ECN: u8 = 0x80;
/// In the long header: where the outer UDP header begins, and the inner IP header.
const OUTER_TRANSPORT: usize = 20;
const INNER_NETWORK: usize = 22;
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const GSO_SIZE: usize = 4;
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;
const NUM_BUFFERS: usize = 10;

/// Why a frame from the guest has no place on a tap.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TrunkFault {
    #[error("The frame's first tag is not 802.1Q")]
    MissingTag,
    #[error("The checksum would start inside the Ethernet header or the tag")]
    BadOffload,
}

/// A frame to be cut that lies in a tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunnelled {
    /// Where the inner IP header begins, without the tag.
    pub network: u16,
    /// A UDP tunnel as devices know it, over IPv6 or not; `None`: another kind.
    pub udp6: Option<bool>,
}

impl Tunnelled {
    /// The long header of the frame, out of the short one, which has been through [`to_tap`]; `None` if no device knows this
    /// kind of tunnel.
    pub fn long_header(self, header: &[u8; HEADER]) -> Option<[u8; LONG_HEADER]> {
        let outer = if self.udp6? { 14 + 40u16 } else { 14 + 20 };
        let mut long = [0; LONG_HEADER];
        long[..HEADER].copy_from_slice(header);
        long[OUTER_TRANSPORT..INNER_NETWORK].copy_from_slice(&outer.to_le_bytes());
        long[INNER_NETWORK..].copy_from_slice(&self.network.to_le_bytes());
        Some(long)
    }
}

/// What a tap's header says of a frame that is to be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segmentation {
    /// What the segments are, without the flags.
    pub kind: u8,
    /// Payload of each.
    pub size: u16,
    /// Where the checksum of each begins, and where it stands from there.
    pub start: u16,
    pub offset: u16,
    /// The UDP header of the tunnel has a checksum too.
    pub outer_checksum: bool,
}

impl Segmentation {
    /// Of a header that has been through [`to_tap`]; `None` if nothing is to be cut, or no checksum to be completed.
    pub fn read(header: &[u8; HEADER]) -> Option<Self> {
        let to_cut = is_gso(header) && header[0] & NEEDS_CSUM != 0;
        to_cut.then(|| Self {
            kind: header[GSO_TYPE] & !(TUNNEL4 | TUNNEL6 | ECN),
            size: field(header, GSO_SIZE),
            start: field(header, CSUM_START),
            offset: field(header, CSUM_OFFSET),
            outer_checksum: header[0] & TUNNEL_CSUM != 0,
        })
    }
}

/// The header of one segment, of the tap's size: nothing to cut, the same checksum to be completed.
pub fn of_segment(header: &[u8; HEADER]) -> [u8; LONG_HEADER] {
    let mut one = [0; LONG_HEADER];
    one[0] = NEEDS_CSUM;
    one[CSUM_START..NUM_BUFFERS].copy_from_slice(&header[CSUM_START..NUM_BUFFERS]);
    one
}

fn field(header: &[u8; HEADER], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

fn put(header: &mut [u8; HEADER], at: usize, value: u16) {
    header[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Whether the frame behind this header is a segmentation-offload frame.
pub fn is_gso(header: &[u8; HEADER]) -> bool {
    header[GSO_TYPE] != 0
}

/// The tag of a link, as it stands on the trunk.
pub fn tag(link: u16) -> [u8; TAG] {
    let [hi, lo] = (link & 0x0fff).to_be_bytes();
    [0x81, 0x00, hi, lo]
}

/// Turns a tap's header into the trunk's: offsets move by the tag, and the number of receive buffers is told.
pub fn to_trunk(header: &mut [u8; HEADER], buffers: u16) {
    if header[0] & NEEDS_CSUM != 0 {
        let start = field(header, CSUM_START);
        put(header, CSUM_START, start.saturating_add(TAG as u16));
    }
    let len = field(header, HDR_LEN);
    if len != 0 {
        put(header, HDR_LEN, len.saturating_add(TAG as u16));
    }
    put(header, NUM_BUFFERS, buffers);
}

/// Turns the trunk's header into the tap's; says so if the frame lies in a tunnel and is to be cut.
///
/// # Errors
/// [`TrunkFault::BadOffload`] when the checksum would start before the end of the tagged Ethernet header, or a tunnel is said
/// to be where none can be.
pub fn to_tap(header: &mut [u8; HEADER]) -> Result<Option<Tunnelled>, TrunkFault> {
    let tunnel = header[GSO_TYPE] & (TUNNEL4 | TUNNEL6);
    let network = field(header, NUM_BUFFERS);
    let tunnelled = match (tunnel, network) {
        (0, 0) => None,
        (TUNNEL4 | TUNNEL6, 1..) | (0, 1..) if is_gso(header) => Some(Tunnelled {
            network: network.saturating_sub(TAG as u16),
            udp6: (tunnel != 0).then_some(tunnel == TUNNEL6),
        }),
        _ => return Err(TrunkFault::BadOffload),
    };
    // Whoever cuts it, also the daemon a kind that no device knows, has to know of the outer checksum.
    let tunnel_flag = tunnelled.map_or(0, |_| TUNNEL_CSUM);
    header[0] &= NEEDS_CSUM | DATA_VALID | tunnel_flag;
    if header[0] & NEEDS_CSUM != 0 {
        let start = field(header, CSUM_START);
        if usize::from(start) < MACS + TAG + 2 {
            return Err(TrunkFault::BadOffload);
        }
        put(header, CSUM_START, start - TAG as u16);
    }
    let len = field(header, HDR_LEN);
    put(header, HDR_LEN, len.saturating_sub(TAG as u16));
    put(header, NUM_BUFFERS, 0);
    Ok(tunnelled)
}

/// The link a tag names.
///
/// # Errors
/// [`TrunkFault::MissingTag`] when it is not an 802.1Q tag.
pub fn link_of(tag: [u8; TAG]) -> Result<u16, TrunkFault> {
    match tag {
        [0x81, 0x00, hi, lo] => Ok(u16::from_be_bytes([hi, lo]) & 0x0fff),
        _ => Err(TrunkFault::MissingTag),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn header_is_the_same_after_the_round_trip(
            flags in 0u8..4, gso in any::<u8>(), hdr_len in 54u16..2000, size in any::<u16>(),
            start in 14u16..2000, offset in any::<u16>(), buffers in 1u16..20,
        ) {
            let mut header = [0; HEADER];
            header[0] = flags;
            header[1] = gso;
            put(&mut header, 2, hdr_len);
            put(&mut header, 4, size);
            put(&mut header, 6, start);
            put(&mut header, 8, offset);
            let before = header;
            to_trunk(&mut header, buffers);
            prop_assert_eq!(field(&header, NUM_BUFFERS), buffers);
            prop_assert_eq!(field(&header, HDR_LEN), hdr_len + 4);
            prop_assert_eq!(field(&header, CSUM_START), start + if flags & 1 == 1 { 4 } else { 0 });
            // What the guest sends says nothing of buffers.
            put(&mut header, NUM_BUFFERS, 0);
            let tunnel = gso & (TUNNEL4 | TUNNEL6) != 0;
            prop_assert_eq!(to_tap(&mut header).is_err(), tunnel);
            if !tunnel {
                prop_assert_eq!(header, before);
            }
        }

        #[test]
        fn any_header_from_the_guest_is_judged_without_panic(mut header in any::<[u8; HEADER]>()) {
            let needs = header[0] & 1 != 0;
            let early = field(&header, CSUM_START) < 18;
            let tunnel = header[GSO_TYPE] & (TUNNEL4 | TUNNEL6);
            let place = field(&header, NUM_BUFFERS);
            let contradictory = tunnel == TUNNEL4 | TUNNEL6
                || (tunnel != 0 && place == 0)
                || (place != 0 && !is_gso(&header));
            prop_assert_eq!(to_tap(&mut header).is_err(), contradictory || (needs && early));
        }

        #[test]
        fn m12_a_tunnelled_frame_gets_the_long_header(place in 64u16..200, six: bool, start in 80u16..200) {
            let mut header = [0; HEADER];
            header[0] = NEEDS_CSUM | TUNNEL_CSUM;
            header[GSO_TYPE] = 1 | if six { TUNNEL6 } else { TUNNEL4 };
            put(&mut header, CSUM_START, start + 4);
            put(&mut header, NUM_BUFFERS, place + 4);
            let told = to_tap(&mut header).unwrap().unwrap();
            prop_assert_eq!(told, Tunnelled { network: place, udp6: Some(six) });
            let long = told.long_header(&header).unwrap();
            prop_assert_eq!(&long[..12], &header[..]);
            prop_assert_eq!(long[0], NEEDS_CSUM | TUNNEL_CSUM);
            let outer = if six { 54u16 } else { 34 };
            prop_assert_eq!(&long[20..], &[outer.to_le_bytes(), place.to_le_bytes()].concat()[..]);
            header[0] = NEEDS_CSUM | TUNNEL_CSUM;
            header[GSO_TYPE] = 1;
            put(&mut header, NUM_BUFFERS, place + 4);
            put(&mut header, CSUM_START, start + 4);
            let other = to_tap(&mut header).unwrap().unwrap();
            prop_assert_eq!(other.long_header(&header), None);
            prop_assert!(Segmentation::read(&header).unwrap().outer_checksum);
        }

        #[test]
        fn a_tag_names_its_link(link in 0u16..4096) {
            prop_assert_eq!(link_of(tag(link)), Ok(link));
        }

        #[test]
        fn only_8021q_is_a_tag(bytes in any::<[u8; TAG]>()) {
            prop_assert_eq!(link_of(bytes).is_ok(), bytes[..2] == [0x81, 0]);
        }
    }
}
