//! Frames from any link through a node: raw ones, and ones that get past the first checks because they are built, wrapped in
//! a tunnel, or made of what the node has sent itself.
//!
//! The input is a program. A byte picks the node's tunnel; then each step is a byte (see [`Run::step`]) and its operands.

extern crate std;

use super::fixture::{LINKS, TUNNELS, Tunnel, from_wire, on_node};
use super::input::Input;
use super::tunnel::wrap;
use crate::address::{Address, Family};
use crate::frame::{Gso, GsoKind, Partial, Tunnel as TunnelOffload, TunnelKind};
use crate::parse::{self, Parsed, Transport};
use crate::testing::node::{self, Addresses, UPLINK};
use crate::testing::{BenchIn, Builder, End, Segment, address};
use crate::time::Duration;
use crate::wire::icmp;
use crate::{Frame, Offload, Verdict};
use sluice_contract::LinkId;
use std::vec::Vec;

/// More in one input finds nothing that fewer would not.
const STEPS: usize = 64;
/// What a buffer holds besides a tunnel's headers.
const LONGEST: usize = 3000;
/// In a step: the frame has offload words and a tail.
const OFFLOADED: u8 = 0x40;
/// In a step: the frame waits, and goes in one batch with those after it.
const BATCHED: u8 = 0x80;
/// Ports at which something is, or that are special.
const PORTS: [u16; 10] = [80, 53, 8080, 30080, 30053, 8472, 5000, 0, 61000, 65535];

/// Fuzz entry: any frames through any node. Holds: no panic, every frame ends in one counter, the connections agree with
/// their index, and no packet has a local pod's address as its source that did not come from that pod.
///
/// # Panics
/// If what has to hold does not.
pub fn fuzz_frames(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let number = usize::from(input.byte()) % TUNNELS.len();
    on_node(number, |bench| {
        let mut run = Run {
            tunnel: TUNNELS[number],
            bench,
            input,
            batch: Vec::new(),
            sent: None,
            left: None,
        };
        for _ in 0..STEPS {
            if run.input.is_empty() {
                break;
            }
            run.step();
        }
        run.finish();
    });
}

struct Run<'r, 'm, 'b> {
    tunnel: Tunnel,
    bench: &'r mut BenchIn<'m>,
    input: Input<'b>,
    batch: Vec<(u16, Vec<u8>)>,
    /// The last frame that was sent in, and the last that the node sent out.
    sent: Option<(u16, Vec<u8>)>,
    left: Option<(u16, Vec<u8>)>,
}

