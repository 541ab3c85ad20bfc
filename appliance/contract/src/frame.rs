//! How messages lie in the byte stream: `magic (4) · payload length (2, LE) · CRC-32 of the payload (4, LE) · payload`.
//!
//! The [`Decoder`] takes bytes in any pieces, hands out whole payloads and throws away the rest: after garbage it looks for
//! the next magic, so one broken frame costs one frame. It never allocates and never holds more than one frame.

use crate::limits::FRAME_PAYLOAD;
use serde::{Serialize, de::DeserializeOwned};

/// Begins every frame. Not valid UTF-8, so that no text can imitate it.
pub const MAGIC: [u8; 4] = [0xa5, b'S', b'L', 0x5a];
/// Bytes before the payload.
pub const HEADER: usize = 10;
/// The longest frame.
pub const FRAME_MAX: usize = HEADER + FRAME_PAYLOAD;

/// Why a message could not be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EncodeError {
    /// It does not fit into [`FRAME_PAYLOAD`], or into the buffer that was given.
    TooLong,
}

impl core::fmt::Display for EncodeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Message longer than one frame")
    }
}

impl core::error::Error for EncodeError {}

/// Writes `message` as one frame into `buffer` and returns the frame.
///
/// # Errors
/// [`EncodeError::TooLong`] if it does not fit; `buffer` then holds nothing of use.
pub fn encode<'b, M: Serialize>(
    message: &M,
    buffer: &'b mut [u8],
) -> Result<&'b [u8], EncodeError> {
    let (header, payload) = buffer
        .split_at_mut_checked(HEADER)
        .ok_or(EncodeError::TooLong)?;
    let length = postcard::to_slice(message, payload)
        .map_err(|_| EncodeError::TooLong)?
        .len();
    let wire_length = u16::try_from(length).map_err(|_| EncodeError::TooLong)?;
    if length > FRAME_PAYLOAD {
        return Err(EncodeError::TooLong);
    }
    let crc = crc32fast::hash(payload.get(..length).ok_or(EncodeError::TooLong)?);
    header[..4].copy_from_slice(&MAGIC);
    header[4..6].copy_from_slice(&wire_length.to_le_bytes());
    header[6..].copy_from_slice(&crc.to_le_bytes());
    buffer.get(..HEADER + length).ok_or(EncodeError::TooLong)
}

/// Reads a payload as a message. All of it must be used.
pub fn decode<M: DeserializeOwned>(payload: &[u8]) -> Option<M> {
    match postcard::take_from_bytes(payload) {
        Ok((message, [])) => Some(message),
        _ => None,
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug)]
pub struct Decoder {
    buffer: [u8; FRAME_MAX],
    /// Bytes of `buffer` in use.
    filled: usize,
    /// Bytes at the front of `buffer` that were handed out as a frame and go with the next call.
    consumed: usize,
    garbage: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self {
            buffer: [0; FRAME_MAX],
            filled: 0,
            consumed: 0,
            garbage: 0,
        }
    }
}

impl Decoder {
    /// Takes bytes from the front of `input` and returns the next whole payload, if there is one.
    ///
    /// Call again until it returns `None`: then all of `input` is taken.
    pub fn next<'d>(&'d mut self, input: &mut &[u8]) -> Option<&'d [u8]> {
        self.discard(self.consumed);
        self.consumed = 0;
        loop {
            match self.scan() {
                Scan::Frame(end) => {
                    self.consumed = end;
                    return self.buffer.get(HEADER..end);
                }
                Scan::Garbage(bytes) => {
                    self.garbage += 1;
                    self.discard(bytes);
                }
                Scan::Short => {
                    if input.is_empty() {
                        return None;
                    }
                    let room = self.buffer.get_mut(self.filled..).unwrap_or_default();
                    let n = room.len().min(input.len());
                    let (taken, rest) = input.split_at(n);
                    room[..n].copy_from_slice(taken);
                    *input = rest;
                    self.filled += n;
                }
            }
        }
    }

    /// Times that bytes were thrown away: noise before a magic, an impossible length, a wrong checksum.
    pub const fn garbage(&self) -> u64 {
        self.garbage
    }

    fn scan(&self) -> Scan {
        let held = self.buffer.get(..self.filled).unwrap_or_default();
        let noise = noise_before_magic(held);
        if noise > 0 {
            return Scan::Garbage(noise);
        }
        let Some(header) = held.first_chunk::<HEADER>() else {
            return Scan::Short;
        };
        let [_, _, _, _, l0, l1, c0, c1, c2, c3] = *header;
        let length = usize::from(u16::from_le_bytes([l0, l1]));
        if length > FRAME_PAYLOAD {
            return Scan::Garbage(1);
        }
        match held.get(HEADER..HEADER + length) {
            None => Scan::Short,
            Some(payload) if crc32fast::hash(payload) == u32::from_le_bytes([c0, c1, c2, c3]) => {
                Scan::Frame(HEADER + length)
            }
            Some(_) => Scan::Garbage(1),
        }
    }

    fn discard(&mut self, bytes: usize) {
        let bytes = bytes.min(self.filled);
        self.buffer.copy_within(bytes..self.filled, 0);
        self.filled -= bytes;
    }
}

enum Scan {
    Frame(usize),
    Garbage(usize),
    Short,
}

/// Bytes of `held` that cannot be the beginning of a frame.
fn noise_before_magic(held: &[u8]) -> usize {
    (0..held.len())
        .find(|&at| {
            held.iter()
                .skip(at)
                .zip(MAGIC.iter())
                .all(|(byte, magic)| byte == magic)
        })
        .unwrap_or(held.len())
}
