//! The replay itself: the tables are put in force, then each frame goes its way at the time that the capture says.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};

use sluice_appliance::apply::Outcome;
use sluice_appliance::observe::Record;
use sluice_appliance::time::Duration;
use sluice_appliance::verdict::Originate;
use sluice_appliance::{Arena, Frame, Instant, Offload, OutOfMemory, Pipeline, Verdict};
use sluice_contract::report::{CounterId, Field, Reject, RejectReason};
use sluice_contract::{Generation, LinkId, Row, ToGuest};

use crate::pcapng::{FRAME_MAX, ReadError, Reader, Traffic, Writer};
use crate::tables::Tables;
use crate::verdict::{End, Index, Report, Words};

/// The interface of the result on which lie the frames that did not leave.
pub const NOT_SENT: &str = "not-sent";
/// Bytes free in front of a frame, as in the guest.
const HEADROOM: usize = 128;
/// When the first packet comes: long after boot, so that nothing is still warming up.
const START: Instant = Instant::from_micros(1_000_000_000);
/// Housekeeping between two packets, at most so often; what is left is done at once.
const SWEEPS: u32 = 100_000;
/// Rows of one housekeeping.
const SWEEP_BUDGET: usize = 1 << 16;

/// Why a replay ended early.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    #[error(transparent)]
    Capture(#[from] ReadError),
    #[error("{path}: The dataplane refuses it: {field:?}: {reason:?}")]
    Refused {
        path: String,
        field: Field,
        reason: RejectReason,
    },
    #[error("The tables do not fit into memory: {0}")]
    Memory(OutOfMemory),
    #[error("--map: there is no link {0:?} in the tables; there are: {1}")]
    NoSuchLink(String, String),
    #[error(
        "Packet {number}: its interface {interface:?} is no link of the tables ({links}); name the interfaces of the \
         capture after the links, or say --map '{interface}=LINK'"
    )]
    NoLink {
        number: u64,
        interface: String,
        links: String,
    },
    #[error("The result cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// What is counted over a whole replay.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Totals {
    pub packets: u64,
    pub forwarded: u64,
    pub replied: u64,
    pub dropped: u64,
    /// Fragments that waited when the capture ended.
    pub held: u64,
    /// Frames that left later than they came: fragments whose first one came after them.
    pub released: u64,
    /// Drops by reason, those of frames that had waited included.
    pub reasons: BTreeMap<&'static str, u64>,
    /// The dataplane's own count agrees, and sums up.
    pub balanced: bool,
}

/// Frames that left otherwise than as the answer to the present one.
#[derive(Debug, Default)]
struct Released(Vec<(LinkId, Vec<u8>)>);

impl Originate for Released {
    fn originate(&mut self, link: LinkId, bytes: &[u8], _: Offload) -> bool {
        self.0.push((link, bytes.to_vec()));
        true
    }
}

/// Memory for a replay of these tables.
pub fn memory(tables: &Tables) -> Vec<u8> {
    vec![0; tables.capacity.bytes()]
}

/// A node under replay.
#[derive(Debug)]
pub struct Replay<'t, 'm, W> {
    tables: &'t Tables,
    /// Names of interfaces that are not those of their links.
    renamed: BTreeMap<String, LinkId>,
    index: Index,
    pipeline: Pipeline<'m>,
    result: Writer<W>,
    /// Interfaces of the result.
    places: BTreeMap<LinkId, u32>,
    released: Released,
    /// The time of the first packet.
    epoch: Option<u64>,
    nanos: u64,
    next_sweep: Instant,
    totals: Totals,
    buffer: Vec<u8>,
}

