//! The host's end of the control channel as a state machine: bytes and time in, bytes and events out.
//!
//! One rule settles every doubt (a gap, a late answer, a `Resync`, a new connection): begin a new session, say `Hello`, send
//! all desired rows from `Begin { fresh: true }`. The guest takes that as a whole at the commit and cuts no live flow.
//! A guest that makes doubts again and again is met with a growing pause, so that it costs the host little.
//!
//! Rows that the guest refuses are no doubt: the others are in force. They are offered again with later changes, by which
//! what stood in their way may have gone.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use sluice_contract::frame::{self, Decoder, FRAME_MAX};
use sluice_contract::message::{Counter, Envelope, GuestHello, Level, Room};
use sluice_contract::name::Learnt;
use sluice_contract::policy::WouldDeny;
use sluice_contract::report::{Reject, RejectReason};
use sluice_contract::{Generation, LinkId, ToGuest, ToHost, VERSION, limits};

use super::desired::{Change, Desired, Refused};

/// First and longest wait for an answer to `Hello`: a guest boots in milliseconds under KVM, in seconds under TCG.
const GREETING: [Duration; 2] = [Duration::from_millis(250), Duration::from_secs(2)];
/// Longest wait for the answer to a ping.
const PATIENCE: Duration = Duration::from_secs(5);
/// Longest wait for the answer to a commit. A guest with large tables brings its shadow copies up to date before it reads
/// on, which takes seconds on a busy machine; giving up earlier would begin all of it anew.
const COMMITTED: Duration = Duration::from_secs(30);
/// Silence after which the guest is asked whether it is there.
const QUIET: Duration = Duration::from_secs(5);
/// First and longest pause before a session that follows a broken one.
const PAUSE: [Duration; 2] = [Duration::from_millis(5), Duration::from_secs(1)];
/// A session that lasted for so long was not broken by whatever broke the one before.
const CALM: Duration = Duration::from_secs(10);
/// Shortest and longest time until refused rows are offered again.
const OFFER: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];
/// Counters accepted for one question: more than any guest has.
const COUNTERS: usize = 1 << 16;

/// What the daemon has to know.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The guest said who it is.
    Greeted(GuestHello),
    /// The guest speaks another version: nothing will be sent to it.
    VersionRefused { guest: u16 },
    /// This revision of the desired rows is in force, except the refused ones.
    InForce {
        generation: Generation,
        revision: u64,
    },
    /// A desired row is not in force.
    Refused(Reject),
    /// The guest took a whole change for none.
    Rejected(Reject),
    /// The answer to a question for counters.
    Stats { token: u32, counters: Vec<Counter> },
    /// The answer to a question for names.
    Names { token: u32, names: Vec<Learnt> },
    /// A line of the guest's log.
    Log { level: Level, text: String },
    /// The guest says that it is about to end.
    Fault { text: String },
    /// Packets wait for a neighbor on the uplink.
    Unresolved(IpAddr),
    /// A connection began although a rule denies it.
    WouldDeny(WouldDeny),
    /// A new session begins.
    Restarted { why: &'static str },
}

#[derive(Debug)]
enum Phase {
    /// A new session begins at this time.
    Pausing { until: Instant },
    /// `Hello` is out.
    Greeting { until: Instant },
    /// The versions differ.
    Refused,
    /// The guest has nothing to answer.
    Settled { fresh: bool },
    /// A commit is out.
    Committing {
        generation: Generation,
        revision: u64,
        until: Instant,
        /// Rows that the guest has named as refused.
        refused: u32,
        /// All rows that could be offered are in it.
        whole: bool,
        /// The order of its rows may be why some were refused.
        unordered: bool,
    },
}

/// The session.
#[derive(Debug)]
pub struct Session {
    phase: Phase,
    id: u64,
    sent: u32,
    expected: u32,
    decoder: Decoder,
    /// Garbage seen by former decoders.
    garbage: u64,
    output: Vec<u8>,
    /// The generation in force in the guest, as far as it has said.
    generation: Generation,
    revision: u64,
    /// What the guest has room for.
    room: Option<Room>,
    patience: Duration,
    pause: Duration,
    /// When the last session was broken.
    broken: Option<Instant>,
    /// Refused rows are offered again: with a change that comes after this time …
    offer_after: Instant,
    /// … or at this time, without one.
    offer_at: Option<Instant>,
    offer_pause: Duration,
    heard: Instant,
    ping: Option<Instant>,
    stats: Option<(u32, Vec<Counter>)>,
    names: Option<(u32, Vec<Learnt>)>,
}

