//! What pods ask of names and are told: noted on the way, before the packet goes on.

use super::Pipeline;
use super::transit::Stages;
use crate::address::Address;
use crate::conntrack::Hit;
use crate::flow::{Direction, Flow};
use crate::frame::Frame;
use crate::names::message::{self, Question, RECORDS};
use crate::names::{self, KNOWN, Part, Who};
use crate::observe::Observer;
use crate::parse::{Fragment, Packet, Transport};
use crate::wire::{protocol, tcp, udp};
use heapless::Vec;
use sluice_contract::LinkId;
use sluice_contract::name::{Learnt, NameId};
use zerocopy::FromBytes;

/// Messages of one frame: datagrams that were put together, or questions in one segment.
const MESSAGES: usize = 16;

impl<O: Observer> Stages<'_, '_, O> {
    /// Whether anybody is interested in what goes to or comes from this port.
    #[inline]
    pub(super) fn is_about_names(&self, packet: &Packet, port: u16) -> bool {
        port == names::PORT
            && matches!(packet.protocol, protocol::UDP | protocol::TCP)
            && packet.fragment != Fragment::Later
            && !O::DRY
            && self.tables.policy().knows_names()
    }

    /// A pod asks: if its rules name what it asks for, the answer will be believed.
    #[cold]
    pub(super) fn note_question(&mut self, frame: &Frame<'_>, packet: &Packet, flow: &Flow) {
        let Some(who) = self.pod(frame.ingress) else {
            return;
        };
        if let Transport::Tcp { flags, .. } = packet.transport
            && flags & (tcp::SYN | tcp::ACK) == tcp::SYN
        {
            let stream = self.stream_key(who, flow);
            self.state.names.streams.opened(who, stream);
        }
        for message in Messages::of(frame, packet) {
            let Some(question) = message::question(message).filter(|it| !it.is_answer) else {
                continue;
            };
            let policy = self.tables.policy();
            if policy.names_of(who.link, question.name.text()).is_empty() {
                continue;
            }
            let key = self.key(flow, &question);
            let tables = self.tables;
            let lives = |it: Who| {
                let link = tables.link(it.link);
                link.is_some_and(|link| link.incarnation == it.incarnation)
            };
            self.state.names.ask(who, key, self.now, lives);
        }
    }

    /// A pod is answered.
    #[cold]
    pub(super) fn note_answer(&mut self, frame: &Frame<'_>, packet: &Packet, hit: Hit, to: LinkId) {
        let ct = &self.state.conntrack;
        let (Some(asked), Some(who)) = (ct.original(hit.id), self.pod(to)) else {
            return;
        };
        let policy = self.tables.policy();
        // Who answers, or the Service that was asked.
        let believed = [packet.source, asked.destination()]
            .into_iter()
            .any(|it| policy.is_resolver(it.into()));
        if hit.direction != Direction::Reply || !believed {
            return;
        }
        let mut budget = RECORDS;
        if packet.protocol == protocol::UDP {
            for message in Messages::of(frame, packet) {
                self.learn(who, &asked, message, &mut budget);
            }
            return;
        }
        let Some((header, bytes)) = segment(frame, packet) else {
            return;
        };
        let stream = self.stream_key(who, &asked);
        let sequence = header.sequence.get();
        if header.has(tcp::SYN) {
            let first = sequence.wrapping_add(1);
            self.state.names.streams.begin(who, stream, first);
        } else if !header.has(tcp::RST) {
            let streams = &mut self.state.names.streams;
            let Some(mut piece) = streams.piece(who, stream, sequence, bytes) else {
                return;
            };
            while let Some(part) = self.state.names.streams.next(&mut piece) {
                if !matches!(part, Part::Whole(_)) {
                    self.state.names.cut(who);
                }
                if let Part::Whole(message) | Part::First(message) = part {
                    self.learn(who, &asked, message, &mut budget);
                }
            }
        }
    }

    /// Takes what a message says, if the pod has asked for it.
    fn learn(&mut self, who: Who, asked: &Flow, message: &[u8], budget: &mut usize) {
        let Some(question) = message::question(message).filter(|it| it.is_answer) else {
            return;
        };
        let key = self.key(asked, &question);
        if !self.state.names.answered(who, key, self.now) {
            return;
        }
        let policy = self.tables.policy();
        let all = policy.names_of(who.link, question.name.text());
        message::addresses(message, &question, budget, |address, seconds| {
            if self.may_be_named(address) {
                for name in &all {
                    let now = self.now;
                    self.state.names.learn(who, *name, address, seconds, now);
                }
            }
        });
    }

    /// The names under which a pod learnt of an address. `began`: for a connection that is there already.
    #[inline]
    pub(super) fn names_at(
        &self,
        link: LinkId,
        address: Address,
        began: bool,
    ) -> Vec<NameId, KNOWN> {
        if !self.tables.policy().knows_names() {
            return Vec::new();
        }
        let of = |who| self.state.names.names(who, address, self.now, began);
        let mut names = self.pod(link).map(of).unwrap_or_default();
        // Asked again: a pod, Service or node may have got the address since the answer came.
        if !names.is_empty() && self.tables.is_in_cluster(address) {
            names.clear();
        }
        names
    }

