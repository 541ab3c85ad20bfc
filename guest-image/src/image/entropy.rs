//! A seed that pods cannot guess: tables are hashed with it.

use core::arch::x86_64::{__cpuid, _rdrand64_step};

use super::platform;

/// Samples of the processor's generator; each of the others takes only the counter.
const GENERATED: usize = 4;

/// From the processor's generator where there is one, and from the jitter of the counter in any
/// case.
pub(crate) fn seed() -> [u8; 16] {
    let mut state = [platform::tsc(), 0x9e37_79b9_7f4a_7c15];
    let has_generator = has_generator();
    for i in 0..256 {
        let generated = if has_generator && i < GENERATED {
            generate()
        } else {
            0
        };
        let sample = platform::tsc() ^ generated;
        // SplitMix64's finalizer (Steele, Lea, Flood 2014), chained over both halves.
        let mut mixed = sample ^ state[0].rotate_left(29);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state = [state[1].wrapping_add(mixed ^ (mixed >> 31)), state[0]];
    }
    let mut seed = [0; 16];
    seed[..8].copy_from_slice(&state[0].to_le_bytes());
    seed[8..].copy_from_slice(&state[1].to_le_bytes());
    seed
}

/// `cpuid` costs an exit on some hosts: once is enough.
fn has_generator() -> bool {
    const RDRAND: u32 = 1 << 30;
    __cpuid(1).ecx & RDRAND != 0
}

fn generate() -> u64 {
    let mut value = 0;
    // A generator that has run dry leaves zero, and the counter has to do.
    rdrand(&mut value);
    value
}

#[target_feature(enable = "rdrand")]
fn rdrand_step(value: &mut u64) -> i32 {
    _rdrand64_step(value)
}

fn rdrand(value: &mut u64) {
    // SAFETY: called only where the processor says that it has the instruction.
    unsafe { rdrand_step(value) };
}
