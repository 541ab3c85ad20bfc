use super::*;
use crate::address::Address;
use crate::time::Duration;
use crate::wire::protocol;
use std::vec::Vec;

/// A table in its own memory.
pub(super) struct Memory(Vec<u8>);

impl Memory {
    pub(super) fn new(capacity: u32) -> Self {
        let bytes = Conntrack::region_bytes(capacity).unwrap();
        Self(std::vec![0xa5; bytes + 63])
    }

    pub(super) fn bytes(&mut self) -> &mut [u8] {
        let pad = self.0.as_ptr().align_offset(64);
        let length = self.0.len() - 63;
        &mut self.0[pad..pad + length]
    }

    pub(super) fn table(&mut self, capacity: u32) -> Conntrack<'_> {
        let hasher = Hasher::new([9; 16]);
        Conntrack::new(self.bytes(), capacity, Settings::default(), hasher, at(0)).unwrap()
    }
}

pub(super) fn at(seconds: u64) -> Instant {
    Instant::from_micros(seconds * 1_000_000)
}

pub(super) fn v4(n: u32) -> Address {
    Address::v4(n.to_be_bytes())
}

pub(super) fn v6(n: u32) -> Address {
    let mut octets = [0; 16];
    octets[0] = 0xfd;
    octets[12..].copy_from_slice(&n.to_be_bytes());
    Address(octets)
}

pub(super) fn udp(client: u32) -> Flow {
    Flow::new(
        v4(0x0a00_0000 + client),
        v4(0x0aff_0001),
        protocol::UDP,
        4_000,
        53,
    )
}

pub(super) const POD: LinkId = match LinkId::new(16) {
    Some(link) => link,
    None => LinkId::HOST,
};

impl Conntrack<'_> {
    pub(super) fn begin(
        &mut self,
        flow: Flow,
        reply: Flow,
        signal: &Signal,
        now: Instant,
    ) -> Result<Hit, CommitError> {
        let hash = self.hash(&flow);
        let mut new = self.open(&flow, hash, LinkId::UPLINK, signal, now).unwrap();
        new.reply = reply;
        self.commit(&new, now)
    }

    pub(super) fn packet(&mut self, flow: &Flow, signal: &Signal, now: Instant) -> Option<Hit> {
        let hit = self.lookup(flow, self.hash(flow), now)?;
        (self.track(hit, signal, now) == Ok(Track::Belongs)).then_some(hit)
    }
}

#[test]
fn k05_both_directions_find_one_object() {
    for (client, service, backend, node) in
        [(v4(1), v4(2), v4(3), v4(4)), (v6(1), v6(2), v6(3), v6(4))]
    {
        let mut memory = Memory::new(64);
        let mut table = memory.table(64);
        let flow = Flow::new(client, service, protocol::UDP, 4_000, 53);
        let plain = flow.reversed();
        let translated = Flow::new(backend, node, protocol::UDP, 5_353, 61_000);
        for reply in [plain, translated] {
            let opened = table.begin(flow, reply, &Signal::Datagram, at(1)).unwrap();
            table.audit().unwrap();
            let there = table.lookup(&flow, table.hash(&flow), at(1)).unwrap();
            let back = table.lookup(&reply, table.hash(&reply), at(1)).unwrap();
            assert_eq!((there.id, back.id), (opened.id, opened.id));
            assert_eq!(there.direction, Direction::Original);
            assert_eq!(back.direction, Direction::Reply);
            assert_eq!(table.outgoing(there), Some(reply.reversed()));
            assert_eq!(table.outgoing(back), Some(flow.reversed()));
            assert_eq!(table.is_translated(opened.id), reply != plain);
            assert_eq!(table.owner(opened.id), Some(LinkId::UPLINK));
            table.remove(opened.id);
            table.audit().unwrap();
            assert_eq!(table.used(), 0);
            assert_eq!(table.lookup(&flow, table.hash(&flow), at(1)), None);
            assert_eq!(table.lookup(&reply, table.hash(&reply), at(1)), None);
        }
    }
}

