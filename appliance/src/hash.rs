//! SipHash-1-3 over 64-bit words: a keyed hash, so that nobody outside can choose keys that collide.
//!
//! Keys of tables are short and of fixed length, so the length is not mixed in; every table has one key shape.

/// A secret key, the same for all tables of one pipeline.
#[derive(Clone, Copy)]
pub struct Hasher {
    key: [u64; 2],
    /// An odd number made of it.
    factor: u64,
}

impl core::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Hasher")
    }
}

impl Hasher {
    /// A hasher with the secret `seed`.
    pub const fn new(seed: [u8; 16]) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = seed;
        Self::with_key([
            u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            u64::from_le_bytes(rest),
        ])
    }

    /// The key as it lies in a region that a successor reads.
    pub(crate) const fn key(&self) -> [u64; 2] {
        self.key
    }

    /// The hasher of a region's key.
    pub(crate) const fn with_key(key: [u64; 2]) -> Self {
        let factor = spread(key[1] ^ 0x9e37_79b9_7f4a_7c15) | 1;
        Self { key, factor }
    }

    /// The hash of `words`.
    ///
    /// # Cost
    /// One round per word and three to finish.
    #[inline]
    pub fn hash<const N: usize>(&self, words: [u64; N]) -> u64 {
        self.hash_all(words)
    }

    /// The hash of `first` and then `words`.
    #[inline]
    pub(crate) fn hash_after<const N: usize>(&self, first: u64, words: &[u64; N]) -> u64 {
        self.hash_all(core::iter::once(first).chain(words.iter().copied()))
    }

    #[inline(always)]
    fn hash_all(&self, words: impl IntoIterator<Item = u64>) -> u64 {
        let [k0, k1] = self.key;
        let mut v = [
            k0 ^ 0x736f_6d65_7073_6575,
            k1 ^ 0x646f_7261_6e64_6f6d,
            k0 ^ 0x6c79_6765_6e65_7261,
            k1 ^ 0x7465_6462_7974_6573,
        ];
        for word in words {
            v[3] ^= word;
            round(&mut v);
            v[0] ^= word;
        }
        v[2] ^= 0xff;
        for _ in 0..3 {
            round(&mut v);
        }
        v[0] ^ v[1] ^ v[2] ^ v[3]
    }

    /// The hash of a number that the host gave to a row: MurmurHash3's finalizer over the keyed number, with a secret factor in
    /// the place of its first. No packet chooses the number, and what the host makes it of (objects that people write) says
    /// nothing of this key, so this is enough, at a third of the cost.
    #[inline]
    pub(crate) const fn hash_id(&self, id: u64) -> u64 {
        mix(id ^ self.key[0], self.factor)
    }
}

/// MurmurHash3's first factor.
const FACTOR: u64 = 0xff51_afd7_ed55_8ccd;

/// MurmurHash3's finalizer. Secret only if `hash` is.
#[inline]
pub(crate) const fn spread(hash: u64) -> u64 {
    mix(hash, FACTOR)
}

/// The same with another first factor.
#[inline]
const fn mix(number: u64, factor: u64) -> u64 {
    let hash = (number ^ (number >> 33)).wrapping_mul(factor);
    let hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[inline]
fn round(v: &mut [u64; 4]) {
    v[0] = v[0].wrapping_add(v[1]);
    v[2] = v[2].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(13) ^ v[0];
    v[3] = v[3].rotate_left(16) ^ v[2];
    v[0] = v[0].rotate_left(32);
    v[2] = v[2].wrapping_add(v[1]);
    v[0] = v[0].wrapping_add(v[3]);
    v[1] = v[1].rotate_left(17) ^ v[2];
    v[3] = v[3].rotate_left(21) ^ v[0];
    v[2] = v[2].rotate_left(32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::hash::Hasher as _;
    use proptest::prelude::*;
    use std::collections::hash_map::DefaultHasher;

    #[test]
    fn ids_that_follow_each_other_fill_a_table_evenly() {
        for seed in 0..64u8 {
            let hasher = Hasher::new([seed; 16]);
            // As the backends of sets: half a table of 2¹⁶, the longest run of which is what a lookup may have to walk.
            let mut used = std::vec![false; 1 << 16];
            let mut longest = 0;
            for set in 0..1u64 << 13 {
                for index in 0..4u64 {
                    let start = hasher.hash_id(set << 16 | index) as usize;
                    let steps = (0..)
                        .position(|step| !used[(start + step) & 0xffff])
                        .unwrap();
                    used[(start + steps) & 0xffff] = true;
                    longest = longest.max(steps);
                }
            }
            assert!(longest < 200, "{longest} with seed {seed}");
        }
    }

    #[test]
    fn numbers_that_meet_under_one_key_part_under_another() {
        let seed = |n: u8| core::array::from_fn(|at| if at == 8 { n } else { 7 });
        // Only the factor differs.
        let (one, other) = (Hasher::new(seed(1)), Hasher::new(seed(2)));
        let start = |hasher: &Hasher, id| hasher.hash_id(id) & 0x3ff;
        let wanted = start(&one, 0);
        let ids = (0..u64::MAX).filter(|id| start(&one, *id) == wanted);
        let places: std::collections::BTreeSet<u64> =
            ids.take(64).map(|id| start(&other, id)).collect();
        assert!(places.len() > 50, "{}", places.len());
    }

    proptest! {
        #[test]
        fn with_the_length_as_last_word_it_is_siphash_1_3(words: [u64; 4]) {
            // The standard library's default hasher is SipHash-1-3 with a zero key.
            let mut reference = DefaultHasher::new();
            for word in words {
                reference.write(&word.to_le_bytes());
            }
            let [a, b, c, d] = words;
            let ours = Hasher::new([0; 16]).hash([a, b, c, d, 32 << 56]);
            prop_assert_eq!(ours, reference.finish());
        }
    }
}
