//! Questions for an address on the link, and what is said about one. Frames of others are untrusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpEthIpv4Packet, ArpOperation, Icmpv6Type, LinkSlice, NetSlice, PacketBuilder, SlicedPacket,
    TransportSlice,
};

/// An address of a network card.
pub type Mac = [u8; 6];

const BROADCAST: Mac = [0xff; 6];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
/// No router is passed on the way (RFC 4861 §7.1).
const HOP_LIMIT: u8 = 255;
/// The option that carries a MAC, and its length in eights of octets.
const TARGET_LINK_ADDRESS: [u8; 2] = [2, 1];

/// Somebody asks who has an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub(super) wanted: IpAddr,
    asker_mac: Mac,
    /// Nothing when the asker wants the address for itself (RFC 5227, RFC 4862).
    asker: Option<IpAddr>,
}

/// The question that a frame is, if it is one.
pub(super) fn question(frame: &[u8]) -> Option<Question> {
    let packet = SlicedPacket::from_ethernet(frame).ok()?;
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else {
        return None;
    };
    let question = match (&packet.net, &packet.transport) {
        (Some(NetSlice::Arp(arp)), _) => {
            let arp = ArpEthIpv4Packet::try_from(arp.to_packet()).ok()?;
            let asker = Ipv4Addr::from(arp.sender_ipv4);
            Question {
                wanted: Ipv4Addr::from(arp.target_ipv4).into(),
                asker_mac: arp.sender_mac,
                asker: (!asker.is_unspecified()).then_some(asker.into()),
            }
            .if_some(arp.operation == ArpOperation::REQUEST)?
        }
        (Some(NetSlice::Ipv6(v6)), Some(TransportSlice::Icmpv6(icmp))) => {
            let header = v6.header();
            let is_whole = icmp.is_checksum_valid(header.source(), header.destination());
            let asks = icmp.icmp_type() == Icmpv6Type::NeighborSolicitation;
            let target: [u8; 16] = icmp.payload().first_chunk().copied()?;
            let asker = header.source_addr();
            Question {
                wanted: Ipv6Addr::from(target).into(),
                asker_mac: ethernet.source(),
                asker: (!asker.is_unspecified()).then_some(asker.into()),
            }
            .if_some(asks && is_whole && header.hop_limit() == HOP_LIMIT)?
        }
        _ => return None,
    };
    let is_group = |mac: Mac| mac[0] & 1 == 1;
    (!is_group(question.asker_mac)).then_some(question)
}

impl Question {
    fn if_some(self, holds: bool) -> Option<Self> {
        holds.then_some(self)
    }
}

/// The answer: the address is at `own`.
pub(super) fn answer(question: &Question, own: Mac) -> Option<Vec<u8>> {
    match (question.wanted, question.asker) {
        (IpAddr::V4(wanted), asker) => {
            let asker = match asker {
                Some(IpAddr::V4(asker)) => asker,
                _ => Ipv4Addr::UNSPECIFIED,
            };
            let said = ArpEthIpv4Packet {
                operation: ArpOperation::REPLY,
                sender_mac: own,
                sender_ipv4: wanted.octets(),
                target_mac: question.asker_mac,
                target_ipv4: asker.octets(),
            };
            arp(own, question.asker_mac, said)
        }
        (IpAddr::V6(wanted), Some(IpAddr::V6(asker))) => {
            advertisement(own, wanted, (question.asker_mac, asker), true)
        }
        (IpAddr::V6(wanted), _) => advertisement(own, wanted, (ALL_NODES_MAC, ALL_NODES), false),
    }
}

/// What nobody asked for: the address is at `own` from now on.
pub(super) fn announcement(address: IpAddr, own: Mac) -> Option<Vec<u8>> {
    match address {
        IpAddr::V4(v4) => {
            let said = ArpEthIpv4Packet {
                operation: ArpOperation::REQUEST,
                sender_mac: own,
                sender_ipv4: v4.octets(),
                target_mac: [0; 6],
                target_ipv4: v4.octets(),
            };
            arp(own, BROADCAST, said)
        }
        IpAddr::V6(v6) => advertisement(own, v6, (ALL_NODES_MAC, ALL_NODES), false),
    }
}

fn arp(own: Mac, to: Mac, said: ArpEthIpv4Packet) -> Option<Vec<u8>> {
    let builder = PacketBuilder::ethernet2(own, to).arp(said.into());
    let mut frame = Vec::with_capacity(builder.size());
    builder.write(&mut frame).ok()?;
    Some(frame)
}

