//! For tests: packets by the piece, a fixture with a few pods, a clock that is set by hand. Needs std.

extern crate std;

mod fuzz;
pub mod node;

pub use crate::conntrack::fuzz::fuzz_adoption;
pub(crate) use fuzz::Input;
pub use fuzz::{fuzz_control, fuzz_frames, fuzz_names};

use crate::address::Address;
use crate::arena::Arena;
use crate::frame::{Frame, Offload};
use crate::pipeline::Pipeline;
use crate::tables::Capacity;
use crate::time::{Duration, Instant};
use crate::verdict::{Originate, Verdict};
use crate::wire::{checksum, ethernet, icmp, ipv4, ipv6, protocol, tcp, udp};
use sluice_contract::report::Reject;
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Generation, Identity, LinkId, Mac, Row, ToGuest};
use std::vec::Vec;
use zerocopy::{IntoBytes, big_endian::U16, big_endian::U32};

/// Bytes free in front of a frame that [`Bench::send`] gives to the pipeline, as the guest's buffers have them.
pub const HEADROOM: usize = 128;
/// Length of such a buffer.
pub const BUFFER: usize = 4096;

/// An address, from the form that people write.
///
/// # Panics
/// If it is none.
#[expect(clippy::panic, reason = "for tests")]
pub fn address(text: &str) -> Address {
    match text.parse::<core::net::IpAddr>() {
        Ok(address) => address.into(),
        Err(_) => panic!("{text} is no address"),
    }
}

/// A packet under construction. What is not said has an honest value.
#[derive(Clone, Debug)]
pub struct Builder {
    pub source_mac: Mac,
    pub destination_mac: Mac,
    pub source: Address,
    pub destination: Address,
    pub hops: u8,
    pub identification: u16,
    /// IPv4: the fragment word as it stands in the header.
    pub fragment: u16,
    /// IPv6: a fragment header with these offset and flags, and this identification.
    pub fragment6: Option<(u16, u32)>,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
    pub transport: Segment,
}

/// The transport header to be built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    Tcp {
        source: u16,
        destination: u16,
        sequence: u32,
        acknowledgment: u32,
        flags: u8,
    },
    Udp {
        source: u16,
        destination: u16,
    },
    Sctp {
        source: u16,
        destination: u16,
        tag: u32,
    },
    /// Kind, code, second word.
    Icmp(u8, u8, u32),
    /// The payload as it is, with this protocol number.
    Raw(u8),
}

impl Builder {
    /// From one pod of a [`Bench`] to an address.
    pub fn from(pod: u16, source: &str, destination: &str) -> Self {
        let link = LinkId::new(pod).unwrap_or(LinkId::HOST);
        Self {
            source_mac: Mac::of_pod(link),
            destination_mac: Mac::GATEWAY,
            source: address(source),
            destination: address(destination),
            hops: 64,
            identification: 7,
            fragment: ipv4::DF,
            fragment6: None,
            options: Vec::new(),
            payload: Vec::new(),
            transport: Segment::Udp {
                source: 1000,
                destination: 2000,
            },
        }
    }

    #[must_use]
    pub fn udp(mut self, source: u16, destination: u16) -> Self {
        self.transport = Segment::Udp {
            source,
            destination,
        };
        self
    }

    #[must_use]
    pub fn sctp(mut self, source: u16, destination: u16) -> Self {
        self.transport = Segment::Sctp {
            source,
            destination,
            tag: 0,
        };
        self
    }

    /// With a verification tag, which all but the first packet have.
    #[must_use]
    pub fn sctp_tagged(mut self, source: u16, destination: u16, tag: u32) -> Self {
        self.transport = Segment::Sctp {
            source,
            destination,
            tag,
        };
        self
    }

    #[must_use]
    pub fn tcp(mut self, source: u16, destination: u16, flags: u8) -> Self {
        self.transport = Segment::Tcp {
            source,
            destination,
            sequence: 1000,
            acknowledgment: 0,
            flags,
        };
        self
    }

    /// Sequence and acknowledgment of a TCP segment.
    #[must_use]
    pub fn numbers(mut self, sequence: u32, acknowledgment: u32) -> Self {
        if let Segment::Tcp {
            source,
            destination,
            flags,
            ..
        } = self.transport
        {
            self.transport = Segment::Tcp {
                source,
                destination,
                sequence,
                acknowledgment,
                flags,
            };
        }
        self
    }

    /// An echo request of the right family.
    #[must_use]
    pub fn echo(mut self, id: u16, sequence: u16) -> Self {
        let kind = match self.source.family() {
            crate::Family::V4 => icmp::v4::ECHO,
            crate::Family::V6 => icmp::v6::ECHO,
        };
        self.transport = Segment::Icmp(kind, 0, u32::from(id) << 16 | u32::from(sequence));
        self
    }

