//! An echo as a frame of the probes' link: `virtio_net_hdr_v1`, Ethernet, IP, ICMP. Made to an exact size, and never to be
//! fragmented: IPv4 says DF, IPv6 has no other way.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use sluice_contract::Mac;
use sluice_contract::row::NodeRow;

use sluice_ports::tap;

/// The smallest probe: smaller than anything that a path might refuse.
pub(super) const SMALL: u16 = 128;
/// The link's own MAC.
pub(super) const OWN: Mac = Mac([0x02, 0x53, 0x4c, 0, 0, 0x03]);

const NEEDS_CHECKSUM: u8 = 1;
const ETHERNET: usize = 14;
const HEADER4: usize = 20;
const HEADER6: usize = 40;
const ICMP: usize = 8;
const HOPS: u8 = 64;

/// What is asked, or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Request,
    Reply,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Echo {
    pub(super) kind: Kind,
    pub(super) from: IpAddr,
    pub(super) to: IpAddr,
    /// Whose it is.
    pub(super) id: u16,
    pub(super) sequence: u16,
    /// What nobody else can know, at the beginning of the data.
    pub(super) cookie: u64,
    /// Of the IP packet.
    pub(super) size: u16,
}

/// The sum of RFC 1071, not yet folded.
fn sum(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u64::from(u16::from_be_bytes([*high, *low])),
        [high] => u64::from(u16::from_be_bytes([*high, 0])),
        _ => 0,
    });
    words.sum()
}

fn fold(mut sum: u64) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

impl Echo {
    /// The frame; `None` if the ends are of different families or nothing so small can be made.
    pub(super) fn frame(&self) -> Option<Vec<u8>> {
        let (kind4, kind6) = match self.kind {
            Kind::Request => (8, 128),
            Kind::Reply => (0, 129),
        };
        let mut frame = vec![0; tap::HEADER];
        frame.extend(NodeRow::default().gateway_mac.0);
        frame.extend(OWN.0);
        let length = |header: usize| usize::from(self.size).checked_sub(header + ICMP + 8);
        let data = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let data = length(HEADER4)?;
                frame.extend([0x08, 0x00]);
                frame.extend(header4(from, to, self.size));
                data
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let data = length(HEADER6)?;
                frame.extend([0x86, 0xdd]);
                frame.extend(header6(from, to, self.size - HEADER6 as u16));
                data
            }
            _ => return None,
        };
        let kind = if self.from.is_ipv4() { kind4 } else { kind6 };
        let mut icmp = vec![kind, 0, 0, 0];
        icmp.extend(self.id.to_be_bytes());
        icmp.extend(self.sequence.to_be_bytes());
        icmp.extend(self.cookie.to_be_bytes());
        icmp.extend((0..data).map(|at| at as u8));
        let pseudo = match (self.from, self.to) {
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                sum(&from.octets()) + sum(&to.octets()) + icmp.len() as u64 + 58
            }
            _ => 0,
        };
        let checksum = fold(pseudo + sum(&icmp));
        icmp.splice(2..4, checksum);
        frame.extend(icmp);
        Some(frame)
    }

    /// Reads a frame; `None` if it is anything else than a whole echo.
    pub(super) fn read(frame: &[u8]) -> Option<Self> {
        let (header, frame) = frame.split_first_chunk::<{ tap::HEADER }>()?;
        if header.first()? & NEEDS_CHECKSUM != 0 {
            return None;
        }
        let (ethernet, packet) = frame.split_first_chunk::<ETHERNET>()?;
        let (from, to, size, icmp) = match ethernet {
            [.., 0x08, 0x00] => read4(packet)?,
            [.., 0x86, 0xdd] => read6(packet)?,
            _ => return None,
        };
        let (icmp, data) = icmp.split_first_chunk::<ICMP>()?;
        let [kind, 0, _, _, id @ .., c, d] = *icmp else {
            return None;
        };
        let kind = match (from.is_ipv4(), kind) {
            (true, 8) | (false, 128) => Kind::Request,
            (true, 0) | (false, 129) => Kind::Reply,
            _ => return None,
        };
        Some(Self {
            kind,
            from,
            to,
            id: u16::from_be_bytes(id),
            sequence: u16::from_be_bytes([c, d]),
            cookie: u64::from_be_bytes(*data.first_chunk()?),
            size,
        })
    }

    /// The answer to a request that is this frame, with the same data.
    pub(super) fn answer(&self) -> Option<Vec<u8>> {
        let answer = Self {
            kind: Kind::Reply,
            from: self.to,
            to: self.from,
            ..*self
        };
        answer.frame()
    }
}

fn header4(from: Ipv4Addr, to: Ipv4Addr, size: u16) -> [u8; HEADER4] {
    let mut header = [0; HEADER4];
    let [high, low] = size.to_be_bytes();
    // Not to be fragmented.
    header[..10].copy_from_slice(&[0x45, 0, high, low, 0, 0, 0x40, 0, HOPS, 1]);
    header[12..16].copy_from_slice(&from.octets());
    header[16..].copy_from_slice(&to.octets());
    let checksum = fold(sum(&header));
    header[10..12].copy_from_slice(&checksum);
    header
}

