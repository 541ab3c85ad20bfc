//! A guest that says anything at any time to the host's end of the control channel: no panic, a bounded backlog, and once the
//! guest keeps to the contract it has exactly what is desired.
//!
//! The sources of the session are compiled in here, without the daemon around them.
#![no_main]

#[allow(dead_code)]
#[path = "../../../host-shim/src/control/desired.rs"]
mod desired;
#[allow(dead_code)]
#[path = "../../../host-shim/src/control/session.rs"]
mod session;
#[allow(dead_code)]
#[path = "../../../host-shim/src/control/testing.rs"]
mod testing;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use sluice_contract::frame::{self, Decoder, FRAME_MAX};
use sluice_contract::message::{Envelope, GuestHello};
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::row::BandwidthRow;
use sluice_contract::{Generation, Key, LinkId, Row, ToGuest, ToHost, VERSION};

use desired::Desired;
use session::{Event, Session};
use testing::Guest;

/// More than all rows of these tests, a few times.
const BACKLOG: usize = 1 << 20;

struct World {
    now: Instant,
    host: Session,
    desired: Desired,
    wanted: BTreeMap<Key, Row>,
    events: Vec<Event>,
    heard: Decoder,
    /// The session that the host is in, as far as it has been sent, and what the guest says next in it.
    session: u64,
    sequence: u32,
    generation: Generation,
    refused: u32,
}

fuzz_target!(|bytes: &[u8]| {
    let now = Instant::now();
    let mut world = World {
        now,
        host: Session::new(now, 1),
        desired: Desired::default(),
        wanted: BTreeMap::new(),
        events: Vec::new(),
        heard: Decoder::default(),
        session: 0,
        sequence: 0,
        generation: Generation(0),
        refused: 0,
    };
    let mut rest = bytes;
    while let [what, how, tail @ ..] = rest {
        rest = world.step(*what, *how, tail);
    }
    world.end();
});

fn key(n: u8) -> Key {
    Key::Bandwidth(LinkId::new(16 + u16::from(n % 32)).unwrap_or(LinkId::HOST))
}

impl World {
    /// One thing that happens; yields the bytes that it left.
    fn step<'b>(&mut self, what: u8, how: u8, tail: &'b [u8]) -> &'b [u8] {
        let (own, rest) = tail.split_at(tail.len().min(usize::from(how)));
        match what % 9 {
            0 => self.now += Duration::from_millis(u64::from(how) * u64::from(how)),
            1 => self.put(how),
            2 => {
                self.wanted.remove(&key(how));
                self.desired.remove([key(how)]);
            }
            3 => {
                self.receive(own);
                return rest;
            }
            4 => self.say(ToHost::Hello(GuestHello {
                version: VERSION + u16::from(how == 255),
                image: [how; 20],
                generation: Generation(if how == 254 { u64::MAX } else { how.into() }),
                ram_mib: 64,
                uptime_us: 1,
                room: testing::ROOM,
            })),
            5 => self.say(ToHost::Ack {
                generation: self.generation,
                refused: self.refused + u32::from(how == 255),
            }),
            6 => self.refuse(how),
            7 => self.say(ToHost::Resync { expected: how.into() }),
            _ => {
                if let Ok((message, _)) = postcard::take_from_bytes::<ToHost>(own) {
                    self.say(message);
                }
                return rest;
            }
        }
        self.advance();
        tail
    }

    fn put(&mut self, how: u8) {
        let Key::Bandwidth(link) = key(how) else { return };
        let rate = sluice_contract::row::Rate {
            bits_per_second: u64::from(how) + 1,
            burst: 1,
        };
        let row = Row::Bandwidth(BandwidthRow {
            link,
            ingress: Some(rate),
            egress: None,
        });
        self.wanted.insert(row.key(), row.clone());
        self.desired.put([row]);
    }

    fn refuse(&mut self, how: u8) {
        let reason = match how >> 5 {
            0 => RejectReason::Taken,
            1 => RejectReason::Missing,
            2 => RejectReason::InUse(1),
            3 => RejectReason::Incomplete(1),
            4 => RejectReason::Full(9),
            _ => RejectReason::Invalid,
        };
        let reject = Reject {
            object: (how != 255).then(|| key(how)),
            field: Field::Whole,
            reason,
        };
        self.refused += 1;
        let generation = self.generation;
        let rows = [reject].into_iter().collect();
        self.say(ToHost::Refused { generation, rows });
    }

    fn say(&mut self, message: ToHost) {
        let envelope = Envelope {
            session: self.session,
            sequence: self.sequence,
            message,
        };
        self.sequence += 1;
        let mut buffer = [0; FRAME_MAX];
        if let Ok(bytes) = frame::encode(&envelope, &mut buffer) {
            self.receive(&bytes.to_vec());
        }
    }

    fn receive(&mut self, bytes: &[u8]) {
        let (desired, events) = (&mut self.desired, &mut self.events);
        self.host.receive(bytes, self.now, desired, events);
    }

    /// Time passes, and the guest reads what the host says, for its numbers.
    fn advance(&mut self) {
        let (desired, events) = (&mut self.desired, &mut self.events);
        self.host.advance(self.now, desired, events);
        assert!(self.host.output().len() < BACKLOG);
        let sent = std::mem::take(self.host.output());
        let mut rest = &sent[..];
        while let Some(payload) = self.heard.next(&mut rest) {
            let Some(envelope) = frame::decode::<Envelope<ToGuest>>(payload) else {
                continue;
            };
            self.session = envelope.session;
            match envelope.message {
                ToGuest::Hello { .. } => self.sequence = 0,
                ToGuest::Begin { generation, .. } => {
                    assert_ne!(generation, Generation(0));
                    (self.generation, self.refused) = (generation, 0);
                }
                _ => {}
            }
        }
    }

    /// Another guest, which keeps to the contract.
    fn end(mut self) {
        let is_refused = |it: &Event| matches!(it, Event::VersionRefused { .. });
        if self.events.iter().any(is_refused) {
            return;
        }
        let mut guest = Guest::default();
        for _ in 0..40 {
            let (desired, events) = (&mut self.desired, &mut self.events);
            self.host.advance(self.now, desired, events);
            guest.receive(&std::mem::take(self.host.output()));
            let said = std::mem::take(&mut guest.output);
            self.receive(&said);
            self.now = self.host.deadline().unwrap_or(self.now).max(self.now);
        }
        assert!(self.host.is_settled());
        assert_eq!(guest.rows, self.wanted);
        assert_eq!(self.desired.refusals().count(), 0);
    }
}
