//! Packets as bytes: a header of six bytes that no version changes, then one postcard value to the end.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::{PACKET_MAX, VERSION};

/// Bytes before the body: version and sequence number, little-endian.
pub const HEADER: usize = 6;

/// A packet to be sent.
pub type Packet = heapless::Vec<u8, PACKET_MAX>;

/// What is the same in all versions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub version: u16,
    /// A reply has its request's number.
    pub sequence: u32,
}

/// Splits a packet; `None` when it is too short to be one of any version.
pub fn split(packet: &[u8]) -> Option<(Header, &[u8])> {
    let (&[v0, v1, s0, s1, s2, s3], body) = packet.split_first_chunk::<HEADER>()?;
    let header = Header {
        version: u16::from_le_bytes([v0, v1]),
        sequence: u32::from_le_bytes([s0, s1, s2, s3]),
    };
    Some((header, body))
}

/// Reads a body of our version; `None` when it is no `T`, or more follows it.
pub fn read<T: DeserializeOwned>(body: &[u8]) -> Option<T> {
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Some(value),
        _ => None,
    }
}

/// Writes a packet of our version; `None` when it would be longer than a packet may be.
pub fn write<T: Serialize>(sequence: u32, body: &T) -> Option<Packet> {
    let mut bytes = [0; PACKET_MAX];
    let (header, rest) = bytes.split_first_chunk_mut::<HEADER>()?;
    let [v0, v1] = VERSION.to_le_bytes();
    let [s0, s1, s2, s3] = sequence.to_le_bytes();
    *header = [v0, v1, s0, s1, s2, s3];
    let length = HEADER + postcard::to_slice(body, rest).ok()?.len();
    Packet::from_slice(bytes.get(..length)?).ok()
}
