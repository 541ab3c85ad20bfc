//! The host's end against a small guest that keeps the contract's rules, over a channel that loses and garbles.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use sluice_contract::message::Counter;
use sluice_contract::name::{Learnt, NameId};
use sluice_contract::report::{CounterId, RejectReason};
use sluice_contract::row::{LinkRow, NodeRow};
use sluice_contract::types::Identity;
use sluice_contract::{Generation, LinkId, Mac, Row, VERSION, limits};

use super::desired::Desired;
use super::session::{Event, Session};
use super::testing::Guest;

fn link(id: u16, incarnation: u32) -> Row {
    let id = LinkId::new(id).unwrap();
    Row::Link(LinkRow {
        id,
        mac: Mac::of_pod(id),
        addresses: heapless_from([10, 0, 0, id.raw() as u8].into()),
        mtu: 1500,
        identity: Identity(7),
        incarnation,
        tenant: sluice_contract::Tenant::NONE,
    })
}

fn heapless_from(address: std::net::IpAddr) -> heapless::Vec<std::net::IpAddr, 4> {
    heapless::Vec::from_slice(&[address]).unwrap()
}

struct Channel {
    now: Instant,
    host: Session,
    guest: Guest,
    desired: Desired,
    events: Vec<Event>,
}

impl Channel {
    fn new(guest: Guest, desired: Desired) -> Self {
        let now = Instant::now();
        Self {
            now,
            host: Session::new(now, 1),
            guest,
            desired,
            events: Vec::new(),
        }
    }

    /// One exchange; what travels is passed through `spoil` first.
    fn exchange(&mut self, mut spoil: impl FnMut(Vec<u8>) -> Vec<u8>) {
        self.host
            .advance(self.now, &mut self.desired, &mut self.events);
        let down = spoil(std::mem::take(self.host.output()));
        self.guest.receive(&down);
        let up = spoil(std::mem::take(&mut self.guest.output));
        self.host
            .receive(&up, self.now, &mut self.desired, &mut self.events);
    }

    fn exchanges(&mut self, count: usize) {
        (0..count).for_each(|_| self.exchange(|bytes| bytes));
    }

    /// Lets time pass up to the session's deadline.
    fn pass_time(&mut self) {
        self.now = self.host.deadline().unwrap_or(self.now).max(self.now);
    }

    fn in_force(&self) -> Vec<(u64, u64)> {
        let number = |e: &Event| match e {
            Event::InForce {
                generation,
                revision,
            } => Some((generation.0, *revision)),
            _ => None,
        };
        self.events.iter().filter_map(number).collect()
    }
}

fn desired_rows(rows: impl IntoIterator<Item = Row>) -> Desired {
    let mut desired = Desired::default();
    desired.put(rows);
    desired
}

#[test]
fn guest_gets_all_rows_afresh_and_then_only_differences() {
    let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1), link(17, 1)]));
    channel.exchanges(2);
    assert_eq!(channel.in_force(), [(1, 1)]);
    assert_eq!(channel.guest.rows.len(), 2);

    channel
        .desired
        .put([Row::Node(NodeRow::default()), link(17, 2)]);
    let key = link(16, 1).key();
    channel.desired.remove([key]);
    channel.exchange(|bytes| {
        assert!(
            bytes.len() < 250,
            "more than the differences: {}",
            bytes.len()
        );
        bytes
    });
    assert_eq!(channel.in_force(), [(1, 1), (2, 3)]);
    assert_eq!(channel.guest.rows.len(), 2);
    assert_eq!(
        channel.guest.rows.get(&link(17, 2).key()),
        Some(&link(17, 2))
    );
}

