//! A socket that hears questions on a network card, before anybody redirects them, and nothing else.

use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};

use socket2::{Domain, Protocol, SockAddr, SockAddrStorage, SockFilter, Socket, Type};

/// Where classic BPF finds what is no octet of the frame (SKF_AD_OFF and behind).
const KIND_OF_FRAME: u32 = (-0x1000_i32 + 4) as u32;
const HAS_TAG: u32 = (-0x1000_i32 + 48) as u32;
/// A frame that this host sends (PACKET_OUTGOING).
const OUTGOING: u32 = 4;
/// Longer than any question.
const SNAP: u32 = 256;

const LOAD_WORD: u16 = 0x20;
const LOAD_HALF: u16 = 0x28;
const LOAD_OCTET: u16 = 0x30;
const IS: u16 = 0x15;
const RETURN: u16 = 0x06;

/// An open socket of one card.
#[derive(Debug)]
pub(super) struct Wire(Socket);

impl Wire {
    /// Hears the card of that index.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn open(card: u32) -> io::Result<Self> {
        // Nothing is heard before the filter is in place: protocol 0 hears nothing.
        let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(0)))?;
        socket.set_nonblocking(true)?;
        socket.attach_filter(&filter())?;
        let all = (libc::ETH_P_ALL as u16).to_be();
        socket.bind(&link_address(card, all))?;
        hear_groups(&socket, card)?;
        Ok(Self(socket))
    }

    /// The next frame, if there is one.
    pub(super) fn next<'a>(&self, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
        let count = (&self.0).read(buffer).ok()?;
        buffer.get(..count)
    }

    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        (&self.0).write(frame).map(drop)
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Untagged frames of others that are ARP requests or neighbor solicitations.
fn filter() -> [SockFilter; 16] {
    let load = |code, offset| SockFilter::new(code, 0, 0, offset);
    let is = |value, yes, no| SockFilter::new(IS, yes, no, value);
    [
        load(LOAD_WORD, KIND_OF_FRAME),
        is(OUTGOING, 13, 0),
        load(LOAD_OCTET, HAS_TAG),
        is(0, 0, 11),
        load(LOAD_HALF, 12),
        is(0x0806, 0, 2),
        load(LOAD_HALF, 20), // the operation
        is(1, 6, 7),
        is(0x86dd, 0, 6),
        load(LOAD_OCTET, 20), // the next header
        is(58, 0, 4),
        load(LOAD_OCTET, 54), // the type
        is(135, 1, 2),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, SNAP),
        SockFilter::new(RETURN, 0, 0, 0),
    ]
}

fn link_address(card: u32, protocol: u16) -> SockAddr {
    let mut storage = SockAddrStorage::zeroed();
    // SAFETY: `sockaddr_ll` is a socket address, and all of its fields may be zero.
    let address = unsafe { storage.view_as::<libc::sockaddr_ll>() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = card as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the family says what the storage holds, and the length is that of it.
    unsafe { SockAddr::new(storage, length) }
}

/// Solicitations go to groups that the host is not in.
fn hear_groups(socket: &Socket, card: u32) -> io::Result<()> {
    use std::os::fd::AsRawFd as _;
    let request = libc::packet_mreq {
        mr_ifindex: card as i32,
        mr_type: libc::PACKET_MR_ALLMULTI as u16,
        mr_alen: 0,
        mr_address: [0; 8],
    };
    let length = size_of::<libc::packet_mreq>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the kernel only reads `length` octets of the structure.
    let outcome = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            length,
        )
    };
    match outcome {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
