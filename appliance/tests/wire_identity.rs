//! Whom policy takes a packet of another node to be from: what the tunnel tells, what is known of the address, and what follows
//! where they differ.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::Capacity;
use sluice_appliance::testing::{Bench, Builder};
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol, TunnelRow,
};
use sluice_contract::policy::{
    Action, BindingRow, ClassRow, Established, IdentityRow, Layer, LayerId, PolicyRow, RuleId,
    RulesetId, RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Identity, LinkId, Mac, Prefix, Row};
use std::net::IpAddr;

const UPLINK: u16 = 1;
const POD: u16 = 16;
/// May reach the pod of node 2.
const FRIEND: Identity = Identity(0x0012_3456);
const STRANGER: Identity = Identity(0x0065_4321);
/// Both again, in sixteen bits.
const SMALL_FRIEND: Identity = Identity(0x1234);
const SMALL_STRANGER: Identity = Identity(0x4321);
const WORLD: Identity = Identity::WORLD;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(last: u8) -> Mac {
    Mac([2, 0, 0, 0, 0, last])
}

fn link(id: u16, mac: Mac, addresses: &[&str], identity: Identity) -> Row {
    Row::Link(LinkRow {
        id: LinkId::new(id).unwrap(),
        mac,
        addresses: addresses.iter().map(|it| ip(it)).collect(),
        mtu: 1450,
        identity,
        incarnation: 1,
        tenant: sluice_contract::Tenant::NONE,
    })
}

/// Node `n` of two, with one pod of that identity.
fn node(n: u8, protocol: TunnelProtocol, identity: Identity) -> Bench {
    let other = 3 - n;
    let mut bench = Bench::empty(Capacity::default());
    let remote = |text: String, length| {
        Row::Overlay(OverlayRow::Remote(RemoteRow {
            prefix: Prefix::new(ip(&text), length).unwrap(),
            peer: PeerId(7),
        }))
    };
    let pod = Mac::of_pod(LinkId::new(POD).unwrap());
    bench.commit(&[
        link(UPLINK, mac(n), &[], WORLD),
        link(
            POD,
            pod,
            &[&format!("10.{n}.0.5"), &format!("fd0{n}::5")],
            identity,
        ),
        Row::Overlay(OverlayRow::Tunnel(TunnelRow {
            protocol,
            mac: mac(0x10 + n),
            source4: Some([192, 168, 0, n].into()),
            ..TunnelRow::default()
        })),
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(0),
            address: [192, 168, 0, other].into(),
            mac: Some(mac(other)),
        })),
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(7),
            address: [192, 168, 0, other].into(),
            mac: mac(0x10 + other),
            next_hop: NextHopId(0),
            mtu: 1500,
            direct: false,
        })),
        remote(format!("10.{other}.0.0"), 24),
        remote(format!("fd0{other}::"), 64),
    ]);
    bench
}

/// The pod of node 2 lets friends in and nobody else; what is known there of the address of node 1's pod.
fn policy(friend: Identity, known: Identity) -> Vec<Row> {
    let accept = SpanEntry {
        start: 0,
        target: Target::Rule {
            action: Action::Accept,
            order: 0,
            rule: RuleId(16),
        },
    };
    let layer = Layer {
        id: LayerId(1),
        classes: true,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Deny,
        miss_rule: RuleId(20),
    };
    let mut rows = vec![
        PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods: false,
        }),
        PolicyRow::Span(SpanRow {
            id: SpanId(1),
            entries: heapless::Vec::from_slice(&[accept]).unwrap(),
        }),
        PolicyRow::Class(ClassRow {
            layer: LayerId(1),
            identity: friend,
            ports: SpanId(1),
        }),
        PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(1),
            layers: heapless::Vec::from_slice(&[layer]).unwrap(),
        }),
        PolicyRow::Binding(BindingRow {
            link: LinkId::new(POD).unwrap(),
            ingress: RulesetId(1),
            egress: RulesetId::NONE,
        }),
    ];
    if known != WORLD {
        rows.extend(["10.1.0.5", "fd01::5"].map(|address| {
            PolicyRow::Identity(IdentityRow {
                address: ip(address),
                identity: known,
            })
        }));
    }
    rows.into_iter().map(Row::Policy).collect()
}

/// Whether a first packet of node 1's pod, which that node takes for `sender`, reaches the pod of node 2.
fn is_let_in(
    protocol: TunnelProtocol,
    sender: Identity,
    friend: Identity,
    known: Identity,
) -> bool {
    let ends = [("10.1.0.5", "10.2.0.5"), ("fd01::5", "fd02::5")];
    let each = ends.map(|(from, to)| {
        let mut here = node(1, protocol, sender);
        let mut there = node(2, protocol, FRIEND);
        there.commit(&policy(friend, known));
        let sent = here.send(POD, &Builder::from(POD, from, to).udp(1000, 53).build());
        let came = there.send_with(UPLINK, sent.forwarded(UPLINK), 0, sent.offload);
        let drops = there.pipeline.stats().dropped(DropReason::PolicyIngress);
        match drops {
            0 => !came.forwarded(POD).is_empty(),
            _ => false,
        }
    });
    assert_eq!(each[0], each[1], "IPv4 and IPv6");
    each[0]
}

#[test]
fn o14_geneve_tells_an_identity_whole_and_a_lie_never_widens() {
    // What the tunnel tells, what is known of the address, and what comes of it.
    let table = [
        (FRIEND, WORLD, true),
        (STRANGER, WORLD, false),
        (WORLD, WORLD, false),
        (FRIEND, FRIEND, true),
        (STRANGER, STRANGER, false),
        (WORLD, FRIEND, true),
        (WORLD, STRANGER, false),
        // A node that lies about a pod of its own, and an address that was another pod's a moment ago.
        (FRIEND, STRANGER, false),
        (STRANGER, FRIEND, false),
    ];
    for protocol in [TunnelProtocol::Geneve, TunnelProtocol::GeneveIp] {
        for (told, known, expected) in table {
            let seen = is_let_in(protocol, told, FRIEND, known);
            assert_eq!(
                seen, expected,
                "{protocol:?}: told {told:?}, known {known:?}"
            );
        }
    }
}

#[test]
fn o14_sixteen_bits_carry_what_fits_and_nothing_that_could_be_taken_for_another() {
    let protocol = TunnelProtocol::VxlanGbp;
    for (told, known, expected) in [
        (SMALL_FRIEND, WORLD, true),
        (SMALL_STRANGER, WORLD, false),
        (SMALL_STRANGER, SMALL_FRIEND, false),
        (SMALL_FRIEND, SMALL_STRANGER, false),
        // Its low half is the friend's number, and is not told.
        (Identity(0x0007_1234), WORLD, false),
        // The address decides.
        (Identity(0x0007_1234), SMALL_FRIEND, true),
        (FRIEND, SMALL_STRANGER, false),
    ] {
        let seen = is_let_in(protocol, told, SMALL_FRIEND, known);
        assert_eq!(seen, expected, "told {told:?}, known {known:?}");
    }
}
