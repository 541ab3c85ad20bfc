//! The virtio-net header and the trunk's tag: bytes there, [`Offload`] and [`LinkId`] here.
//!
//! On the trunk `csum_start` and `hdr_len` count from the start of the tagged frame; in the
//! appliance a frame has no tag. The tag's four bytes are added and taken off here and nowhere
//! else.
//!
//! A frame to be cut that lies in a tunnel carries virtio's own flags for that; where the inner IP
//! header begins stands in `num_buffers`, which means nothing in this direction otherwise
//! (docs/machine.md, "The trunk frame").

use sluice_appliance::frame::{Gso, GsoKind, Offload, Partial, Tunnel, TunnelKind};
use sluice_contract::LinkId;

/// `struct virtio_net_hdr_v1`.
pub const HEADER: usize = 12;
/// TPID and TCI.
pub const TAG: usize = 4;
/// Both MAC addresses, which stand in front of the tag.
pub const MACS: usize = 12;
const TPID: [u8; 2] = [0x81, 0x00];
const VLAN_ID: u16 = 0x0fff;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const TUNNEL_CSUM: u8 = 8;
const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;
const GSO_TUNNEL4: u8 = 0x20;
const GSO_TUNNEL6: u8 = 0x40;

/// How many buffers the frame has, whatever else its header says: those after the first hold no
/// headers and must not be taken for frames.
pub fn buffers(header: &[u8; HEADER]) -> u16 {
    let [.., n0, n1] = *header;
    u16::from_le_bytes([n0, n1]).max(1)
}

/// Reads the header of a received frame. `None` if it promises what cannot be: an unknown kind of
/// GSO, segments of no size, offsets inside the tag.
pub fn read(header: &[u8; HEADER]) -> Option<Offload> {
    let [flags, kind, h0, h1, g0, g1, s0, s1, o0, o1, _, _] = *header;
    let word = |low, high| u16::from_le_bytes([low, high]);
    let partial = if flags & NEEDS_CSUM == 0 {
        None
    } else {
        let start = untagged(word(s0, s1))?;
        Some(Partial {
            start,
            offset: word(o0, o1),
        })
    };
    let tunnel = match kind & (GSO_TUNNEL4 | GSO_TUNNEL6) {
        0 => None,
        GSO_TUNNEL4 => Some(TunnelKind::Udp4),
        GSO_TUNNEL6 => Some(TunnelKind::Udp6),
        _ => return None,
    };
    let gso = match kind & !(GSO_ECN | GSO_TUNNEL4 | GSO_TUNNEL6) {
        GSO_NONE => None,
        kind_number => Some(Gso {
            kind: match kind_number {
                GSO_TCPV4 => GsoKind::Tcp4,
                GSO_TCPV6 => GsoKind::Tcp6,
                GSO_UDP_L4 => GsoKind::Udp,
                _ => return None,
            },
            size: Some(word(g0, g1)).filter(|size| *size > 0)?,
            header: untagged(word(h0, h1))?,
            ecn: kind & GSO_ECN != 0,
        }),
    };
    // A device that segments also sums up; a frame to be cut without a checksum to complete is
    // nonsense.
    if gso.is_some() && partial.is_none() {
        return None;
    }
    // A tunnel around nothing that is to be cut.
    if gso.is_none() && tunnel.is_some() {
        return None;
    }
    Some(Offload {
        partial,
        verified: flags & DATA_VALID != 0,
        gso,
        tunnel: tunnel.map(|kind| Tunnel {
            kind,
            network: 0,
            checksum: flags & TUNNEL_CSUM != 0,
        }),
    })
}

