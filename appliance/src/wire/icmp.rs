//! ICMP (RFC 792), ICMPv6 (RFC 4443) and neighbor discovery (RFC 4861).

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`].
pub const LENGTH: usize = 8;

/// Types and codes of ICMP for IPv4.
pub mod v4 {
    pub const ECHO_REPLY: u8 = 0;
    pub const UNREACHABLE: u8 = 3;
    pub const SOURCE_QUENCH: u8 = 4;
    pub const REDIRECT: u8 = 5;
    pub const ECHO: u8 = 8;
    pub const TIME_EXCEEDED: u8 = 11;
    pub const PARAMETER: u8 = 12;

    pub const CODE_HOST: u8 = 1;
    pub const CODE_PORT: u8 = 3;
    pub const CODE_TOO_BIG: u8 = 4;
    pub const CODE_PROHIBITED: u8 = 13;

    /// Whether the message reports an error, and so must never be answered by one (RFC 1122 §3.2.2).
    pub const fn is_error(kind: u8) -> bool {
        matches!(
            kind,
            UNREACHABLE | SOURCE_QUENCH | REDIRECT | TIME_EXCEEDED | PARAMETER
        )
    }
}

/// Types and codes of ICMPv6.
pub mod v6 {
    pub const UNREACHABLE: u8 = 1;
    pub const TOO_BIG: u8 = 2;
    pub const TIME_EXCEEDED: u8 = 3;
    pub const PARAMETER: u8 = 4;
    pub const ECHO: u8 = 128;
    pub const ECHO_REPLY: u8 = 129;
    pub const ROUTER_SOLICITATION: u8 = 133;
    pub const ROUTER_ADVERTISEMENT: u8 = 134;
    pub const NEIGHBOR_SOLICITATION: u8 = 135;
    pub const NEIGHBOR_ADVERTISEMENT: u8 = 136;
    pub const REDIRECT: u8 = 137;

    pub const CODE_NO_ROUTE: u8 = 0;
    pub const CODE_PROHIBITED: u8 = 1;
    pub const CODE_ADDRESS: u8 = 3;
    pub const CODE_PORT: u8 = 4;

    /// Types below 128 are errors (RFC 4443 §2.1); a redirect is answered by none either (§2.4 e.2).
    pub const fn is_error(kind: u8) -> bool {
        kind < 128 || kind == REDIRECT
    }

    /// Whether the message belongs to neighbor discovery.
    pub const fn is_neighbor(kind: u8) -> bool {
        kind >= ROUTER_SOLICITATION && kind <= REDIRECT
    }
}

/// The first eight bytes of every message; `rest` is the echo id and sequence, or the MTU, or unused.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub kind: u8,
    pub code: u8,
    pub checksum: U16,
    pub rest: U32,
}

impl Header {
    /// The identifier of an echo request or reply.
    pub const fn echo_id(&self) -> u16 {
        (self.rest.get() >> 16) as u16
    }
}

/// A neighbor solicitation or advertisement, options not counted.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Neighbor {
    pub icmp: Header,
    pub target: [u8; 16],
}

/// In `Neighbor::icmp.rest` of an advertisement: from a router, asked for, replaces what was known.
pub const ADVERTISE_FLAGS: u32 = 0xe000_0000;

/// The link-layer address option: kind 1 source, 2 target.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct LinkLayerOption {
    pub kind: u8,
    pub units: u8,
    pub mac: [u8; 6],
}

pub const SOURCE_LINK_LAYER: u8 = 1;
pub const TARGET_LINK_LAYER: u8 = 2;

/// Whether `options` are well-formed (no option of length zero, none cut off); yields whether `wanted` is among them.
pub fn neighbor_options_have(mut options: &[u8], wanted: u8) -> Option<bool> {
    let mut found = false;
    while let [kind, units, ..] = *options {
        if units == 0 {
            return None;
        }
        found |= kind == wanted;
        options = options.get(usize::from(units) * 8..)?;
    }
    options.is_empty().then_some(found)
}