impl Run<'_, '_, '_> {
    fn step(&mut self) {
        let step = self.input.byte();
        let frame = match step & 7 {
            0 => Some(self.raw()),
            1 | 2 => Some(self.packet()),
            3 => Some((UPLINK, self.tunnelled(false))),
            4 => Some((UPLINK, self.tunnelled(true))),
            5 => self.error_about_left(),
            6 => self.answer_to_left(),
            _ => self.again(),
        };
        if let Some((link, mut bytes)) = frame {
            bytes.truncate(LONGEST);
            self.send(step, link, bytes);
        }
    }

    fn send(&mut self, step: u8, link: u16, bytes: Vec<u8>) {
        if step & BATCHED != 0 {
            self.batch.push((link, bytes));
            return;
        }
        self.send_batch();
        let (offload, tail) = if step & OFFLOADED == 0 {
            (Offload::default(), 0)
        } else {
            (self.offload(), usize::from(self.input.byte()) * 257)
        };
        let end = self.bench.send_with(link, &bytes, tail, offload);
        self.note(link, bytes, end);
    }

    fn send_batch(&mut self) {
        let batch = core::mem::take(&mut self.batch);
        let ends = self.bench.send_batch(&batch);
        for ((link, bytes), end) in batch.into_iter().zip(ends) {
            self.note(link, bytes, end);
        }
    }

    fn note(&mut self, link: u16, bytes: Vec<u8>, end: End) {
        self.sent = Some((link, bytes));
        if let Verdict::Forward(by) = end.verdict {
            assert_no_stolen_source(link, by, &end.bytes);
            self.left = Some((by.raw(), end.bytes));
        }
    }

    fn finish(&mut self) {
        self.send_batch();
        let audit = self.bench.pipeline.conntrack().audit();
        assert_eq!(audit, Ok(()));
        self.bench.wait(Duration::from_secs(30));
        assert!(self.bench.pipeline.stats().is_balanced());
        let audit = self.bench.pipeline.conntrack().audit();
        assert_eq!(audit, Ok(()));
    }

    fn raw(&mut self) -> (u16, Vec<u8>) {
        let link = self.input.pick(&LINKS);
        let length = usize::from(self.input.byte()) * 2;
        (link, self.input.take(length).to_vec())
    }

    fn addresses(&mut self) -> Addresses {
        self.input.pick(&node::BOTH)
    }

    fn address(&mut self, of: &Addresses) -> Address {
        let known = [
            of.pods[0],
            of.pods[1],
            of.pods[2],
            of.remote,
            of.node,
            of.other_node,
            of.outside,
            of.cluster_ip,
            of.load_balancer,
            of.unallocated,
            of.any,
        ];
        let choice = usize::from(self.input.byte()) % (known.len() + 1);
        match (known.get(choice), of.family) {
            (Some(text), _) => address(text),
            (None, Family::V4) => Address::v4(self.input.array()),
            (None, Family::V6) => Address(self.input.array()),
        }
    }

    fn port(&mut self) -> u16 {
        let choice = usize::from(self.input.byte());
        PORTS
            .get(choice)
            .copied()
            .unwrap_or_else(|| self.input.short())
    }

    fn transport(&mut self) -> Segment {
        let kind = self.input.byte();
        if kind % 6 > 3 {
            return match kind % 6 {
                4 => Segment::Icmp(self.input.byte(), self.input.byte(), self.input.word()),
                _ => Segment::Raw(self.input.byte()),
            };
        }
        let (source, destination) = (self.port(), self.port());
        match kind % 6 {
            0 | 1 => Segment::Tcp {
                source,
                destination,
                flags: self.input.byte(),
                sequence: 1000 + u32::from(self.input.byte()),
                acknowledgment: 1000 + u32::from(self.input.byte()),
            },
            2 => Segment::Udp {
                source,
                destination,
            },
            _ => Segment::Sctp {
                source,
                destination,
                tag: u32::from(self.input.byte()),
            },
        }
    }

    /// A packet with right lengths and checksums, by default from a link with its MAC addresses.
    fn packet(&mut self) -> (u16, Vec<u8>) {
        let link = self.input.pick(&LINKS);
        (link, self.builder(link).build())
    }

    fn builder(&mut self, link: u16) -> Builder {
        let at = self.addresses();
        let shape = self.input.byte();
        let mut builder = node::packet(link, at.any, at.any);
        builder.source = match (shape & 1, link.checked_sub(16)) {
            (0, Some(pod @ 0..3)) => address(at.pods[usize::from(pod)]),
            _ => self.address(&at),
        };
        builder.destination = self.address(&at);
        builder.transport = self.transport();
        if shape & 2 != 0 {
            builder.hops = self.input.byte();
        }
        if shape & 4 != 0 {
            builder.fragment = self.input.short();
            builder.identification = u16::from(self.input.byte());
            builder.fragment6 = Some((builder.fragment, builder.identification.into()));
        }
        if shape & 8 != 0 {
            let options = usize::from(self.input.byte() % 11) * 4;
            builder.options = self.input.take(options).to_vec();
            builder.options.resize(options, 0);
        }
        if shape & 16 != 0 {
            builder.destination_mac.0 = self.input.array();
        }
        let length = usize::from(self.input.byte()) * 6;
        let payload = self.input.take(length);
        builder.payload = payload.to_vec();
        if shape & 32 != 0 {
            builder.payload.resize(length, 0);
        }
        builder
    }

    /// A packet in the node's tunnel; `answers`: to the last frame that was sent in.
    fn tunnelled(&mut self, answers: bool) -> Vec<u8> {
        let answered = match &self.sent {
            Some((_, bytes)) if answers => reversed(bytes),
            _ => None,
        };
        let inner = match answered {
            Some(builder) => self.dressed(builder),
            None => self.builder(UPLINK),
        };
        wrap(self.tunnel, inner, &mut self.input)
    }

    /// Flags and payload of an answer.
    fn dressed(&mut self, mut builder: Builder) -> Builder {
        if let Segment::Tcp { flags, .. } = &mut builder.transport {
            *flags = self.input.byte();
        }
        let length = usize::from(self.input.byte()) * 6;
        builder.payload = self.input.take(length).to_vec();
        builder
    }

    /// Who got the last frame that left answers it.
    fn answer_to_left(&mut self) -> Option<(u16, Vec<u8>)> {
        let (link, bytes) = self.left.clone()?;
        let answer = reversed(&bytes)?;
        let macs = node::packet(link, node::V4.any, node::V4.any);
        let answer = answer.macs(macs.source_mac, macs.destination_mac);
        Some((link, self.dressed(answer).build()))
    }

    /// An ICMP error that quotes the last frame that left, from where it went.
    fn error_about_left(&mut self) -> Option<(u16, Vec<u8>)> {
        let (link, bytes) = self.left.clone()?;
        let asked = reversed(&bytes)?;
        let at = match asked.source.family() {
            Family::V4 => node::V4,
            Family::V6 => node::V6,
        };
        let kinds4 = [(3, 4), (3, 1), (3, 3), (11, 0), (12, 0)];
        let kinds6 = [(2, 0), (1, 0), (1, 4), (3, 0), (4, 0)];
        let (kind, code) = match at.family {
            Family::V4 => self.input.pick(&kinds4),
            Family::V6 => self.input.pick(&kinds6),
        };
        let mut error = node::packet(link, at.any, at.any);
        error.source = match self.input.byte() & 1 {
            0 => asked.source,
            _ => self.address(&at),
        };
        error.destination = asked.destination;
        error.transport = Segment::Icmp(kind, code, u32::from(self.input.short()));
        let mut quote = bytes[14..].to_vec();
        quote.truncate(usize::from(self.input.byte()).max(28) * 4);
        self.change(&mut quote);
        Some((link, error.payload(&quote).build()))
    }

    /// Changes up to three bytes.
    fn change(&mut self, bytes: &mut [u8]) {
        for _ in 0..self.input.byte() % 4 {
            let at = usize::from(self.input.byte());
            let value = self.input.byte();
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= value;
            }
        }
    }

    /// Time passes, or the last frame comes once more, not quite the same.
    fn again(&mut self) -> Option<(u16, Vec<u8>)> {
        let pause = self.input.byte();
        if pause & 1 != 0 {
            let pause = Duration::from_millis(u64::from(pause) * u64::from(pause));
            self.bench.wait(pause);
            return None;
        }
        let (link, mut bytes) = self.sent.clone()?;
        self.change(&mut bytes);
        Some((link, bytes))
    }

    fn offload(&mut self) -> Offload {
        let [flags, place] = self.input.array();
        let partial = (flags & 1 != 0).then(|| Partial {
            start: 34 + u16::from(place >> 6) * 20,
            offset: if flags & 2 == 0 { 6 } else { 16 },
        });
        let kinds = [GsoKind::Tcp4, GsoKind::Tcp6, GsoKind::Udp];
        let gso = (flags & 4 != 0).then(|| Gso {
            kind: self.input.pick(&kinds),
            size: u16::from(place) * 6,
            header: u16::from(self.input.byte()),
            ecn: flags & 8 != 0,
        });
        let kinds = [TunnelKind::Udp4, TunnelKind::Udp6, TunnelKind::Other];
        let tunnel = (flags & 32 != 0).then(|| TunnelOffload {
            kind: self.input.pick(&kinds),
            network: 0,
            checksum: flags & 64 != 0,
        });
        Offload {
            partial,
            verified: flags & 16 != 0,
            gso,
            tunnel,
        }
    }
}