#[test]
fn guest_of_another_version_is_refused_with_its_number_and_gets_no_rows() {
    let guest = Guest {
        version: VERSION + 1,
        ..Guest::default()
    };
    let mut channel = Channel::new(guest, desired_rows([link(16, 1)]));
    channel.exchanges(5);
    assert_eq!(
        channel.events,
        [Event::VersionRefused { guest: VERSION + 1 }]
    );
    assert!(channel.guest.rows.is_empty());
    let mut state = super::State::default();
    state.learn(channel.events.remove(0));
    let text = state.status.problem.unwrap();
    assert!(text.contains(&format!("version {}", VERSION + 1)), "{text}");
    assert!(text.contains(&format!("version {VERSION}:")), "{text}");
}

#[test]
fn what_came_and_went_or_is_as_it_was_costs_no_word() {
    let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1)]));
    channel.exchanges(3);
    channel.desired.put([link(16, 1), link(17, 1)]);
    channel
        .desired
        .remove([link(17, 1).key(), link(18, 1).key()]);
    channel.exchange(|bytes| {
        assert_eq!(bytes, [0; 0]);
        bytes
    });
    assert_eq!(channel.in_force(), [(1, 1), (1, 3)]);
}

#[test]
fn nobody_is_told_anything_before_what_is_desired_is_known() {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    let name = format!("sluice-control-held-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let control = super::Control::new(|_| {}).unwrap();
    // Two parts of it, each known at its own time.
    control.hold();
    control.hold();
    control
        .serve(UnixListener::bind_addr(&address).unwrap(), |_| true)
        .unwrap();
    let mut stream = UnixStream::connect_addr(&address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(600)))
        .unwrap();
    let mut byte = [0];
    for _ in 0..2 {
        let silence = std::io::Read::read(&mut stream, &mut byte).unwrap_err();
        assert_eq!(silence.kind(), std::io::ErrorKind::WouldBlock);
        control.put([link(16, 1)]);
        control.release();
    }
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    assert_eq!(std::io::Read::read(&mut stream, &mut byte).unwrap(), 1);
    control.stop();
}

#[test]
fn guest_that_boots_late_is_greeted_again() {
    let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1)]));
    for _ in 0..4 {
        channel.exchange(|_| Vec::new());
        channel.pass_time();
    }
    channel.exchanges(3);
    assert_eq!(channel.guest.rows.len(), 1);
}

#[test]
fn guest_that_falls_silent_is_asked_and_then_greeted_again() {
    let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1)]));
    channel.exchanges(3);
    assert!(channel.host.is_settled());
    for _ in 0..3 {
        channel.pass_time();
        channel.exchange(|_| Vec::new());
    }
    assert!(!channel.host.is_settled());
    channel.guest = Guest::default();
    for _ in 0..4 {
        channel.exchanges(3);
        channel.pass_time();
    }
    assert_eq!(channel.guest.rows.len(), 1);
}

#[test]
fn quiet_channel_costs_a_ping_every_few_seconds_and_no_more() {
    let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1)]));
    channel.exchanges(3);
    let start = channel.now;
    let mut bytes = 0;
    while channel.now < start + Duration::from_secs(60) {
        channel.exchange(|b| {
            bytes += b.len();
            b
        });
        channel.pass_time();
    }
    assert!(bytes > 0 && bytes < 2000, "{bytes} bytes in a minute");
    assert_eq!(channel.in_force().len(), 1);
}

#[test]
fn n14_names_come_in_pages_as_one_answer_and_no_more_than_is_told_at_once() {
    for count in [0, 3, limits::NAMES_BATCH, limits::NAMES_TOLD + 100] {
        let mut guest = Guest::default();
        let learnt = |n: usize| Learnt {
            link: LinkId::new(16 + (n % 2) as u16).unwrap(),
            name: NameId(n as u64),
            address: [10, 0, 0, 1].into(),
            left: n as i32,
        };
        guest.names = (0..count).map(learnt).collect();
        let mut channel = Channel::new(guest, Desired::default());
        assert!(!channel.host.ask_for_names(4, None), "nobody is there yet");
        channel.exchanges(3);
        for (token, link) in [(5, None), (6, LinkId::new(17))] {
            assert!(channel.host.ask_for_names(token, link));
            channel.exchanges(1);
            let wanted = (0..count).map(learnt);
            let wanted = wanted.filter(|it| link.is_none_or(|link| link == it.link));
            let names: Vec<_> = wanted.take(limits::NAMES_TOLD).collect();
            let told = Event::Names { token, names };
            assert_eq!(channel.events.last(), Some(&told));
        }
    }
}

