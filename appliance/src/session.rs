//! The guest's end of the control channel, as a state machine: messages in, messages out, no bytes and no clock.
//!
//! Use: while [`Session::is_ready`], decode the next frame and give it to [`Session::receive`]; send what [`Session::poll`]
//! yields until it yields nothing; and give the pipeline's tables their slices ([`Pipeline::work`]) meanwhile.

use crate::apply::{Outcome, Refusals};
use crate::pipeline::Pipeline;
use heapless::{Deque, String, Vec};
use sluice_contract::message::{Counter, Envelope, GuestHello, Level};
use sluice_contract::name::Learnt;
use sluice_contract::{Generation, LinkId, ToGuest, ToHost, VERSION, limits};

/// Sessions that are remembered so that a replayed `Hello` of one does not end the present one.
const REMEMBERED: usize = 8;
/// Short answers that wait to be sent. Each message causes at most two.
const PENDING: usize = 16;

/// Addresses that are looked at for one page of names, so that no page holds up packets.
const LOOKS: usize = 512;

/// What the image knows of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    pub image: [u8; 20],
    pub ram_mib: u32,
}

/// What the run loop is asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    Continue,
    /// End in order.
    Shutdown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// No session, or one of another version: silent until a `Hello`.
    Closed,
    Open,
    /// A message is missing; changes are ignored until one starts afresh.
    Lost,
}

/// Answers short enough to wait in a queue.
#[derive(Clone, Debug)]
enum Answer {
    Hello { uptime_us: u64 },
    Outcome(Outcome),
    Resync { expected: u32 },
    Pong { token: u32 },
}

/// A question for what pods were told of names, under way.
#[derive(Clone, Copy, Debug)]
struct Naming {
    token: u32,
    link: Option<LinkId>,
    cursor: usize,
    /// So many more are told.
    left: usize,
}

/// The session.
#[derive(Debug)]
pub struct Session {
    facts: Facts,
    state: State,
    session: u64,
    /// The sequence number that the next message should have.
    expected: u32,
    /// The sequence number of the next message to be sent.
    sequence: u32,
    former: Deque<u64, REMEMBERED>,
    answers: Deque<Answer, PENDING>,
    /// The statistics being read: token and cursor.
    reading: Option<(u32, usize)>,
    /// The names being read.
    naming: Option<Naming>,
    /// Neighbors that the host has been asked for.
    wanted: usize,
    audited: usize,
    log: Option<(Level, String<{ limits::LOG_TEXT }>)>,
}

impl Session {
    /// Silent until the host says `Hello`.
    pub fn new(facts: Facts) -> Self {
        Self {
            facts,
            state: State::Closed,
            session: 0,
            expected: 0,
            sequence: 0,
            former: Deque::new(),
            answers: Deque::new(),
            reading: None,
            naming: None,
            wanted: 0,
            audited: 0,
            log: None,
        }
    }

    /// Whether the next message may be given: the tables are not busy, there is room for the answers, and the host was sent
    /// what was refused.
    pub fn is_ready(&self, pipeline: &Pipeline<'_>) -> bool {
        !pipeline.is_applying()
            && pipeline.refusals().is_none()
            && self.answers.len() + 2 <= PENDING
    }

    /// Takes a message. `uptime_us` goes into the answer to a `Hello`.
    pub fn receive(
        &mut self,
        envelope: &Envelope<ToGuest>,
        pipeline: &mut Pipeline<'_>,
        uptime_us: u64,
    ) -> Order {
        let Envelope {
            session,
            sequence,
            message,
        } = envelope;
        if let ToGuest::Hello { version } = message {
            self.hello(*session, *sequence, *version, pipeline, uptime_us);
            return Order::Continue;
        }
        let foreign = self.state == State::Closed || *session != self.session;
        if foreign || *sequence < self.expected {
            pipeline.stats_mut().machine.control_stale += 1;
            return Order::Continue;
        }
        if *sequence > self.expected {
            self.lose(pipeline);
        }
        self.expected = sequence.saturating_add(1);
        self.message(message, pipeline)
    }

    fn hello(
        &mut self,
        session: u64,
        sequence: u32,
        version: u16,
        pipeline: &mut Pipeline<'_>,
        uptime_us: u64,
    ) {
        let present = self.sequence > 0 && session == self.session;
        if sequence != 0 || present || self.former.iter().any(|former| *former == session) {
            pipeline.stats_mut().machine.control_stale += 1;
            return;
        }
        if self.sequence > 0 {
            if self.former.is_full() {
                self.former.pop_front();
            }
            // There is room now.
            let _ = self.former.push_back(self.session);
        }
        pipeline.abort();
        self.session = session;
        self.expected = 1;
        self.sequence = 0;
        self.reading = None;
        self.naming = None;
        self.answers.clear();
        self.state = if version == VERSION {
            State::Open
        } else {
            State::Closed
        };
        self.answer(Answer::Hello { uptime_us });
    }

    fn lose(&mut self, pipeline: &mut Pipeline<'_>) {
        pipeline.abort();
        self.state = State::Lost;
        self.answer(Answer::Resync {
            expected: self.expected,
        });
    }

