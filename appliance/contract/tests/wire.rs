//! The bytes of the boundary: golden encodings, hostile streams, and every cut of them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use proptest::prelude::*;
use sluice_contract::frame::{self, Decoder, FRAME_MAX, HEADER, MAGIC};
use sluice_contract::message::{Envelope, GuestHello, Room};
use sluice_contract::report::{DropReason, Field, Reject, RejectReason};
use sluice_contract::row::LinkRow;
use sluice_contract::service::ServiceKey;
use sluice_contract::{
    Generation, Identity, Key, LinkId, Mac, Protocol, Row, ToGuest, ToHost, VERSION, limits,
};
use std::net::IpAddr;

fn link(raw: u16) -> LinkId {
    LinkId::new(raw).expect("a valid link id")
}

fn encoded<M: serde::Serialize>(message: M) -> Vec<u8> {
    let mut buffer = [0; FRAME_MAX];
    frame::encode(
        &Envelope {
            session: 7,
            sequence: 3,
            message,
        },
        &mut buffer,
    )
    .expect("fits")
    .to_vec()
}

fn all_payloads(mut stream: &[u8]) -> (Vec<Vec<u8>>, u64) {
    let mut decoder = Decoder::default();
    let mut payloads = Vec::new();
    while let Some(payload) = decoder.next(&mut stream) {
        payloads.push(payload.to_vec());
    }
    (payloads, decoder.garbage())
}

fn a_put() -> ToGuest {
    let addresses = ["10.1.0.5", "fd00:1::5"].map(|a| a.parse::<IpAddr>().unwrap());
    ToGuest::Put(Row::Link(LinkRow {
        id: link(16),
        mac: Mac::of_pod(link(16)),
        addresses: heapless::Vec::from_slice(&addresses).unwrap(),
        mtu: 1500,
        identity: Identity(9),
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    }))
}

#[test]
fn golden_bytes_of_each_kind_of_message() {
    let messages: &[(&str, Vec<u8>)] = &[
        ("hello", encoded(ToGuest::Hello { version: 1 })),
        (
            "begin",
            encoded(ToGuest::Begin {
                generation: Generation(300),
                fresh: true,
            }),
        ),
        ("put-link", encoded(a_put())),
        ("remove-link", encoded(ToGuest::Remove(Key::Link(link(16))))),
        (
            "commit",
            encoded(ToGuest::Commit {
                generation: Generation(300),
            }),
        ),
        ("guest-hello", encoded(ToHost::Hello(a_guest()))),
        (
            "reject",
            encoded(ToHost::Reject {
                generation: Generation(300),
                reject: a_reject(),
            }),
        ),
        (
            "ack",
            encoded(ToHost::Ack {
                generation: Generation(300),
                refused: 2,
            }),
        ),
        (
            "refused",
            encoded(ToHost::Refused {
                generation: Generation(300),
                rows: [a_reject(), a_reject()].into_iter().collect(),
            }),
        ),
    ];
    let now: String = messages
        .iter()
        .map(|(name, bytes)| {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            format!("{name} {hex}\n")
        })
        .collect();
    assert_eq!(
        include_str!("golden.txt"),
        now,
        "an encoding changed: see the rules in src/lib.rs"
    );
}

fn a_guest() -> GuestHello {
    GuestHello {
        version: 1,
        image: [0xab; 20],
        generation: Generation(0),
        ram_mib: 64,
        uptime_us: 1000,
        room: Room {
            addresses: 1,
            frontends: 2,
            ports: 3,
            sets: 4,
            backends: 5,
            chunks: 6,
            sources: 7,
            identities: 8,
            bindings: 9,
            rulesets: 10,
            classes: 11,
            spans: 12,
            names: 13,
            named: 14,
        },
    }
}

fn a_reject() -> Reject {
    Reject {
        object: Some(Key::Link(link(16))),
        field: Field::Addresses,
        reason: RejectReason::Taken,
    }
}

#[test]
fn a_full_message_of_refused_rows_fits_into_a_frame() {
    let address = "fd00::1".parse().unwrap();
    let object = Some(Key::Service(ServiceKey::Frontend {
        address,
        protocol: Protocol::Sctp,
        port: u16::MAX,
    }));
    let reject = Reject {
        object,
        field: Field::Dscp,
        reason: RejectReason::Full(u32::MAX),
    };
    let rows = std::iter::repeat_n(reject, limits::REFUSED_BATCH).collect();
    let generation = Generation(u64::MAX);
    let bytes = encoded(ToHost::Refused { generation, rows });
    assert!(bytes.len() < limits::FRAME_PAYLOAD, "{}", bytes.len());
}