#[test]
fn counters_come_in_pages_as_one_answer() {
    let mut channel = Channel::new(Guest::default(), Desired::default());
    channel.exchanges(3);
    assert!(channel.host.ask_for_stats(5));
    channel.exchanges(1);
    let id = CounterId::Received;
    let counters = vec![Counter { id, value: 0 }, Counter { id, value: 1 }];
    assert_eq!(
        channel.events.last(),
        Some(&Event::Stats { token: 5, counters })
    );
}

#[test]
fn generation_goes_on_from_that_of_a_guest_that_kept_running() {
    let guest = Guest {
        generation: Generation(41),
        ..Guest::default()
    };
    let mut channel = Channel::new(guest, desired_rows([link(16, 1)]));
    channel.exchanges(3);
    assert_eq!(channel.in_force(), [(42, 1)]);
}

/// What a bad channel does to a piece of it.
#[derive(Clone, Copy, Debug)]
enum Spoil {
    Nothing,
    Lose,
    Truncate(usize),
    Flip(usize),
    Twice,
    Prepend(u8),
}

fn spoilt(spoil: Spoil, mut bytes: Vec<u8>) -> Vec<u8> {
    match spoil {
        Spoil::Nothing => {}
        Spoil::Lose => bytes.clear(),
        Spoil::Truncate(n) => bytes.truncate(n),
        Spoil::Flip(n) if !bytes.is_empty() => {
            let at = n % bytes.len();
            bytes[at] ^= 1 << (n % 8);
        }
        Spoil::Flip(_) => {}
        Spoil::Twice => bytes.extend(bytes.clone()),
        Spoil::Prepend(n) => bytes.splice(0..0, (0..n).map(|i| i ^ n)).for_each(drop),
    }
    bytes
}

fn spoils() -> impl Strategy<Value = Vec<Spoil>> {
    let one = prop_oneof![
        2 => Just(Spoil::Nothing),
        1 => Just(Spoil::Lose),
        2 => (0usize..400).prop_map(Spoil::Truncate),
        2 => (0usize..400).prop_map(Spoil::Flip),
        1 => Just(Spoil::Twice),
        1 => any::<u8>().prop_map(Spoil::Prepend),
    ];
    proptest::collection::vec(one, 0..60)
}

proptest! {
    #[test]
    fn whatever_the_channel_did_the_tables_end_as_desired(
        spoils in spoils(), changes in proptest::collection::vec((16u16..24, 0u32..3), 1..20),
    ) {
        let mut channel = Channel::new(Guest::default(), Desired::default());
        let mut expected = BTreeMap::new();
        let mut changes = changes.into_iter();
        for pair in spoils.chunks(2) {
            if let Some((id, incarnation)) = changes.next() {
                let row = link(id, incarnation);
                if incarnation == 0 {
                    expected.remove(&row.key());
                    channel.desired.remove([row.key()]);
                } else {
                    expected.insert(row.key(), row.clone());
                    channel.desired.put([row]);
                }
            }
            let mut pair = pair.iter();
            channel.exchange(|b| spoilt(*pair.next().unwrap_or(&Spoil::Nothing), b));
            channel.pass_time();
        }
        for _ in 0..12 {
            channel.exchanges(3);
            channel.pass_time();
        }
        prop_assert_eq!(&channel.guest.rows, &expected);
        prop_assert!(channel.host.is_settled());
    }

    #[test]
    fn any_bytes_from_the_guest_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..5000)) {
        let mut channel = Channel::new(Guest::default(), desired_rows([link(16, 1)]));
        channel.host.receive(&bytes, channel.now, &mut channel.desired, &mut channel.events);
        for _ in 0..4 {
            channel.exchanges(3);
            channel.pass_time();
        }
        prop_assert_eq!(channel.guest.rows.len(), 1);
    }
}

