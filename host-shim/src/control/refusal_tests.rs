//! What rows that the guest cannot take cost: nobody but themselves.

use std::time::{Duration, Instant};

use sluice_appliance::Capacity;
use sluice_appliance::session::{Facts, Session as GuestSession};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_contract::frame::{self, Decoder, FRAME_MAX};
use sluice_contract::policy::{IdentityRow, PolicyRow};
use sluice_contract::report::RejectReason;
use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, PortId, PortRow, ServiceRow,
    SetId, SetRow,
};
use sluice_contract::types::Identity;
use sluice_contract::{Family, Generation, Key, LinkId, Protocol, Row};

use super::desired::Desired;
use super::session::{Event, Session};
use super::testing::Guest;

fn link(id: u16, incarnation: u32) -> Row {
    let mut row = pod_row(id, id);
    row.incarnation = incarnation;
    Row::Link(row)
}

fn address(address: [u8; 4], role: AddressRole) -> Row {
    let address = address.into();
    Row::Service(ServiceRow::Address(AddressRow { address, role }))
}

fn frontend(address: [u8; 4], port: u16) -> Row {
    Row::Service(ServiceRow::Frontend(FrontendRow {
        address: address.into(),
        protocol: Protocol::Tcp,
        port,
        kind: FrontendKind::ExternalIp,
        service: PortId(0),
    }))
}

fn port(cluster: Option<SetId>) -> Row {
    Row::Service(ServiceRow::Port(PortRow {
        id: PortId(0),
        family: Family::V4,
        affinity: 0,
        endpoints: true,
        internal_local: false,
        external_local: false,
        direct_return: false,
        cluster,
        local: None,
        serving: None,
        source_lengths: heapless::Vec::new(),
    }))
}

fn set(count: u16) -> Row {
    Row::Service(ServiceRow::Set(SetRow {
        id: SetId(0),
        family: Family::V4,
        count,
        slots: 0,
    }))
}

fn backend(index: u16) -> Row {
    Row::Service(ServiceRow::Backend(BackendRow {
        set: SetId(0),
        index,
        address: [10, 0, 0, index as u8 + 1].into(),
        port: 80,
    }))
}

/// The host's end, and the appliance's own at the other.
struct Pair {
    now: Instant,
    host: Session,
    guest: GuestSession,
    bench: Bench,
    decoder: Decoder,
    desired: Desired,
    events: Vec<Event>,
}

impl Pair {
    fn new(capacity: Capacity) -> Self {
        let now = Instant::now();
        Self {
            now,
            host: Session::new(now, 1),
            guest: GuestSession::new(Facts::default()),
            bench: Bench::empty(capacity),
            decoder: Decoder::default(),
            desired: Desired::default(),
            events: Vec::new(),
        }
    }

    fn answers(&mut self, up: &mut Vec<u8>) {
        while let Some(said) = self.guest.poll(&mut self.bench.pipeline) {
            let mut buffer = [0; FRAME_MAX];
            up.extend_from_slice(frame::encode(&said, &mut buffer).unwrap());
        }
    }

    /// Whatever is to be said at this moment, both ways, until both are silent.
    fn talk(&mut self) {
        for _ in 0..100 {
            self.host
                .advance(self.now, &mut self.desired, &mut self.events);
            let down = std::mem::take(self.host.output());
            let mut rest = &down[..];
            let mut up = Vec::new();
            while let Some(payload) = self.decoder.next(&mut rest) {
                let envelope = frame::decode(payload).unwrap();
                while !self.guest.is_ready(&self.bench.pipeline) {
                    self.bench.pipeline.work(64);
                    while let Some(said) = self.guest.poll(&mut self.bench.pipeline) {
                        let mut buffer = [0; FRAME_MAX];
                        up.extend_from_slice(frame::encode(&said, &mut buffer).unwrap());
                    }
                }
                self.guest.receive(&envelope, &mut self.bench.pipeline, 0);
            }
            while self.bench.pipeline.is_applying() {
                self.answers(&mut up);
                self.bench.pipeline.work(64);
            }
            self.answers(&mut up);
            if down.is_empty() && up.is_empty() {
                return;
            }
            self.host
                .receive(&up, self.now, &mut self.desired, &mut self.events);
        }
        panic!("They never come to an end");
    }

    fn wait(&mut self, span: Duration) {
        self.now += span;
        self.talk();
    }

    fn restarts(&self) -> usize {
        let is_one = |it: &&Event| matches!(it, Event::Restarted { .. });
        self.events.iter().filter(is_one).count()
    }