    #[must_use]
    pub fn icmp(mut self, kind: u8, code: u8, second: u32) -> Self {
        self.transport = Segment::Icmp(kind, code, second);
        self
    }

    #[must_use]
    pub fn raw(mut self, protocol: u8) -> Self {
        self.transport = Segment::Raw(protocol);
        self
    }

    #[must_use]
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }

    #[must_use]
    pub fn hops(mut self, hops: u8) -> Self {
        self.hops = hops;
        self
    }

    #[must_use]
    pub fn macs(mut self, source: Mac, destination: Mac) -> Self {
        self.source_mac = source;
        self.destination_mac = destination;
        self
    }

    fn protocol(&self) -> u8 {
        match (self.transport, self.source.family()) {
            (Segment::Tcp { .. }, _) => protocol::TCP,
            (Segment::Udp { .. }, _) => protocol::UDP,
            (Segment::Sctp { .. }, _) => protocol::SCTP,
            (Segment::Icmp(..), crate::Family::V4) => protocol::ICMP,
            (Segment::Icmp(..), crate::Family::V6) => protocol::ICMP6,
            (Segment::Raw(number), _) => number,
        }
    }

    fn transport_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut patch = None;
        match self.transport {
            Segment::Tcp {
                source,
                destination,
                sequence,
                acknowledgment,
                flags,
            } => {
                let header = tcp::Header {
                    source: U16::new(source),
                    destination: U16::new(destination),
                    sequence: U32::new(sequence),
                    acknowledgment: U32::new(acknowledgment),
                    data_offset: 5 << 4,
                    flags,
                    window: U16::new(0xfff0),
                    checksum: U16::new(0),
                    urgent: U16::new(0),
                };
                bytes.extend_from_slice(header.as_bytes());
                patch = Some(16);
            }
            Segment::Udp {
                source,
                destination,
            } => {
                let header = udp::Header {
                    source: U16::new(source),
                    destination: U16::new(destination),
                    length: U16::new((udp::LENGTH + self.payload.len()) as u16),
                    checksum: U16::new(0),
                };
                bytes.extend_from_slice(header.as_bytes());
                patch = Some(6);
            }
            Segment::Sctp {
                source,
                destination,
                tag,
            } => {
                bytes.extend_from_slice(&source.to_be_bytes());
                bytes.extend_from_slice(&destination.to_be_bytes());
                bytes.extend_from_slice(&tag.to_be_bytes());
                bytes.extend_from_slice(&[0; 4]);
            }
            Segment::Icmp(kind, code, second) => {
                bytes.extend_from_slice(&[kind, code, 0, 0]);
                bytes.extend_from_slice(&second.to_be_bytes());
                patch = Some(2);
            }
            Segment::Raw(_) => {}
        }
        bytes.extend_from_slice(&self.payload);
        if let Some(at) = patch {
            let sum = match self.protocol() {
                protocol::ICMP => 0,
                number => checksum::pseudo(self.source, self.destination, number, bytes.len()),
            };
            let sum = checksum::finish(checksum::sum(&bytes, sum));
            if let Some(field) = bytes.get_mut(at..at + 2) {
                field.copy_from_slice(&sum.to_be_bytes());
            }
        }
        bytes
    }

    /// The frame.
    pub fn build(&self) -> Vec<u8> {
        let transport = self.transport_bytes();
        let mut bytes = Vec::new();
        match self.source.family() {
            crate::Family::V4 => {
                let ethernet =
                    ethernet::Header::new(self.destination_mac, self.source_mac, ethernet::IPV4);
                let mut header = ipv4::Header::new(
                    self.source.v4_octets(),
                    self.destination.v4_octets(),
                    self.protocol(),
                    (transport.len() + self.options.len()) as u16,
                );
                header.version_ihl = 0x45 + (self.options.len() / 4) as u8;
                header.ttl = self.hops;
                header.fragment = U16::new(self.fragment);
                header.identification = U16::new(self.identification);
                header.checksum = U16::new(0);
                let sum = checksum::sum(&self.options, checksum::sum(header.as_bytes(), 0));
                header.checksum = U16::new(checksum::finish(sum));
                bytes.extend_from_slice(ethernet.as_bytes());
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend_from_slice(&self.options);
            }
            crate::Family::V6 => {
                let ethernet =
                    ethernet::Header::new(self.destination_mac, self.source_mac, ethernet::IPV6);
                let mut extension = Vec::new();
                let mut next = self.protocol();
                if let Some((offset_flags, identification)) = self.fragment6 {
                    let header = ipv6::FragmentHeader {
                        next_header: next,
                        reserved: 0,
                        offset_flags: U16::new(offset_flags),
                        identification: U32::new(identification),
                    };
                    extension.extend_from_slice(header.as_bytes());
                    next = 44;
                }
                let header = ipv6::Header::new(
                    self.source.0,
                    self.destination.0,
                    next,
                    (extension.len() + transport.len()) as u16,
                    self.hops,
                );
                bytes.extend_from_slice(ethernet.as_bytes());
                bytes.extend_from_slice(header.as_bytes());
                bytes.extend_from_slice(&extension);
            }
        }
        bytes.extend_from_slice(&transport);
        bytes
    }
}

