//! Where the stages meet the tunnel: what comes in it is unwrapped before anything else, answers to it go back in it, and what
//! routers say about it is noted.

use super::direct;
use super::refusal::Refusal;
use super::transit::Stages;
use crate::address::Address;
use crate::classify;
use crate::decap::{self, Complaint, Origin};
use crate::encap::{self, Told};
use crate::frame::Frame;
use crate::mtu;
use crate::observe::Observer;
use crate::parse::{self, Content, Packet, Parsed};
use crate::reply;
use crate::tables::{Place, Tables};
use sluice_contract::overlay::PeerId;
use sluice_contract::{DropReason, Identity, LinkId};

/// Takes the outer headers off a packet of another node; `packet` becomes what is inside.
pub(super) fn unwrap(
    tables: &Tables<'_>,
    frame: &mut Frame<'_>,
    packet: &mut Packet,
) -> Result<Origin, DropReason> {
    let uplink = tables.link(LinkId::UPLINK);
    let uplink = uplink.ok_or(DropReason::UnknownLink)?;
    let header = reply::ethernet_of(frame).ok_or(DropReason::Malformed)?;
    classify::link_layer(tables, frame.ingress, uplink, header)?;
    let (overlay, own) = (tables.overlay(), uplink.mac());
    let mut origin = decap::unwrap(frame, packet, overlay, own)?;
    match parse::parse_into(frame, packet)? {
        Content::Ip if origin.target.is_some() => {
            if direct::may_pass_on(tables, origin.peer, packet) {
                // Who the client is, its address says.
                origin.identity = None;
                Ok(origin)
            } else {
                Err(DropReason::TunnelSpoof)
            }
        }
        Content::Ip if may_speak(tables, origin.peer, packet.source) => Ok(origin),
        Content::Ip => Err(DropReason::TunnelSpoof),
        Content::Arp => Err(DropReason::EtherType),
    }
}

/// Whether a node may send what comes from `source`: from a pod there, from itself, or from an address of some node of which
/// no more is known.
pub(super) fn may_speak(tables: &Tables<'_>, peer: PeerId, source: Address) -> bool {
    let overlay = tables.overlay();
    overlay.may_speak_for(peer, source)
        || (tables.place(source) == Place::Peer && overlay.peer_at(source).is_none())
}

impl<O: Observer> Stages<'_, '_, O> {
    /// A router on the underlay speaks of a packet to another node: it ends here, and its word is noted.
    #[cold]
    pub(super) fn listen_to_router(
        &mut self,
        frame: &Frame<'_>,
        packet: &Packet,
    ) -> Result<(), Refusal> {
        let overlay = self.tables.overlay();
        let heard = self
            .origin
            .is_none()
            .then(|| decap::complaint(frame, packet, overlay));
        let Some(Complaint { peer, mtu, genuine }) = heard.flatten() else {
            return Ok(());
        };
        let (Some(row), Some(tunnel)) = (overlay.peer(peer), overlay.tunnel()) else {
            return Ok(());
        };
        if O::DRY {
            return if genuine {
                Err(DropReason::PathMtu.into())
            } else {
                Ok(())
            };
        }
        let learned = &mut self.state.learned;
        if !learned.trusts(genuine, self.now) {
            // It goes the way of all errors about what was never sent.
            return Ok(());
        }
        let is_probed = self.tables.link(LinkId::PROBES).is_some();
        let until = self.now + if is_probed { mtu::BRIDGED } else { mtu::MEMORY };
        let overhead = mtu::overhead(tunnel.protocol, row.address.family()) as u16;
        let sizes = (row.mtu, overhead);
        learned.lower((peer, row.address), sizes, mtu, until);
        Err(DropReason::PathMtu.into())
    }

    /// An answer to what came in a tunnel goes back in it.
    pub(super) fn return_to_sender(&self, frame: &mut Frame<'_>) -> Option<()> {
        let Some(origin) = self.origin else {
            return Some(());
        };
        let overlay = self.tables.overlay();
        let uplink = self.tables.link(LinkId::UPLINK)?;
        let exit = overlay.exit(origin.peer, uplink.mtu, &self.state.learned);
        let Ok(Parsed::Ip(packet)) = parse::parse(frame) else {
            return None;
        };
        encap::send(
            frame,
            &packet,
            overlay,
            &exit.ok()?,
            uplink.mac(),
            Told {
                identity: Identity::WORLD,
                target: None,
            },
        )
        .ok()
    }
}
