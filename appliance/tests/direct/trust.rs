//! Whom the backend's node believes, and what.

use super::{
    BOTH, GENEVE, POD, ROUTER, SYN, UPLINK, V4, World, carry, find, nic, nodes, octets, rows,
    serve, svc,
};
use sluice_appliance::Family;
use sluice_appliance::frame::Offload;
use sluice_appliance::testing::node::Svc;
use sluice_appliance::testing::{Bench, End};
use sluice_appliance::wire::checksum;
use sluice_contract::overlay::GENEVE_BACKEND;
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, PolicyRow, RuleId, RulesetId, RulesetRow,
    SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::{DropReason, LinkId, Protocol, Row};

/// A frame between the nodes, and where in it there is what.
#[derive(Clone)]
struct Wrapped {
    world: World,
    bytes: Vec<u8>,
    option: usize,
    /// The inner IP header.
    inner: usize,
}

impl Wrapped {
    fn new(world: World, sent: &End) -> Self {
        let bytes = sent.forwarded(UPLINK).to_vec();
        let option = find(&bytes, &[0xff, 0x53, GENEVE_BACKEND]);
        let length = 4 + usize::from(bytes[option + 3] & 0x1f) * 4;
        let inner = option + length + 14;
        Self {
            world,
            bytes,
            option,
            inner,
        }
    }

    /// The same from another client, or to another address.
    fn with(&self, source: Option<&str>, destination: Option<&str>) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        let (first, length) = match self.world.family {
            Family::V4 => (12, 4),
            Family::V6 => (8, 16),
        };
        let first = self.inner + first;
        for (at, text) in [(first, source), (first + length, destination)] {
            if let Some(text) = text {
                bytes[at..at + length].copy_from_slice(&octets(text));
            }
        }
        if self.world.family == Family::V4 {
            let header = &mut bytes[self.inner..self.inner + 20];
            header[10..12].fill(0);
            let sum = checksum::finish(checksum::sum(header, 0));
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        bytes
    }

    fn flipped(&self, at: usize) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at] ^= 1;
        bytes
    }
}

fn refused(b: &mut Bench, bytes: &[u8]) -> DropReason {
    b.send_with(UPLINK, bytes, 0, Offload::default()).dropped()
}

#[test]
fn s28_only_pairs_that_the_backends_node_knows_are_taken() {
    for world in BOTH {
        let at = world.frontends()[0];
        let (mut a, mut b) = nodes(GENEVE);
        let sent = a.send(UPLINK, &world.asks(at).tcp(4000, at.1, SYN).build());
        let good = Wrapped::new(world, &sent);
        // Another backend, another port of it, and a backend that serves, but elsewhere.
        let address = good.option + 4;
        let last = octets(world.client).len() - 1;
        for at in [address + last, address + last + 2] {
            let reason = refused(&mut b, &good.flipped(at));
            assert_eq!(reason, DropReason::SvcDirectReturn);
        }
        let two = |svc: &mut Svc, world: World| svc.cluster.push((world.pods[0], 8080));
        serve(&mut b, two);
        let mut elsewhere = good.bytes.clone();
        elsewhere[address..=address + last].copy_from_slice(&octets(world.pods[0]));
        assert_eq!(refused(&mut b, &elsewhere), DropReason::SvcDirectReturn);
        // A port that no Service has.
        let port = good.inner + if last == 3 { 22 } else { 42 };
        let reason = refused(&mut b, &good.flipped(port + 1));
        assert_eq!(reason, DropReason::SvcDirectReturn);
        // An address that is the node's own, a pod's, or nobody's.
        for other in [world.nodes[1], world.pods[1], world.client] {
            let reason = refused(&mut b, &good.with(None, Some(other)));
            assert_eq!(reason, DropReason::TunnelSpoof, "{other}");
        }
        // A Service that is not served like that.
        serve(&mut b, |svc, world| {
            two(svc, world);
            svc.direct_return = false;
        });
        assert_eq!(refused(&mut b, &good.bytes), DropReason::SvcDirectReturn);
        serve(&mut b, |svc, world| {
            two(svc, world);
            svc.external_local = true;
        });
        assert_eq!(refused(&mut b, &good.bytes), DropReason::SvcDirectReturn);
        // A node that nobody knows.
        let mut stranger = good.bytes.clone();
        stranger[29] = 9;
        stranger[24..26].fill(0);
        let sum = checksum::finish(checksum::sum(&stranger[14..34], 0));
        stranger[24..26].copy_from_slice(&sum.to_be_bytes());
        let reason = refused(&mut b, &stranger);
        assert_eq!(reason, DropReason::TunnelUnknownPeer);
        // Nothing has begun by any of it; and the right one still may.
        assert_eq!(b.pipeline.conntrack().used(), 0);
        serve(&mut b, two);
        b.send(UPLINK, &good.bytes).forwarded(POD);
    }
}