#[test]
fn rows_reach_a_guest_over_the_socket_and_waiters_are_told() {
    use std::io::{Read, Write};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    let name = format!("sluice-control-test-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let gate = Arc::new(Mutex::new(Vec::new()));
    let told = gate.clone();
    let control = super::Control::new(move |open| told.lock().unwrap().push(open)).unwrap();
    control
        .serve(UnixListener::bind_addr(&address).unwrap(), |_| true)
        .unwrap();
    let serve = std::thread::spawn(move || {
        let mut stream = UnixStream::connect_addr(&address).unwrap();
        let mut guest = Guest::default();
        let (key, reason) = (link(17, 1).key(), RejectReason::Taken);
        guest.refuses.insert(key, reason);
        let mut chunk = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut chunk) {
            guest.receive(&chunk[..n]);
            if stream
                .write_all(&std::mem::take(&mut guest.output))
                .is_err()
            {
                break;
            }
        }
        guest
    });
    let limit = Duration::from_secs(10);
    let revision = control.put([link(16, 1)]);
    assert_eq!(control.wait(revision, link(16, 1).key(), limit), Ok(()));
    let revision = control.put([link(17, 1)]);
    let refused = control
        .wait(revision, link(17, 1).key(), limit)
        .unwrap_err();
    let text = "Link 17 is not in force: something else has the same address";
    assert_eq!(refused.to_string(), text);
    assert_eq!(control.counters(limit).unwrap().len(), 2);
    assert!(control.status().connected);
    assert_eq!(
        *gate.lock().unwrap(),
        [false, true],
        "shut for the new guest, open once it has tables"
    );
    control.stop();
    assert_eq!(serve.join().unwrap().rows.len(), 1);
}

#[test]
fn what_a_guest_says_drives_no_terminal() {
    let mut state = super::State::default();
    let text = "\u{1b}]0;owned\u{7}\u{1b}[2Jgone\n\u{9b}31m".to_owned();
    state.learn(Event::Fault { text });
    let note = &state.status.notes[0];
    assert!(note.contains("gone"), "{note:?}");
    assert!(!note.chars().any(char::is_control), "{note:?}");
}

#[test]
fn another_process_than_the_machine_is_not_taken_for_the_guest() {
    use std::io::Read;
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    let name = format!("sluice-control-admits-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes()).unwrap();
    let control = super::Control::new(|_| {}).unwrap();
    let own = std::process::id().cast_signed();
    let machine = Arc::new(Mutex::new(1));
    let expected = machine.clone();
    let admits = move |pid| pid == Some(*expected.lock().unwrap());
    let listener = UnixListener::bind_addr(&address).unwrap();
    control.serve(listener, admits).unwrap();
    let mut byte = [0];
    let mut stranger = UnixStream::connect_addr(&address).unwrap();
    assert_eq!(
        stranger.read(&mut byte).unwrap(),
        0,
        "closed without a word"
    );
    assert!(!control.status().connected);
    *machine.lock().unwrap() = own;
    let mut guest = UnixStream::connect_addr(&address).unwrap();
    assert_eq!(guest.read(&mut byte).unwrap(), 1, "greeted");
    assert!(control.status().connected);
    control.stop();
}

#[test]
fn guest_that_talks_too_much_is_counted_and_not_logged() {
    let mut state = super::State::default();
    for _ in 0..1000 {
        let text = "again".to_owned();
        state.learn(Event::Fault { text });
    }
    assert!(
        state.status.lines_dropped >= 960,
        "{}",
        state.status.lines_dropped
    );
    assert_eq!(state.status.notes.len(), super::NOTES);
}
