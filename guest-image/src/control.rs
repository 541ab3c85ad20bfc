//! The control channel: bytes to messages to tables, and answers back. The session itself is the
//! appliance's.

use sluice_appliance::pipeline::Pipeline;
use sluice_appliance::session::{Facts, Order, Session};
use sluice_contract::frame::{Decoder, FRAME_MAX, decode, encode};
use sluice_contract::message::Envelope;
use sluice_contract::{ToGuest, ToHost};

use crate::console::Console;

/// Rows that a slice of a table change touches between two looks at the clock: a few microseconds.
const SLICE_ROWS: usize = 64;

/// The guest's end of the control channel.
#[derive(Debug)]
pub struct Control<'m> {
    console: Console<'m>,
    decoder: Decoder,
    session: Session,
    /// Whole frames that were no message of the contract.
    undecodable: u64,
}

/// What a turn came to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Turn {
    pub worked: bool,
    pub order: Order,
    /// Queues to notify.
    pub notify_receive: bool,
    pub notify_transmit: bool,
}

impl<'m> Control<'m> {
    pub fn new(console: Console<'m>, facts: Facts) -> Self {
        let (decoder, session) = (Decoder::default(), Session::new(facts));
        Self {
            console,
            decoder,
            session,
            undecodable: 0,
        }
    }

    /// Completions that made no sense.
    pub fn errors(&self) -> u64 {
        self.console.errors()
    }

    /// The session, for the machine's own lines to the host.
    pub fn session(&mut self) -> &mut Session {
        &mut self.session
    }

    /// Does what there is to do until `is_over`: table slices, messages, answers.
    pub fn turn(
        &mut self,
        pipeline: &mut Pipeline<'_>,
        uptime_us: u64,
        mut is_over: impl FnMut() -> bool,
    ) -> Turn {
        let (mut worked, mut order) = (false, Order::Continue);
        loop {
            let mut step = self.answer(pipeline);
            // Refused rows for which the console has no room hold the change up until the host reads.
            if pipeline.is_applying() && pipeline.refusals().is_none() {
                pipeline.work(SLICE_ROWS);
                step = true;
            } else if self.session.is_ready(pipeline) && self.console.room() >= FRAME_MAX {
                match self.receive(pipeline, uptime_us) {
                    Some(Order::Continue) => step = true,
                    Some(end) => {
                        (order, step) = (end, true);
                    }
                    None => {}
                }
            }
            worked |= step;
            if !step || order != Order::Continue || is_over() {
                break;
            }
        }
        let machine = &mut pipeline.stats_mut().machine;
        machine.control_garbage = self.decoder.garbage() + self.undecodable;
        let (notify_transmit, notify_receive) = (self.console.flush(), self.console.refill());
        Turn {
            worked,
            order,
            notify_receive,
            notify_transmit,
        }
    }

    /// Asks for notifications before a sleep: `true` if there is something to do at once.
    pub fn arm(&mut self) -> bool {
        let wants_room = self.console.room() < 2 * FRAME_MAX;
        self.console.arm(wants_room)
    }

    /// Asks for none: the loop polls.
    pub fn disarm(&mut self) {
        self.console.disarm();
    }

    /// Takes the next message. `None` if there is none yet.
    fn receive(&mut self, pipeline: &mut Pipeline<'_>, uptime_us: u64) -> Option<Order> {
        loop {
            let held = self.console.received();
            let mut rest = held;
            let payload = self.decoder.next(&mut rest);
            let taken = held.len() - rest.len();
            let message = payload.map(decode::<Envelope<ToGuest>>);
            self.console.consume(taken);
            match message {
                Some(Some(envelope)) => {
                    return Some(self.session.receive(&envelope, pipeline, uptime_us));
                }
                Some(None) => self.undecodable += 1,
                None if taken == 0 => return None,
                None => {}
            }
        }
    }

    /// Sends the next answer; `true` if there was one.
    fn answer(&mut self, pipeline: &mut Pipeline<'_>) -> bool {
        if self.console.room() < 2 * FRAME_MAX {
            return false;
        }
        let Some(envelope) = self.session.poll(pipeline) else {
            return false;
        };
        let mut buffer = [0; FRAME_MAX];
        let sent = encode::<Envelope<ToHost>>(&envelope, &mut buffer)
            .is_ok_and(|frame| self.console.send(frame));
        // A message that does not fit leaves a gap in the sequence, by which the host notices.
        debug_assert!(sent);
        true
    }
}
