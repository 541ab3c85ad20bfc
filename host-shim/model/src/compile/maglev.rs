//! Consistent hashing as in Maglev (Eisenbud et al., NSDI 2016, §3.4): each backend has its own order of preference of all
//! slots, and they take turns. Nearly equal shares, and a backend that goes takes few others' slots along.

use std::hash::Hash;

use super::hash;

/// Primes, as the paper asks for. With a hundred slots a backend the shares differ by about one percent.
const SIZES: [u16; 9] = [251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521];
const SLOTS_PER_BACKEND: usize = 100;

/// How many slots a set of so many backends should have.
pub(crate) fn size(backends: usize) -> u16 {
    let wanted = backends.saturating_mul(SLOTS_PER_BACKEND);
    let fits = SIZES.into_iter().find(|size| usize::from(*size) >= wanted);
    fits.unwrap_or(SIZES[SIZES.len() - 1])
}

/// Which backend (by index) each slot belongs to. `slots` is prime; there are not more backends than slots.
pub(crate) fn table<B: Hash>(backends: &[B], slots: u16) -> Vec<u16> {
    let size = u64::from(slots);
    let mut turns: Vec<(u64, u64)> = backends
        .iter()
        .map(|it| {
            (
                hash::of(&(it, 0u8)) % size,
                hash::of(&(it, 1u8)) % (size - 1) + 1,
            )
        })
        .collect();
    let mut table: Vec<Option<u16>> = vec![None; usize::from(slots)];
    let mut left = table.len();
    while left > 0 && !turns.is_empty() {
        for (index, (next, skip)) in turns.iter_mut().enumerate() {
            let slot = loop {
                let at = *next;
                *next = (*next + *skip) % size;
                match usize::try_from(at).ok().and_then(|at| table.get_mut(at)) {
                    Some(slot) if slot.is_none() => break slot,
                    _ => {}
                }
            };
            *slot = u16::try_from(index).ok();
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    table.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owners(backends: &[u32]) -> Vec<u32> {
        let table = table(backends, size(backends.len()));
        table
            .into_iter()
            .map(|index| backends[usize::from(index)])
            .collect()
    }

    #[test]
    fn shares_are_nearly_equal() {
        for count in [1u32, 2, 3, 7, 100] {
            let backends: Vec<u32> = (0..count).collect();
            let owners = owners(&backends);
            let share = |it: &u32| owners.iter().filter(|owner| *owner == it).count();
            let (least, most) = (
                backends.iter().map(share).min(),
                backends.iter().map(share).max(),
            );
            assert!(
                most.unwrap() - least.unwrap() <= owners.len() / 50 + 1,
                "{count}: {least:?} {most:?}"
            );
        }
    }

    #[test]
    fn s27_removing_one_of_a_hundred_moves_few_of_the_others() {
        let all: Vec<u32> = (0..100).collect();
        let rest: Vec<u32> = all.iter().copied().filter(|it| *it != 42).collect();
        let (before, after) = (table(&all, 16381), table(&rest, 16381));
        let moved = before.iter().zip(&after).filter(|(a, b)| {
            let (a, b) = (all[usize::from(**a)], rest[usize::from(**b)]);
            a != 42 && a != b
        });
        let moved = moved.count();
        assert!(moved * 50 < before.len(), "{moved} of {}", before.len());
    }
}