#[test]
fn k06_the_second_of_two_first_packets_joins_the_first() {
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let flow = udp(1);
    let hash = table.hash(&flow);
    // Two queues, both miss before either commits, each having chosen another backend.
    let backends = [v4(0x0a01_0001), v4(0x0a01_0002)];
    let tentative = backends.map(|backend| {
        assert_eq!(table.lookup(&flow, hash, at(1)), None);
        let signal = Signal::Datagram;
        let mut new = table.open(&flow, hash, POD, &signal, at(1)).unwrap();
        new.reply = flow.with_destination(backend, 5_353).reversed();
        new
    });
    let first = table.commit(&tentative[0], at(1)).unwrap();
    let Err(CommitError::Conflict(second)) = table.commit(&tentative[1], at(1)) else {
        panic!("two connections for one flow");
    };
    assert_eq!(second.id, first.id);
    assert_eq!(table.outgoing(second).unwrap().destination(), backends[0]);
    assert_eq!(
        table.track(second, &Signal::Datagram, at(1)),
        Ok(Track::Belongs)
    );
    assert_eq!(table.used(), 1);
    table.audit().unwrap();
}

#[test]
fn a_translation_in_use_is_refused() {
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let reply = Flow::new(v4(7), v4(8), protocol::UDP, 53, 61_000);
    let first = table
        .begin(udp(1), reply, &Signal::Datagram, at(1))
        .unwrap();
    let second = table.begin(udp(2), reply, &Signal::Datagram, at(1));
    assert!(matches!(second, Err(CommitError::ReplyTaken(hit)) if hit.id == first.id));
    // Nor may it be the original flow of another connection.
    let second = table.begin(udp(2), udp(1), &Signal::Datagram, at(1));
    assert!(matches!(second, Err(CommitError::ReplyTaken(hit)) if hit.id == first.id));
    // Nor, without a translation of its own, be taken for the answer to what a translated one began with.
    let second = table.begin(udp(1).reversed(), udp(1), &Signal::Datagram, at(1));
    assert!(matches!(second, Err(CommitError::ReplyTaken(hit)) if hit.id == first.id));
    let other = Flow::new(v6(7), v6(8), protocol::UDP, 53, 61_000);
    let second = table.begin(udp(2), other, &Signal::Datagram, at(1));
    assert_eq!(second, Err(CommitError::Family));
    table.audit().unwrap();
    assert_eq!(table.used(), 1);
}

#[test]
fn udp_is_unreplied_replied_and_a_stream() {
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let flow = udp(1);
    let signal = Signal::Datagram;
    let back = flow.reversed();
    table.begin(flow, back, &signal, at(0)).unwrap();
    for (packet, before) in [
        (flow, State::UdpUnreplied),
        (back, State::UdpUnreplied),
        (back, State::UdpReplied),
        (flow, State::UdpReplied),
        (back, State::UdpStream),
    ] {
        let hit = table.packet(&packet, &signal, at(1)).unwrap();
        assert_eq!(hit.state, before);
        table.audit().unwrap();
    }
}

#[test]
fn icmp_answers_need_a_question() {
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let flow = Flow::new(v4(1), v4(2), protocol::ICMP, 77, 0);
    let (hash, back) = (table.hash(&flow), flow.reversed());
    let unasked = table.open(&back, hash, POD, &Signal::Answer, at(0));
    assert_eq!(unasked.unwrap_err(), Invalid::Unsolicited);
    table.begin(flow, back, &Signal::Query, at(0)).unwrap();
    assert!(table.packet(&flow, &Signal::Query, at(1)).is_some());
    assert!(table.packet(&back, &Signal::Answer, at(1)).is_some());
    assert!(table.packet(&flow, &Signal::Answer, at(1)).is_none());
    assert!(table.packet(&back, &Signal::Query, at(1)).is_none());
    assert!(table.packet(&flow, &Signal::Datagram, at(1)).is_none());
    assert_eq!(table.counters().invalid, 4);
}

mod adoption;
mod limits;
mod tcp;