/// Frames that the pipeline made by itself.
#[derive(Debug, Default)]
pub struct Originated(pub Vec<(LinkId, Vec<u8>)>);

impl Originate for Originated {
    fn originate(&mut self, link: LinkId, bytes: &[u8], _: Offload) -> bool {
        self.0.push((link, bytes.to_vec()));
        true
    }
}

/// How a frame ended, and what it was then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    pub verdict: Verdict,
    pub bytes: Vec<u8>,
    pub offload: Offload,
}

impl End {
    /// The bytes, of a frame that was sent on by this link.
    #[expect(clippy::panic, reason = "for tests")]
    pub fn forwarded(&self, link: u16) -> &[u8] {
        match self.verdict {
            Verdict::Forward(id) if id.raw() == link => &self.bytes,
            other => panic!("{other:?} instead of forwarded to link {link}"),
        }
    }

    /// The bytes, of a frame that was answered.
    #[expect(clippy::panic, reason = "for tests")]
    pub fn replied(&self) -> &[u8] {
        match self.verdict {
            Verdict::Reply => &self.bytes,
            other => panic!("{other:?} instead of a reply"),
        }
    }

    /// The reason, of a frame that was dropped.
    #[expect(clippy::panic, reason = "for tests")]
    pub fn dropped(&self) -> DropReason {
        match self.verdict {
            Verdict::Drop(reason) => reason,
            other => panic!("{other:?} instead of a drop"),
        }
    }
}

/// A [`BenchIn`] that owns its memory, which is never freed: tests are short.
pub type Bench = BenchIn<'static>;

/// A pipeline with a clock and a generation counter, in memory that its caller owns.
#[derive(Debug)]
pub struct BenchIn<'m> {
    pub pipeline: Pipeline<'m>,
    pub now: Instant,
    pub originated: Originated,
    generation: u64,
    /// What the last change left out.
    pub refused: Vec<Reject>,
}

impl Bench {
    /// An empty pipeline of that capacity.
    pub fn empty(capacity: Capacity) -> Self {
        Self::seeded(capacity, [7; 16])
    }

    /// The same with another secret.
    ///
    /// # Panics
    /// If the memory does not suffice.
    pub fn seeded(capacity: Capacity, seed: [u8; 16]) -> Self {
        Self::in_memory(Vec::leak(std::vec![0u8; capacity.bytes()]), capacity, seed)
    }

    /// Three pods, dual-stack: 16 (10.0.0.1, fd00::1), 17 (…2) and 18 (…3).
    pub fn pods() -> Self {
        let mut bench = Self::empty(Capacity::TINY);
        let rows: Vec<Row> = (1..=3u16).map(|n| Row::Link(pod_row(15 + n, n))).collect();
        bench.commit(&rows);
        bench
    }
}

impl<'m> BenchIn<'m> {
    /// An empty pipeline in zeroed memory of [`Capacity::bytes`].
    ///
    /// # Panics
    /// If the memory does not suffice.
    #[expect(clippy::expect_used, reason = "for tests")]
    pub fn in_memory(memory: &'m mut [u8], capacity: Capacity, seed: [u8; 16]) -> Self {
        let pipeline = Pipeline::new(&mut Arena::new(memory), capacity, seed)
            .expect("The fixture's memory suffices");
        Self {
            pipeline,
            now: Instant::from_micros(1_000_000_000),
            originated: Originated::default(),
            generation: 0,
            refused: Vec::new(),
        }
    }

    /// Puts rows, in one change.
    ///
    /// # Panics
    /// If the pipeline refuses it.
    pub fn commit(&mut self, rows: &[Row]) {
        let outcome = self.change(&rows.iter().cloned().map(ToGuest::Put).collect::<Vec<_>>());
        assert!(outcome.is_whole(), "{outcome:?}: {:?}", self.refused);
    }

    /// One change of these messages, and its outcome. What was refused of it stands in [`Self::refused`].
    pub fn change(&mut self, messages: &[ToGuest]) -> crate::apply::Outcome {
        self.change_from(false, messages)
    }

