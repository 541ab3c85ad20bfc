//! The MTU of pods where nobody says one: what the card takes less what the tunnel adds, if there may be a tunnel.

use std::net::IpAddr;

use super::config::{Direct, Underlay};
use super::members::{Roster, Way};
use super::rows::Ground;
use crate::config::{MTU_MAX, MTU_MIN};

/// The MTU of pods behind a card that takes packets of `card`. A node that is reached without a tunnel now may move behind a
/// router, so with [`Direct::SameSubnet`] the tunnel counts.
///
/// # Errors
/// Less is left than any pod may have.
pub(super) fn of_pods(
    ground: &Ground,
    roster: &Roster,
    own: &[IpAddr],
    card: u16,
) -> Result<u16, String> {
    let protocol = sluice_contract::overlay::TunnelProtocol::from(ground.config.tunnel.protocol);
    let overhead = six(ground, roster, own).map_or(0, |six| protocol.overhead(six));
    let left = card.saturating_sub(overhead);
    if left < MTU_MIN {
        return Err(format!(
            "The uplink takes packets of {card} bytes, of which the tunnel leaves {left}: pods need {MTU_MIN}"
        ));
    }
    Ok(left.min(MTU_MAX))
}

/// The family of the widest tunnel that there may be: `None` if there is none.
fn six(ground: &Ground, roster: &Roster, own: &[IpAddr]) -> Option<bool> {
    let tunnels = roster.peers.iter().filter(|peer| peer.way != Way::Direct);
    let known = tunnels.map(|peer| peer.address.is_ipv6()).max();
    let expected = (ground.has_source && ground.config.direct != Direct::Always).then(|| {
        match ground.config.underlay {
            Underlay::Ipv4 => false,
            Underlay::Ipv6 => true,
            Underlay::Auto => roster.two_ends || !own.iter().any(IpAddr::is_ipv4),
        }
    });
    known.max(expected)
}

#[cfg(test)]
mod tests {
    use super::super::config::UplinkConfig;
    use super::super::members::{Origin, Peer};
    use super::*;

    fn mtu(
        config: &str,
        has_source: bool,
        peers: &[(&str, Way)],
        own: &[&str],
        card: u16,
    ) -> Result<u16, String> {
        let config: UplinkConfig =
            serde_json::from_str(&format!(r#"{{"interface": "eth0"{config}}}"#)).unwrap();
        let ground = Ground {
            config,
            cluster: Vec::new(),
            node: "here".into(),
            has_source,
            host_link: None,
            mtu: None,
        };
        let peer = |(address, way): &(&str, Way)| Peer {
            name: (*address).into(),
            origin: Origin::Configuration,
            address: address.parse().unwrap(),
            mac: Default::default(),
            pods: Vec::new(),
            node_addresses: Vec::new(),
            way: *way,
            is_ours: true,
        };
        let roster = Roster {
            peers: peers.iter().map(peer).collect(),
            ..Roster::default()
        };
        let own: Vec<IpAddr> = own.iter().map(|it| it.parse().unwrap()).collect();
        of_pods(&ground, &roster, &own, card)
    }

    #[test]
    fn m01_pods_get_what_the_widest_possible_tunnel_leaves() {
        let (v4, v6) = (("192.0.2.2", Way::Tunnel), ("2001:db8::2", Way::Tunnel));
        let both = &["192.0.2.1", "2001:db8::1"];
        for (config, source, peers, own, expected) in [
            ("", false, &[][..], &both[..], 1500),
            ("", false, &[v4], both, 1450),
            ("", false, &[v4, v6], both, 1430),
            ("", false, &[("192.0.2.2", Way::Direct)], both, 1500),
            ("", true, &[], both, 1450),
            ("", true, &[], &both[1..], 1430),
            (r#", "underlay": "ipv6""#, true, &[], both, 1430),
            (
                r#", "direct": "always""#,
                true,
                &[("192.0.2.2", Way::Direct)],
                both,
                1500,
            ),
            (
                r#", "direct": "same-subnet""#,
                true,
                &[("192.0.2.2", Way::DirectOnLink)],
                both,
                1450,
            ),
            (
                r#", "tunnel": {"protocol": "geneve"}"#,
                true,
                &[],
                both,
                1442,
            ),
            (
                r#", "tunnel": {"protocol": "geneve-ip"}"#,
                true,
                &[],
                &both[1..],
                1436,
            ),
            (
                r#", "tunnel": {"protocol": "ipip"}"#,
                true,
                &[v4],
                both,
                1480,
            ),
        ] {
            assert_eq!(
                mtu(config, source, peers, own, 1500),
                Ok(expected),
                "{config}"
            );
        }
        assert_eq!(mtu("", true, &[], both, 9000), Ok(8950));
        let too_small = mtu("", true, &[], both, 1320).unwrap_err();
        assert!(too_small.contains("leaves 1270"), "{too_small}");
    }
}
