//! Both sides hold for any bytes and any order of requests, and every message there is survives the wire.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::time::Duration;

use proptest::prelude::*;

use crate::client::{Client, ClientError};
use crate::message::{
    CarriedCounts, DropCounts, Page, PortCounters, PortKind, Refusal, Reply, Request, Status, text,
};
use crate::offloads::Offloads;
use crate::server::Server;
use crate::testing::{RememberedPorts, fuzz_client, fuzz_server, identity};
use crate::{HOLD_MAX_MILLIS, ID_MAX, PACKET_MAX, packet};

fn offloads() -> impl Strategy<Value = Offloads> {
    any::<[bool; 4]>().prop_map(|[checksum, tso4, tso6, uso]| Offloads {
        checksum,
        tso4,
        tso6,
        uso,
    })
}

fn request() -> impl Strategy<Value = Request> {
    let id = prop_oneof![8 => 1u16..20, 1 => any::<u16>()];
    let kind = prop_oneof![Just(PortKind::Tap), Just(PortKind::Socket)];
    prop_oneof![
        1 => (".{0,80}", any::<bool>()).prop_map(|(daemon, take_over)| Request::Hello {
            daemon: text(&daemon),
            take_over,
        }),
        4 => (id.clone(), kind).prop_map(|(id, kind)| Request::AddPort { id, kind }),
        3 => id.prop_map(|id| Request::RemovePort { id }),
        1 => any::<u32>().prop_map(|millis| Request::Hold { millis }),
        1 => Just(Request::Release),
        1 => offloads().prop_map(Request::Offloads),
        1 => Just(Request::Status),
        2 => (0u16..20).prop_map(|after| Request::Counters { after }),
        1 => Just(Request::Freeze),
        1 => Just(Request::Thaw),
        1 => Just(Request::Quit),
        2 => (0u16..20).prop_map(|id| Request::Descriptor { id }),
    ]
}

/// What the server should have made of the requests so far.
#[derive(Debug, Default)]
struct Model {
    owner: Option<u64>,
    ports: BTreeMap<u16, PortKind>,
    held: Option<Duration>,
    frozen: bool,
    quit: bool,
}

impl Model {
    fn obey(&mut self, from: u64, request: &Request, descriptors: usize) -> Result<(), Refusal> {
        let wanted = usize::from(matches!(request, Request::AddPort { .. }));
        if descriptors != wanted {
            return Err(Refusal::Descriptor);
        }
        if let Request::Hello { take_over, .. } = request {
            if self.owner.is_some_and(|owner| owner != from) && !take_over {
                return Err(Refusal::InUse);
            }
            self.owner = Some(from);
            return Ok(());
        }
        if self.owner != Some(from) {
            return Err(Refusal::HelloFirst);
        }
        match request {
            Request::AddPort { id, .. }
            | Request::RemovePort { id }
            | Request::Descriptor { id }
                if *id == 0 || *id > ID_MAX =>
            {
                return Err(Refusal::Id);
            }
            Request::AddPort { id, kind } => {
                self.ports.insert(*id, *kind);
            }
            Request::RemovePort { id } => {
                self.ports.remove(id).ok_or(Refusal::NoSuchPort)?;
            }
            Request::Hold { millis } => {
                self.held = Some(Duration::from_millis((*millis).min(HOLD_MAX_MILLIS).into()));
            }
            Request::Release => self.held = None,
            Request::Freeze => self.frozen = true,
            Request::Thaw => self.frozen = false,
            Request::Quit => self.quit = true,
            Request::Descriptor { id } if !self.ports.contains_key(id) => {
                return Err(Refusal::NoSuchPort);
            }
            _ => {}
        }
        Ok(())
    }
}

fn descriptors(count: usize) -> Vec<OwnedFd> {
    (0..count)
        .map(|_| OwnedFd::from(File::open("/dev/null").unwrap()))
        .collect()
}

