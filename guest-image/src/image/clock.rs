//! How fast the time-stamp counter runs.

use core::arch::x86_64::__cpuid;

use super::platform;

/// The first source that knows: command line, processor, hypervisor, a comparison with ring 0's timer.
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

/// The least of three sleeps of 2 ms: a sleep is never too short, only too long.
fn measured() -> u64 {
    const SLEEP_US: u64 = 2000;
    platform::wait(1);
    let shortest = (0..3).map(|_| {
        let start = platform::tsc();
        platform::wait(SLEEP_US);
        platform::tsc() - start
    });
    (shortest.min().unwrap_or(0) * 1000 / SLEEP_US).max(10_000)
}
