//! What a router sends, cut into messages.
//!
//! UPDATE messages are skipped by their length: this speaker takes no routes, so nothing in a router's
//! routing table, however large, new or wrong, is decoded here.

use bytes::{Bytes, BytesMut};
use rustbgpd_wire::constants::MAX_MESSAGE_LEN;
use rustbgpd_wire::header::peek_message_length;
use rustbgpd_wire::{DecodeError, Message, decode_message};

/// RFC 4271 §4.1: marker, length, and then the type.
const TYPE_AT: usize = 18;
/// RFC 4271 §4.1
const UPDATE: u8 = 2;

/// A message, as far as it matters.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Came {
    /// Routes, of which nothing is read.
    Update,
    /// Any other.
    Message(Message),
}

/// What of the next messages has come.
#[derive(Debug)]
pub(crate) struct Inbox(BytesMut);

impl Inbox {
    pub(crate) fn new() -> Self {
        Self(BytesMut::with_capacity(MAX_MESSAGE_LEN.into()))
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next message, if all of it has come.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn next(&mut self) -> Result<Option<Came>, DecodeError> {
        let Some(length) = peek_message_length(&self.0, MAX_MESSAGE_LEN)? else {
            return Ok(None);
        };
        if self.0.len() < length.into() {
            return Ok(None);
        }
        let mut message: Bytes = self.0.split_to(length.into()).freeze();
        if message.get(TYPE_AT) == Some(&UPDATE) {
            return Ok(Some(Came::Update));
        }
        decode_message(&mut message, MAX_MESSAGE_LEN)
            .map(Came::Message)
            .map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Longest is a kilobyte; `body` is what follows the type.
    fn message(kind: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(19 + body.len()).unwrap();
        [&[0xff; 16][..], &length.to_be_bytes(), &[kind], body].concat()
    }

    #[test]
    fn updates_are_skipped_unread_and_the_rest_is_found_behind_them() {
        let nonsense = [
            message(UPDATE, &[]),
            // More is withdrawn than there is.
            message(UPDATE, &[0xff, 0xff, 1, 2, 3]),
            // An attribute longer than all of them.
            message(UPDATE, &[0, 0, 0, 4, 0x40, 1, 200, 9]),
            message(UPDATE, &[0xaa; 1000]),
        ];
        let keepalive = message(4, &[]);
        let stream = [nonsense.concat(), keepalive.clone()].concat();
        for size in [1, 7, 4096] {
            let mut inbox = Inbox::new();
            let mut came = Vec::new();
            for piece in stream.chunks(size) {
                inbox.push(piece);
                while let Some(message) = inbox.next().unwrap() {
                    came.push(message);
                }
            }
            let (last, updates) = came.split_last().unwrap();
            assert_eq!(last, &Came::Message(Message::Keepalive));
            assert_eq!(updates, [const { Came::Update }; 4]);
        }
    }

    #[test]
    fn a_message_that_is_too_long_or_of_no_kind_ends_the_stream() {
        for wrong in [
            [&[0xff; 16][..], &5000_u16.to_be_bytes(), &[UPDATE]].concat(),
            [&[0xff; 16][..], &18_u16.to_be_bytes(), &[UPDATE]].concat(),
            message(99, &[]),
            vec![0; 19],
        ] {
            let mut inbox = Inbox::new();
            inbox.push(&wrong);
            assert!(inbox.next().is_err(), "{wrong:?}");
        }
    }
}
