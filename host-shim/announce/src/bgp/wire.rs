//! Messages as this speaker makes them. The format is `rustbgpd-wire`'s to know.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rustbgpd_wire::notification::{NotificationCode, cease_subcode};
use rustbgpd_wire::{
    Afi, AsPath, AsPathSegment, Capability, EncodeError, GracefulRestartFamily, Ipv4NlriEntry,
    Ipv4Prefix, Ipv4UnicastMode, Ipv6Prefix, Message, MpReachNlri, MpUnreachNlri, NlriEntry,
    NotificationMessage, OpenMessage, Origin, PathAttribute, Prefix as WirePrefix, Safi,
    UpdateMessage,
};
use sluice_contract::Prefix;

use super::config::BgpConfig;

/// Stands for an autonomous system that two octets cannot say (RFC 6793).
const AS_TRANS: u16 = 23_456;
/// What an autonomous system prefers unless told otherwise (RFC 4271 §5.1.5 leaves it open; everybody takes this).
const LOCAL_PREFERENCE: u32 = 100;
/// Prefixes in one message: 17 octets each at most, of 4096.
const CHUNK: usize = 200;

/// Where routers send what is for this node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NextHops {
    pub v4: Option<Ipv4Addr>,
    pub v6: Option<Ipv6Addr>,
}

impl NextHops {
    pub(crate) fn has(self, afi: Afi) -> bool {
        match afi {
            Afi::Ipv4 => self.v4.is_some(),
            Afi::Ipv6 => self.v6.is_some(),
            _ => false,
        }
    }
}

/// What both sides agreed upon.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    pub(crate) own_asn: u32,
    /// One autonomous system on both sides.
    pub(crate) is_internal: bool,
    pub(crate) four_octets: bool,
    pub(crate) next_hops: NextHops,
}

pub(crate) const FAMILIES: [Afi; 2] = [Afi::Ipv4, Afi::Ipv6];

/// The family of a prefix.
pub(crate) fn family(prefix: &Prefix) -> Afi {
    match prefix.address() {
        IpAddr::V4(_) => Afi::Ipv4,
        IpAddr::V6(_) => Afi::Ipv6,
    }
}

/// What this node says first. `restarted`: it may have been known to the router a moment ago.
pub(crate) fn open(
    config: &BgpConfig,
    router_id: Ipv4Addr,
    hold_seconds: u16,
    next_hops: NextHops,
    restarted: bool,
) -> Message {
    let spoken = || FAMILIES.into_iter().filter(|afi| next_hops.has(*afi));
    let mut capabilities: Vec<Capability> = spoken()
        .map(|afi| Capability::MultiProtocol {
            afi,
            safi: Safi::Unicast,
        })
        .collect();
    capabilities.push(Capability::RouteRefresh);
    capabilities.push(Capability::FourOctetAs { asn: config.asn });
    if config.graceful_restart_seconds > 0 {
        capabilities.push(Capability::GracefulRestart {
            restart_state: restarted,
            notification: false,
            restart_time: config.graceful_restart_seconds,
            families: spoken()
                .map(|afi| GracefulRestartFamily {
                    afi,
                    safi: Safi::Unicast,
                    // Frames wait in the pods' interfaces until the daemon is back.
                    forwarding_preserved: true,
                })
                .collect(),
        });
    }
    Message::Open(OpenMessage {
        version: 4,
        my_as: u16::try_from(config.asn).unwrap_or(AS_TRANS),
        hold_time: hold_seconds,
        bgp_identifier: router_id,
        capabilities,
    })
}

/// Announces prefixes of one family that is spoken.
pub(crate) fn announce(
    afi: Afi,
    prefixes: &[Prefix],
    terms: Terms,
) -> Result<Vec<Message>, EncodeError> {
    let mut attributes = vec![
        PathAttribute::Origin(Origin::Igp),
        PathAttribute::AsPath(AsPath {
            segments: match terms.is_internal {
                true => Vec::new(),
                false => vec![AsPathSegment::AsSequence(vec![terms.own_asn])],
            },
        }),
    ];
    if let (Afi::Ipv4, Some(next_hop)) = (afi, terms.next_hops.v4) {
        attributes.push(PathAttribute::NextHop(next_hop));
    }
    if terms.is_internal {
        attributes.push(PathAttribute::LocalPref(LOCAL_PREFERENCE));
    }
    let of_chunk = |chunk: &[Prefix]| {
        let mut attributes = attributes.clone();
        if let (Afi::Ipv6, Some(next_hop)) = (afi, terms.next_hops.v6) {
            attributes.push(reach(next_hop, v6_entries(chunk)));
        }
        update(&v4_entries(chunk), &[], &attributes, terms)
    };
    prefixes.chunks(CHUNK).map(of_chunk).collect()
}