fn advertisement(
    own: Mac,
    address: Ipv6Addr,
    (to_mac, to): (Mac, Ipv6Addr),
    solicited: bool,
) -> Option<Vec<u8>> {
    let flags = NeighborAdvertisementHeader {
        router: false,
        solicited,
        r#override: true,
    };
    let builder = PacketBuilder::ethernet2(own, to_mac)
        .ipv6(address.octets(), to.octets(), HOP_LIMIT)
        .icmpv6(Icmpv6Type::NeighborAdvertisement(flags));
    let said = [&address.octets()[..], &TARGET_LINK_ADDRESS, &own].concat();
    let mut frame = Vec::with_capacity(builder.size(said.len()));
    builder.write(&mut frame, &said).ok()?;
    Some(frame)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OWN: Mac = [2, 0, 0, 0, 0, 1];
    const ASKER: Mac = [2, 0, 0, 0, 0, 9];
    const VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

    fn asked(operation: ArpOperation, sender: [u8; 4]) -> Vec<u8> {
        let said = ArpEthIpv4Packet {
            operation,
            sender_mac: ASKER,
            sender_ipv4: sender,
            target_mac: [0; 6],
            target_ipv4: VIP.octets(),
        };
        arp(ASKER, BROADCAST, said).unwrap()
    }

    fn solicitation(from: Ipv6Addr, target: Ipv6Addr, hops: u8) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(ASKER, [0x33, 0x33, 0xff, 0, 0, 0x80])
            .ipv6(from.octets(), ALL_NODES.octets(), hops)
            .icmpv6(Icmpv6Type::NeighborSolicitation);
        let mut frame = Vec::new();
        let options = [&target.octets()[..], &[1, 1], &ASKER].concat();
        builder.write(&mut frame, &options).unwrap();
        frame
    }

    #[test]
    fn o20_an_arp_question_is_answered_to_who_asks() {
        let question = question(&asked(ArpOperation::REQUEST, [192, 0, 2, 9])).unwrap();
        assert_eq!(question.wanted, VIP);
        let frame = answer(&question, OWN).unwrap();
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let Some(NetSlice::Arp(arp)) = packet.net else {
            panic!("no ARP");
        };
        let said = ArpEthIpv4Packet::try_from(arp.to_packet()).unwrap();
        assert_eq!(said.operation, ArpOperation::REPLY);
        assert_eq!((said.sender_mac, said.sender_ipv4), (OWN, VIP.octets()));
        assert_eq!((said.target_mac, said.target_ipv4), (ASKER, [192, 0, 2, 9]));
        assert_eq!(frame[..6], ASKER);
        // An answer is no question, and who probes for a conflict is told as well.
        assert_eq!(
            super::question(&asked(ArpOperation::REPLY, [192, 0, 2, 9])),
            None
        );
        let probe = super::question(&asked(ArpOperation::REQUEST, [0; 4])).unwrap();
        assert!(answer(&probe, OWN).is_some());
    }

    #[test]
    fn o20_a_solicitation_is_answered_with_a_checksum_and_no_router_in_between() {
        let vip: Ipv6Addr = "2001:db8::80".parse().unwrap();
        let asker: Ipv6Addr = "2001:db8::9".parse().unwrap();
        let question = question(&solicitation(asker, vip, 255)).unwrap();
        assert_eq!(question.wanted, vip);
        let frame = answer(&question, OWN).unwrap();
        let packet = SlicedPacket::from_ethernet(&frame).unwrap();
        let (Some(NetSlice::Ipv6(v6)), Some(TransportSlice::Icmpv6(icmp))) =
            (packet.net, packet.transport)
        else {
            panic!("no ICMPv6");
        };
        assert!(icmp.is_checksum_valid(v6.header().source(), v6.header().destination()));
        assert_eq!(
            (v6.header().destination_addr(), v6.header().hop_limit()),
            (asker, 255)
        );
        let Icmpv6Type::NeighborAdvertisement(flags) = icmp.icmp_type() else {
            panic!("no advertisement");
        };
        assert!(flags.solicited && flags.r#override && !flags.router);
        assert_eq!(icmp.payload(), [&vip.octets()[..], &[2, 1], &OWN].concat());
        // From behind a router, or of somebody who wants the address itself.
        assert_eq!(super::question(&solicitation(asker, vip, 64)), None);
        let conflict = super::question(&solicitation(Ipv6Addr::UNSPECIFIED, vip, 255)).unwrap();
        let told = answer(&conflict, OWN).unwrap();
        assert_eq!(told[..6], ALL_NODES_MAC);
        let mut broken = solicitation(asker, vip, 255);
        broken[60] ^= 1;
        assert_eq!(super::question(&broken), None);
    }

    proptest! {
        #[test]
        fn z02_whatever_is_on_the_wire_is_a_question_or_not(frame in prop::collection::vec(any::<u8>(), 0..200), six: bool) {
            let mut typed = frame.clone();
            if typed.len() > 14 {
                typed[12..14].copy_from_slice(&(if six { 0x86ddu16 } else { 0x0806 }).to_be_bytes());
            }
            for frame in [frame, typed] {
                if let Some(question) = question(&frame) {
                    prop_assert!(answer(&question, OWN).is_some());
                }
            }
        }
    }
}