    fn message(&mut self, message: &ToGuest, pipeline: &mut Pipeline<'_>) -> Order {
        let change = match message {
            ToGuest::Hello { .. } => return Order::Continue,
            ToGuest::Ping { token } => {
                self.answer(Answer::Pong { token: *token });
                return Order::Continue;
            }
            ToGuest::ReadStats { token } => {
                self.reading = Some((*token, 0));
                return Order::Continue;
            }
            ToGuest::ReadNames { token, link } => {
                self.naming = Some(Naming {
                    token: *token,
                    link: *link,
                    cursor: 0,
                    left: limits::NAMES_TOLD,
                });
                return Order::Continue;
            }
            ToGuest::Shutdown => return Order::Shutdown,
            change => change,
        };
        if self.state == State::Lost {
            match change {
                ToGuest::Begin { fresh: true, .. } => self.state = State::Open,
                // The host has not heard the `Resync`, or has not answered it yet: once per change is enough.
                ToGuest::Commit { .. } => {
                    self.answer(Answer::Resync {
                        expected: self.expected,
                    });
                    return Order::Continue;
                }
                _ => return Order::Continue,
            }
        }
        match pipeline.configure(change) {
            // What is left out waits in the pipeline.
            Outcome::Noted | Outcome::LeftOut(_) => {}
            outcome => self.answer(Answer::Outcome(outcome)),
        }
        Order::Continue
    }

    fn answer(&mut self, answer: Answer) {
        // `is_ready` kept room; a caller who did not ask loses the answer, and the host resyncs.
        let _ = self.answers.push_back(answer);
    }

    /// Leaves a line for the host; the one before, if still unsent, is replaced.
    pub fn log(&mut self, level: Level, text: &str) {
        let end = text.floor_char_boundary(limits::LOG_TEXT);
        let text = text.get(..end).and_then(|text| String::try_from(text).ok());
        self.log = text.map(|text| (level, text));
    }

    /// The next message to be sent, if there is one.
    pub fn poll(&mut self, pipeline: &mut Pipeline<'_>) -> Option<Envelope<ToHost>> {
        if let Some(outcome) = pipeline.take_outcome() {
            self.answer(Answer::Outcome(outcome));
        }
        let message = self.next_message(pipeline)?;
        let sequence = self.sequence;
        self.sequence = self.sequence.saturating_add(1);
        Some(Envelope {
            session: self.session,
            sequence,
            message,
        })
    }

    fn next_message(&mut self, pipeline: &mut Pipeline<'_>) -> Option<ToHost> {
        // Before the acknowledgment that counts them.
        if let Some(Refusals { generation, rows }) = pipeline.refusals().cloned() {
            pipeline.clear_refusals();
            return Some(ToHost::Refused { generation, rows });
        }
        if let Some(answer) = self.answers.pop_front() {
            return Some(self.to_host(&answer, pipeline));
        }
        if self.state == State::Closed {
            return None;
        }
        if let Some((level, text)) = self.log.take() {
            return Some(ToHost::Log { level, text });
        }
        if let Some((address, next)) = pipeline.wanted().after(self.wanted) {
            self.wanted = next;
            let address = address.into();
            return Some(ToHost::Unresolved { address });
        }
        if let Some((event, next)) = pipeline.audited().after(self.audited) {
            self.audited = next;
            return Some(ToHost::WouldDeny(event));
        }
        if let Some((token, cursor)) = self.reading {
            let (counters, rest) = page(pipeline, cursor);
            self.reading = rest.map(|cursor| (token, cursor));
            return Some(ToHost::Stats {
                token,
                counters,
                last: rest.is_none(),
            });
        }
        let mut naming = self.naming.take()?;
        let token = naming.token;
        let (names, last) = naming.page(pipeline);
        self.naming = (!last).then_some(naming);
        Some(ToHost::Names { token, names, last })
    }

    fn to_host(&self, answer: &Answer, pipeline: &Pipeline<'_>) -> ToHost {
        match *answer {
            Answer::Hello { uptime_us } => ToHost::Hello(GuestHello {
                version: VERSION,
                image: self.facts.image,
                generation: pipeline.tables().generation(),
                ram_mib: self.facts.ram_mib,
                uptime_us,
                room: pipeline.room(),
            }),
            Answer::Outcome(Outcome::Refused(generation, reject)) => {
                ToHost::Reject { generation, reject }
            }
            Answer::Outcome(Outcome::Committed {
                generation,
                refused,
            }) => ToHost::Ack {
                generation,
                refused,
            },
            // Never queued; an acknowledgment of nothing is harmless.
            Answer::Outcome(Outcome::Noted | Outcome::LeftOut(_)) => ToHost::Ack {
                generation: Generation(0),
                refused: 0,
            },
            Answer::Resync { expected } => ToHost::Resync { expected },
            Answer::Pong { token } => ToHost::Pong { token },
        }
    }
}

impl Naming {
    /// One page of names, and whether it is the last one.
    fn page(&mut self, pipeline: &Pipeline<'_>) -> (Vec<Learnt, { limits::NAMES_BATCH }>, bool) {
        let mut names = Vec::new();
        for _ in 0..LOOKS {
            let next = pipeline.names_from(self.link, self.cursor);
            let Some((learnt, cursor)) = next.filter(|_| self.left > 0) else {
                return (names, true);
            };
            if let Some(learnt) = learnt {
                if names.push(learnt).is_err() {
                    break;
                }
                self.left -= 1;
            }
            self.cursor = cursor;
        }
        (names, false)
    }
}

/// One page of counters, and where the next one begins if there is one.
fn page(
    pipeline: &Pipeline<'_>,
    mut cursor: usize,
) -> (Vec<Counter, { limits::STATS_BATCH }>, Option<usize>) {
    let mut counters = Vec::new();
    while let Some((counter, next)) = pipeline.stats().next_from(cursor) {
        if counters.push(counter).is_err() {
            return (counters, Some(cursor));
        }
        cursor = next;
    }
    (counters, None)
}
