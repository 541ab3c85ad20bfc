//! Geneve (RFC 8926) and the walk over its options.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`], options not counted.
pub const LENGTH: usize = 8;
/// Bytes of an option's header.
pub const OPTION: usize = 4;
/// The protocol type of an Ethernet frame.
pub const ETHERNET: u16 = 0x6558;

const CONTROL: u8 = 0x80;
/// Among the options are critical ones.
const HAS_CRITICAL: u8 = 0x40;
/// In an option's type: who does not know the option must drop the packet.
const CRITICAL: u8 = 0x80;

/// Reserved bits are sent as zero and ignored on receipt.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Two bits of version, six of the options' length in words of four bytes.
    pub version_length: u8,
    pub flags: u8,
    pub protocol: U16,
    /// The network in the upper 24 bits.
    pub vni_reserved: U32,
}

impl Header {
    /// A header followed by `options` bytes of options.
    pub const fn new(vni: u32, protocol: u16, options: usize, critical: bool) -> Self {
        Self {
            version_length: (options / 4) as u8 & 0x3f,
            flags: if critical { HAS_CRITICAL } else { 0 },
            protocol: U16::new(protocol),
            vni_reserved: U32::new(vni << 8),
        }
    }

    pub const fn version(&self) -> u8 {
        self.version_length >> 6
    }

    /// Bytes of options.
    pub const fn options_length(&self) -> usize {
        (self.version_length & 0x3f) as usize * 4
    }

    /// Whether it speaks to the endpoint itself, and carries nothing for the network (§3.4).
    pub const fn is_control(&self) -> bool {
        self.flags & CONTROL != 0
    }

    pub const fn vni(&self) -> u32 {
        self.vni_reserved.get() >> 8
    }
}

/// The header of one option.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHeader {
    pub class: U16,
    pub kind: u8,
    /// Three reserved bits and the length of the data in words of four bytes.
    pub length: u8,
}

/// An option with one word of data.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct WordOption {
    pub header: OptionHeader,
    pub data: U32,
}

impl WordOption {
    pub const LENGTH: usize = size_of::<Self>();

    pub const fn new(class: u16, kind: u8, data: u32) -> Self {
        Self {
            header: OptionHeader {
                class: U16::new(class),
                kind,
                length: 1,
            },
            data: U32::new(data),
        }
    }
}

/// Why the options are no good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionError {
    /// An option runs past the others' end.
    Broken,
    /// A critical option that is not the wanted one (§3.5).
    Critical,
}

/// Shows each option to `take`, in order, which says whether it knows it.
///
/// # Errors
/// [`OptionError`].
///
/// # Cost
/// At most 63 steps: options are 252 bytes at most, four each at least.
pub fn walk(
    mut options: &[u8],
    mut take: impl FnMut(&OptionHeader, &[u8]) -> bool,
) -> Result<(), OptionError> {
    while !options.is_empty() {
        let (header, rest) =
            OptionHeader::ref_from_prefix(options).map_err(|_| OptionError::Broken)?;
        let length = usize::from(header.length & 0x1f) * 4;
        let data = rest.get(..length).ok_or(OptionError::Broken)?;
        if !take(header, data) && header.kind & CRITICAL != 0 {
            return Err(OptionError::Critical);
        }
        options = rest.get(length..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    fn option(class: u16, kind: u8, words: &[u32]) -> Vec<u8> {
        let mut bytes = class.to_be_bytes().to_vec();
        bytes.extend([kind, words.len() as u8]);
        for word in words {
            bytes.extend(word.to_be_bytes());
        }
        bytes
    }

    /// The data of the last option with one word of data that is (`class`, `kind`).
    fn find_word(options: &[u8], class: u16, kind: u8) -> Result<Option<u32>, OptionError> {
        let mut found = None;
        walk(options, |header, data| {
            let ours = header.class == class && header.kind == kind;
            if let (true, [a, b, c, d]) = (ours, data) {
                found = Some(u32::from_be_bytes([*a, *b, *c, *d]));
                return true;
            }
            false
        })?;
        Ok(found)
    }

    #[test]
    fn o12_the_wanted_option_is_found_among_others_in_any_order() {
        let (ours, other) = (option(7, 1, &[42]), option(9, 1, &[1, 2, 3]));
        for all in [[ours.clone(), other.clone()], [other.clone(), ours.clone()]] {
            assert_eq!(find_word(&all.concat(), 7, 1), Ok(Some(42)));
        }
        assert_eq!(find_word(&other, 7, 1), Ok(None));
        assert_eq!(find_word(&[], 7, 1), Ok(None));
        let twice = [ours, option(7, 1, &[43])].concat();
        assert_eq!(find_word(&twice, 7, 1), Ok(Some(43)));
    }

    #[test]
    fn o12_unknown_critical_options_and_lengths_past_the_end_are_refused() {
        let critical = option(9, 0x81, &[1]);
        assert_eq!(find_word(&critical, 7, 1), Err(OptionError::Critical));
        let empty = option(9, 0x80, &[]);
        assert_eq!(find_word(&empty, 7, 1), Err(OptionError::Critical));
        let mut long = option(9, 1, &[1]);
        long[3] = 2;
        assert_eq!(find_word(&long, 7, 1), Err(OptionError::Broken));
        assert_eq!(find_word(&[0, 9, 1], 7, 1), Err(OptionError::Broken));
    }

    proptest! {
        #[test]
        fn noise_ends_without_panic(noise in proptest::collection::vec(any::<u8>(), 0..252)) {
            let _ = find_word(&noise, 7, 1);
        }
    }
}
