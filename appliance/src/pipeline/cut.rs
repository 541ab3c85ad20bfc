//! A packet of IPv4 that is too large for its way out, and that its sender allows to be cut (row M-09): it is cut as its sender
//! could have done it, before anything else of it is changed, and the pieces go the way of any fragment.

use super::batch::{Core, HEADROOM, Ready};
use crate::address::Family;
use crate::connection::flow_of;
use crate::decap::Origin;
use crate::fragments::ROOM;
use crate::frame::{Frame, Offload};
use crate::observe::{Observer, Silent};
use crate::parse::{self, Fragment, Packet};
use crate::verdict::{Originate, Verdict};
use crate::wire::{checksum, ethernet, ipv4, protocol};
use sluice_contract::{DropReason, LinkId};
use zerocopy::{FromBytes, IntoBytes, big_endian::U16};

/// Ethernet and IPv4 without options: what is written anew for each piece.
const HEADERS: usize = ethernet::LENGTH + ipv4::LENGTH;

/// Whether the packet may be cut to `mtu`, all of it is at hand and there is room for a piece. Options would have to be told apart by whether they are copied
/// (RFC 791 §3.1); nobody sends them with large packets, so those are answered.
pub(super) fn is_possible(frame: &Frame<'_>, packet: &Packet, mtu: u16) -> bool {
    let room = ethernet::LENGTH + usize::from(mtu) <= ROOM;
    room && packet.family == Family::V4
        && !packet.dont_fragment
        && packet.fragment == Fragment::Whole
        && usize::from(packet.payload) == HEADERS
        && frame.offload.gso.is_none()
        && frame.offload.tunnel.is_none()
        && frame.bytes().len() >= packet.end as usize
}

/// What is left of a packet whose first piece was cut off.
struct Rest {
    headers: [u8; HEADERS],
    ingress: LinkId,
    origin: Option<Origin>,
    /// Payload bytes of the whole packet, and of a piece.
    length: usize,
    piece: usize,
}

impl Rest {
    /// Makes the frame its own first piece of at most `mtu` bytes.
    fn of(frame: &mut Frame<'_>, ready: &Ready, mtu: u16) -> Option<Self> {
        complete(frame, &ready.packet)?;
        let rest = Self {
            headers: *frame.bytes().first_chunk()?,
            ingress: frame.ingress,
            origin: ready.origin,
            length: (ready.packet.end as usize).checked_sub(HEADERS)?,
            piece: usize::from(mtu).checked_sub(ipv4::LENGTH)? & !7,
        };
        if rest.piece == 0 || rest.piece >= rest.length || HEADERS + rest.piece > ROOM {
            return None;
        }
        frame.resize(HEADERS + rest.piece).then_some(())?;
        rest.write_headers(frame.bytes_mut(), 0)?;
        Some(rest)
    }

    /// Payload offsets of the other pieces.
    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        (self.piece..self.length).step_by(self.piece)
    }

    /// Writes the headers of the piece at `offset` to the beginning of `bytes`, which ends with its payload.
    fn write_headers(&self, bytes: &mut [u8], offset: usize) -> Option<()> {
        let length = u16::try_from(bytes.len() - ethernet::LENGTH).ok()?;
        let more = offset + self.piece < self.length;
        let place = bytes.first_chunk_mut::<HEADERS>()?;
        *place = self.headers;
        let (_, network) = place.split_at_mut(ethernet::LENGTH);
        let header = ipv4::Header::mut_from_bytes(network).ok()?;
        header.total_length = U16::new(length);
        let fragment = (offset / 8) as u16 | if more { ipv4::MF } else { 0 };
        header.fragment = U16::new(fragment);
        header.checksum = U16::new(0);
        header.checksum = U16::new(checksum::finish(checksum::sum(header.as_bytes(), 0)));
        Some(())
    }
}

