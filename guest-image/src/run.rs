//! The loop: a batch of frames, housekeeping, control, and sleep when there is nothing to do.
//!
//! Frames come first. Housekeeping and control have budgets, so that neither holds frames back for
//! longer than [`CONTROL_BUDGET`]. The machine below is a trait: the microVM, or a test.

use sluice_appliance::frame::Frame;
use sluice_appliance::pipeline::Pipeline;
use sluice_appliance::session::Order;
use sluice_appliance::time::Instant;
use sluice_appliance::verdict::Verdict;
use sluice_contract::DropReason;

use crate::control::Control;
use crate::idle::Idle;
use crate::net::{self, Trunk};
use crate::packet::{BATCH, Batch, Outcome, Packet};

/// Steps of housekeeping per turn.
const SWEEP_BUDGET: usize = 64;
/// Nanoseconds of control work per turn.
const CONTROL_BUDGET: u64 = 25_000;
/// A slice of control work that takes longer is counted.
const LONG_SLICE: u64 = 100_000;
/// Between two signs of life while running: half of what is owed.
const HEARTBEAT: u64 = 250_000_000;
/// Looks at the rings between two looks at the clock.
const POLLS: u32 = 16;

/// The devices that can be notified.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Device {
    Trunk,
    Control,
}

/// What the loop needs of the machine it runs on.
pub trait Machine {
    /// Nanoseconds since boot.
    fn now(&self) -> u64;
    /// Tells a device that a queue has something new.
    fn notify(&mut self, device: Device, queue: u16);
    /// Forgets interrupts that were raised so far; what they were about is looked for afterwards.
    fn clear_interrupts(&mut self);
    /// Sleeps until a device interrupts or the nanoseconds are over.
    fn sleep(&mut self, nanoseconds: u64);
    /// A sign of life.
    fn heartbeat(&mut self);
    /// Whether anything can arrive while this runs. Where nothing can, polling is a waste.
    fn moves_meanwhile(&self) -> bool;
}

/// The whole appliance on its machine.
#[derive(Debug)]
pub struct Loop<'m, M> {
    machine: M,
    trunk: Option<Trunk<'m>>,
    control: Option<Control<'m>>,
    pipeline: Pipeline<'m>,
    batch: Batch<'m>,
    idle: Idle,
    last_heartbeat: u64,
    /// When housekeeping wants to be called again.
    next_sweep: Option<u64>,
}

impl<'m, M: Machine> Loop<'m, M> {
    /// A machine may lack either device: without a trunk it can still say so, without control it
    /// forwards nothing.
    pub fn new(
        machine: M,
        trunk: Option<Trunk<'m>>,
        control: Option<Control<'m>>,
        pipeline: Pipeline<'m>,
    ) -> Self {
        Self {
            machine,
            trunk,
            control,
            pipeline,
            batch: Batch::default(),
            idle: Idle::default(),
            last_heartbeat: 0,
            next_sweep: Some(0),
        }
    }

    /// Runs until the host asks for the end.
    pub fn run(&mut self) {
        while self.turn() == Order::Continue {}
    }

    /// One turn: all that waits is done, or a sleep.
    pub fn turn(&mut self) -> Order {
        let now = self.machine.now();
        self.idle.turn(now);
        let mut worked = self.frames(now);
        worked |= self.sweep(now);
        let (control_worked, order) = self.control(now);
        worked |= control_worked;
        if now.saturating_sub(self.last_heartbeat) >= HEARTBEAT {
            self.machine.heartbeat();
            self.last_heartbeat = now;
        }
        if worked {
            self.idle.worked(now);
        } else if order == Order::Continue {
            self.rest();
        }
        order
    }

    /// Receives a batch, sends it to its end, and out. `true` if there was one.
    fn frames(&mut self, now: u64) -> bool {
        let Some(trunk) = &mut self.trunk else {
            return false;
        };
        trunk.receive(&mut self.batch);
        let received = !self.batch.packets.is_empty();
        if received {
            process(&mut self.pipeline, trunk, &mut self.batch, instant(now));
        }
        flush(&mut self.machine, trunk);
        received
    }

    /// Housekeeping that is due. `true` if there is more of it.
    fn sweep(&mut self, now: u64) -> bool {
        let Some(trunk) = &mut self.trunk else {
            self.next_sweep = None; // nothing to keep house for, and no reason to stay awake
            return false;
        };
        if self.next_sweep.is_none_or(|at| at > now) {
            return false;
        }
        let next = self.pipeline.sweep(instant(now), SWEEP_BUDGET, trunk);
        self.next_sweep = next.map(|at| at.micros().saturating_mul(1000));
        flush(&mut self.machine, trunk);
        self.next_sweep.is_some_and(|at| at <= now)
    }

