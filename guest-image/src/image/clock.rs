//! Time from the time-stamp counter, and how fast that runs.

use core::arch::x86_64::__cpuid;

use super::platform;

/// Nanoseconds since the machine's first instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: u64,
    /// Nanoseconds per cycle, times 2^32.
    factor: u64,
}

impl Clock {
    /// `khz` is not zero; `start` is the counter at entry.
    pub(crate) fn new(khz: u64, start: u64) -> Self {
        Self {
            start,
            factor: (1_000_000u64 << 32) / khz.max(1),
        }
    }

    #[inline]
    pub(crate) fn nanoseconds(&self, tsc: u64) -> u64 {
        let cycles = tsc.saturating_sub(self.start);
        ((u128::from(cycles) * u128::from(self.factor)) >> 32) as u64
    }
}

/// The first source that knows: command line, processor, hypervisor, a comparison with ring 0's
/// timer.
pub(crate) fn frequency_khz(told: Option<u64>) -> u64 {
    told.or_else(from_processor)
        .or_else(from_hypervisor)
        .unwrap_or_else(measured)
}

/// Leaf 0x15: crystal frequency and ratio; leaf 0x16: base frequency in MHz.
fn from_processor() -> Option<u64> {
    let highest = __cpuid(0).eax;
    if highest >= 0x15 {
        let leaf = __cpuid(0x15);
        let product = u64::from(leaf.ecx) * u64::from(leaf.ebx);
        if let Some(hertz) = product.checked_div(u64::from(leaf.eax)).filter(|h| *h > 0) {
            return Some(hertz / 1000);
        }
    }
    if highest < 0x16 {
        return None;
    }
    Some(u64::from(__cpuid(0x16).eax & 0xffff) * 1000).filter(|khz| *khz > 0)
}

/// Leaf 0x40000010, where a hypervisor announces it: kHz in eax.
fn from_hypervisor() -> Option<u64> {
    const HYPERVISOR_PRESENT: u32 = 1 << 31;
    if __cpuid(1).ecx & HYPERVISOR_PRESENT == 0 || __cpuid(0x4000_0000).eax < 0x4000_0010 {
        return None;
    }
    Some(u64::from(__cpuid(0x4000_0010).eax)).filter(|khz| *khz > 0)
}

/// From the difference between long and short sleeps, in which what a sleep costs beside its length
/// cancels out. The shortest of several each: a sleep is never too short, only too long.
fn measured() -> u64 {
    const SHORT_US: u64 = 1000;
    const LONG_US: u64 = 11_000;
    let least = |microseconds: u64, times: u32| {
        let one = || {
            let start = platform::tsc();
            platform::wait(microseconds);
            platform::tsc().saturating_sub(start)
        };
        (0..times).map(|_| one()).min().unwrap_or(0)
    };
    // The first prepares the timer.
    platform::wait(1);
    let cycles = least(LONG_US, 2).saturating_sub(least(SHORT_US, 3));
    (cycles * 1000 / (LONG_US - SHORT_US)).max(10_000)
}
