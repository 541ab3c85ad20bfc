//! vhost-user messages as bytes: what the VMM asks, with the file descriptors that come with it, and our answers.
//!
//! Spoken directly instead of through the `vhost` crate's `BackendReqHandler`, which refuses `SET_VRING_ENABLE` before
//! `SET_FEATURES`: QEMU (7.2, at realization of virtio-net) does exactly that, and the specification allows it. The crate's
//! frontend is the other end in the tests.
//! Format: QEMU `docs/interop/vhost-user.rst`, "Message Specification".

use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::memory::RegionSpec;

/// The longest body read: a memory table of [`REGIONS`] regions is 264 bytes.
const BODY_MAX: usize = 4096;
/// Most regions of a memory table, and most descriptors of a message ("VHOST_MEMORY_BASELINE_NREGIONS").
pub(super) const REGIONS: usize = 8;
const HEADER: usize = 12;
/// Protocol version, and the flags of the header.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;
/// In the body of a kick or call: no descriptor comes with it.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// What the VMM asks. Requests that belong to features we do not offer are `Other`.
#[derive(Debug)]
pub(super) enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<RegionSpec>, Vec<File>),
    SetVringNum {
        queue: u32,
        size: u32,
    },
    /// Descriptor table, available ring, used ring.
    SetVringAddr {
        queue: u32,
        areas: [u64; 3],
    },
    SetVringBase {
        queue: u32,
        base: u32,
    },
    GetVringBase {
        queue: u32,
    },
    SetVringKick {
        queue: u32,
        file: Option<File>,
    },
    SetVringCall {
        queue: u32,
        file: Option<File>,
    },
    SetVringErr {
        queue: u32,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    SetVringEnable {
        queue: u32,
        enable: bool,
    },
    Other {
        code: u32,
    },
}

/// How a request wants to be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ticket {
    code: u32,
    needs_reply: bool,
}

fn malformed(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Reads the next request.
///
/// # Errors
/// `UnexpectedEof` when the VMM is gone; `InvalidData` when it sent what is no message.
pub(super) fn receive(stream: &UnixStream) -> io::Result<(Request, Ticket)> {
    let (header, files) = receive_header(stream)?;
    let word = |at: usize| le32(&header, at);
    let (Some(code), Some(flags), Some(size)) = (word(0), word(4), word(8)) else {
        return Err(malformed("short header"));
    };
    let size = usize::try_from(size).unwrap_or(usize::MAX);
    if flags & VERSION_MASK != VERSION || flags & REPLY != 0 || size > BODY_MAX {
        return Err(malformed("not a vhost-user request"));
    }
    let mut body = vec![0; size];
    (&*stream).read_exact(&mut body)?;
    let request = parse(code, &body, files).ok_or_else(|| malformed("malformed request"))?;
    Ok((
        request,
        Ticket {
            code,
            needs_reply: flags & NEED_REPLY != 0,
        },
    ))
}

/// The descriptors travel with the first byte of a message.
fn receive_header(stream: &UnixStream) -> io::Result<([u8; HEADER], Vec<File>)> {
    let mut header = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REGIONS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(&mut header)];
    let received = recvmsg(stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files.map(File::from)),
        _ => None,
    });
    let files: Vec<File> = files.flatten().collect();
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let rest = header.get_mut(received.bytes..).unwrap_or_default();
    (&*stream).read_exact(rest)?;
    Ok((header, files))
}

fn parse(code: u32, body: &[u8], files: Vec<File>) -> Option<Request> {
    let number = || le64(body, 0);
    let state = || Some((le32(body, 0)?, le32(body, 4)?));
    let descriptor = |files: Vec<File>| {
        let number = le64(body, 0)?;
        let file = files
            .into_iter()
            .next()
            .filter(|_| number & NO_DESCRIPTOR == 0);
        Some(((number & 0xff) as u32, file))
    };
    Some(match code {
        1 => Request::GetFeatures,
        2 => Request::SetFeatures(number()?),
        3 => Request::SetOwner,
        4 => Request::ResetOwner,
        5 => Request::SetMemTable(regions(body)?, files),
        8 => state().map(|(queue, size)| Request::SetVringNum { queue, size })?,
        9 => {
            let [descriptors, used, available] = [le64(body, 8)?, le64(body, 16)?, le64(body, 24)?];
            let areas = [descriptors, available, used];
            Request::SetVringAddr {
                queue: le32(body, 0)?,
                areas,
            }
        }
        10 => state().map(|(queue, base)| Request::SetVringBase { queue, base })?,
        11 => Request::GetVringBase {
            queue: le32(body, 0)?,
        },
        12 => descriptor(files).map(|(queue, file)| Request::SetVringKick { queue, file })?,
        13 => descriptor(files).map(|(queue, file)| Request::SetVringCall { queue, file })?,
        14 => descriptor(files).map(|(queue, _)| Request::SetVringErr { queue })?,
        15 => Request::GetProtocolFeatures,
        16 => Request::SetProtocolFeatures(number()?),
        18 => state().map(|(queue, n)| Request::SetVringEnable {
            queue,
            enable: n != 0,
        })?,
        code => Request::Other { code },
    })
}

