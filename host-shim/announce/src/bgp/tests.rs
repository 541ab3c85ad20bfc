use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;
use rustbgpd_wire::notification::{NotificationCode, open_subcode};
use rustbgpd_wire::{Capability, Message, OpenMessage, Prefix as WirePrefix, encode_message};
use sluice_contract::Prefix;

use super::config::{BgpConfig, PeerConfig};
use super::{Farewell, NextHops, Speaker};
use crate::Routes;

const PATIENCE: Duration = Duration::from_secs(20);
const OWN: u32 = 64_512;
const ROUTER: u32 = 4_200_000_000;

fn prefix(text: &str) -> Prefix {
    let (address, length) = text.split_once('/').unwrap();
    Prefix::new(address.parse().unwrap(), length.parse().unwrap()).unwrap()
}

fn routes<'a>(all: impl IntoIterator<Item = &'a str>) -> Routes {
    Arc::new(all.into_iter().map(prefix).collect())
}

/// The router's side of one session, on loopback.
struct Router {
    stream: TcpStream,
}

fn config(port: u16, graceful_restart_seconds: u16) -> BgpConfig {
    let peer = PeerConfig {
        address: [127, 0, 0, 1].into(),
        asn: ROUTER,
        port,
        hold_seconds: 90,
        hops: None,
        ttl_security: false,
        password_file: None,
    };
    BgpConfig {
        asn: OWN,
        router_id: None,
        graceful_restart_seconds,
        peers: vec![peer],
    }
}

fn speaker(graceful_restart_seconds: u16) -> (Speaker, TcpListener) {
    speaker_with(graceful_restart_seconds, |_| {})
}

fn speaker_with(
    graceful_restart_seconds: u16,
    change: impl Fn(&mut PeerConfig),
) -> (Speaker, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut config = config(port, graceful_restart_seconds);
    config.peers.iter_mut().for_each(change);
    let next_hops = NextHops {
        v4: Some([192, 0, 2, 1].into()),
        v6: Some("2001:db8::1".parse().unwrap()),
    };
    let speaker = Speaker::start(config, next_hops).unwrap();
    (speaker, listener)
}

fn open(asn: u32, hold_time: u16, identifier: [u8; 4]) -> Message {
    let families = super::wire::FAMILIES.map(|afi| Capability::MultiProtocol {
        afi,
        safi: rustbgpd_wire::Safi::Unicast,
    });
    let mut capabilities = families.to_vec();
    capabilities.push(Capability::FourOctetAs { asn });
    Message::Open(OpenMessage {
        version: 4,
        my_as: 23_456,
        hold_time,
        bgp_identifier: identifier.into(),
        capabilities,
    })
}

impl Router {
    fn accept(listener: &TcpListener) -> Self {
        let (stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream }
    }

    /// With everything agreed upon.
    fn established(listener: &TcpListener) -> Self {
        let mut router = Self::accept(listener);
        assert!(matches!(router.hear(), Some(Message::Open(_))));
        router.say(&open(ROUTER, 30, [9, 9, 9, 9]));
        router.say(&Message::Keepalive);
        assert!(matches!(router.hear(), Some(Message::Keepalive)));
        router
    }

    fn say(&mut self, message: &Message) {
        let bytes = encode_message(message).unwrap();
        self.stream.write_all(&bytes).unwrap();
    }

    /// The next message; nothing at the end.
    fn hear(&mut self) -> Option<Message> {
        let mut header = [0; 19];
        self.stream.read_exact(&mut header).ok()?;
        let length = u16::from_be_bytes([header[16], header[17]]);
        let mut message = header.to_vec();
        message.resize(length.into(), 0);
        self.stream.read_exact(&mut message[19..]).ok()?;
        Some(rustbgpd_wire::decode_message(&mut Bytes::from(message), 4096).unwrap())
    }