/// The header for a frame to be sent.
pub fn write(offload: &Offload) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if offload.verified {
        header[0] |= DATA_VALID;
    }
    if let Some(partial) = offload.partial {
        header[0] = NEEDS_CSUM;
        header[6..8].copy_from_slice(&tagged(partial.start).to_le_bytes());
        header[8..10].copy_from_slice(&partial.offset.to_le_bytes());
    }
    if let Some(gso) = offload.gso {
        header[1] = match gso.kind {
            GsoKind::Tcp4 => GSO_TCPV4,
            GsoKind::Tcp6 => GSO_TCPV6,
            GsoKind::Udp => GSO_UDP_L4,
        } | if gso.ecn { GSO_ECN } else { 0 };
        header[2..4].copy_from_slice(&tagged(gso.header).to_le_bytes());
        header[4..6].copy_from_slice(&gso.size.to_le_bytes());
    }
    if let Some(tunnel) = offload.tunnel {
        header[1] |= match tunnel.kind {
            TunnelKind::Udp4 => GSO_TUNNEL4,
            TunnelKind::Udp6 => GSO_TUNNEL6,
            TunnelKind::Other => 0,
        };
        if tunnel.checksum {
            header[0] |= TUNNEL_CSUM;
        }
        header[10..12].copy_from_slice(&tagged(tunnel.network).to_le_bytes());
    }
    header
}

fn untagged(offset: u16) -> Option<u16> {
    offset
        .checked_sub(TAG as u16)
        .filter(|offset| usize::from(*offset) >= MACS)
}

fn tagged(offset: u16) -> u16 {
    offset.saturating_add(TAG as u16)
}

/// Takes the tag off the frame at the start of `frame`: the MAC addresses move up to where it
/// stood, so the frame now begins [`TAG`] bytes later. `None`, and no change, if there is no tag or
/// its link cannot be.
pub fn strip_tag(frame: &mut [u8]) -> Option<LinkId> {
    let tag = frame.get(MACS..MACS + TAG)?;
    let (tpid, tci) = (tag.first_chunk::<2>()?, tag.last_chunk::<2>()?);
    if *tpid != TPID {
        return None;
    }
    let link = LinkId::new(u16::from_be_bytes(*tci) & VLAN_ID)?;
    frame.copy_within(..MACS, TAG);
    Some(link)
}

