//! A backend, as one node names it to another: a packet that travels as its client sent it, addressed to a Service's frontend,
//! says in a Geneve option whom it was given to. The other node translates it, and its answers go to the client directly.

use crate::address::{Address, Family};
use crate::wire::geneve::OptionHeader;
use heapless::Vec;
use sluice_contract::overlay::{GENEVE_BACKEND, GENEVE_CLASS};

/// Bytes of the longest option.
const LONGEST: usize = 24;

/// Address and port of a backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    pub address: Address,
    pub port: u16,
}

impl Target {
    /// Bytes of the option: its header, the address, the port, two of zero.
    pub fn option_length(self) -> usize {
        match self.address.family() {
            Family::V4 => 12,
            Family::V6 => LONGEST,
        }
    }

    pub(crate) fn to_option(self) -> Vec<u8, LONGEST> {
        let mut bytes = Vec::new();
        let words = (self.option_length() - 4) / 4;
        let [class, port] = [GENEVE_CLASS.to_be_bytes(), self.port.to_be_bytes()];
        // Twelve bytes, or as many as there is room for.
        let _ = bytes.extend_from_slice(&class);
        let _ = bytes.extend_from_slice(&[GENEVE_BACKEND, words as u8]);
        let _ = match self.address.family() {
            Family::V4 => bytes.extend_from_slice(&self.address.v4_octets()),
            Family::V6 => bytes.extend_from_slice(&self.address.0),
        };
        let _ = bytes.extend_from_slice(&port);
        let _ = bytes.extend_from_slice(&[0; 2]);
        bytes
    }

    /// Reads the option; `None` for any other, and for one that names nobody.
    pub(crate) fn of_option(header: &OptionHeader, data: &[u8]) -> Option<Self> {
        if header.class != GENEVE_CLASS || header.kind != GENEVE_BACKEND {
            return None;
        }
        let (bytes, [a, b, _, _]) = data.split_last_chunk::<4>()?;
        let address = match bytes {
            [a, b, c, d] => Address::v4([*a, *b, *c, *d]),
            bytes => Address(bytes.try_into().ok()?),
        };
        let port = u16::from_be_bytes([*a, *b]);
        (port != 0).then_some(Self { address, port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::geneve::{self, OPTION};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn s28_what_is_told_is_what_is_read(six: bool, address: [u8; 16], port in 1u16..) {
            let [a, b, c, d, ..] = address;
            let address = if six { Address(address) } else { Address::v4([a, b, c, d]) };
            let target = Target { address, port };
            let bytes = target.to_option();
            prop_assert_eq!(bytes.len(), target.option_length());
            prop_assert_eq!(bytes.len() % 4, 0);
            prop_assert_eq!(usize::from(bytes[3]) * 4, bytes.len() - OPTION);
            let mut read = None;
            let walked = geneve::walk(&bytes, |header, data| {
                read = Target::of_option(header, data);
                read.is_some()
            });
            prop_assert_eq!((walked, read), (Ok(()), Some(target)));
        }

        #[test]
        fn noise_names_nobody_and_ends_without_panic(noise in proptest::collection::vec(any::<u8>(), 0..64)) {
            let header = OptionHeader { class: GENEVE_CLASS.into(), kind: GENEVE_BACKEND, length: 5 };
            let read = Target::of_option(&header, &noise);
            prop_assert!(read.is_none() || matches!(noise.len(), 8 | 20));
        }
    }
}