fn header6(from: Ipv6Addr, to: Ipv6Addr, payload: u16) -> [u8; HEADER6] {
    let mut header = [0; HEADER6];
    let [high, low] = payload.to_be_bytes();
    header[..8].copy_from_slice(&[0x60, 0, 0, 0, high, low, 58, HOPS]);
    header[8..24].copy_from_slice(&from.octets());
    header[24..].copy_from_slice(&to.octets());
    header
}

type Read<'f> = (IpAddr, IpAddr, u16, &'f [u8]);

fn read4(packet: &[u8]) -> Option<Read<'_>> {
    let header: &[u8; HEADER4] = packet.first_chunk()?;
    let [0x45, _, a, b, _, _, flags, low, _, 1, ..] = *header else {
        return None;
    };
    // A fragment, first or later.
    if flags & 0x3f != 0 || low != 0 {
        return None;
    }
    let size = u16::from_be_bytes([a, b]);
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 4] = header.get(at..)?.first_chunk().copied()?;
        Some(octets.into())
    };
    let icmp = packet.get(HEADER4..usize::from(size))?;
    Some((address(12)?, address(16)?, size, icmp))
}

fn read6(packet: &[u8]) -> Option<Read<'_>> {
    let header: &[u8; HEADER6] = packet.first_chunk()?;
    let [0x60, _, _, _, a, b, 58, ..] = *header else {
        return None;
    };
    let size = u16::from_be_bytes([a, b]).checked_add(HEADER6 as u16)?;
    let address = |at: usize| -> Option<IpAddr> {
        let octets: [u8; 16] = header.get(at..)?.first_chunk().copied()?;
        Some(octets.into())
    };
    let icmp = packet.get(HEADER6..usize::from(size))?;
    Some((address(8)?, address(24)?, size, icmp))
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    fn echo(from: &str, to: &str, size: u16) -> Echo {
        Echo {
            kind: Kind::Request,
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            id: 7,
            sequence: 0xfedc,
            cookie: 0x0123_4567_89ab_cdef,
            size,
        }
    }

    #[test]
    fn o22_an_echo_is_of_exactly_its_size_and_what_another_parser_calls_whole() {
        let ends = [("10.1.2.0", "10.1.3.0"), ("fd00:1:2::", "fd00:1:3::")];
        for (from, to) in ends {
            for size in [SMALL, 1280, 1449, 1450, 8950, 65_000] {
                let request = echo(from, to, size);
                let frame = request.frame().unwrap();
                assert_eq!(frame.len(), 12 + 14 + usize::from(size));
                let parsed = SlicedPacket::from_ethernet(&frame[12..]).unwrap();
                let (Some(net), Some(transport)) = (&parsed.net, &parsed.transport) else {
                    panic!("{parsed:?}");
                };
                match (net, transport) {
                    (NetSlice::Ipv4(ip), TransportSlice::Icmpv4(icmp)) => {
                        let header = ip.header().to_header();
                        assert!(header.dont_fragment);
                        assert_eq!(header.calc_header_checksum(), header.header_checksum);
                        assert!(
                            icmp.header().checksum
                                == icmp.icmp_type().calc_checksum(icmp.payload())
                        );
                    }
                    (NetSlice::Ipv6(ip), TransportSlice::Icmpv6(icmp)) => {
                        let header = ip.header();
                        assert!(icmp.is_checksum_valid(header.source(), header.destination()));
                    }
                    other => panic!("{other:?}"),
                }
                assert_eq!(Echo::read(&frame), Some(request));
                let answer = Echo::read(&request.answer().unwrap()).unwrap();
                assert_eq!(answer.kind, Kind::Reply);
                assert_eq!((answer.from, answer.to), (request.to, request.from));
                assert_eq!((answer.size, answer.cookie), (size, request.cookie));
            }
        }
        assert_eq!(echo("10.1.2.0", "fd00::", SMALL).frame(), None);
        assert_eq!(echo("10.1.2.0", "10.1.3.0", 20).frame(), None);
    }

    #[test]
    fn fragments_and_unfinished_frames_are_no_echoes() {
        let frame = echo("10.1.2.0", "10.1.3.0", SMALL).frame().unwrap();
        for (at, value) in [(0, NEEDS_CHECKSUM), (12 + 14 + 6, 0x20), (12 + 14 + 7, 1)] {
            let mut bad = frame.clone();
            bad[at] = value;
            assert_eq!(Echo::read(&bad), None, "byte {at}");
        }
        assert_eq!(Echo::read(&frame[..frame.len() - 1]), None, "cut short");
    }

    proptest! {
        #[test]
        fn any_frame_is_read_without_panic(
            mut frame in proptest::collection::vec(any::<u8>(), 0..160),
            six in any::<bool>(),
        ) {
            let _ = Echo::read(&frame);
            let kind: &[u8] = if six { &[0x86, 0xdd, 0x60, 0, 0, 0] } else { &[8, 0, 0x45] };
            if let Some(place) = frame.get_mut(24..24 + kind.len()) {
                place.copy_from_slice(kind);
            }
            if let Some(echo) = Echo::read(&frame) {
                let _ = echo.answer();
            }
        }
    }
}
