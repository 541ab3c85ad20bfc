//! The Internet checksum: summed, finished, and patched in place.

use crate::address::{Address, Family};

/// Adds `bytes` to a running one's-complement sum. Only the last piece may have an odd length.
pub fn sum(bytes: &[u8], initial: u64) -> u64 {
    let mut total = initial;
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        total += u64::from(u32::from_be_bytes(*word));
    }
    // A 32-bit word counts as its two halves: 2^16 is 1 in this arithmetic, so the fold takes care of it.
    let mut last = [0u8; 4];
    last.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    total + u64::from(u32::from_be_bytes(last))
}

/// The sum in sixteen bits.
pub const fn fold(total: u64) -> u16 {
    let total = (total & 0xffff_ffff) + (total >> 32);
    let total = (total & 0xffff) + ((total >> 16) & 0xffff) + (total >> 32);
    let total = (total & 0xffff) + (total >> 16);
    let total = (total & 0xffff) + (total >> 16);
    total as u16
}

/// The checksum that makes the whole sum right.
pub const fn finish(total: u64) -> u16 {
    !fold(total)
}

/// The sum of a pseudo-header (RFC 768, RFC 8200 §8.1).
pub fn pseudo(source: Address, destination: Address, protocol: u8, length: usize) -> u64 {
    let addresses = match source.family() {
        Family::V4 => sum(&source.v4_octets(), sum(&destination.v4_octets(), 0)),
        Family::V6 => sum(&source.0, sum(&destination.0, 0)),
    };
    addresses + u64::from(protocol) + length as u64
}

/// What changed under a checksum (RFC 1624, equation 3): collected once, patched into every checksum it touches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    total: u64,
}

impl Delta {
    /// A sixteen-bit word became another.
    #[must_use]
    pub const fn word(self, old: u16, new: u16) -> Self {
        Self {
            total: self.total + (!old) as u64 + new as u64,
        }
    }

    /// An address became another.
    #[must_use]
    pub fn address(self, old: Address, new: Address) -> Self {
        // The mapped prefix of IPv4 is the same on both sides and cancels out.
        let halves = |value: u64| (value >> 32) + (value & 0xffff_ffff);
        Self {
            total: self.total
                + halves(!old.high())
                + halves(!old.low())
                + halves(new.high())
                + halves(new.low()),
        }
    }

    /// Both changes.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self {
            total: self.total + other.total,
        }
    }

    /// A finished checksum, patched.
    pub const fn patch(self, checksum: u16) -> u16 {
        !fold((!checksum) as u64 + self.total)
    }

    /// The sum of a pseudo-header that waits to be completed by the far side (not complemented), patched.
    pub const fn patch_partial(self, partial: u16) -> u16 {
        fold(partial as u64 + self.total)
    }
}

/// The reversed polynomial of CRC32c (RFC 9260, appendix A).
const CRC32C: u32 = 0x82f6_3b78;

/// The CRC32c of a message of `length` bytes whose CRC32c was `sum` before its first four bytes changed by `differ` (the exclusive
/// or of old and new, the first byte highest). The CRC is linear: the change is pushed through the rest as if that were
/// zeros, by squaring, so nothing of the message is read.
///
/// # Cost
/// Two multiplications of polynomials per bit of `length`.
pub fn crc32c_patch(sum: u32, differ: u32, length: usize) -> u32 {
    // Bytes enter lowest bit first.
    let change = differ.swap_bytes();
    let shift = power_of_x(8 * length as u64);
    sum ^ multiply(change, shift)
}

/// x^n modulo the polynomial; bit 31 is the coefficient of x^0.
fn power_of_x(mut n: u64) -> u32 {
    let mut result = 1 << 31;
    let mut square = 1 << 30;
    while n > 0 {
        if n & 1 == 1 {
            result = multiply(result, square);
        }
        square = multiply(square, square);
        n >>= 1;
    }
    result
}

fn multiply(a: u32, mut b: u32) -> u32 {
    let mut product = 0;
    for bit in (0..32).rev() {
        if a >> bit & 1 == 1 {
            product ^= b;
        }
        b = (b >> 1) ^ (CRC32C & (b & 1).wrapping_neg());
    }
    product
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;

    /// Word by word, as RFC 1071 says it.
    fn reference(bytes: &[u8]) -> u16 {
        let mut total = 0u32;
        for pair in bytes.chunks(2) {
            total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
            total = (total & 0xffff) + (total >> 16);
        }
        !(total as u16)
    }

    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (CRC32C & (crc & 1).wrapping_neg());
            }
        }
        !crc
    }

    #[test]
    fn crc32c_is_the_one_of_the_rfc() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        #[test]
        fn crc32c_patch_equals_summing_again(mut bytes in proptest::collection::vec(any::<u8>(), 4..200), new: u32) {
            let before = crc32c(&bytes);
            let old = u32::from_be_bytes(bytes[..4].try_into().unwrap());
            bytes[..4].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(crc32c_patch(before, old ^ new, bytes.len()), crc32c(&bytes));
        }

        #[test]
        fn sum_equals_the_rfc(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(finish(sum(&bytes, 0)), reference(&bytes));
        }

        #[test]
        fn patch_equals_summing_again(mut bytes in proptest::collection::vec(any::<u8>(), 40..80), new: [u8; 16], word: u16) {
            let before = finish(sum(&bytes, 0));
            let old = Address(bytes[4..20].try_into().unwrap());
            let old_word = u16::from_be_bytes([bytes[2], bytes[3]]);
            bytes[4..20].copy_from_slice(&new);
            bytes[2..4].copy_from_slice(&word.to_be_bytes());
            let delta = Delta::default().word(old_word, word).address(old, Address(new));
            let after = finish(sum(&bytes, 0));
            // 0 and ffff are the same number; both are right unless everything is zero.
            prop_assert!(delta.patch(before) == after || after % 0xffff == delta.patch(before) % 0xffff);
            prop_assert_eq!(delta.patch_partial(!before) % 0xffff, !after % 0xffff);
        }
    }
}