fn regions(body: &[u8]) -> Option<Vec<RegionSpec>> {
    let count = usize::try_from(le32(body, 0)?)
        .ok()
        .filter(|n| (1..=REGIONS).contains(n))?;
    let region = |i: usize| {
        let at = 8 + 32 * i;
        let [guest, len, user, offset] = [
            le64(body, at)?,
            le64(body, at + 8)?,
            le64(body, at + 16)?,
            le64(body, at + 24)?,
        ];
        Some(RegionSpec {
            guest,
            len,
            user,
            offset,
        })
    };
    (0..count).map(region).collect()
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u32::from_le_bytes(*b))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes
        .get(at..)?
        .first_chunk()
        .map(|b| u64::from_le_bytes(*b))
}

/// What a request is answered with, if it is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reply {
    /// Nothing of its own: done.
    Done,
    /// Nothing of its own: refused.
    Refused,
    Number(u64),
    Base {
        queue: u32,
        base: u32,
    },
}

impl Ticket {
    /// Answers the request; those without a reply of their own only when the VMM asked for it.
    ///
    /// # Errors
    /// When the VMM does not take the answer.
    pub(super) fn reply(self, mut stream: &UnixStream, reply: Reply) -> io::Result<()> {
        let (body, owed) = match reply {
            Reply::Done => (0, self.needs_reply),
            Reply::Refused => (1, self.needs_reply),
            Reply::Number(number) => (number, true),
            Reply::Base { queue, base } => (u64::from(queue) | u64::from(base) << 32, true),
        };
        if !owed {
            return Ok(());
        }
        let mut bytes = Vec::with_capacity(HEADER + 8);
        for word in [self.code, VERSION | REPLY, 8] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body.to_le_bytes());
        stream.write_all(&bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn message(code: u32, flags: u32, body: &[u8]) -> Vec<u8> {
        let words = [code, flags, body.len() as u32];
        words
            .iter()
            .flat_map(|w| w.to_le_bytes())
            .chain(body.iter().copied())
            .collect()
    }

    fn received(bytes: &[u8]) -> io::Result<(Request, Ticket)> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).unwrap();
        drop(theirs);
        receive(&ours)
    }

    #[test]
    fn requests_are_read_and_a_reply_is_owed_when_asked_for() {
        let (request, ticket) = received(&message(2, 9, &5u64.to_le_bytes())).unwrap();
        assert!(matches!(request, Request::SetFeatures(5)) && ticket.needs_reply);
        let (request, ticket) = received(&message(77, 1, &[])).unwrap();
        assert!(matches!(request, Request::Other { code: 77 }) && !ticket.needs_reply);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ticket.reply(&ours, Reply::Done).unwrap();
        ticket.reply(&ours, Reply::Number(9)).unwrap();
        drop(ours);
        let mut answer = Vec::new();
        theirs.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, message(77, 5, &9u64.to_le_bytes()));
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for bad in [
            message(2, 2, &[0; 8]),
            message(2, 5, &[0; 8]),
            message(2, 1, &[0; 7]),
            message(5, 1, &[0; 8]),
            message(5, 1, &[9, 0, 0, 0, 0, 0, 0, 0]),
            [
                message(2, 1, &[]).get(..8).unwrap().to_vec(),
                5000u32.to_le_bytes().to_vec(),
            ]
            .concat(),
        ] {
            assert_eq!(
                received(&bad).unwrap_err().kind(),
                io::ErrorKind::InvalidData,
                "{bad:?}"
            );
        }
        let cut = message(2, 1, &[0; 8]);
        for end in 0..cut.len() {
            assert_eq!(
                received(&cut[..end]).unwrap_err().kind(),
                io::ErrorKind::UnexpectedEof
            );
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged_without_panic(
            code in 0u32..40, body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = received(&message(code, 1, &body));
            let _ = received(&body);
        }
    }
}
