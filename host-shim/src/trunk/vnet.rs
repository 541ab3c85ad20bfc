//! The arithmetic of the trunk frame: vnet header and 802.1Q tag, on plain bytes.
//!
//! A tap frame is `virtio_net_hdr_v1`, MAC addresses, EtherType, payload. On the trunk the tag stands between the MAC
//! addresses and the EtherType, so every offset that counts from the frame's start grows by four towards the guest and
//! shrinks by four on the way back (docs/machine.md, "The trunk frame"). Multi-byte fields are little endian (virtio 1.2 §5.1.6).

use thiserror::Error;

/// Length of `virtio_net_hdr_v1`.
pub const HEADER: usize = 12;
/// Length of the two MAC addresses.
pub const MACS: usize = 12;
/// Length of an 802.1Q tag.
pub const TAG: usize = 4;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TYPE: usize = 1;
const HDR_LEN: usize = 2;
const CSUM_START: usize = 6;
const NUM_BUFFERS: usize = 10;

/// Why a frame from the guest has no place on a tap.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub enum TrunkFault {
    #[error("The frame's first tag is not 802.1Q")]
    MissingTag,
    #[error("The checksum would start inside the Ethernet header or the tag")]
    BadOffload,
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

/// Turns the trunk's header into the tap's.
///
/// # Errors
/// [`TrunkFault::BadOffload`] when the checksum would start before the end of the tagged Ethernet header.
pub fn to_tap(header: &mut [u8; HEADER]) -> Result<(), TrunkFault> {
    header[0] &= NEEDS_CSUM | DATA_VALID;
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
    Ok(())
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
            to_tap(&mut header).unwrap();
            prop_assert_eq!(header, before);
        }

        #[test]
        fn any_header_from_the_guest_is_judged_without_panic(mut header in any::<[u8; HEADER]>()) {
            let needs = header[0] & 1 != 0;
            let early = field(&header, CSUM_START) < 18;
            prop_assert_eq!(to_tap(&mut header).is_err(), needs && early);
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
