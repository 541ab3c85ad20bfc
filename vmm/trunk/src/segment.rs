//! Cutting a frame into segments where no device will: a tap without tunnel offload, or a tunnel that no device knows (IP in
//! IP, UDP segmentation inside a tunnel).
//!
//! Only headers are made anew, from one copy of them that was taken out of guest memory; payload goes from there to the tap as
//! it is. The innermost checksum stays for the far side to complete, as it was; what it will be summed up to is known without
//! it (the complement of its pseudo-header's sum), so an outer UDP checksum needs no payload either.

use std::ops::Range;

use super::vnet::{self, Segmentation, Tunnelled};

/// Longest headers of a segment: Ethernet, IPv6, UDP, Geneve with an option, Ethernet, IPv6, TCP with all options, and a
/// little more.
pub(super) const MOST_HEADERS: usize = 256;
/// Most segments of a frame. The smallest MSS that Linux speaks without being forced to (536) makes 122 of 64 KiB.
const MOST_SEGMENTS: usize = 1024;

const ETHERNET: usize = 14;
const IPV6: usize = 40;
const UDP: usize = 8;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP: u8 = 5;
/// Of TCP's flags: CWR (RFC 3168) belongs to the first segment, FIN and PSH to the last.
const FIRST_ONLY: u8 = 0x80;
const LAST_ONLY: u8 = 0x01 | 0x08;
const PROTOCOL_TCP: u8 = 6;
const PROTOCOL_UDP: u8 = 17;

/// An IP header among the headers.
#[derive(Clone, Copy, Debug)]
struct Network {
    at: usize,
    six: bool,
    /// Where what it carries begins: behind IPv4's options, right behind an IPv6 header.
    upper: usize,
}

/// A frame that is to be cut.
#[derive(Debug)]
pub(super) struct Cut {
    headers: [u8; MOST_HEADERS],
    /// Of all headers.
    length: usize,
    outer: Option<Network>,
    /// The outer UDP header needs a checksum of its own.
    outer_checksum: bool,
    inner: Network,
    /// Where the TCP or UDP header begins that each segment has.
    transport: usize,
    tcp: bool,
    payload: usize,
    /// Payload of each segment.
    size: usize,
}

impl Cut {
    /// What there is to cut: `header` has been through [`vnet::to_tap`], `front` is the beginning of the frame as it will stand
    /// on the tap, `total` bytes long. `None` if it is not what its header says, or would be too many.
    pub(super) fn new(
        header: &[u8; vnet::HEADER],
        tunnelled: Option<Tunnelled>,
        front: &[u8],
        total: usize,
    ) -> Option<Self> {
        let told = Segmentation::read(header)?;
        let (tcp, six) = match told.kind {
            GSO_TCPV4 => (true, Some(false)),
            GSO_TCPV6 => (true, Some(true)),
            GSO_UDP => (false, None),
            _ => return None,
        };
        let transport = usize::from(told.start);
        let place = tunnelled.map_or(ETHERNET, |tunnel| usize::from(tunnel.network));
        let inner = Network::read(front, place)?;
        let (length, checksum) = if tcp {
            let words = front.get(transport + 12)? >> 4;
            (transport + usize::from(words.max(5)) * 4, 16)
        } else {
            (transport + UDP, 6)
        };
        let consistent = inner.upper <= transport
            && six.is_none_or(|six| six == inner.six)
            && told.offset == checksum;
        if !consistent {
            return None;
        }
        let outer = match tunnelled {
            None => None,
            Some(_) => Some(Network::read(front, ETHERNET).filter(|n| n.upper <= place)?),
        };
        let mut headers = [0; MOST_HEADERS];
        headers
            .get_mut(..length)?
            .copy_from_slice(front.get(..length)?);
        let cut = Self {
            headers,
            length,
            outer,
            outer_checksum: told.outer_checksum,
            inner,
            transport,
            tcp,
            payload: total.checked_sub(length).filter(|payload| *payload > 0)?,
            size: Some(usize::from(told.size)).filter(|size| *size > 0)?,
        };
        (cut.count() <= MOST_SEGMENTS).then_some(cut)
    }

    /// How many segments it makes.
    pub(super) fn count(&self) -> usize {
        self.payload.div_ceil(self.size)
    }

    /// Writes the headers of segment `index` into `to`: how long they are, and which bytes of the frame follow them. `None`
    /// if the frame is not what it seemed.
    pub(super) fn segment(
        &self,
        index: usize,
        to: &mut [u8; MOST_HEADERS],
    ) -> Option<(usize, Range<usize>)> {
        let from = index.checked_mul(self.size)?;
        let payload = self.payload.checked_sub(from)?.min(self.size);
        *to = self.headers;
        let headers = to.get_mut(..self.length)?;
        let end = self.length + payload;
        self.write_transport(headers, index, end)?;
        self.inner.write(headers, index, end)?;
        if let Some(outer) = self.outer {
            outer.write(headers, index, end)?;
            self.write_outer_udp(headers, outer, end)?;
        }
        let begin = self.length + from;
        Some((self.length, begin..begin + payload))
    }

