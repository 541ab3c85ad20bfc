//! Where messages begin in the streams of answers over TCP.
//!
//! Segments are read as they pass and nothing of them is kept, so a message that lies in several is known by its first piece.
//! What must not happen is that the middle of one message is taken for the beginning of another: who is asked sends on what
//! others wrote, and a pod that wants to be deceived chooses where segments end. So each stream is followed from its first
//! byte, by sequence number. Whatever was not followed teaches nothing.

use super::Who;
use crate::arena::{Arena, OutOfMemory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Streams of a pod that are followed at once; they make room in turn.
pub(super) const STREAMS: usize = 4;
/// Messages of one segment that are read, and the first that is not: the others are passed over from end to end.
const MESSAGES: usize = 17;

/// One stream; key 0: none.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct Stream {
    key: u64,
    /// Of the next byte to be read.
    at: u32,
    /// The length of the message that begins there; 0: its length begins there.
    length: u16,
    /// The link of the pod.
    link: u16,
}

/// All of them, by the link of the pod.
#[derive(Debug)]
pub struct Streams<'m> {
    sets: &'m mut [Stream],
    /// How often one began.
    count: usize,
}

/// A piece of a stream, of which the messages are taken.
#[derive(Clone, Debug)]
pub struct Piece<'a> {
    place: usize,
    rest: &'a [u8],
    /// There was something before it that never came.
    gap: bool,
    left: usize,
}

/// A message, as far as it is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    Whole(&'a [u8]),
    /// Its end comes later.
    First(&'a [u8]),
    /// Something that is not read: where its messages begin is not known, or there are too many.
    Unread,
}

impl<'m> Streams<'m> {
    /// For so many links.
    ///
    /// # Errors
    /// [`OutOfMemory`]
    pub(super) fn new(arena: &mut Arena<'m>, links: usize) -> Result<Self, OutOfMemory> {
        Ok(Self {
            sets: arena.slice(links * STREAMS)?,
            count: 0,
        })
    }

    /// The pod opens a connection; `key` is that connection's. What was followed under it is over.
    pub fn opened(&mut self, who: Who, key: u64) {
        let link = who.link.raw();
        let is_his = |it: &&mut Stream| it.key == key && it.link == link;
        if let Some(stream) = self.set(who).iter_mut().find(is_his) {
            *stream = Stream::default();
        }
    }

    /// The stream of answers of a connection begins with this sequence number; one that has begun does not begin again before
    /// the pod opens its connection again, so whoever answers cannot make the middle of an answer a beginning.
    pub fn begin(&mut self, who: Who, key: u64, sequence: u32) {
        let link = who.link.raw();
        let oldest = self.count % STREAMS;
        let set = self.set(who);
        if set.iter().any(|it| it.key == key && it.link == link) {
            return;
        }
        let free = set.iter().position(|it| it.key == 0);
        if let Some(stream) = set.get_mut(free.unwrap_or(oldest)) {
            *stream = Stream {
                key,
                at: sequence,
                length: 0,
                link,
            };
            self.count = self.count.wrapping_add(1);
        }
    }

    /// A segment of that connection, of which [`Self::next`] then takes the messages; if its stream is followed.
    pub fn piece<'a>(
        &mut self,
        who: Who,
        key: u64,
        sequence: u32,
        bytes: &'a [u8],
    ) -> Option<Piece<'a>> {
        let first = self.first(who);
        let link = who.link.raw();
        let set = self.set(who);
        let is_his = |it: &Stream| it.key == key && it.link == link;
        let place = set.iter().position(is_his)?;
        let known = set.get(place)?.at.wrapping_sub(sequence);
        let gap = known >> 31 == 1;
        let skip = if gap { usize::MAX } else { known as usize };
        Some(Piece {
            place: first + place,
            rest: bytes.get(skip..).unwrap_or_default(),
            gap: gap && !bytes.is_empty(),
            left: MESSAGES,
        })
    }

    /// The next message of a piece.
    pub fn next<'a>(&mut self, piece: &mut Piece<'a>) -> Option<Part<'a>> {
        self.sets.get_mut(piece.place)?.next(piece)
    }

    fn first(&self, who: Who) -> usize {
        let count = (self.sets.len() / STREAMS).max(1);
        usize::from(who.link.raw()) % count * STREAMS
    }

    fn set(&mut self, who: Who) -> &mut [Stream] {
        let first = self.first(who);
        let set = self.sets.get_mut(first..first + STREAMS);
        set.unwrap_or_default()
    }
}