/// Takes prefixes of one family back.
pub(crate) fn withdraw(
    afi: Afi,
    prefixes: &[Prefix],
    terms: Terms,
) -> Result<Vec<Message>, EncodeError> {
    let of_chunk = |chunk: &[Prefix]| match afi {
        Afi::Ipv6 => update(&[], &[], &[unreach(v6_entries(chunk))], terms),
        _ => update(&[], &v4_entries(chunk), &[], terms),
    };
    prefixes.chunks(CHUNK).map(of_chunk).collect()
}

/// Says that everything of a family was said (RFC 4724 §2).
pub(crate) fn end_of_rib(afi: Afi, terms: Terms) -> Result<Message, EncodeError> {
    match afi {
        Afi::Ipv6 => update(&[], &[], &[unreach(Vec::new())], terms),
        _ => update(&[], &[], &[], terms),
    }
}

/// The session ends because the operator wants it to; the router drops the routes.
pub(crate) fn farewell() -> Message {
    notification(
        NotificationCode::Cease,
        cease_subcode::ADMINISTRATIVE_SHUTDOWN,
    )
}

pub(crate) fn notification(code: NotificationCode, subcode: u8) -> Message {
    Message::Notification(NotificationMessage::new(code, subcode, bytes::Bytes::new()))
}

fn update(
    announced: &[Ipv4NlriEntry],
    withdrawn: &[Ipv4NlriEntry],
    attributes: &[PathAttribute],
    terms: Terms,
) -> Result<Message, EncodeError> {
    let mode = Ipv4UnicastMode::Body;
    let made = UpdateMessage::try_build(
        announced,
        withdrawn,
        attributes,
        terms.four_octets,
        false,
        mode,
    );
    made.map(Message::Update)
}

fn v4_entries(prefixes: &[Prefix]) -> Vec<Ipv4NlriEntry> {
    let entry = |prefix: &Prefix| match prefix.address() {
        IpAddr::V4(address) => Some(Ipv4NlriEntry {
            path_id: 0,
            prefix: Ipv4Prefix::new(address, prefix.length()),
        }),
        IpAddr::V6(_) => None,
    };
    prefixes.iter().filter_map(entry).collect()
}

fn v6_entries(prefixes: &[Prefix]) -> Vec<NlriEntry> {
    let entry = |prefix: &Prefix| match prefix.address() {
        IpAddr::V6(address) => Some(NlriEntry {
            path_id: 0,
            prefix: WirePrefix::V6(Ipv6Prefix::new(address, prefix.length())),
        }),
        IpAddr::V4(_) => None,
    };
    prefixes.iter().filter_map(entry).collect()
}

fn reach(next_hop: Ipv6Addr, announced: Vec<NlriEntry>) -> PathAttribute {
    PathAttribute::MpReachNlri(Box::new(MpReachNlri {
        afi: Afi::Ipv6,
        safi: Safi::Unicast,
        next_hop: next_hop.into(),
        link_local_next_hop: None,
        announced,
        flowspec_announced: Vec::new(),
        evpn_announced: Vec::new(),
        bgpls_announced: Vec::new(),
        vpn_announced: Vec::new(),
        labeled_announced: Vec::new(),
        rtc_announced: Vec::new(),
    }))
}

fn unreach(withdrawn: Vec<NlriEntry>) -> PathAttribute {
    PathAttribute::MpUnreachNlri(Box::new(MpUnreachNlri {
        afi: Afi::Ipv6,
        safi: Safi::Unicast,
        withdrawn,
        flowspec_withdrawn: Vec::new(),
        evpn_withdrawn: Vec::new(),
        bgpls_withdrawn: Vec::new(),
        vpn_withdrawn: Vec::new(),
        labeled_withdrawn: Vec::new(),
        rtc_withdrawn: Vec::new(),
    }))
}
