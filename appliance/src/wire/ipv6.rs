//! IPv6 (RFC 8200) and the walk over its extension headers.

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    big_endian::{U16, U32},
};

/// Bytes of [`Header`].
pub const LENGTH: usize = 40;
/// Extension headers that are walked before a packet is refused. Linux passes any number; honest packets have at most four.
pub const DEPTH: usize = 8;

const FLOW_LABEL: u32 = 0xf_ffff;
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    pub version_class_flow: U32,
    pub payload_length: U16,
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}

impl Header {
    /// The header of a packet that the appliance makes itself.
    pub const fn new(
        source: [u8; 16],
        destination: [u8; 16],
        next_header: u8,
        payload: u16,
        hop_limit: u8,
    ) -> Self {
        Self {
            version_class_flow: U32::new(6 << 28),
            payload_length: U16::new(payload),
            next_header,
            hop_limit,
            source,
            destination,
        }
    }

    /// The same with the flow label in the lower twenty bits of `label`.
    #[must_use]
    pub const fn labelled(mut self, label: u32) -> Self {
        let rest = self.version_class_flow.get() & !FLOW_LABEL;
        self.version_class_flow = U32::new(rest | label & FLOW_LABEL);
        self
    }

    pub const fn flow_label(&self) -> u32 {
        self.version_class_flow.get() & FLOW_LABEL
    }

    pub const fn version(&self) -> u8 {
        (self.version_class_flow.get() >> 28) as u8
    }
}

/// The fragment extension header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct FragmentHeader {
    pub next_header: u8,
    pub reserved: u8,
    pub offset_flags: U16,
    pub identification: U32,
}

impl FragmentHeader {
    pub const fn more_fragments(&self) -> bool {
        self.offset_flags.get() & 1 != 0
    }

    /// Where this fragment's payload belongs, in bytes.
    pub const fn offset(&self) -> u16 {
        self.offset_flags.get() & 0xfff8
    }
}

/// What lies behind the extension headers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    pub protocol: u8,
    /// Bytes from the end of the fixed header to the upper-layer header, or to this fragment's payload.
    pub offset: usize,
    /// Where the fragment header lies, counted like `offset`, if there is one.
    pub fragment: Option<usize>,
}

/// Why the walk gave up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WalkError {
    /// A header is cut off.
    Short,
    /// More than [`DEPTH`] headers, one out of place, a second fragment header, or a routing header of type 0 (RFC 5095).
    Refused,
}

/// Walks the extension headers in `payload`, of which the first is `next`.
///
/// # Cost
/// At most [`DEPTH`] steps.
pub fn walk(next: u8, payload: &[u8]) -> Result<Upper, WalkError> {
    let mut upper = Upper {
        protocol: next,
        offset: 0,
        fragment: None,
    };
    for step in 0..=DEPTH {
        let rest = payload.get(upper.offset..).ok_or(WalkError::Short)?;
        let length = match upper.protocol {
            HOP_BY_HOP if step > 0 => return Err(WalkError::Refused),
            HOP_BY_HOP | DESTINATION | ROUTING => {
                let [_, length, kind, ..] = *rest else {
                    return Err(WalkError::Short);
                };
                if upper.protocol == ROUTING && kind == 0 {
                    return Err(WalkError::Refused);
                }
                (usize::from(length) + 1) * 8
            }
            AUTHENTICATION => {
                let [_, length, ..] = *rest else {
                    return Err(WalkError::Short);
                };
                (usize::from(length) + 2) * 4
            }
            FRAGMENT => {
                if upper.fragment.is_some() {
                    return Err(WalkError::Refused);
                }
                let (header, _) =
                    FragmentHeader::ref_from_prefix(rest).map_err(|_| WalkError::Short)?;
                upper.fragment = Some(upper.offset);
                upper.protocol = header.next_header;
                upper.offset += size_of::<FragmentHeader>();
                if header.offset() != 0 {
                    return Ok(upper);
                }
                continue;
            }
            _ => return Ok(upper),
        };
        if rest.len() < length {
            return Err(WalkError::Short);
        }
        upper.protocol = rest.first().copied().ok_or(WalkError::Short)?;
        upper.offset += length;
    }
    Err(WalkError::Refused)
}