    /// Routes as updates make them, until `done`.
    fn learn(&mut self, mut known: BTreeSet<String>, done: &[&str]) -> BTreeSet<String> {
        let wanted: BTreeSet<String> = done.iter().map(|it| (*it).to_owned()).collect();
        while known != wanted {
            match self.hear().expect("a message") {
                Message::Update(update) => {
                    let parsed = update.parse(true, false, &[]).unwrap();
                    let text =
                        |it: &WirePrefix| format!("{}/{}", it.addr_string(), it.prefix_len());
                    for it in &parsed.withdrawn {
                        known.remove(&text(&WirePrefix::V4(it.prefix)));
                    }
                    for it in &parsed.announced {
                        known.insert(text(&WirePrefix::V4(it.prefix)));
                    }
                    for attribute in &parsed.attributes {
                        match attribute {
                            rustbgpd_wire::PathAttribute::MpReachNlri(it) => {
                                known.extend(it.announced.iter().map(|it| text(&it.prefix)));
                            }
                            rustbgpd_wire::PathAttribute::MpUnreachNlri(it) => {
                                for it in &it.withdrawn {
                                    known.remove(&text(&it.prefix));
                                }
                            }
                            _ => {}
                        }
                    }
                }
                Message::Keepalive => {}
                other => panic!("{other:?}"),
            }
        }
        known
    }
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn o18_a_router_hears_what_is_served_and_what_is_no_longer() {
    let (speaker, listener) = speaker(0);
    let all = [
        "10.1.0.0/24",
        "198.51.100.1/32",
        "2001:db8:1::/64",
        "2001:db8:80::1/128",
    ];
    speaker.announce(routes(all));
    let mut router = Router::established(&listener);
    let known = router.learn(BTreeSet::new(), &all);
    until("a session", || speaker.report()[0].established);
    assert_eq!(speaker.report()[0].routes, 4);
    speaker.announce(routes(all.into_iter().skip(2)));
    let known = router.learn(known, &all[2..]);
    // More than one message holds.
    let many: Vec<String> = (0..1000u32)
        .map(|it| format!("10.{}.{}.0/24", it / 256, it % 256))
        .collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    speaker.announce(routes(many.iter().copied()));
    router.learn(known, &many);
    drop(speaker);
    loop {
        match router.hear() {
            Some(Message::Notification(it)) => break assert_eq!(it.code, NotificationCode::Cease),
            Some(_) => {}
            None => panic!("it went without a word"),
        }
    }
}

#[test]
fn o18_a_router_that_asks_again_is_told_again() {
    let (speaker, listener) = speaker(0);
    speaker.announce(routes(["10.1.0.0/24", "2001:db8:1::/64"]));
    let mut router = Router::established(&listener);
    router.learn(BTreeSet::new(), &["10.1.0.0/24", "2001:db8:1::/64"]);
    let again = rustbgpd_wire::RouteRefreshMessage::new(
        rustbgpd_wire::Afi::Ipv4,
        rustbgpd_wire::Safi::Unicast,
    );
    router.say(&Message::RouteRefresh(again));
    router.learn(BTreeSet::new(), &["10.1.0.0/24"]);
}

#[test]
fn z02_updates_of_any_content_do_not_end_the_session() {
    let (speaker, listener) = speaker(0);
    speaker.announce(routes(["10.1.0.0/24"]));
    let mut router = Router::established(&listener);
    router.learn(BTreeSet::new(), &["10.1.0.0/24"]);
    let mut seed = 1u64;
    let mut random = || {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (seed >> 33) as u8
    };
    for _ in 0..20_000 {
        let body: Vec<u8> = (0..random()).map(|_| random()).collect();
        let length = u16::try_from(19 + body.len()).unwrap();
        let message = [&[0xff; 16][..], &length.to_be_bytes(), &[2], &body].concat();
        router.stream.write_all(&message).unwrap();
    }
    // Read to the end, and still a session.
    speaker.announce(routes(["10.2.0.0/24"]));
    router.learn(BTreeSet::from(["10.1.0.0/24".into()]), &["10.2.0.0/24"]);
    let report = &speaker.report()[0];
    assert!(report.established && report.sessions == 1, "{report:?}");
}

/// The fuzz target's body, from its seeds, without its engine.
#[test]
fn z02_what_a_router_sends_never_ends_the_daemon() {
    let seeds = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fuzz/seeds/bgp");
    let seeds = std::fs::read_dir(seeds).unwrap();
    let seeds = seeds.map(|it| std::fs::read(it.unwrap().path()).unwrap());
    // A message has a marker of 16 bytes, a length and a type.
    let seeds: Vec<Vec<u8>> = seeds.filter(|it| it.len() > 19).collect();
    assert!(!seeds.is_empty());
    let each = 80_000 / seeds.len();
    let mut state = 7u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        (state >> 33) as usize % below
    };
    for seed in seeds {
        super::fuzz_router(&seed);
        for _ in 0..each {
            let mut bytes = seed.clone();
            for _ in 0..=random(4) {
                // Markers are known, and a wrong one is found at once.
                let at = 16 + random(bytes.len() - 16);
                bytes[at] = random(256) as u8;
            }
            bytes.truncate(19 + random(bytes.len()));
            super::fuzz_router(&bytes);
        }
    }
}

#[test]
fn o18_with_ttl_security_only_a_router_on_the_link_has_a_session() {
    for (ttl_security, hops, ttl, is_heard) in [
        (true, None, 255, true),
        (true, None, 254, false),
        (true, None, 1, false),
        (true, Some(3), 253, true),
        (true, Some(3), 252, false),
        (false, None, 1, true),
    ] {
        let (speaker, listener) = speaker_with(0, |peer| {
            (peer.ttl_security, peer.hops) = (ttl_security, hops);
        });
        listener.set_ttl(ttl).unwrap();
        speaker.announce(routes(["10.1.0.0/24"]));
        if is_heard {
            let mut router = Router::established(&listener);
            router.learn(BTreeSet::new(), &["10.1.0.0/24"]);
        } else {
            let what = format!("TTL {ttl}, hops {hops:?}: refused");
            until(&what, || speaker.report()[0].problem.is_some());
            assert!(!speaker.report()[0].established, "{what}");
        }
    }
}

