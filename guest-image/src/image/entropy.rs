//! A seed that pods cannot guess: tables are hashed with it.

use core::arch::x86_64::{__cpuid, _rdrand64_step};

use sluice_guest::boot::SEED;

use super::platform;

/// Samples of the processor's generator; each of the others takes only the counter.
const GENERATED: usize = 4;
const SAMPLES: usize = 256;
/// How often a generator that has run dry is asked again (Intel SDM vol. 1, 7.3.17.1).
const ATTEMPTS: usize = 10;

/// From what the VMM gave, from the processor's generator where there is one, and from the jitter
/// of the counter in any case. Any one of them that is good makes the seed good.
pub(crate) fn seed(given: Option<&[u8; SEED]>) -> [u8; 16] {
    let mut state = [platform::tsc(), 0x9e37_79b9_7f4a_7c15];
    let has_generator = has_generator();
    for i in 0..SAMPLES {
        let generated = if has_generator && i < GENERATED {
            generate().unwrap_or_default()
        } else {
            0
        };
        absorb(&mut state, platform::tsc() ^ generated);
    }
    let (words, _) = given.map_or(&[][..], |given| given).as_chunks::<8>();
    for word in words {
        absorb(&mut state, u64::from_le_bytes(*word));
    }
    let mut seed = [0; 16];
    seed[..8].copy_from_slice(&state[0].to_le_bytes());
    seed[8..].copy_from_slice(&state[1].to_le_bytes());
    seed
}

/// SplitMix64's finalizer (Steele, Lea, Flood 2014), chained over both halves.
fn absorb(state: &mut [u64; 2], sample: u64) {
    let mut mixed = sample ^ state[0].rotate_left(29);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    *state = [state[1].wrapping_add(mixed ^ (mixed >> 31)), state[0]];
}

/// `cpuid` costs an exit on some hosts: once is enough.
fn has_generator() -> bool {
    const RDRAND: u32 = 1 << 30;
    __cpuid(1).ecx & RDRAND != 0
}

/// `None` if the generator has run dry, or is broken: some AMD processors answer with all ones, and
/// call it a success, after the host has been suspended.
fn generate() -> Option<u64> {
    (0..ATTEMPTS)
        .find_map(|_| rdrand())
        .filter(|value| !matches!(*value, 0 | u64::MAX))
}

#[target_feature(enable = "rdrand")]
fn rdrand_step(value: &mut u64) -> i32 {
    _rdrand64_step(value)
}

fn rdrand() -> Option<u64> {
    let mut value = 0;
    // SAFETY: called only where the processor says that it has the instruction.
    let filled = unsafe { rdrand_step(&mut value) };
    (filled == 1).then_some(value)
}
