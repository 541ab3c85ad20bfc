//! Congestion marks across a tunnel (RFC 6040, normal mode) and where they lie in the headers.

use crate::address::Family;
use crate::wire::{checksum, ipv4, ipv6};
use zerocopy::{FromBytes, big_endian::U16, big_endian::U32};

/// The two bits.
const MASK: u8 = 0b11;
const NOT_ECT: u8 = 0b00;
const ECT_1: u8 = 0b01;
const ECT_0: u8 = 0b10;
const CE: u8 = 0b11;

/// The traffic class (TOS) of an outer header around a packet with the class `inner`.
pub const fn wrap(inner: u8, copy_dscp: bool) -> u8 {
    if copy_dscp { inner } else { inner & MASK }
}

/// A traffic class with another DSCP and the same mark.
pub const fn remark(class: u8, dscp: u8) -> u8 {
    dscp << 2 | class & MASK
}

/// The class of the inner packet after the outer one came with the class `outer`; `None`: it must be dropped (§4.2).
pub const fn unwrap(inner: u8, outer: u8) -> Option<u8> {
    let mark = match (inner & MASK, outer & MASK) {
        (NOT_ECT, CE) => return None,
        (NOT_ECT, _) => NOT_ECT,
        (ECT_0, ECT_1) => ECT_1,
        (_, CE) => CE,
        (inner, _) => inner,
    };
    Some(inner & !MASK | mark)
}

/// The traffic class of the IP packet at the start of `bytes`.
pub fn class_of(bytes: &[u8], family: Family) -> Option<u8> {
    match (family, bytes) {
        (Family::V4, [_, tos, ..]) => Some(*tos),
        (Family::V6, [a, b, ..]) => Some(a << 4 | b >> 4),
        _ => None,
    }
}

/// Changes the traffic class of the IP packet at the start of `bytes`.
pub fn set_class(bytes: &mut [u8], family: Family, class: u8) -> Option<()> {
    match family {
        Family::V4 => {
            let (header, _) = ipv4::Header::mut_from_prefix(bytes).ok()?;
            let old = u16::from_be_bytes([header.version_ihl, header.tos]);
            header.tos = class;
            let new = u16::from_be_bytes([header.version_ihl, header.tos]);
            let delta = checksum::Delta::default().word(old, new);
            header.checksum = U16::new(delta.patch(header.checksum.get()));
        }
        Family::V6 => {
            let (header, _) = ipv6::Header::mut_from_prefix(bytes).ok()?;
            let word = header.version_class_flow.get() & !(0xff << 20);
            header.version_class_flow = U32::new(word | u32::from(class) << 20);
        }
    }
    Some(())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;

    #[test]
    fn o08_all_sixteen_cells_of_rfc_6040() {
        // Rows: inner Not-ECT, ECT(1), ECT(0), CE; columns: outer in the same order (figure 4).
        const DROP: Option<u8> = None;
        let cells = [
            [Some(0), Some(0), Some(0), DROP],
            [Some(1), Some(1), Some(1), Some(3)],
            [Some(2), Some(1), Some(2), Some(3)],
            [Some(3), Some(3), Some(3), Some(3)],
        ];
        for (inner, row) in (0u8..).zip(cells) {
            for (outer, expected) in (0u8..).zip(row) {
                assert_eq!(unwrap(inner, outer | 0xb8), expected, "{inner} {outer}");
                let expected = expected.map(|mark| mark | 0x48);
                assert_eq!(unwrap(inner | 0x48, outer), expected);
            }
        }
    }

    #[test]
    fn o08_the_mark_is_copied_out_and_dscp_if_wished() {
        for class in 0..=255 {
            assert_eq!(wrap(class, false), class & 3);
            assert_eq!(wrap(class, true), class);
        }
    }

    #[test]
    fn a_class_is_set_where_it_is_read_and_the_checksum_stays_right() {
        let mut four = *<[u8; 20]>::try_from(zerocopy::IntoBytes::as_bytes(&ipv4::Header::new(
            [10, 0, 0, 1],
            [10, 0, 0, 2],
            6,
            100,
        )))
        .as_ref()
        .unwrap();
        set_class(&mut four, Family::V4, 0xab).unwrap();
        assert_eq!(class_of(&four, Family::V4), Some(0xab));
        assert_eq!(checksum::finish(checksum::sum(&four, 0)), 0);
        let mut six = [0x60u8; 40];
        set_class(&mut six, Family::V6, 0xab).unwrap();
        assert_eq!(class_of(&six, Family::V6), Some(0xab));
        assert_eq!((six[0] >> 4, six[1] & 0xf, six[2]), (6, 0, 0x60));
    }
}