    fn pod(&self, link: LinkId) -> Option<Who> {
        let incarnation = self
            .tables
            .link(link)
            .filter(|_| link.is_pod())?
            .incarnation;
        Some(Who { link, incarnation })
    }

    /// Names do not lead into the cluster or to its nodes, nor to what has a meaning on one link or one
    /// machine only: otherwise the owner of an allowed domain could open any pod, Service or node (DNS
    /// rebinding).
    fn may_be_named(&self, address: Address) -> bool {
        let ip = core::net::IpAddr::from(address);
        let local = match ip {
            core::net::IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            core::net::IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        let nowhere = ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
        !(local || nowhere || self.tables.is_in_cluster(address))
    }

    /// What tells the streams of answers of a pod from each other: the connection.
    fn stream_key(&self, who: Who, flow: &Flow) -> u64 {
        let to = flow.destination();
        let own = u64::from(who.incarnation) << 16 | u64::from(flow.source_port());
        self.state.hasher.hash([own, to.high(), to.low()])
    }

    /// What tells one question of a pod from its others: the connection, the number, the name and the type.
    fn key(&self, flow: &Flow, question: &Question) -> u64 {
        let to = flow.destination();
        let numbers = u64::from(flow.protocol()) << 48
            | u64::from(flow.source_port()) << 32
            | u64::from(question.id) << 16
            | u64::from(question.kind);
        let hasher = &self.state.hasher;
        let begin = hasher.hash([numbers, to.high(), to.low()]);
        question.name.text().chunks(8).fold(begin, |sum, bytes| {
            let mut word = [0; 8];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            hasher.hash([sum, u64::from_le_bytes(word)])
        })
    }
}

impl Pipeline<'_> {
    /// What pods that are there were told of names, one at a time from `cursor` on, and the cursor behind it: of one pod all,
    /// of all pods what holds. `Some((None, …))`: there is something that is not to be told.
    pub fn names_from(&self, of: Option<LinkId>, cursor: usize) -> Option<(Option<Learnt>, usize)> {
        let names = &self.state.names;
        let incarnation = |link| self.tables.link(link).map(|it| it.incarnation);
        let (link, told, next, is_told) = match of {
            Some(link) => {
                let incarnation = incarnation(link)?;
                let told = names.told(Who { link, incarnation }, cursor)?;
                (link, told, cursor + 1, true)
            }
            None => {
                let (who, told, next) = names.next_from(cursor)?;
                let is_there = incarnation(who.link) == Some(who.incarnation);
                (who.link, told, next, is_there && told.2 > self.now)
            }
        };
        let (name, address, until) = told;
        let left = if until > self.now {
            // What still holds for a moment is not over.
            seconds(until.since(self.now).micros() + 999_999)
        } else {
            -seconds(self.now.since(until).micros())
        };
        let learnt = Learnt {
            link,
            name,
            address: address.into(),
            left,
        };
        Some((is_told.then_some(learnt), next))
    }
}

fn seconds(micros: u64) -> i32 {
    i32::try_from(micros / 1_000_000).unwrap_or(i32::MAX)
}

/// The messages in one frame.
struct Messages<'a> {
    rest: &'a [u8],
    kind: Kind,
    left: usize,
}

enum Kind {
    /// Datagrams of this length, one after the other; the last one may be shorter.
    Datagrams(usize),
    /// Each behind its length (RFC 1035 §4.2.2): questions, which their pod may as well have made up. One that goes on in the
    /// next segment is not read.
    Stream,
}

/// What is there of a packet behind its network header.
fn transport<'a>(frame: &'a Frame<'_>, packet: &Packet) -> &'a [u8] {
    let bytes = frame.bytes();
    let end = bytes.len().min(packet.end as usize);
    let transport = bytes.get(usize::from(packet.payload)..end);
    transport.unwrap_or_default()
}

/// A TCP segment's header and its bytes.
fn segment<'a>(frame: &'a Frame<'_>, packet: &Packet) -> Option<(&'a tcp::Header, &'a [u8])> {
    let transport = transport(frame, packet);
    let (header, _) = tcp::Header::ref_from_prefix(transport).ok()?;
    Some((header, transport.get(header.header_length()..)?))
}

impl<'a> Messages<'a> {
    fn of(frame: &'a Frame<'_>, packet: &Packet) -> Self {
        let (rest, kind) = if packet.protocol == protocol::UDP {
            let size = frame
                .offload
                .gso
                .map_or(usize::MAX, |gso| usize::from(gso.size));
            let datagrams = transport(frame, packet).get(udp::LENGTH..);
            (datagrams, Kind::Datagrams(size.max(1)))
        } else {
            let bytes = segment(frame, packet).map(|(_, bytes)| bytes);
            (bytes, Kind::Stream)
        };
        Self {
            rest: rest.unwrap_or_default(),
            kind,
            left: MESSAGES,
        }
    }
}

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.left = self.left.checked_sub(1)?;
        if self.rest.is_empty() {
            return None;
        }
        let (message, rest) = match self.kind {
            Kind::Datagrams(size) => self.rest.split_at(size.min(self.rest.len())),
            Kind::Stream => {
                let (length, rest) = self.rest.split_first_chunk::<2>()?;
                rest.split_at_checked(u16::from_be_bytes(*length).into())?
            }
        };
        self.rest = rest;
        Some(message)
    }
}