/// Puts the tag into `frame`, whose first [`TAG`] bytes are free: the MAC addresses move down to
/// its start. `false`, and no change, if it is shorter than that takes.
pub fn push_tag(frame: &mut [u8], link: LinkId) -> bool {
    if frame.len() < MACS + TAG {
        return false;
    }
    frame.copy_within(TAG..TAG + MACS, 0);
    let [t0, t1] = TPID;
    let [i0, i1] = link.raw().to_be_bytes();
    if let Some(tag) = frame.get_mut(MACS..MACS + TAG) {
        tag.copy_from_slice(&[t0, t1, i0, i1]);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn header(flags: u8, kind: u8, hdr_len: u16, size: u16, start: u16, offset: u16) -> [u8; 12] {
        let mut header = [0; HEADER];
        header[0] = flags;
        header[1] = kind;
        for (at, value) in [(2, hdr_len), (4, size), (6, start), (8, offset), (10, 3)] {
            header[at..at + 2].copy_from_slice(&value.to_le_bytes());
        }
        header
    }

    #[test]
    fn a_tagged_tso_header_is_moved_by_four_both_ways() {
        let wire = header(NEEDS_CSUM, GSO_TCPV4 | GSO_ECN, 70, 1448, 38, 16);
        let offload = read(&wire).unwrap();
        assert_eq!(buffers(&wire), 3);
        let partial = Partial {
            start: 34,
            offset: 16,
        };
        assert_eq!(offload.partial, Some(partial));
        let gso = Gso {
            kind: GsoKind::Tcp4,
            size: 1448,
            header: 66,
            ecn: true,
        };
        assert_eq!(offload.gso, Some(gso));
        let mut again = write(&offload);
        again[10] = 3;
        assert_eq!(again, wire);
    }

    #[test]
    fn a_tunnelled_frame_says_so_and_where_the_inner_packet_begins() {
        let wire = header(
            NEEDS_CSUM | TUNNEL_CSUM,
            GSO_TCPV4 | GSO_TUNNEL6,
            124,
            1380,
            104,
            16,
        );
        let mut offload = read(&wire).unwrap();
        let told = offload.tunnel.as_mut().unwrap();
        assert_eq!((told.kind, told.checksum), (TunnelKind::Udp6, true));
        told.network = 84;
        let mut expected = wire;
        expected[10] = 88;
        assert_eq!(write(&offload), expected);
    }

    #[test]
    fn a_plain_frame_counts_as_one_buffer() {
        assert_eq!(read(&[0; HEADER]), Some(Offload::default()));
        assert_eq!(buffers(&[0; HEADER]), 1);
        assert_eq!(write(&Offload::default()), [0; HEADER]);
        assert!(read(&header(DATA_VALID, 0, 0, 0, 0, 0)).unwrap().verified);
    }

    #[test]
    fn promises_that_cannot_be_are_refused() {
        for bad in [
            header(NEEDS_CSUM, 0, 0, 0, 3, 6),
            header(NEEDS_CSUM, 0, 0, 0, 15, 6),
            header(NEEDS_CSUM, GSO_TCPV4, 70, 0, 38, 16),
            header(NEEDS_CSUM, GSO_TCPV4, 3, 1448, 38, 16),
            header(NEEDS_CSUM, 3, 70, 1448, 38, 16),
            header(NEEDS_CSUM, 0x7f, 70, 1448, 38, 16),
            header(0, GSO_TCPV4, 70, 1448, 38, 16),
            header(NEEDS_CSUM, GSO_TUNNEL4, 70, 0, 38, 16),
            header(
                NEEDS_CSUM,
                GSO_TCPV4 | GSO_TUNNEL4 | GSO_TUNNEL6,
                70,
                1448,
                38,
                16,
            ),
        ] {
            assert_eq!(read(&bad), None, "{bad:?}");
        }
    }

    #[test]
    fn frames_without_a_usable_tag_are_left_alone() {
        let tagged = |tpid: [u8; 2], tci: u16| {
            let mut frame = [7u8; 20];
            frame[12..14].copy_from_slice(&tpid);
            frame[14..16].copy_from_slice(&tci.to_be_bytes());
            frame
        };
        for (tpid, tci) in [([8, 0], 16), (TPID, 0), (TPID, 4095), ([0x88, 0xa8], 16)] {
            let mut frame = tagged(tpid, tci);
            assert_eq!(strip_tag(&mut frame), None);
            assert_eq!(frame, tagged(tpid, tci));
        }
        assert_eq!(strip_tag(&mut [0x81; 15]), None);
        assert!(!push_tag(&mut [0; 15], LinkId::HOST));
    }

    proptest! {
        #[test]
        fn the_tag_goes_on_and_off_without_touching_the_frame(
            frame in proptest::collection::vec(any::<u8>(), 14..80),
            link in (1u16..4095).prop_map(|raw| LinkId::new(raw).unwrap()),
        ) {
            let mut buffer: Vec<u8> = [0xa5; TAG].into_iter().chain(frame.iter().copied()).collect();
            prop_assert!(push_tag(&mut buffer, link));
            prop_assert_eq!(&buffer[..MACS], &frame[..MACS]);
            prop_assert_eq!(&buffer[MACS + TAG..], &frame[MACS..]);
            prop_assert_eq!(strip_tag(&mut buffer), Some(link));
            prop_assert_eq!(&buffer[TAG..], &frame[..]);
        }

        #[test]
        fn noise_never_panics_and_what_is_read_is_written_again(noise in any::<[u8; HEADER]>()) {
            if let Some(offload) = read(&noise) {
                let again = read(&write(&offload)).unwrap();
                let mut expected = offload;
                // One flag says it all for a frame whose checksum is still to be completed.
                expected.verified &= expected.partial.is_none();
                prop_assert!(expected.tunnel.is_none() || expected.gso.is_some());
                prop_assert_eq!(again, expected);
            }
        }
    }
}