impl<'t, 'm, W: Write> Replay<'t, 'm, W> {
    /// A node with these tables in force. `memory` is [`memory`]; `map` names interfaces by link.
    ///
    /// # Errors
    /// [`ReplayError`].
    pub fn new(
        tables: &'t Tables,
        seed: u64,
        memory: &'m mut [u8],
        map: &[(String, String)],
        output: W,
    ) -> Result<Self, ReplayError> {
        let mut secret = [0; 16];
        let words = seed.to_le_bytes().into_iter().chain((!seed).to_be_bytes());
        secret
            .iter_mut()
            .zip(words)
            .for_each(|(to, from)| *to = from);
        let mut pipeline = Pipeline::new(&mut Arena::new(memory), tables.capacity, secret)
            .map_err(ReplayError::Memory)?;
        let index = Index::of(&tables.rows);
        commit(&mut pipeline, &tables.rows, &index)?;
        let mut renamed = BTreeMap::new();
        for (interface, link) in map {
            let id = tables.links.id(link);
            let id = id.ok_or_else(|| ReplayError::NoSuchLink(link.clone(), names(tables)))?;
            renamed.insert(interface.clone(), id);
        }
        let interfaces: BTreeSet<LinkId> = tables.links.iter().map(|(id, _)| id).collect();
        let all = tables.links.iter().map(|(_, name)| name);
        let result = Writer::new(output, "sluice-replay", all.chain([NOT_SENT]))?;
        Ok(Self {
            tables,
            renamed,
            index,
            pipeline,
            result,
            places: interfaces.into_iter().zip(0..).collect(),
            released: Released::default(),
            epoch: None,
            nanos: 0,
            next_sweep: START,
            totals: Totals::default(),
            buffer: vec![0; HEADROOM + FRAME_MAX + HEADROOM],
        })
    }

    /// Sends the whole capture through; `told` hears each verdict. Yields what was counted.
    ///
    /// # Errors
    /// [`ReplayError`], or the first of `told`.
    pub fn run(
        mut self,
        capture: impl Read,
        mut told: impl FnMut(&Report) -> io::Result<()>,
    ) -> Result<Totals, ReplayError> {
        let mut reader = Reader::new(capture)?;
        while let Some(packet) = reader.next_packet()? {
            let name = &packet.interface.name;
            let link = self.renamed.get(name).copied();
            let Some(link) = link.or_else(|| self.tables.links.id(name)) else {
                return Err(ReplayError::NoLink {
                    number: packet.number,
                    interface: name.clone(),
                    links: names(self.tables),
                });
            };
            let report = self.packet(packet.number, packet.nanos, link, packet.bytes)?;
            told(&report)?;
        }
        self.totals.held = self.counter(CounterId::Held);
        self.totals.balanced = self.is_balanced();
        let totals = std::mem::take(&mut self.totals);
        self.result.finish()?;
        Ok(totals)
    }

    fn packet(
        &mut self,
        number: u64,
        nanos: u64,
        link: LinkId,
        bytes: &[u8],
    ) -> Result<Report, ReplayError> {
        let epoch = *self.epoch.get_or_insert(nanos);
        self.nanos = nanos;
        let elapsed = nanos.saturating_sub(epoch);
        let now = START + Duration::from_micros(elapsed / 1_000);
        self.sweep_until(now)?;
        let end = HEADROOM + bytes.len();
        if let Some(room) = self.buffer.get_mut(HEADROOM..end) {
            room.copy_from_slice(bytes);
        }
        let offload = Offload::default();
        let frame = Frame::new(&mut self.buffer, HEADROOM, end, 0, link, offload);
        // The reader lets no longer frame through than the buffer holds.
        let Some(mut frame) = frame else {
            return Err(io::Error::other("A frame did not fit").into());
        };
        let mut record = Record::default();
        let verdict =
            self.pipeline
                .process_observed(&mut frame, now, &mut self.released, &mut record);
        let words = Words {
            links: &self.tables.links,
            index: &self.index,
        };
        let (stage, reason, row) = words.decision(verdict, link, &record.steps);
        let (ended, to) = match verdict {
            Verdict::Forward(to) => (End::Forwarded, Some(to)),
            Verdict::Reply => (End::Replied, Some(link)),
            Verdict::Drop(_) => (End::Dropped, None),
            Verdict::Held => (End::Held, None),
        };
        let report = Report {
            packet: number,
            time: format!("{}.{:09}", elapsed / 1_000_000_000, elapsed % 1_000_000_000),
            from: self.tables.links.name(link).to_owned(),
            verdict: ended,
            to: to.map(|to| self.tables.links.name(to).to_owned()),
            stage,
            reason: reason.map(|reason| reason.name()),
            row,
            steps: words.steps(&record.steps),
        };
        let comment = format!("packet {number} from {}: {}", report.from, report.summary());
        let (place, bytes, traffic) = match to {
            Some(to) => (self.places.get(&to).copied(), frame.bytes(), Traffic::Left),
            None => (None, bytes, Traffic::Came),
        };
        // Behind the links is what did not leave.
        let place = place.unwrap_or(self.places.len() as u32);
        self.result.packet(place, nanos, bytes, traffic, &comment)?;
        self.count(&report);
        self.release()?;
        Ok(report)
    }