    /// The same, from empty tables if it is `fresh`.
    pub fn change_from(&mut self, fresh: bool, messages: &[ToGuest]) -> crate::apply::Outcome {
        use crate::apply::Outcome;
        self.refused.clear();
        self.generation += 1;
        let generation = Generation(self.generation);
        let begin = ToGuest::Begin { generation, fresh };
        let commit = ToGuest::Commit { generation };
        for message in [&begin].into_iter().chain(messages).chain([&commit]) {
            self.settle();
            match self.pipeline.configure(message) {
                Outcome::Noted | Outcome::LeftOut(_) => {}
                outcome => {
                    self.settle();
                    return outcome;
                }
            }
        }
        self.settle();
        self.pipeline.take_outcome().unwrap_or(Outcome::Noted)
    }

    /// Lets the tables come to rest, and takes what they refused.
    fn settle(&mut self) {
        while self.pipeline.is_applying() || self.pipeline.refusals().is_some() {
            self.pipeline.work(64);
            if let Some(refusals) = self.pipeline.refusals() {
                self.refused.extend(&refusals.rows);
                self.pipeline.clear_refusals();
            }
        }
    }

    /// Sends a frame from a link through the pipeline.
    pub fn send(&mut self, link: u16, bytes: &[u8]) -> End {
        self.send_with(link, bytes, 0, Offload::default())
    }

    /// The same with a tail and offload words.
    ///
    /// # Panics
    /// If the frame does not fit into a buffer, or the counters do not sum up afterwards.
    #[expect(clippy::expect_used, reason = "for tests")]
    pub fn send_with(&mut self, link: u16, bytes: &[u8], tail: usize, offload: Offload) -> End {
        let mut buffer = std::vec![0xa5u8; BUFFER];
        let end = HEADROOM + bytes.len();
        buffer
            .get_mut(HEADROOM..end)
            .expect("The frame fits")
            .copy_from_slice(bytes);
        let ingress = LinkId::new(link).expect("A link id");
        let frame = Frame::new(&mut buffer, HEADROOM, end, tail, ingress, offload);
        let mut frames = [frame.expect("The frame lies in its buffer")];
        let mut verdicts = [Verdict::Held];
        self.pipeline
            .process_batch(&mut frames, &mut verdicts, self.now, &mut self.originated);
        assert!(self.pipeline.stats().is_balanced());
        let [frame] = frames;
        let [verdict] = verdicts;
        End {
            verdict,
            bytes: frame.bytes().to_vec(),
            offload: frame.offload,
        }
    }

    /// Sends frames, each from its link, through the pipeline in one batch.
    ///
    /// # Panics
    /// As [`Self::send_with`].
    #[expect(clippy::expect_used, reason = "for tests")]
    pub fn send_batch(&mut self, sent: &[(u16, Vec<u8>)]) -> Vec<End> {
        let room = |bytes: &Vec<u8>| [&[0xa5; HEADROOM][..], bytes].concat();
        let mut buffers: Vec<Vec<u8>> = sent.iter().map(|(_, bytes)| room(bytes)).collect();
        let frames = buffers.iter_mut().zip(sent).map(|(buffer, (link, _))| {
            let (end, ingress) = (buffer.len(), LinkId::new(*link).expect("A link id"));
            let frame = Frame::new(buffer, HEADROOM, end, 0, ingress, Offload::default());
            frame.expect("The frame lies in its buffer")
        });
        let mut frames: Vec<Frame<'_>> = frames.collect();
        let mut verdicts = std::vec![Verdict::Held; frames.len()];
        self.pipeline
            .process_batch(&mut frames, &mut verdicts, self.now, &mut self.originated);
        assert!(self.pipeline.stats().is_balanced());
        let ends = frames.iter().zip(verdicts).map(|(frame, verdict)| End {
            verdict,
            bytes: frame.bytes().to_vec(),
            offload: frame.offload,
        });
        ends.collect()
    }

    /// Lets time pass.
    pub fn wait(&mut self, span: Duration) {
        self.now = self.now + span;
        self.pipeline.sweep(self.now, 1 << 20, &mut self.originated);
    }
}

/// The row of a dual-stack pod 10.0.0.n, fd00::n.
pub fn pod_row(link: u16, n: u16) -> LinkRow {
    let id = LinkId::new(link).unwrap_or(LinkId::HOST);
    let [hi, lo] = n.to_be_bytes();
    let mut addresses = heapless::Vec::new();
    // Two of four.
    let _ = addresses.push(core::net::IpAddr::from([10, 0, hi, lo]));
    let _ = addresses.push(core::net::IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, n]));
    LinkRow {
        id,
        mac: Mac::of_pod(id),
        addresses,
        mtu: 1500,
        identity: Identity(u32::from(link)),
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    }
}
