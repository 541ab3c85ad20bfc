//! A guest for tests, as far as the control channel is concerned.

use std::collections::{BTreeMap, BTreeSet};

use sluice_contract::frame::{self, Decoder, FRAME_MAX};
use sluice_contract::message::{Counter, Envelope, GuestHello, Room};
use sluice_contract::name::Learnt;
use sluice_contract::report::{CounterId, Field, Reject, RejectReason};
use sluice_contract::{Generation, Key, Row, ToGuest, ToHost, VERSION, limits};

/// The guest's end by the rules in the contract's `message.rs`: it keeps the rows and nothing else.
#[derive(Debug)]
pub struct Guest {
    pub version: u16,
    /// Rows that it cannot take, and why.
    pub refuses: BTreeMap<Key, RejectReason>,
    pub decoder: Decoder,
    pub output: Vec<u8>,
    pub session: u64,
    pub sequence: u32,
    pub expected: u32,
    pub open: bool,
    pub rows: BTreeMap<Key, Row>,
    pub shadow: Option<BTreeMap<Key, Row>>,
    /// What it refused of the change under way.
    pub refused: Vec<Reject>,
    /// Keys of the rows that were put in the present change, or the last one.
    pub puts: BTreeSet<Key>,
    pub generation: Generation,
    /// What its pods were told of names.
    pub names: Vec<Learnt>,
    /// What it says it has room for.
    pub room: Room,
}

/// More than any test fills.
const PLENTY: u32 = 1 << 20;

/// Room for everything.
pub const ROOM: Room = Room {
    addresses: PLENTY,
    frontends: PLENTY,
    ports: PLENTY,
    sets: PLENTY,
    backends: PLENTY,
    chunks: PLENTY,
    sources: PLENTY,
    identities: PLENTY,
    bindings: PLENTY,
    rulesets: PLENTY,
    classes: PLENTY,
    spans: PLENTY,
    names: PLENTY,
    named: PLENTY,
};

impl Default for Guest {
    fn default() -> Self {
        Self {
            version: VERSION,
            refuses: BTreeMap::new(),
            decoder: Decoder::default(),
            output: Vec::new(),
            session: 0,
            sequence: 0,
            expected: 0,
            open: false,
            rows: BTreeMap::new(),
            shadow: None,
            refused: Vec::new(),
            puts: BTreeSet::new(),
            generation: Generation(0),
            names: Vec::new(),
            room: ROOM,
        }
    }
}

impl Guest {
    fn send(&mut self, message: ToHost) {
        let mut buffer = [0; FRAME_MAX];
        let envelope = Envelope {
            session: self.session,
            sequence: self.sequence,
            message,
        };
        self.sequence += 1;
        self.output
            .extend_from_slice(frame::encode(&envelope, &mut buffer).expect("fits"));
    }

    /// Whether that row was in the last change.
    pub fn offered(&self, key: &Key) -> bool {
        self.puts.contains(key)
    }

    /// Claims that a message is missing.
    pub fn ask_for_everything(&mut self) {
        let expected = self.expected;
        self.send(ToHost::Resync { expected });
    }

    /// Takes bytes from the host; what there is to say is appended to `output`.
    pub fn receive(&mut self, mut bytes: &[u8]) {
        let mut decoder = std::mem::take(&mut self.decoder);
        while let Some(payload) = decoder.next(&mut bytes) {
            if let Some(envelope) = frame::decode::<Envelope<ToGuest>>(payload) {
                self.take(envelope);
            }
        }
        self.decoder = decoder;
    }

    fn refuse(&mut self, key: Key, field: Field, reason: RejectReason) {
        let object = Some(key);
        self.refused.push(Reject {
            object,
            field,
            reason,
        });
    }

    fn commit(&mut self, generation: Generation) {
        let Some(rows) = self.shadow.take() else {
            return;
        };
        (self.rows, self.generation) = (rows, generation);
        let refused = std::mem::take(&mut self.refused);
        for rows in refused.chunks(limits::REFUSED_BATCH) {
            let rows = rows.iter().copied().collect();
            self.send(ToHost::Refused { generation, rows });
        }
        let refused = u32::try_from(refused.len()).unwrap_or(u32::MAX);
        self.send(ToHost::Ack {
            generation,
            refused,
        });
    }

    fn take(&mut self, envelope: Envelope<ToGuest>) {
        if let ToGuest::Hello { version } = envelope.message {
            (self.session, self.sequence, self.expected) = (envelope.session, 0, 1);
            self.shadow = None;
            self.open = version == self.version;
            let (version, generation) = (self.version, self.generation);
            let hello = GuestHello {
                version,
                image: [7; 20],
                generation,
                ram_mib: 64,
                uptime_us: 9,
                room: self.room,
            };
            return self.send(ToHost::Hello(hello));
        }
        if !self.open || envelope.session != self.session || envelope.sequence < self.expected {
            return;
        }
        if envelope.sequence > self.expected {
            self.shadow = None;
            self.open = false;
            return self.send(ToHost::Resync {
                expected: self.expected,
            });
        }
        self.expected += 1;
        match envelope.message {
            ToGuest::Begin { fresh, .. } => {
                let rows = if fresh {
                    BTreeMap::new()
                } else {
                    self.rows.clone()
                };
                self.shadow = Some(rows);
                self.refused.clear();
                self.puts.clear();
            }
            ToGuest::Put(row) => {
                let Some(rows) = &mut self.shadow else {
                    return;
                };
                self.puts.insert(row.key());
                match self.refuses.get(&row.key()) {
                    Some(reason) => {
                        rows.remove(&row.key());
                        let reason = *reason;
                        self.refuse(row.key(), Field::Addresses, reason);
                    }
                    None => drop(rows.insert(row.key(), row)),
                }
            }
            ToGuest::Remove(key) => {
                if let Some(rows) = &mut self.shadow
                    && rows.remove(&key).is_none()
                {
                    self.refuse(key, Field::Whole, RejectReason::Missing);
                }
            }
            ToGuest::Commit { generation } => self.commit(generation),
            ToGuest::ReadStats { token } => {
                for last in [false, true] {
                    let id = CounterId::Received;
                    let value = u64::from(last);
                    let counters = [Counter { id, value }].into_iter().collect();
                    self.send(ToHost::Stats {
                        token,
                        counters,
                        last,
                    });
                }
            }
            ToGuest::ReadNames { token, link } => {
                let names = self.names.iter();
                let names = names.filter(|it| link.is_none_or(|link| it.link == link));
                let names = names.copied().collect::<Vec<_>>();
                let pages = names.len().div_ceil(limits::NAMES_BATCH).max(1);
                for n in 0..pages {
                    let rest = names.iter().skip(n * limits::NAMES_BATCH);
                    self.send(ToHost::Names {
                        token,
                        names: rest.take(limits::NAMES_BATCH).copied().collect(),
                        last: n + 1 == pages,
                    });
                }
            }
            ToGuest::Ping { token } => self.send(ToHost::Pong { token }),
            ToGuest::Hello { .. } | ToGuest::Shutdown => {}
        }
    }
}