    fn count(&mut self, report: &Report) {
        let totals = &mut self.totals;
        totals.packets += 1;
        match report.verdict {
            End::Forwarded => totals.forwarded += 1,
            End::Replied => totals.replied += 1,
            End::Dropped => {
                totals.dropped += 1;
                *totals
                    .reasons
                    .entry(report.reason.unwrap_or("?"))
                    .or_default() += 1;
            }
            End::Held => {}
        }
    }

    /// Writes what left by itself.
    fn release(&mut self) -> Result<(), ReplayError> {
        for (link, bytes) in std::mem::take(&mut self.released.0) {
            self.totals.released += 1;
            let Some(place) = self.places.get(&link).copied() else {
                continue;
            };
            let comment = "released: had waited for the first fragment of its datagram";
            self.result
                .packet(place, self.nanos, &bytes, Traffic::Left, comment)?;
        }
        Ok(())
    }

    /// What time asks for between two packets, at the moments at which the guest would do it.
    fn sweep_until(&mut self, now: Instant) -> Result<(), ReplayError> {
        for _ in 0..SWEEPS {
            if self.next_sweep > now {
                break;
            }
            let at = self.next_sweep;
            let next = self.pipeline.sweep(at, SWEEP_BUDGET, &mut self.released);
            self.next_sweep = next.unwrap_or(at + Duration::from_secs(1));
        }
        if self.next_sweep <= now {
            let next = self.pipeline.sweep(now, SWEEP_BUDGET, &mut self.released);
            self.next_sweep = next.unwrap_or(now + Duration::from_secs(1));
        }
        self.release()
    }

    fn counter(&self, id: CounterId) -> u64 {
        let stats = self.pipeline.stats();
        let mut cursor = 0;
        while let Some((counter, next)) = stats.next_from(cursor) {
            if counter.id == id {
                return counter.value;
            }
            cursor = next;
        }
        0
    }

    /// The dataplane counted what was seen here.
    fn is_balanced(&self) -> bool {
        let totals = &self.totals;
        self.pipeline.stats().is_balanced()
            && self.counter(CounterId::Received) == totals.packets
            && self.counter(CounterId::Forwarded) + self.counter(CounterId::Replied)
                == totals.forwarded + totals.replied + totals.released
    }
}

fn names(tables: &Tables) -> String {
    let names: Vec<&str> = tables.links.iter().map(|(_, name)| name).collect();
    names.join(", ")
}

/// Puts all rows in force.
fn commit(
    pipeline: &mut Pipeline<'_>,
    rows: &[(String, Row)],
    index: &Index,
) -> Result<(), ReplayError> {
    let generation = Generation(1);
    let begin = ToGuest::Begin {
        generation,
        fresh: true,
    };
    let puts = rows.iter().map(|(_, row)| ToGuest::Put(row.clone()));
    let all = std::iter::once(begin).chain(puts);
    for message in all.chain([ToGuest::Commit { generation }]) {
        while !pipeline.work(1 << 20) {}
        let outcome = pipeline.configure(&message);
        if let Outcome::LeftOut(reject) | Outcome::Refused(_, reject) = outcome {
            return Err(refused(&reject, index));
        }
    }
    while !pipeline.work(1 << 20) {}
    // Sets of which parts are missing are found at the end.
    let first = pipeline.refusals().and_then(|it| it.rows.first().copied());
    first.map_or(Ok(()), |reject| Err(refused(&reject, index)))
}

fn refused(reject: &Reject, index: &Index) -> ReplayError {
    let path = reject.object.and_then(|key| index.path(key));
    ReplayError::Refused {
        path: path.unwrap_or(".").to_owned(),
        field: reject.field,
        reason: reject.reason,
    }
}