/// A checksum that was left to the far side cannot be completed there from pieces.
fn complete(frame: &mut Frame<'_>, packet: &Packet) -> Option<()> {
    let Some(partial) = frame.offload.partial.take() else {
        return Some(());
    };
    let bytes = frame.bytes_mut().get_mut(..packet.end as usize)?;
    let bytes = bytes.get_mut(usize::from(partial.start)..)?;
    let sum = match (checksum::finish(checksum::sum(bytes, 0)), packet.protocol) {
        // 0 would say that there is none (RFC 768).
        (0, protocol::UDP) => u16::MAX,
        (sum, _) => sum,
    };
    let at = usize::from(partial.offset);
    let field = bytes.get_mut(at..at + 2)?;
    field.copy_from_slice(&sum.to_be_bytes());
    Some(())
}

impl Core<'_, '_> {
    /// Sends the pieces of a packet for which [`is_possible`] holds. The frame becomes the first, and its verdict is that one's.
    #[cold]
    pub(super) fn cut<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        mtu: u16,
        out: &mut impl Originate,
        observer: &mut O,
    ) -> Verdict {
        let Some(rest) = Rest::of(frame, ready, mtu) else {
            return Verdict::Drop(DropReason::TooBig);
        };
        let first = self.piece(frame, rest.origin);
        let verdict = self.fragment(frame, &first, out, observer);
        if let Verdict::Forward(_) = verdict {
            // The payload of the others still lies behind the first, wherever its headers begin now.
            let sent = frame.bytes().len();
            if frame.resize(sent + rest.length - rest.piece) {
                let payload = frame.bytes().get(sent..).unwrap_or_default();
                self.send_others(&rest, payload, out);
                frame.resize(sent);
            }
        }
        verdict
    }

    /// The same for a packet that only might come: what becomes of its first piece.
    pub(super) fn cut_dry<O: Observer>(
        &mut self,
        frame: &mut Frame<'_>,
        ready: &Ready,
        mtu: u16,
        observer: &mut O,
    ) -> Verdict {
        match Rest::of(frame, ready, mtu) {
            Some(rest) => {
                let first = self.piece(frame, rest.origin);
                self.decide(frame, &first, observer)
            }
            None => Verdict::Drop(DropReason::TooBig),
        }
    }

    fn send_others(&mut self, rest: &Rest, payload: &[u8], out: &mut impl Originate) {
        for offset in rest.others() {
            let end = rest.length.min(offset + rest.piece);
            let part = payload.get(offset - rest.piece..end - rest.piece);
            let part = part.unwrap_or_default();
            let mut buffer = [0; HEADROOM + ROOM];
            let end = HEADROOM + HEADERS + part.len();
            let Some(place) = buffer.get_mut(HEADROOM..end) else {
                return;
            };
            if let Some(room) = place.get_mut(HEADERS..) {
                room.copy_from_slice(part);
            }
            if rest.write_headers(place, offset).is_none() {
                return;
            }
            let offload = Offload::default();
            let frame = Frame::new(&mut buffer, HEADROOM, end, 0, rest.ingress, offload);
            let Some(mut frame) = frame else { return };
            let ready = self.piece(&frame, rest.origin);
            if let Verdict::Forward(link) = self.fragment(&mut frame, &ready, out, &mut Silent)
                && out.originate(link, frame.bytes(), frame.offload)
            {
                self.stats.count_originated(link, frame.length());
            }
        }
    }

    fn piece(&self, frame: &Frame<'_>, origin: Option<Origin>) -> Ready {
        let mut ready = Ready::of(frame, origin);
        if ready.packet.fragment == Fragment::First {
            ready.flow = flow_of(&ready.packet);
            ready.hash = self.state.conntrack.hash(&ready.flow);
        }
        ready
    }
}

impl Ready {
    /// A frame out of its turn.
    pub(super) fn of(frame: &Frame<'_>, origin: Option<Origin>) -> Self {
        let mut ready = Self::NOTHING;
        ready.origin = origin;
        ready.content = parse::parse_into(frame, &mut ready.packet);
        ready
    }
}
