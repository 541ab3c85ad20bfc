//! What is cut is judged by a parser that knows nothing of cutting: every segment is a packet on its own, with the checksums that
//! a receiver would compute, and together they are what there was.

use etherparse::{
    IpHeaders, LinkSlice, NetSlice, PacketBuilder, SlicedPacket, TcpHeader, TransportSlice,
};
use proptest::prelude::*;

use super::testing::{FakeGuest, engine_for, socket_link};
use super::vnet;
use sluice_ports::drops::HostDrop;

const GENEVE_PORT: u16 = 6081;

/// The tunnels that frames lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outer {
    Udp4,
    Udp6,
    IpIp,
}

/// A frame to be cut, as it stands on the trunk.
#[derive(Clone, Debug)]
struct Case {
    outer: Outer,
    six: bool,
    tcp: bool,
    size: u16,
    payload: Vec<u8>,
}

impl Case {
    fn inner(&self, ethernet: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let payload = &self.payload;
        // With the addresses of Ethernet or without, the rest is the same.
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let builder = if self.six {
            builder.ipv6([0xfd; 16], [0xfe; 16], 63)
        } else {
            builder.ipv4([10, 244, 1, 2], [10, 244, 2, 2], 63)
        };
        if self.tcp {
            let tcp = builder
                .tcp(4000, 80, 0xffff_ff00, 1000)
                .ack(7)
                .psh()
                .fin()
                .cwr()
                .options_raw(&[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
            tcp.unwrap().write(&mut bytes, payload).unwrap();
        } else {
            builder.udp(4000, 53).write(&mut bytes, payload).unwrap();
        }
        if ethernet {
            bytes
        } else {
            bytes[14..].to_vec()
        }
    }

    /// The frame without tag, and its vnet header.
    fn frame(&self) -> (Vec<u8>, [u8; 12]) {
        let inner = self.inner(self.outer != Outer::IpIp);
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2([2, 0, 0, 0, 1, 1], [2, 0, 0, 0, 1, 2]);
        let geneve = [1, 0, 0x65, 0x58, 0, 0, 1, 0, 0xff, 0x53, 1, 1, 0, 0, 1, 0];
        let tunnel = [&geneve[..], &inner].concat();
        match self.outer {
            Outer::Udp4 => builder
                .ipv4([192, 168, 0, 1], [192, 168, 0, 2], 64)
                .udp(50000, GENEVE_PORT)
                .write(&mut frame, &tunnel),
            Outer::Udp6 => builder
                .ipv6([0x20; 16], [0x21; 16], 64)
                .udp(50000, GENEVE_PORT)
                .write(&mut frame, &tunnel),
            Outer::IpIp => {
                let number = if self.six { 41 } else { 4 };
                builder
                    .ip(IpHeaders::Ipv4(
                        etherparse::Ipv4Header::new(
                            inner.len() as u16,
                            64,
                            etherparse::IpNumber(number),
                            [192, 168, 0, 1],
                            [192, 168, 0, 2],
                        )
                        .unwrap(),
                        Default::default(),
                    ))
                    .write(&mut frame, etherparse::IpNumber(number), &inner)
            }
        }
        .unwrap();
        let outer = frame.len() - inner.len();
        if self.outer == Outer::Udp4 {
            frame[14 + 20 + 6..][..2].fill(0);
        }
        let network = outer + if self.outer == Outer::IpIp { 0 } else { 14 };
        let transport = network + if self.six { 40 } else { 20 };
        let length = transport + if self.tcp { 32 } else { 8 };
        let kind = match (self.tcp, self.six) {
            (true, false) => 1 | 0x80,
            (true, true) => 4 | 0x80,
            (false, _) => 5,
        };
        let (bits, flag) = match self.outer {
            Outer::Udp4 => (0x20, 0),
            Outer::Udp6 => (0x40, 8),
            Outer::IpIp => (0, 0),
        };
        // UDP in a tunnel is cut by nobody else.
        let bits = if self.tcp { bits } else { 0 };
        let mut header = [0; 12];
        header[0] = 1 | flag;
        header[1] = kind | bits;
        let words = [
            length + 4,
            usize::from(self.size),
            transport + 4,
            if self.tcp { 16 } else { 6 },
            network + 4,
        ];
        for (at, word) in (2..).step_by(2).zip(words) {
            header[at..at + 2].copy_from_slice(&(word as u16).to_le_bytes());
        }
        // What the sender left to be completed is no checksum.
        let at = transport + words[3];
        frame[at..at + 2].copy_from_slice(&[0xab, 0xcd]);
        (frame, header)
    }

    fn outer_checksum(&self) -> bool {
        self.outer == Outer::Udp6
    }
}

/// What reaches a tap that knows no tunnels, and how many frames were cut.
fn cut(frame: &[u8], header: [u8; 12]) -> Result<(Vec<Vec<u8>>, u64), HostDrop> {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, counters) = socket_link(&mut engine, 1).unwrap();
    let trunk = [&header[..], &frame[..12], &vnet::tag(1), &frame[12..]].concat();
    guest.send(0, &trunk, 4096);
    engine.step();
    let mut got = Vec::new();
    let mut buffer = vec![0; 70_000];
    while let Ok(n) = pod.recv(&mut buffer) {
        got.push(buffer[..n].to_vec());
    }
    match counters.drops.seen().next() {
        Some((reason, _)) => Err(reason),
        None => Ok((got, counters.cut.value())),
    }
}

/// As the far side does it: the checksum is completed, and then the frame stands for itself.
fn completed(segment: &[u8]) -> Vec<u8> {
    let word = |at: usize| usize::from(u16::from_le_bytes([segment[at], segment[at + 1]]));
    assert_eq!((segment[0], segment[1], word(4)), (1, 0, 0));
    let (start, offset) = (word(6), word(8));
    let mut frame = segment[12..].to_vec();
    let mut sum = 0u64;
    for pair in frame[start..].chunks(2) {
        sum += u64::from(pair[0]) << 8 | u64::from(*pair.get(1).unwrap_or(&0));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let value = !(sum as u16);
    let value = if value == 0 { 0xffff } else { value };
    frame[start + offset..start + offset + 2].copy_from_slice(&value.to_be_bytes());
    frame
}

/// The payload of a segment whose every length and checksum was found right, and its TCP header.
fn judged(case: &Case, frame: &[u8]) -> (Vec<u8>, Option<TcpHeader>, [u16; 2]) {
    let outer = SlicedPacket::from_ethernet(frame).unwrap();
    let mut ids = [0; 2];
    if let Some(NetSlice::Ipv4(v4)) = &outer.net {
        let header = v4.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        ids[0] = header.identification;
    }
    let link = match outer.link.unwrap() {
        LinkSlice::Ethernet2(link) => link,
        _ => unreachable!("it was made of Ethernet"),
    };
    let bytes = link.payload_slice();
    let inner = match &outer.transport {
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let payload = udp.payload();
            assert_eq!(usize::from(header.length), 8 + payload.len());
            if case.outer_checksum() {
                let expected = header.calc_checksum_ipv6_raw([0x20; 16], [0x21; 16], payload);
                assert_eq!(header.checksum, expected.unwrap(), "the outer checksum");
            } else {
                assert_eq!(header.checksum, 0);
            }
            payload[16..].to_vec()
        }
        _ => {
            let mut again = vec![0; 12];
            again.extend(if case.six { [0x86, 0xdd] } else { [8, 0] });
            again.extend(&bytes[20..]);
            again
        }
    };
    let inner = SlicedPacket::from_ethernet(&inner).unwrap();
    let net = inner.net.unwrap();
    if let NetSlice::Ipv4(v4) = &net {
        let header = v4.header().to_header();
        assert_eq!(header.header_checksum, header.calc_header_checksum());
        ids[1] = header.identification;
    }
    let [from, to] = [[0xfd; 16], [0xfe; 16]];
    let [from4, to4] = [[10, 244, 1, 2], [10, 244, 2, 2]];
    match inner.transport.unwrap() {
        TransportSlice::Tcp(tcp) => {
            let (header, payload) = (tcp.to_header(), tcp.payload());
            let expected = if case.six {
                header.calc_checksum_ipv6_raw(from, to, payload)
            } else {
                header.calc_checksum_ipv4_raw(from4, to4, payload)
            };
            assert_eq!(header.checksum, expected.unwrap());
            (payload.to_vec(), Some(header), ids)
        }
        TransportSlice::Udp(udp) => {
            let (header, payload) = (udp.to_header(), udp.payload());
            let expected = if case.six {
                header.calc_checksum_ipv6_raw(from, to, payload)
            } else {
                header.calc_checksum_ipv4_raw(from4, to4, payload)
            };
            assert_eq!(header.checksum, expected.unwrap());
            assert_eq!(usize::from(header.length), 8 + payload.len());
            (payload.to_vec(), None, ids)
        }
        other => panic!("{other:?}"),
    }
}

/// No more segments than a socket's queue holds by default.
fn case() -> impl Strategy<Value = Case> {
    let outer = prop_oneof![Just(Outer::Udp4), Just(Outer::Udp6), Just(Outer::IpIp)];
    let payload = (1usize..5500, any::<u8>())
        .prop_map(|(n, seed)| (0..n).map(|i| (i * 7) as u8 ^ seed).collect());
    (outer, any::<bool>(), any::<bool>(), 700u16..1500, payload).prop_map(
        |(outer, six, tcp, size, payload)| Case {
            outer,
            six,
            tcp,
            size,
            payload,
        },
    )
}

proptest! {
    #[test]
    fn m12_segments_are_whole_packets_and_together_what_there_was(case in case()) {
        let (frame, header) = case.frame();
        let (segments, frames_cut) = cut(&frame, header).unwrap();
        prop_assert_eq!(frames_cut, 1);
        let count = case.payload.len().div_ceil(usize::from(case.size));
        prop_assert_eq!(segments.len(), count);
        let mut whole = Vec::new();
        for (index, segment) in segments.iter().enumerate() {
            let (payload, tcp, ids) = judged(&case, &completed(segment));
            if let Some(tcp) = tcp {
                let sent = whole.len() as u32;
                prop_assert_eq!(tcp.sequence_number, 0xffff_ff00u32.wrapping_add(sent));
                let last = index + 1 == count;
                prop_assert_eq!((tcp.psh, tcp.fin, tcp.cwr), (last, last, index == 0));
                prop_assert_eq!((tcp.ack, tcp.options.len()), (true, 12));
            }
            if !case.six {
                prop_assert_eq!(ids[1], index as u16);
            }
            if case.outer != Outer::Udp6 {
                prop_assert_eq!(ids[0], index as u16);
            }
            prop_assert!(index + 1 == count || payload.len() == usize::from(case.size));
            whole.extend(payload);
        }
        prop_assert_eq!(whole, case.payload);
    }

    #[test]
    fn any_headers_end_in_segments_or_a_counted_drop(
        case in case(), changes in proptest::collection::vec((0usize..160, any::<u8>()), 0..6),
    ) {
        let (mut frame, mut header) = case.frame();
        for (at, value) in changes {
            match header.get_mut(at) {
                Some(byte) => *byte = value,
                None => if let Some(byte) = frame.get_mut(at - 12) { *byte = value },
            }
        }
        let _ = cut(&frame, header);
    }
}

#[test]
fn frames_that_would_be_too_many_segments_are_refused() {
    let case = Case {
        outer: Outer::Udp4,
        six: false,
        tcp: true,
        size: 1,
        payload: vec![7; 3000],
    };
    let (frame, header) = case.frame();
    assert_eq!(cut(&frame, header), Err(HostDrop::BadOffload));
}

#[test]
fn frame_of_very_many_segments_has_a_step_for_itself() {
    let case = Case {
        outer: Outer::IpIp,
        six: false,
        tcp: true,
        size: 16,
        payload: vec![7; 10_000],
    };
    let (frame, header) = case.frame();
    let mut trunk = header.to_vec();
    trunk.extend(&frame[..12]);
    trunk.extend(vnet::tag(16));
    trunk.extend(&frame[12..]);
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (_pod, _) = socket_link(&mut engine, 16).unwrap();
    for first in [0, 16, 32, 48] {
        guest.send(first, &trunk, 4096);
    }
    for _ in 0..4 {
        assert_eq!(engine.step().from_guest, 1);
    }
    assert_eq!(engine.step().from_guest, 0);
}