#[test]
fn o19_nothing_is_said_before_it_is_known_and_a_silent_end_has_no_farewell() {
    let (speaker, listener) = speaker(120);
    listener.set_nonblocking(true).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(
        listener.accept().is_err(),
        "it calls before it knows what to say"
    );
    listener.set_nonblocking(false).unwrap();
    speaker.announce(routes(["10.1.0.0/24"]));
    let mut router = Router::established(&listener);
    router.learn(BTreeSet::new(), &["10.1.0.0/24"]);
    speaker.stop(Farewell::Silent);
    let rest: Vec<_> = std::iter::from_fn(|| router.hear()).collect();
    let is_quiet = |it: &Message| matches!(it, Message::Update(_) | Message::Keepalive);
    assert!(rest.iter().all(is_quiet), "{rest:?}");
}

#[test]
fn o18_routers_that_are_others_than_configured_are_refused_by_name() {
    let cases = [
        (
            open(65_000, 90, [9, 9, 9, 9]),
            open_subcode::BAD_PEER_AS,
            "65000",
        ),
        (
            open(ROUTER, 2, [9, 9, 9, 9]),
            open_subcode::UNACCEPTABLE_HOLD_TIME,
            "2 s",
        ),
        (
            open(ROUTER, 90, [0; 4]),
            open_subcode::BAD_BGP_IDENTIFIER,
            "0.0.0.0",
        ),
    ];
    for (theirs, subcode, word) in cases {
        let (speaker, listener) = speaker(0);
        speaker.announce(routes(["10.1.0.0/24"]));
        let mut router = Router::accept(&listener);
        router.hear();
        router.say(&theirs);
        let Some(Message::Notification(it)) = router.hear() else {
            panic!("{word}: no notification");
        };
        assert_eq!(
            (it.code, it.subcode),
            (NotificationCode::OpenMessage, subcode)
        );
        until("the reason", || {
            let report = &speaker.report()[0];
            report.problem.as_ref().is_some_and(|it| it.contains(word)) && !report.established
        });
    }
}

#[test]
fn a_configuration_that_cannot_be_is_refused_by_its_field() {
    let good = config(179, 120);
    good.check().unwrap();
    let mut cases: Vec<(BgpConfig, &str)> = Vec::new();
    let mut case = |field, change: &dyn Fn(&mut BgpConfig)| {
        let mut changed = good.clone();
        change(&mut changed);
        cases.push((changed, field));
    };
    case("asn", &|it| it.asn = 0);
    case("router_id", &|it| it.router_id = Some([0; 4].into()));
    case("graceful_restart_seconds", &|it| {
        it.graceful_restart_seconds = 5000;
    });
    case("peers", &|it| it.peers.clear());
    case("asn", &|it| it.peers[0].asn = 23_456);
    case("hold_seconds", &|it| it.peers[0].hold_seconds = 2);
    case("hops", &|it| it.peers[0].hops = Some(0));
    case("port", &|it| it.peers[0].port = 0);
    case("address", &|it| it.peers[0].address = [0; 4].into());
    case("twice", &|it| it.peers.push(it.peers[0].clone()));
    for (config, word) in cases {
        let (field, reason) = config.check().unwrap_err();
        assert!(
            format!("{field}: {reason}").contains(word),
            "{field}: {reason}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Whatever a router says, before or after it is agreed with, the speaker goes on, and has a session with the next.
    #[test]
    fn z02_what_a_router_says_ends_its_session_at_most(
        bytes in prop::collection::vec(any::<u8>(), 1..200),
        with_header: bool,
        is_established: bool,
    ) {
        let (speaker, listener) = speaker(0);
        speaker.announce(routes(["10.1.0.0/24"]));
        let mut router = match is_established {
            true => Router::established(&listener),
            false => Router::accept(&listener),
        };
        let mut message = bytes;
        if with_header {
            let length = u16::try_from(message.len() + 18).unwrap();
            let mut whole = [&[0xff; 16][..], &length.to_be_bytes()].concat();
            whole.append(&mut message);
            message = whole;
        }
        // It may have hung up.
        let _ = router.stream.write_all(&message);
        let _ = router.stream.shutdown(std::net::Shutdown::Write);
        while router.hear().is_some() {}
        drop(router);
        let mut router = Router::established(&listener);
        router.learn(BTreeSet::new(), &["10.1.0.0/24"]);
    }
}