impl Session {
    /// Begins with a `Hello`. `seed` has to differ between lives of the daemon.
    pub fn new(now: Instant, seed: u64) -> Self {
        let mut session = Self {
            phase: Phase::Refused,
            id: seed,
            sent: 0,
            expected: 0,
            decoder: Decoder::default(),
            garbage: 0,
            output: Vec::new(),
            generation: Generation(0),
            revision: 0,
            room: None,
            patience: GREETING[0],
            pause: PAUSE[0],
            broken: None,
            offer_after: now,
            offer_at: None,
            offer_pause: OFFER[0],
            heard: now,
            ping: None,
            stats: None,
            names: None,
        };
        session.greet(now);
        session
    }

    /// Bytes to be sent to the guest.
    pub fn output(&mut self) -> &mut Vec<u8> {
        &mut self.output
    }

    /// Times that bytes of the guest made no frame.
    pub fn garbage(&self) -> u64 {
        self.garbage + self.decoder.garbage()
    }

    /// Whether the guest has all that is desired.
    pub fn is_settled(&self) -> bool {
        matches!(self.phase, Phase::Settled { fresh: false })
    }

    /// When [`advance`](Self::advance) has to be called, whatever else happens.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.phase {
            Phase::Pausing { until } | Phase::Greeting { until } => Some(*until),
            Phase::Committing { until, .. } => Some(*until),
            Phase::Settled { .. } => {
                let quiet = self.ping.map_or(self.heard + QUIET, |p| p + PATIENCE);
                Some(self.offer_at.map_or(quiet, |at| at.min(quiet)))
            }
            Phase::Refused => None,
        }
    }

    /// Does what time and the desired rows ask for.
    pub fn advance(&mut self, now: Instant, desired: &mut Desired, events: &mut Vec<Event>) {
        match &self.phase {
            Phase::Pausing { until } if now >= *until => self.greet(now),
            Phase::Greeting { until } if now >= *until => {
                self.patience = (self.patience * 2).min(GREETING[1]);
                self.greet(now);
            }
            Phase::Committing { until, .. } if now >= *until => {
                self.restart(now, "no answer to a commit", events);
            }
            Phase::Settled { .. } if self.ping.is_some_and(|p| now >= p + PATIENCE) => {
                self.restart(now, "no answer to a ping", events);
            }
            Phase::Settled { fresh } => {
                let fresh = *fresh;
                let is_due = self.offer_at.is_some_and(|at| now >= at);
                let has_news = fresh || is_due || self.revision != desired.revision();
                // Rows chosen for another guest might not fit into this one.
                if has_news && self.room.is_some_and(|it| desired.is_planned_for(&it)) {
                    self.commit(now, fresh, desired, events);
                } else if self.ping.is_none() && now >= self.heard + QUIET {
                    self.ping = Some(now);
                    self.send(&ToGuest::Ping { token: self.sent });
                }
            }
            _ => {}
        }
    }

    /// Asks for the counters; false when there is nobody to ask.
    pub fn ask_for_stats(&mut self, token: u32) -> bool {
        let open = self.is_open();
        if open {
            self.stats = Some((token, Vec::new()));
            self.send(&ToGuest::ReadStats { token });
        }
        open
    }

    /// Asks what a pod, or all pods were told of names; false when there is nobody to ask.
    pub fn ask_for_names(&mut self, token: u32, link: Option<LinkId>) -> bool {
        let open = self.is_open();
        if open {
            self.names = Some((token, Vec::new()));
            self.send(&ToGuest::ReadNames { token, link });
        }
        open
    }

    fn is_open(&self) -> bool {
        matches!(self.phase, Phase::Settled { .. } | Phase::Committing { .. })
    }

    /// Asks the guest to end in order.
    pub fn shut_down(&mut self) {
        if !matches!(self.phase, Phase::Refused) {
            self.send(&ToGuest::Shutdown);
        }
    }

    /// Takes bytes from the guest.
    pub fn receive(
        &mut self,
        mut bytes: &[u8],
        now: Instant,
        desired: &mut Desired,
        events: &mut Vec<Event>,
    ) {
        // A new session begins later, in `advance`: the decoder put back here is never a former one.
        let mut decoder = std::mem::take(&mut self.decoder);
        while let Some(payload) = decoder.next(&mut bytes) {
            // A frame that is no message counts as lost: the gap will show.
            if let Some(envelope) = frame::decode::<Envelope<ToHost>>(payload) {
                self.take(envelope, now, desired, events);
            }
        }
        self.decoder = decoder;
    }

    fn take(
        &mut self,
        envelope: Envelope<ToHost>,
        now: Instant,
        desired: &mut Desired,
        events: &mut Vec<Event>,
    ) {
        let Envelope {
            session,
            sequence,
            message,
        } = envelope;
        if session != self.id || sequence < self.expected {
            return;
        }
        if sequence > self.expected {
            return self.restart(now, "a message of the guest is missing", events);
        }
        self.expected = sequence.saturating_add(1);
        self.heard = now;
        match message {
            ToHost::Hello(hello) => self.greeted(hello, events),
            ToHost::Ack {
                generation,
                refused,
            } => self.acknowledged(generation, refused, now, desired, events),
            ToHost::Refused { generation, rows } => {
                self.refused(generation, &rows, now, desired, events);
            }
            ToHost::Reject { generation, reject } => {
                self.rejected(generation, reject, now, events);
            }
            ToHost::Resync { .. } => self.restart(now, "the guest asked for it", events),
            ToHost::Pong { .. } => self.ping = None,
            ToHost::Stats {
                token,
                counters,
                last,
            } => self.counted(token, &counters, last, events),
            ToHost::Log { level, text } => {
                events.push(Event::Log {
                    level,
                    text: text.as_str().into(),
                });
            }
            ToHost::Fault { text } => events.push(Event::Fault {
                text: text.as_str().into(),
            }),
            ToHost::Names { token, names, last } => self.named(token, &names, last, events),
            ToHost::Unresolved { address } => events.push(Event::Unresolved(address)),
            ToHost::WouldDeny(event) => events.push(Event::WouldDeny(event)),
        }
    }

    fn greeted(&mut self, hello: GuestHello, events: &mut Vec<Event>) {
        if !matches!(self.phase, Phase::Greeting { .. }) {
            return;
        }
        self.patience = GREETING[0];
        if hello.version == VERSION {
            self.phase = Phase::Settled { fresh: true };
            self.generation = self.generation.max(hello.generation);
            self.room = Some(hello.room);
            events.push(Event::Greeted(hello));
        } else {
            self.phase = Phase::Refused;
            events.push(Event::VersionRefused {
                guest: hello.version,
            });
        }
    }

    fn acknowledged(
        &mut self,
        acknowledged: Generation,
        counted: u32,
        now: Instant,
        desired: &mut Desired,
        events: &mut Vec<Event>,
    ) {
        let Phase::Committing {
            generation,
            revision,
            refused,
            whole,
            unordered,
            ..
        } = self.phase
        else {
            return;
        };
        if generation != acknowledged {
            return;
        }
        if counted != refused {
            return self.restart(now, "the guest did not name all that it refused", events);
        }
        self.revision = revision;
        let before = desired.refusals().len();
        let left = desired.in_force();
        self.phase = Phase::Settled { fresh: false };
        events.push(Event::InForce {
            generation,
            revision,
        });
        if desired.is_guarded_for_nothing() {
            return self.restart(now, "rows that did not fit before fit now", events);
        }
        if left < before {
            self.offer_pause = OFFER[0];
        }
        if whole {
            self.offer_after = now + self.offer_pause;
        } else if unordered && left > 0 {
            self.offer_at = Some(now);
        }
    }

    /// Rows that are left out of the change under way. What names no desired row needs nothing.
    fn refused(
        &mut self,
        of: Generation,
        rows: &[Reject],
        now: Instant,
        desired: &mut Desired,
        events: &mut Vec<Event>,
    ) {
        let Phase::Committing {
            generation,
            refused,
            unordered,
            ..
        } = &mut self.phase
        else {
            return;
        };
        if *generation != of {
            return;
        }
        let mut left = false;
        for reject in rows {
            *refused = refused.saturating_add(1);
            let Some(key) = reject.object else { continue };
            match desired.refuse(key, *reject) {
                Refused::Row => events.push(Event::Refused(*reject)),
                Refused::Again | Refused::Nothing => {}
                Refused::Left => left = true,
            }
        }
        // What rows of the same change give up is free once that is in force.
        let is_passing =
            |it: &RejectReason| matches!(it, RejectReason::Taken | RejectReason::Full(_));
        *unordered |= rows.iter().any(|it| is_passing(&it.reason));
        if left {
            self.restart(now, "a row that should be gone is still there", events);
        }
    }

    /// The change is not in force at all: only time may help.
    fn rejected(
        &mut self,
        refused: Generation,
        reject: Reject,
        now: Instant,
        events: &mut Vec<Event>,
    ) {
        if !matches!(&self.phase, Phase::Committing { generation, .. } if *generation == refused) {
            return;
        }
        events.push(Event::Rejected(reject));
        self.restart_after(PAUSE[1], now, "a change was refused", events);
    }

    fn counted(&mut self, token: u32, batch: &[Counter], last: bool, events: &mut Vec<Event>) {
        let Some((asked, counters)) = &mut self.stats else {
            return;
        };
        if *asked != token {
            return;
        }
        let room = COUNTERS.saturating_sub(counters.len());
        counters.extend(batch.iter().take(room));
        if last && let Some((token, counters)) = self.stats.take() {
            events.push(Event::Stats { token, counters });
        }
    }

    fn named(&mut self, token: u32, batch: &[Learnt], last: bool, events: &mut Vec<Event>) {
        let Some((_, names)) = self.names.as_mut().filter(|(asked, _)| *asked == token) else {
            return;
        };
        let room = limits::NAMES_TOLD.saturating_sub(names.len());
        names.extend(batch.iter().take(room));
        if last && let Some((token, names)) = self.names.take() {
            events.push(Event::Names { token, names });
        }
    }

    fn commit(
        &mut self,
        now: Instant,
        fresh: bool,
        desired: &mut Desired,
        events: &mut Vec<Event>,
    ) {
        let whole = fresh || self.offers(now, desired);
        let changes = if fresh {
            desired.take_all()
        } else {
            desired.take_changes()
        };
        let revision = desired.revision();
        if changes.is_empty() && !fresh {
            // A row came and went, or was refused before: the tables are as desired already.
            self.revision = revision;
            let generation = self.generation;
            events.push(Event::InForce {
                generation,
                revision,
            });
            return;
        }
        // The guest has a say in it: 0 is none, and behind the last one comes the first.
        self.generation = Generation(self.generation.0.checked_add(1).unwrap_or(1));
        let generation = self.generation;
        self.send(&ToGuest::Begin { generation, fresh });
        for change in changes {
            match change {
                Change::Put(row) => self.send(&ToGuest::Put(*row)),
                Change::Remove(key) => self.send(&ToGuest::Remove(key)),
            }
        }
        self.send(&ToGuest::Commit { generation });
        self.phase = Phase::Committing {
            generation,
            revision,
            until: now + COMMITTED,
            refused: 0,
            whole,
            unordered: false,
        };
    }

    /// Whether the change that begins offers refused rows again, or a later one will.
    fn offers(&mut self, now: Instant, desired: &mut Desired) -> bool {
        let is_due = self.offer_at.take().is_some_and(|at| now >= at) || now >= self.offer_after;
        if !desired.has_offers() {
            return false;
        }
        if is_due {
            desired.offer_again();
            self.offer_pause = (self.offer_pause * 2).min(OFFER[1]);
        } else {
            self.offer_at = Some(self.offer_after);
        }
        is_due
    }

    fn restart(&mut self, now: Instant, why: &'static str, events: &mut Vec<Event>) {
        let since = self.broken.map(|at| now.saturating_duration_since(at));
        if since.is_none_or(|since| since >= CALM) {
            self.pause = PAUSE[0];
        }
        self.restart_after(self.pause, now, why, events);
    }

    fn restart_after(
        &mut self,
        pause: Duration,
        now: Instant,
        why: &'static str,
        events: &mut Vec<Event>,
    ) {
        self.broken = Some(now);
        self.phase = Phase::Pausing { until: now + pause };
        self.pause = (pause * 2).min(PAUSE[1]);
        self.stats = None;
        self.names = None;
        events.push(Event::Restarted { why });
    }

    fn greet(&mut self, now: Instant) {
        // Either decoder may be waiting for the rest of a frame whose length was garbled. Ours starts anew; the guest's
        // is fed with nothing until it has seen the longest frame there is.
        if self.sent != 0 {
            self.garbage += self.decoder.garbage();
            self.decoder = Decoder::default();
            // What a guest has not read of an earlier session it need not read any more.
            self.output.clear();
            self.output.resize(FRAME_MAX, 0);
        }
        // Any change of all bits will do: sessions only have to differ.
        self.id = self
            .id
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.sent = 0;
        self.expected = 0;
        self.ping = None;
        self.heard = now;
        self.phase = Phase::Greeting {
            until: now + self.patience,
        };
        self.send(&ToGuest::Hello { version: VERSION });
    }

    fn send(&mut self, message: &ToGuest) {
        let mut buffer = [0; FRAME_MAX];
        let envelope = Envelope {
            session: self.id,
            sequence: self.sent,
            message,
        };
        match frame::encode(&envelope, &mut buffer) {
            Ok(bytes) => {
                self.sent = self.sent.saturating_add(1);
                self.output.extend_from_slice(bytes);
            }
            Err(error) => tracing::error!(%error, ?message, "control message not sent"),
        }
    }
}
