//! What it costs to leave the guest and to enter it again, measured while the guest sets its devices up.
//!
//! A driver's accesses to a device's registers follow each other within nanoseconds, so the time from one to the next is one entry
//! and one exit. Some are longer, because the guest does something else in between: the median is not.

use std::time::Duration;
use std::time::Instant;

/// Accesses that are measured.
const SAMPLES: usize = 33;
/// The first ones pay for page tables.
const IGNORED: u64 = 4;

/// The measurement, until it is done.
#[derive(Debug)]
pub struct Gauge {
    times: Vec<Duration>,
    registers: u64,
    is_done: bool,
}

impl Default for Gauge {
    fn default() -> Gauge {
        Gauge {
            times: Vec::with_capacity(SAMPLES),
            registers: 0,
            is_done: false,
        }
    }
}

impl Gauge {
    /// The guest is about to be entered; nothing once all is measured.
    #[must_use]
    pub fn begin(&self) -> Option<Instant> {
        (!self.is_done).then(Instant::now)
    }

    /// The guest was left, and has accessed so many registers in all. The cost, once.
    pub fn end(&mut self, begin: Instant, registers: u64) -> Option<Duration> {
        self.take(begin.elapsed(), registers)
    }

    fn take(&mut self, time: Duration, registers: u64) -> Option<Duration> {
        let is_register = registers > self.registers;
        self.registers = registers;
        if !is_register || registers <= IGNORED || self.is_done {
            return None;
        }
        self.times.push(time);
        if self.times.len() < SAMPLES {
            return None;
        }
        self.is_done = true;
        self.times.sort_unstable();
        self.times.get(SAMPLES / 2).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_register_accesses_is_given_once() {
        let mut gauge = Gauge::default();
        let mut costs = Vec::new();
        let mut registers = 0;
        for round in 0..200_u64 {
            // Every fourth exit is of another kind and long; every tenth access is held up.
            registers += u64::from(round % 4 != 0);
            let micros = match round {
                round if round % 4 == 0 => 5000,
                round if round % 10 == 1 => 900,
                _ => 20 + round % 3,
            };
            costs.extend(gauge.take(Duration::from_micros(micros), registers));
        }
        assert_eq!(costs.len(), 1);
        assert!((20..=22).contains(&costs[0].as_micros()), "{costs:?}");
        assert_eq!(gauge.begin(), None);
    }
}