    fn has_link(&self, id: u16) -> bool {
        let tables = self.bench.pipeline.tables();
        tables.link(LinkId::new(id).unwrap()).is_some()
    }

    fn refused(&self) -> Vec<Key> {
        self.desired.refusals().map(|(key, _)| key).collect()
    }
}

#[test]
fn ten_thousand_refused_rows_cost_one_session_and_hold_nothing_up() {
    let mut pair = Pair::new(Capacity::default());
    pair.desired.put([link(16, 1), port(None)]);
    pair.talk();
    let begun = Instant::now();
    // An address of which no row tells.
    let nowhere = [192, 0, 2, 9];
    pair.desired
        .put((1..=10_000).map(|port| frontend(nowhere, port)));
    pair.desired.put([link(17, 1)]);
    pair.talk();
    println!("in force after {:?}", begun.elapsed());
    assert!(pair.has_link(17));
    assert_eq!(pair.refused().len(), 10_000);
    assert_eq!(pair.restarts(), 0);
    assert!(pair.host.is_settled());
    // Another pod comes meanwhile.
    let begun = Instant::now();
    let revision = pair.desired.put([link(18, 1)]);
    pair.talk();
    println!("a pod more after {:?}", begun.elapsed());
    assert!(pair.has_link(18));
    let in_force =
        |it: &Event| matches!(it, Event::InForce { revision: it, .. } if *it == revision);
    assert!(pair.events.iter().any(in_force));
    assert_eq!(pair.restarts(), 0);
    // And a life of the daemon later all of that is in force again at once.
    let mut later = Pair::new(Capacity::default());
    std::mem::swap(&mut later.desired, &mut pair.desired);
    later.talk();
    assert!(later.has_link(18) && later.refused().len() == 10_000);
    assert_eq!(later.restarts(), 0);
}

#[test]
fn what_stands_in_the_way_goes_and_the_refused_row_comes_into_force() {
    let mut pair = Pair::new(Capacity::TINY);
    let pods = [10, 0, 0, 16];
    pair.desired.put([
        link(16, 1),
        port(None),
        address(pods, AddressRole::Cluster),
        frontend(pods, 80),
    ]);
    pair.talk();
    assert_eq!(pair.refused().len(), 2, "a pod has that address");
    pair.desired.remove([link(16, 1).key()]);
    pair.talk();
    pair.wait(Duration::from_secs(1));
    assert_eq!(pair.refused(), []);
    assert_eq!(pair.restarts(), 0);
}

#[test]
fn two_that_trade_what_only_one_can_have_do_so_in_the_end() {
    let mut pair = Pair::new(Capacity::TINY);
    pair.desired.put([link(16, 1), link(17, 1)]);
    pair.talk();
    let mut rows = [pod_row(16, 17), pod_row(17, 16)];
    rows.iter_mut().for_each(|row| row.incarnation = 2);
    pair.desired.put(rows.map(Row::Link));
    pair.talk();
    assert!(pair.has_link(16) && pair.has_link(17));
    assert_eq!(pair.refused(), []);
    assert_eq!(pair.restarts(), 0);
}

#[test]
fn refused_rows_are_offered_again_less_and_less_often() {
    let mut guest = Guest::default();
    let bad = link(17, 1);
    guest.refuses.insert(bad.key(), RejectReason::Invalid);
    let mut now = Instant::now();
    let mut host = Session::new(now, 1);
    let (mut desired, mut events) = (Desired::default(), Vec::new());
    desired.put([bad.clone()]);
    let mut offers = 0;
    for second in 0..120u32 {
        // Something changes all the time.
        desired.put([link(18, second)]);
        for _ in 0..4 {
            host.advance(now, &mut desired, &mut events);
            let down = std::mem::take(host.output());
            guest.receive(&down);
            let up = std::mem::take(&mut guest.output);
            host.receive(&up, now, &mut desired, &mut events);
        }
        if guest.offered(&bad.key()) {
            offers += 1;
        }
        now += Duration::from_secs(1);
    }
    assert!((5..=12).contains(&offers), "{offers} times in two minutes");
    assert_eq!(desired.refusals().count(), 1);
    // Its own change counts at once.
    guest.refuses.clear();
    desired.put([link(17, 2)]);
    host.advance(now, &mut desired, &mut events);
    guest.receive(&std::mem::take(host.output()));
    assert_eq!(guest.rows.get(&bad.key()), Some(&link(17, 2)));
}