/// The answer to a packet, as its receiver would build it.
fn reversed(frame: &[u8]) -> Option<Builder> {
    let mut copy = frame.to_vec();
    let end = copy.len();
    let frame = Frame::new(&mut copy, 0, end, 0, LinkId::HOST, Offload::default())?;
    let Ok(Parsed::Ip(packet)) = parse::parse(&frame) else {
        return None;
    };
    let mut answer = from_wire(node::V4.any, node::V4.any);
    (answer.source, answer.destination) = (packet.destination, packet.source);
    answer.transport = match packet.transport {
        Transport::Tcp {
            source,
            destination,
            ..
        } => Segment::Tcp {
            source: destination,
            destination: source,
            sequence: 1000,
            acknowledgment: 1001,
            flags: 0,
        },
        Transport::Udp {
            source,
            destination,
        } => Segment::Udp {
            source: destination,
            destination: source,
        },
        Transport::Sctp {
            source,
            destination,
        } => Segment::Sctp {
            source: destination,
            destination: source,
            tag: 0,
        },
        Transport::Icmp { id, .. } => {
            let kind = match packet.family {
                Family::V4 => icmp::v4::ECHO_REPLY,
                Family::V6 => icmp::v6::ECHO_REPLY,
            };
            Segment::Icmp(kind, 0, u32::from(id) << 16)
        }
        Transport::Opaque => Segment::Raw(packet.protocol),
    };
    Some(answer)
}

/// A packet that goes to a pod or to the host names as its source no pod of this node but the one that sent it.
fn assert_no_stolen_source(from: u16, to: LinkId, frame: &[u8]) {
    if to == LinkId::UPLINK {
        // It may be in a tunnel.
        return;
    }
    let (at, source) = match frame.get(12..14) {
        Some([0x08, 0x00]) => (node::V4, frame.get(26..30)),
        Some([0x86, 0xdd]) => (node::V6, frame.get(22..38)),
        _ => return,
    };
    for (pod, text) in (16..).zip(at.pods) {
        let octets = address(text);
        let octets: Vec<u8> = match at.family {
            Family::V4 => octets.v4_octets().to_vec(),
            Family::V6 => octets.0.to_vec(),
        };
        let stolen = pod != from && source == Some(&octets[..]);
        assert!(
            !stolen,
            "from link {from} with the address of {pod}: {frame:02x?}"
        );
    }
}