    fn control(&mut self, now: u64) -> (bool, Order) {
        let Some(control) = &mut self.control else {
            return (false, Order::Continue);
        };
        let machine = &mut self.machine;
        let began = machine.now();
        let is_over = || machine.now().saturating_sub(began) >= CONTROL_BUDGET;
        let turn = control.turn(&mut self.pipeline, now / 1000, is_over);
        if turn.notify_transmit {
            machine.notify(Device::Control, crate::console::TRANSMIT);
        }
        if turn.notify_receive {
            machine.notify(Device::Control, crate::console::RECEIVE);
        }
        if turn.worked {
            let took = machine.now().saturating_sub(began);
            let errors = control.errors() + self.trunk.as_ref().map_or(0, Trunk::errors);
            let counters = &mut self.pipeline.stats_mut().machine;
            counters.longest_slice_nanos = counters.longest_slice_nanos.max(took);
            counters.slices += 1;
            counters.long_slices += u64::from(took > LONG_SLICE);
            counters.ring_errors = errors;
            // A change may have brought deadlines with it.
            self.next_sweep = Some(now);
        }
        (turn.worked, turn.order)
    }

    /// Nothing to do: poll on, or sleep until there is.
    fn rest(&mut self) {
        let now = self.machine.now();
        let polls = self.machine.moves_meanwhile();
        let Some(length) = self.idle.sleep(now, self.next_sweep, polls) else {
            for _ in 0..POLLS {
                core::hint::spin_loop();
            }
            return;
        };
        self.machine.clear_interrupts();
        let mut is_pending = self.trunk.as_mut().is_some_and(Trunk::arm);
        is_pending |= self.control.as_mut().is_some_and(Control::arm);
        if !is_pending {
            self.machine.sleep(length);
            let woken = self.machine.now();
            self.last_heartbeat = woken;
            let slept = woken.saturating_sub(now);
            self.idle.woke(woken, slept, slept < length);
            let counters = &mut self.pipeline.stats_mut().machine;
            counters.parks += 1;
            counters.parked_micros += slept / 1000;
        }
        if let Some(trunk) = &mut self.trunk {
            trunk.disarm();
        }
        if let Some(control) = &mut self.control {
            control.disarm();
        }
    }
}

/// Sends every frame of the batch through the pipeline and to where its verdict says.
fn process<'m>(
    pipeline: &mut Pipeline<'m>,
    trunk: &mut Trunk<'m>,
    batch: &mut Batch<'m>,
    now: Instant,
) {
    let mut verdicts = [Verdict::Drop(DropReason::Malformed); BATCH];
    let mut outcomes = heapless::Vec::<Outcome, BATCH>::new();
    {
        let mut frames = heapless::Vec::<Frame<'_>, BATCH>::new();
        for frame in batch.packets.iter_mut().filter_map(Packet::frame) {
            // A batch has no more packets than this has room for, and every packet is a frame.
            let _ = frames.push(frame);
        }
        pipeline.process_batch(&mut frames, &mut verdicts, now, trunk);
        outcomes.extend(frames.iter().map(Outcome::from));
    }
    for (outcome, verdict) in outcomes.iter().zip(verdicts) {
        let Some(mut packet) = batch.packets.pop_front() else {
            break;
        };
        packet.adopt(outcome);
        let (ingress, bytes) = (packet.ingress(), packet.length());
        let link = match verdict {
            Verdict::Forward(link) => link,
            Verdict::Reply => ingress,
            Verdict::Drop(_) | Verdict::Held => {
                trunk.recycle(packet, batch);
                continue;
            }
        };
        if !trunk.send(packet, link, batch) {
            pipeline
                .stats_mut()
                .transmit_failed(verdict, ingress, bytes);
        }
    }
}

fn flush<M: Machine>(machine: &mut M, trunk: &mut Trunk<'_>) {
    if trunk.flush() {
        machine.notify(Device::Trunk, net::TRANSMIT);
    }
    if trunk.refill() {
        machine.notify(Device::Trunk, net::RECEIVE);
    }
}

fn instant(nanoseconds: u64) -> Instant {
    Instant::from_micros(nanoseconds / 1000)
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
