//! SipHash-1-3 over 64-bit words: a keyed hash, so that nobody outside can choose keys that collide.
//!
//! Keys of tables are short and of fixed length, so the length is not mixed in; every table has one key shape.

/// A secret key, the same for all tables of one pipeline.
#[derive(Clone, Copy)]
pub struct Hasher {
    key: [u64; 2],
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
        Self {
            key: [
                u64::from_le_bytes([a, b, c, d, e, f, g, h]),
                u64::from_le_bytes(rest),
            ],
        }
    }

    /// The key as it lies in a region that a successor reads.
    pub(crate) const fn key(&self) -> [u64; 2] {
        self.key
    }

    /// The hasher of a region's key.
    pub(crate) const fn with_key(key: [u64; 2]) -> Self {
        Self { key }
    }

    /// The hash of `words`.
    ///
    /// # Cost
    /// One round per word and three to finish.
    #[inline]
    pub fn hash<const N: usize>(&self, words: [u64; N]) -> u64 {
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