impl Stream {
    /// Where a message ends the next one begins, whether that end is there or not.
    fn next<'a>(&mut self, piece: &mut Piece<'a>) -> Option<Part<'a>> {
        if core::mem::take(&mut piece.gap) {
            return Some(Part::Unread);
        }
        loop {
            while self.length == 0 && !piece.rest.is_empty() {
                let Some((length, rest)) = piece.rest.split_first_chunk::<2>() else {
                    // Half a length: from here on nothing is where a message is known to begin.
                    piece.rest = &[];
                    return Some(Part::Unread);
                };
                self.length = u16::from_be_bytes(*length);
                self.at = self.at.wrapping_add(2);
                piece.rest = rest;
            }
            if piece.rest.is_empty() {
                return None;
            }
            self.at = self.at.wrapping_add(self.length.into());
            let length = usize::from(core::mem::take(&mut self.length));
            let end = length.min(piece.rest.len());
            let (message, rest) = piece.rest.split_at(end);
            piece.rest = rest;
            let Some(left) = piece.left.checked_sub(1) else {
                continue;
            };
            piece.left = left;
            return Some(match end == length {
                _ if left == 0 => Part::Unread,
                true => Part::Whole(message),
                false => Part::First(message),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sluice_contract::LinkId;
    use std::vec::Vec;

    const KEY: u64 = 9;

    fn who(link: u16) -> Who {
        Who {
            link: LinkId::new(link).unwrap(),
            incarnation: 1,
        }
    }

    fn with<T>(work: impl FnOnce(&mut Streams<'_>) -> T) -> T {
        let mut memory = std::vec![0; 4096];
        work(&mut Streams::new(&mut Arena::new(&mut memory), 8).unwrap())
    }

    fn open(streams: &mut Streams<'_>, link: u16, key: u64, sequence: u32) {
        streams.opened(who(link), key);
        streams.begin(who(link), key, sequence);
    }

    fn read<'a>(
        streams: &mut Streams<'_>,
        (link, key): (u16, u64),
        sequence: u32,
        bytes: &'a [u8],
        mut each: impl FnMut(Part<'a>),
    ) {
        let Some(mut piece) = streams.piece(who(link), key, sequence, bytes) else {
            return;
        };
        while let Some(part) = streams.next(&mut piece) {
            each(part);
        }
    }

    fn stream(messages: &[Vec<u8>]) -> Vec<u8> {
        let framed = messages.iter().map(|it| {
            let length = (it.len() as u16).to_be_bytes();
            [&length[..], it].concat()
        });
        framed.collect::<Vec<_>>().concat()
    }

    proptest! {
        /// However a stream is cut, put together, repeated and lost: every message is read from its own beginning or not
        /// at all.
        #[test]
        fn d04_nothing_but_the_beginning_of_a_message_is_read_as_one(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..60), 1..12),
            begin: u32,
            segments in prop::collection::vec((0..500usize, 0..200usize), 1..60),
        ) {
            let bytes = stream(&messages);
            with(|streams| {
                open(streams, 16, KEY, begin);
                for (from, length) in segments {
                    let from = from % bytes.len();
                    let segment = &bytes[from..(from + length).min(bytes.len())];
                    let sequence = begin.wrapping_add(from as u32);
                    read(streams, (16, KEY), sequence, segment, |part| match part {
                        Part::Whole(seen) => assert!(messages.iter().any(|it| it == seen)),
                        Part::First(seen) => {
                            assert!(messages.iter().any(|it| it.starts_with(seen)));
                            let at = seen.as_ptr() as usize - bytes.as_ptr() as usize;
                            let before: Vec<_> = (0..messages.len())
                                .map(|n| stream(&messages[..n]).len() + 2)
                                .collect();
                            assert!(before.contains(&at));
                        }
                        Part::Unread => {}
                    });
                }
            });
        }

        #[test]
        fn n14_in_order_every_message_is_read_once_whole_or_by_its_first_piece(
            messages in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..60), 1..12),
            begin: u32,
            // At least two bytes: half a length is the one thing that cannot be followed.
            sizes in prop::collection::vec(2..40usize, 1..10),
        ) {
            let bytes = stream(&messages);
            with(|streams| {
                open(streams, 16, KEY, begin);
                let (mut at, mut all, mut lost) = (0, Vec::new(), false);
                for size in sizes.iter().cycle() {
                    let segment = &bytes[at..(at + size).min(bytes.len())];
                    // Sent twice, as when an acknowledgment is lost.
                    for _ in 0..2 {
                        let sequence = begin.wrapping_add(at as u32);
                        read(streams, (16, KEY), sequence, segment, |part| match part {
                            Part::Whole(it) | Part::First(it) => all.push(it),
                            Part::Unread => lost = true,
                        });
                    }
                    at += segment.len();
                    if at == bytes.len() {
                        break;
                    }
                }
                if !lost {
                    assert_eq!(all.len(), messages.len());
                }
                for (seen, message) in all.iter().zip(&messages) {
                    assert!(message.starts_with(seen) && !seen.is_empty());
                }
            });
        }
    }

    #[test]
    fn n14_streams_that_did_not_begin_here_are_not_read_and_pods_have_their_own() {
        let bytes = stream(&[b"message".to_vec()]);
        with(|streams| {
            let count = |streams: &mut Streams<'_>, link, key| {
                let mut parts = 0;
                read(streams, (link, key), 1, &bytes, |_| parts += 1);
                parts
            };
            assert_eq!(count(streams, 16, KEY), 0);
            open(streams, 16, KEY, 1);
            assert_eq!(count(streams, 17, KEY), 0);
            // Pod 24 has the same set, and another pod's stream is not its own.
            assert_eq!(count(streams, 24, KEY), 0);
            assert_eq!(count(streams, 16, KEY), 1);
            for key in 20..20 + STREAMS as u64 {
                open(streams, 16, key, 1);
            }
            assert_eq!(count(streams, 16, KEY), 0, "the oldest made room");
            assert_eq!(count(streams, 16, 20 + STREAMS as u64 - 1), 1);
        });
    }

    #[test]
    fn d04_a_stream_begins_once_for_each_time_that_the_pod_opens_its_connection() {
        let bytes = stream(&[b"an answer".to_vec(), b"forged".to_vec()]);
        let forged = bytes.len() as u32 - 8;
        let seen = |streams: &mut Streams<'_>, sequence: u32, from: u32| {
            let mut all = Vec::new();
            let bytes = &bytes[from as usize..];
            read(streams, (16, KEY), sequence, bytes, |part| all.push(part));
            all.len()
        };
        with(|streams| {
            open(streams, 16, KEY, 1);
            assert_eq!(seen(streams, 1, 0), 2);
            // Another SYN ACK, which would make the middle of an answer a beginning.
            streams.begin(who(16), KEY, 1 + forged);
            assert_eq!(seen(streams, 1 + forged, forged), 0);
            // The same port again.
            open(streams, 16, KEY, 900);
            assert_eq!(seen(streams, 900, 0), 2);
        });
    }
}