proptest! {
    #[test]
    fn server_does_what_a_model_of_it_does(
        steps in proptest::collection::vec(
            (0u64..3, request(), prop_oneof![8 => Just(None), 1 => (0usize..3).prop_map(Some)]), 1..60),
    ) {
        let mut server = Server::new(identity(), RememberedPorts::default());
        let mut model = Model::default();
        let mut client = Client::default();
        for (from, request, count) in steps {
            let right = usize::from(matches!(request, Request::AddPort { .. }));
            let count = count.unwrap_or(right);
            let before = model.owner;
            let expected = model.obey(from, &request, count);
            let packet = client.request(&request).unwrap();
            let answer = server.receive(from, &packet, descriptors(count)).unwrap();
            match (client.reply(&answer.packet), expected) {
                (Ok(Some(_)), Ok(())) => {}
                (Err(ClientError::Refused(refusal)), Err(expected)) => {
                    prop_assert_eq!(refusal, expected);
                }
                (got, expected) => prop_assert!(false, "{:?} instead of {:?}", got, expected),
            }
            let given = matches!(request, Request::Descriptor { .. }) && answer.descriptor.is_some();
            prop_assert_eq!(answer.descriptor.is_some(), given);
            let lost = before.filter(|owner| model.owner != Some(*owner));
            prop_assert_eq!(answer.replaced, lost);
        }
        let ports = server.ports();
        prop_assert_eq!(&ports.ports, &model.ports);
        prop_assert_eq!((ports.held, ports.frozen, ports.quit), (model.held, model.frozen, model.quit));
    }

    #[test]
    fn every_request_is_read_as_it_was_written(request in request(), sequence in any::<u32>()) {
        let packet = packet::write(sequence, &request).unwrap();
        let (header, body) = packet::split(&packet).unwrap();
        prop_assert_eq!((header.version, header.sequence), (crate::VERSION, sequence));
        prop_assert_eq!(packet::read::<Request>(body), Some(request));
        // A byte more or less is another message or none.
        let more = [body, &[0]].concat();
        prop_assert_eq!(packet::read::<Request>(&more), None);
        prop_assert!(body.len() <= 80);
    }

    #[test]
    fn any_bytes_are_judged_by_both_sides_without_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
    ) {
        fuzz_server(&bytes).unwrap();
        fuzz_client(&bytes);
    }
}

#[test]
fn largest_replies_fit_into_a_packet() {
    let carried = CarriedCounts {
        frames: u64::MAX,
        bytes: u64::MAX,
        gso: u64::MAX,
    };
    let drops: DropCounts = crate::drops::HostDrop::ALL
        .iter()
        .map(|reason| (reason.code(), u64::MAX))
        .collect();
    let mut rows = Page::new();
    while !rows.is_full() {
        let row = PortCounters {
            id: u16::MAX,
            to_guest: carried,
            from_guest: carried,
            cut: u64::MAX,
            drops: drops.clone(),
        };
        rows.push(row).unwrap();
    }
    let page = packet::write(
        1,
        &Reply::Counters {
            rows: Box::new(rows),
            more: true,
        },
    )
    .unwrap();
    assert!(page.len() <= PACKET_MAX);
    let status = Status {
        ports: u16::MAX,
        busy: u64::MAX,
        drops,
        ..Status::default()
    };
    assert!(packet::write(1, &Reply::Status(status)).is_some());
}

#[test]
fn drop_reasons_have_the_numbers_of_the_document() {
    use crate::drops::HostDrop;
    let names = [
        "chain_loop",
        "chain_out_of_range",
        "chain_zero_length",
        "chain_oversized",
        "chain_direction",
        "chain_indirect",
        "short_buffer",
        "short_header",
        "missing_tag",
        "unknown_link",
        "bad_offload",
        "tap_down",
        "tap_full",
        "tap_refused",
        "truncated",
    ];
    for (code, name) in (0..).zip(names) {
        assert_eq!(HostDrop::from_code(code).map(HostDrop::name), Some(name));
    }
    assert_eq!(HostDrop::from_code(15), None);
}

/// The bytes of docs/ports.md, "An example".
#[test]
fn documented_example_is_what_is_written() {
    let hello = Request::Hello {
        daemon: text("x"),
        take_over: false,
    };
    let mut client = Client::default();
    let packet = client.request(&hello).unwrap();
    assert_eq!(packet[..], [2, 0, 1, 0, 0, 0, 0, 1, 0x78, 0]);
    let add = Request::AddPort {
        id: 16,
        kind: PortKind::Tap,
    };
    let packet = client.request(&add).unwrap();
    assert_eq!(packet[..], [2, 0, 2, 0, 0, 0, 1, 0x10, 0]);
    assert_eq!(
        packet::write(2, &Reply::Done).unwrap()[..],
        [2, 0, 2, 0, 0, 0, 1]
    );
    // Refusals by their numbers: the fifth and the one with an error number.
    let refused = |refusal| packet::write(2, &Reply::Refused(refusal)).unwrap()[6..].to_vec();
    assert_eq!(refused(Refusal::NoSuchPort), [2, 5]);
    assert_eq!(refused(Refusal::Kernel(22)), [2, 9, 44]);
}