#[test]
fn s28_pods_and_nodes_are_no_clients_that_another_node_may_pass_on() {
    for world in BOTH {
        for at in world.frontends() {
            let (mut a, mut b) = nodes(GENEVE);
            let sent = a.send(UPLINK, &world.asks(at).udp(4000, at.1).build());
            let good = Wrapped::new(world, &sent);
            for client in [world.nodes[0], world.nodes[1], world.pods[0], world.pods[1]] {
                let reason = refused(&mut b, &good.with(Some(client), None));
                assert_eq!(reason, DropReason::TunnelSpoof, "{client}");
            }
        }
    }
}

#[test]
fn s28_naming_a_backend_is_no_way_into_other_connections() {
    let at = V4.frontends()[1];
    let (mut a, mut b) = nodes(GENEVE);
    let sent = a.send(UPLINK, &V4.asks(at).udp(4000, at.1).build());
    let named = Wrapped::new(V4, &sent);
    // The same client asked node B itself.
    let asks = V4.asks(at).macs(ROUTER, nic(2)).udp(4000, at.1);
    serve(&mut b, |svc, _| svc.direct_return = false);
    b.send(UPLINK, &asks.build()).forwarded(POD);
    assert_eq!(refused(&mut b, &named.bytes), DropReason::Spoof);
}

#[test]
fn s28_source_ranges_are_asked_at_both_nodes() {
    for world in BOTH {
        let at = world.frontends()[1];
        let range = match world.family {
            Family::V4 => "192.0.2.0/24",
            Family::V6 => "2001:db8:1::/48",
        };
        let (mut a, mut b) = nodes(GENEVE);
        let asks = world.asks(at).tcp(4000, at.1, SYN).build();
        let sent = a.send(UPLINK, &asks);
        let mut strict = svc(world, Protocol::Tcp);
        strict.sources = vec![range];
        b.commit(&rows(world, &strict));
        assert_eq!(carry(&mut b, &sent).dropped(), DropReason::SvcSourceRange);
        let (mut a, _) = nodes(GENEVE);
        a.commit(&rows(world, &strict));
        assert_eq!(a.send(UPLINK, &asks).dropped(), DropReason::SvcSourceRange);
    }
}

/// Pods may reach the pod; who is none may if `others` is so.
fn policy(others: bool) -> Vec<Row> {
    let accept = Target::Rule {
        action: Action::Accept,
        order: 0,
        rule: RuleId(20),
    };
    let mut entries = heapless::Vec::new();
    entries
        .push(SpanEntry {
            start: 0,
            target: accept,
        })
        .unwrap();
    let all = SpanId(3);
    let layer = Layer {
        id: LayerId(1),
        classes: false,
        pods: all,
        others: if others { all } else { SpanId::NOTHING },
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss: Action::Deny,
        miss_rule: RuleId(21),
    };
    vec![
        Row::Policy(PolicyRow::Settings(SettingsRow {
            unbound: Action::Deny,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods: false,
        })),
        Row::Policy(PolicyRow::Span(SpanRow { id: all, entries })),
        Row::Policy(PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(5),
            layers: heapless::Vec::from_slice(&[layer]).unwrap(),
        })),
        Row::Policy(PolicyRow::Binding(BindingRow {
            link: LinkId::new(POD).unwrap(),
            ingress: RulesetId(5),
            egress: RulesetId::NONE,
        })),
    ]
}

#[test]
fn s28_the_pods_policy_judges_the_true_client_whatever_the_tunnel_says_of_it() {
    for world in BOTH {
        for others in [true, false] {
            let (mut a, mut b) = nodes(GENEVE);
            b.commit(&policy(others));
            let at = world.frontends()[0];
            let sent = a.send(UPLINK, &world.asks(at).tcp(4000, at.1, SYN).build());
            let mut bytes = sent.forwarded(UPLINK).to_vec();
            // The node asked claims that it is a pod.
            let identity = find(&bytes, &[0xff, 0x53, 1, 1]) + 4;
            bytes[identity..identity + 4].copy_from_slice(&300u32.to_be_bytes());
            let end = b.send(UPLINK, &bytes);
            if others {
                end.forwarded(POD);
            } else {
                assert_eq!(end.dropped(), DropReason::PolicyIngress);
            }
        }
    }
}