#[test]
fn drop_reasons_have_distinct_names_and_meanings() {
    let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), DropReason::ALL.len());
    assert!(
        DropReason::ALL
            .iter()
            .all(|r| r.meaning().len() > 10 && r.index() < DropReason::COUNT)
    );
}

#[test]
fn a_broken_frame_costs_one_frame() {
    let mut stream = encoded(ToGuest::Ping { token: 1 });
    let mut broken = encoded(ToGuest::Ping { token: 2 });
    broken[HEADER] ^= 1;
    stream.extend(broken);
    stream.extend(b"noise without meaning");
    stream.extend(encoded(ToGuest::Ping { token: 3 }));
    let (payloads, garbage) = all_payloads(&stream);
    let tokens: Vec<_> = payloads
        .iter()
        .map(
            |p| match frame::decode::<Envelope<ToGuest>>(p).map(|e| e.message) {
                Some(ToGuest::Ping { token }) => token,
                other => panic!("not a ping: {other:?}"),
            },
        )
        .collect();
    assert_eq!(tokens, [1, 3]);
    assert!(garbage > 0);
}

#[test]
fn an_impossible_length_is_garbage_at_once() {
    let mut stream = MAGIC.to_vec();
    stream.extend([0xff, 0xff, 0, 0, 0, 0]);
    stream.extend(encoded(ToGuest::Ping { token: 4 }));
    assert_eq!(all_payloads(&stream).0.len(), 1);
}

#[test]
fn link_ids_that_802_1q_reserves_do_not_decode() {
    for raw in [0u16, 4095, 65535] {
        let bytes = postcard::to_allocvec(&raw).unwrap();
        assert!(postcard::from_bytes::<LinkId>(&bytes).is_err(), "{raw}");
    }
}

proptest! {
    #[test]
    fn noise_never_decodes_to_a_panic(noise in proptest::collection::vec(any::<u8>(), 0..9000)) {
        for payload in all_payloads(&noise).0 {
            let _ = frame::decode::<Envelope<ToGuest>>(&payload);
        }
        let _ = frame::decode::<Envelope<ToGuest>>(&noise);
        let _ = frame::decode::<Envelope<ToHost>>(&noise);
    }

    #[test]
    fn frames_survive_any_cut_of_the_stream(tokens in proptest::collection::vec(any::<u32>(), 1..20), cut in 1usize..40) {
        let stream: Vec<u8> = tokens.iter().flat_map(|&token| encoded(ToGuest::Ping { token })).collect();
        let mut decoder = Decoder::default();
        let mut seen = Vec::new();
        for mut piece in stream.chunks(cut) {
            while let Some(payload) = decoder.next(&mut piece) {
                seen.push(frame::decode::<Envelope<ToGuest>>(payload).map(|e| e.message));
            }
        }
        let want: Vec<_> = tokens.iter().map(|&token| Some(ToGuest::Ping { token })).collect();
        prop_assert_eq!(seen, want);
        prop_assert_eq!(decoder.garbage(), 0);
    }

    #[test]
    fn every_truncation_of_a_message_is_refused(cut in 0usize..60) {
        let bytes = postcard::to_allocvec(&a_put()).unwrap();
        prop_assume!(cut < bytes.len());
        prop_assert!(frame::decode::<ToGuest>(&bytes[..cut]).is_none());
    }

    #[test]
    fn frames_after_noise_are_found(noise in proptest::collection::vec(any::<u8>(), 0..200), token: u32) {
        prop_assume!(!noise.windows(4).any(|w| w == MAGIC));
        prop_assume!((1..4).all(|n| !noise.ends_with(&MAGIC[..n])));
        let mut stream = noise;
        stream.extend(encoded(ToGuest::Ping { token }));
        prop_assert_eq!(all_payloads(&stream).0.len(), 1);
    }
}

/// The sources without comments and white space, so that only a change of meaning counts.
fn fingerprint() -> String {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    files.sort();
    let mut text = String::new();
    for file in files {
        for line in std::fs::read_to_string(file).unwrap().lines() {
            let code = line.split("//").next().unwrap_or_default();
            text.extend(code.chars().filter(|c| !c.is_whitespace()));
        }
    }
    format!("{:08x}", crc32fast::hash(text.as_bytes()))
}

#[test]
fn the_version_moves_when_the_contract_does() {
    let lock = include_str!("../version.lock");
    let now = format!("version {VERSION} sources {}\n", fingerprint());
    assert_eq!(
        lock, now,
        "the contract's sources changed: if any encoding changed since the last release, raise VERSION; \
         then write the second line into appliance/contract/version.lock"
    );
}