#[test]
fn a_set_that_is_not_complete_is_named_until_it_is() {
    let mut pair = Pair::new(Capacity::TINY);
    pair.desired
        .put([set(2), backend(0), port(Some(SetId(0))), link(16, 1)]);
    pair.talk();
    assert_eq!(pair.refused(), [set(2).key()]);
    pair.desired.put([link(17, 1)]);
    pair.talk();
    assert_eq!(pair.refused(), [set(2).key()]);
    assert!(pair.has_link(16) && pair.has_link(17));
    pair.desired.put([backend(1)]);
    pair.talk();
    assert_eq!(pair.refused(), []);
    // And goes as any other.
    pair.desired.remove([
        set(2).key(),
        backend(0).key(),
        backend(1).key(),
        port(None).key(),
    ]);
    pair.talk();
    assert!(pair.host.is_settled());
    assert_eq!((pair.refused(), pair.restarts()), (vec![], 0));
}

#[test]
fn a_refused_row_that_is_no_longer_desired_is_forgotten() {
    let mut pair = Pair::new(Capacity::TINY);
    let elsewhere = [192, 0, 2, 9];
    pair.desired
        .put([link(16, 1), port(None), frontend(elsewhere, 80)]);
    pair.talk();
    assert_eq!(pair.refused(), [frontend(elsewhere, 80).key()]);
    pair.desired.remove([frontend(elsewhere, 80).key()]);
    pair.talk();
    assert!(pair.host.is_settled());
    assert_eq!((pair.refused(), pair.restarts()), (vec![], 0));
}

#[test]
fn what_does_not_fit_is_left_out_and_all_is_taken_anew_once_it_fits() {
    let identity = |n: u32| {
        Row::Policy(PolicyRow::Identity(IdentityRow {
            address: core::net::Ipv4Addr::from_bits(0x0a01_0000 + n).into(),
            identity: Identity(300),
        }))
    };
    let mut pair = Pair::new(Capacity::TINY);
    pair.desired.put((0..2_000).map(identity));
    pair.desired.put([link(16, 1)]);
    pair.talk();
    assert!(pair.has_link(16), "a pod has its network nevertheless");
    assert!(!pair.refused().is_empty());
    assert_eq!(pair.restarts(), 0);
    pair.desired.remove((100..2_000).map(|n| identity(n).key()));
    pair.talk();
    pair.wait(Duration::from_secs(1));
    pair.wait(Duration::from_secs(1));
    assert_eq!(pair.refused(), []);
    assert_eq!(
        pair.restarts(),
        1,
        "what was denied for want of room is not any more"
    );
    assert!(pair.host.is_settled() && pair.has_link(16));
}

#[test]
fn generations_go_round_and_a_guest_that_names_the_last_one_breaks_nothing() {
    let mut guest = Guest {
        generation: Generation(u64::MAX),
        ..Guest::default()
    };
    let now = Instant::now();
    let mut host = Session::new(now, 1);
    let (mut desired, mut events) = (Desired::default(), Vec::new());
    desired.put([link(16, 1)]);
    for _ in 0..4 {
        host.advance(now, &mut desired, &mut events);
        guest.receive(&std::mem::take(host.output()));
        let up = std::mem::take(&mut guest.output);
        host.receive(&up, now, &mut desired, &mut events);
    }
    assert_eq!(guest.generation, Generation(1));
    assert!(host.is_settled());
}

/// A guest that reads nothing and still says all that makes the host begin again.
#[test]
fn a_guest_that_asks_for_everything_again_and_again_costs_little() {
    let mut desired = Desired::default();
    desired.put((16..1000).map(|id| link(id, 1)));
    let mut now = Instant::now();
    let begun = now;
    let mut host = Session::new(now, 1);
    let mut guest = Guest::default();
    let (mut events, mut sent, mut most) = (Vec::new(), 0, 0);
    while now < begun + Duration::from_secs(60) {
        host.advance(now, &mut desired, &mut events);
        let down = std::mem::take(host.output());
        sent += down.len();
        guest.receive(&down);
        guest.ask_for_everything();
        let up = std::mem::take(&mut guest.output);
        host.receive(&up, now, &mut desired, &mut events);
        most = most.max(host.output().len());
        now = host
            .deadline()
            .unwrap_or(now)
            .max(now + Duration::from_millis(1));
    }
    let whole: usize = 984 * 90;
    assert!(
        sent < 80 * whole,
        "{} times all rows in a minute",
        sent / whole
    );
    // What is not read does not pile up.
    let mut deaf = Session::new(now, 1);
    for _ in 0..100 {
        now += Duration::from_secs(5);
        deaf.advance(now, &mut desired, &mut events);
    }
    assert!(
        deaf.output().len() < 2 * FRAME_MAX,
        "{}",
        deaf.output().len()
    );
}