    fn write_transport(&self, headers: &mut [u8], index: usize, end: usize) -> Option<()> {
        let length = u16::try_from(end.checked_sub(self.transport)?).ok()?;
        let (protocol, checksum) = if self.tcp {
            let at = self.transport + 4;
            let sequence = u32::from_be_bytes(*headers.get(at..)?.first_chunk()?);
            let step = u32::try_from(index * self.size).ok()?;
            put(headers, at, &sequence.wrapping_add(step).to_be_bytes())?;
            let flags = headers.get_mut(self.transport + 13)?;
            if index != 0 {
                *flags &= !FIRST_ONLY;
            }
            if index + 1 != self.count() {
                *flags &= !LAST_ONLY;
            }
            (PROTOCOL_TCP, self.transport + 16)
        } else {
            put(headers, self.transport + 4, &length.to_be_bytes())?;
            (PROTOCOL_UDP, self.transport + 6)
        };
        let pseudo = self.inner.pseudo(headers, protocol, length)?;
        put(headers, checksum, &fold(pseudo).to_be_bytes())
    }

    /// The outer UDP header, if the tunnel has one.
    fn write_outer_udp(&self, headers: &mut [u8], outer: Network, end: usize) -> Option<()> {
        if outer.carries(headers)? != PROTOCOL_UDP {
            return Some(());
        }
        let length = u16::try_from(end.checked_sub(outer.upper)?).ok()?;
        put(headers, outer.upper + 4, &length.to_be_bytes())?;
        put(headers, outer.upper + 6, &[0, 0])?;
        if !self.outer_checksum {
            return Some(());
        }
        let at = self.transport + if self.tcp { 16 } else { 6 };
        let inner = u16::from_be_bytes(*headers.get(at..)?.first_chunk()?);
        let covered = sum(headers.get(outer.upper..self.transport)?);
        let pseudo = outer.pseudo(headers, PROTOCOL_UDP, length)?;
        let value = match !fold(covered + pseudo + u32::from(!inner)) {
            0 => 0xffff,
            value => value,
        };
        put(headers, outer.upper + 6, &value.to_be_bytes())
    }
}

impl Network {
    fn read(front: &[u8], at: usize) -> Option<Self> {
        let first = *front.get(at)?;
        let (six, length) = match first >> 4 {
            4 => (false, usize::from(first & 15).max(5) * 4),
            6 => (true, IPV6),
            _ => return None,
        };
        let upper = at + length;
        Some(Self { at, six, upper })
    }

    /// Lengths, identification and header checksum for a packet that ends at `end`, the `index`th of its kind.
    fn write(&self, headers: &mut [u8], index: usize, end: usize) -> Option<()> {
        if self.six {
            let length = u16::try_from(end.checked_sub(self.upper)?).ok()?;
            return put(headers, self.at + 4, &length.to_be_bytes());
        }
        let length = u16::try_from(end.checked_sub(self.at)?).ok()?;
        put(headers, self.at + 2, &length.to_be_bytes())?;
        let id = u16::from_be_bytes(*headers.get(self.at + 4..)?.first_chunk()?);
        let id = id.wrapping_add(u16::try_from(index).ok()?);
        put(headers, self.at + 4, &id.to_be_bytes())?;
        put(headers, self.at + 10, &[0, 0])?;
        let checksum = !fold(sum(headers.get(self.at..self.upper)?));
        put(headers, self.at + 10, &checksum.to_be_bytes())
    }

    /// The number of the protocol behind it.
    fn carries(&self, headers: &[u8]) -> Option<u8> {
        headers.get(self.at + if self.six { 6 } else { 9 }).copied()
    }

    /// The sum of the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1).
    fn pseudo(&self, headers: &[u8], protocol: u8, length: u16) -> Option<u32> {
        let addresses = if self.six { 8..IPV6 } else { 12..20 };
        let addresses = headers.get(self.at + addresses.start..self.at + addresses.end)?;
        Some(sum(addresses) + u32::from(protocol) + u32::from(length))
    }
}

fn put(headers: &mut [u8], at: usize, value: &[u8]) -> Option<()> {
    headers
        .get_mut(at..at + value.len())?
        .copy_from_slice(value);
    Some(())
}

/// The sum of the 16-bit words (RFC 1071); no more than [`MOST_HEADERS`] bytes, so nothing overflows.
fn sum(bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<2>();
    let last = rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    words
        .iter()
        .map(|word| u32::from(u16::from_be_bytes(*word)))
        .sum::<u32>()
        + last
}

fn fold(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
