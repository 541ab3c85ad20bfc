//! What is configured: Services, policy, translation and incarnations that change at random, and the rows that say so.

use proptest::prelude::*;
use sluice_appliance::Family;
use sluice_appliance::testing::node::{self, Addresses, HOST, UPLINK, V4, V6, service};
use sluice_appliance::testing::pod_row;
use sluice_contract::policy::{
    Action, BindingRow, ClassRow, Established, Layer, LayerId, PolicyRow, RuleId, RulesetId,
    RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::service::{AddressRole, ServiceRow};
use sluice_contract::{Identity, LinkId, Protocol, Row};

pub(crate) const PODS: usize = 3;
pub(crate) const SERVICES: usize = 3;
/// The port at which a Service's endpoints listen.
pub(crate) const TARGET: u16 = 8080;

/// One Service: who are its endpoints, by pod, and what else is said of it.
#[derive(Clone, Debug)]
pub(crate) struct Svc {
    pub(crate) present: bool,
    pub(crate) protocol: Protocol,
    /// Chosen for new connections.
    pub(crate) endpoints: [bool; PODS],
    /// Of these, the ones on this node for traffic that must stay here; the fixture's pods all are, so this is a free choice.
    pub(crate) local: [bool; PODS],
    /// Not chosen any more, but still serving.
    pub(crate) terminating: [bool; PODS],
    pub(crate) internal_local: bool,
    pub(crate) external_local: bool,
    /// In seconds.
    pub(crate) affinity: u32,
}

/// What may come to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ingress {
    Everything,
    Nothing,
    /// Only from the first pod.
    FirstPod,
}

#[derive(Clone, Debug)]
pub(crate) struct World {
    pub v6: bool,
    pub(crate) services: [Svc; SERVICES],
    pub(crate) ingress: [Ingress; PODS],
    /// The pod may send.
    pub(crate) egress: [bool; PODS],
    /// What may come to the node itself, and whether it may send to others than its pods.
    pub(crate) guard: (Ingress, bool),
    pub(crate) incarnations: [u32; PODS],
    pub(crate) masquerade_all: bool,
    pub(crate) masquerade_egress: bool,
    pub(crate) detect_local: bool,
    pub(crate) kept: bool,
}

/// One change of it.
#[derive(Clone, Debug)]
pub(crate) enum Change {
    Service(usize, Svc),
    Ingress(usize, Ingress),
    Egress(usize, bool),
    Guard(Ingress, bool),
    Restart(usize),
    Nat(bool, bool, bool),
    Kept(bool),
    /// The same rows again: nothing may happen.
    Again,
}

impl World {
    pub(crate) fn new(v6: bool) -> Self {
        let svc = |n: usize| Svc {
            present: true,
            protocol: [Protocol::Tcp, Protocol::Udp, Protocol::Tcp][n],
            endpoints: [false, true, true],
            local: [false, true, true],
            terminating: [false; PODS],
            internal_local: false,
            external_local: false,
            affinity: 0,
        };
        Self {
            v6,
            services: [svc(0), svc(1), svc(2)],
            ingress: [Ingress::Everything; PODS],
            egress: [true; PODS],
            guard: (Ingress::Everything, true),
            incarnations: [1; PODS],
            masquerade_all: false,
            masquerade_egress: true,
            detect_local: true,
            kept: false,
        }
    }

    pub(crate) fn addresses(&self) -> &'static Addresses {
        if self.v6 { &V6 } else { &V4 }
    }

    pub(crate) fn apply(&mut self, change: &Change) {
        match change {
            Change::Service(n, svc) => self.services[*n] = svc.clone(),
            Change::Ingress(pod, ingress) => self.ingress[*pod] = *ingress,
            Change::Egress(pod, may) => self.egress[*pod] = *may,
            Change::Guard(ingress, may) => self.guard = (*ingress, *may),
            Change::Restart(pod) => self.incarnations[*pod] += 1,
            Change::Nat(all, egress, detect) => {
                self.masquerade_all = *all;
                self.masquerade_egress = *egress;
                self.detect_local = *detect;
            }
            Change::Kept(kept) => self.kept = *kept,
            Change::Again => {}
        }
    }

    /// All rows that say so.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let a = self.addresses();
        let mut rows = Vec::new();
        for row in node::node_rows() {
            rows.push(match row {
                Row::Link(mut link) if link.id.is_pod() => {
                    let n = usize::from(link.id.raw() - 16);
                    link = pod_row(link.id.raw(), n as u16 + 1);
                    link.incarnation = self.incarnations[n];
                    link.identity = identity(n);
                    Row::Link(link)
                }
                Row::Service(ServiceRow::Nat(mut nat)) => {
                    nat.masquerade_all = self.masquerade_all;
                    nat.masquerade_egress = self.masquerade_egress;
                    nat.detect_local = self.detect_local;
                    service(ServiceRow::Nat(nat))
                }
                row => row,
            });
        }
        if self.kept {
            let outside = match a.family {
                Family::V4 => "203.0.113.0/24",
                Family::V6 => "2001:db8:99::/48",
            };
            rows.push(service(ServiceRow::Prefix(
                sluice_contract::service::PrefixRow {
                    prefix: node::prefix(outside),
                    purpose: sluice_contract::service::PrefixUse::Keep,
                },
            )));
        }
        rows.push(node::known(a.cluster_ip, AddressRole::Cluster));
        rows.push(node::known(a.load_balancer, AddressRole::External));
        for (n, svc) in self.services.iter().enumerate() {
            if svc.present {
                rows.extend(self.service_rows(n, svc));
            }
        }
        rows.extend(self.policy_rows().into_iter().map(Row::Policy));
        rows
    }

    fn service_rows(&self, n: usize, svc: &Svc) -> Vec<Row> {
        let a = self.addresses();
        let list = |of: &dyn Fn(usize) -> bool| -> Vec<(&'static str, u16)> {
            (0..PODS)
                .filter(|pod| of(*pod))
                .map(|pod| (a.pods[pod], TARGET))
                .collect()
        };
        let mut rows = node::Svc::new(&list(&|p| svc.endpoints[p]), &[]);
        rows.local = list(&|p| svc.endpoints[p] && svc.local[p]);
        rows.serving = Some(list(&|p| svc.endpoints[p] || svc.terminating[p]));
        rows.id = n as u32;
        rows.protocol = svc.protocol;
        rows.port = 80 + n as u16;
        rows.node_port = 30_080 + n as u16;
        rows.internal_local = svc.internal_local;
        rows.external_local = svc.external_local;
        rows.affinity = svc.affinity;
        let known = |row: &Row| matches!(row, Row::Service(ServiceRow::Address(_)));
        rows.rows(a).into_iter().filter(|row| !known(row)).collect()
    }

    fn policy_rows(&self) -> Vec<PolicyRow> {
        let layer = |id: u64, classes| {
            let layer = Layer {
                id: LayerId(id),
                classes,
                pods: SpanId::NOTHING,
                others: SpanId::NOTHING,
                v4: SpanId::NOTHING,
                v6: SpanId::NOTHING,
                miss: Action::Deny,
                miss_rule: RuleId(20 + id as u32),
            };
            PolicyRow::Ruleset(RulesetRow {
                id: RulesetId(id),
                layers: heapless::Vec::from_slice(&[layer]).unwrap(),
            })
        };
        let everything = SpanEntry {
            start: 0,
            target: Target::Rule {
                action: Action::Accept,
                order: 0,
                rule: RuleId(16),
            },
        };
        let mut rows = vec![
            PolicyRow::Settings(SettingsRow {
                unbound: Action::Deny,
                host_reaches_pods: true,
                established: Established::Judged,
                audit: false,
                audit_node: false,
                unlisted_pods: false,
            }),
            PolicyRow::Span(SpanRow {
                id: SpanId(1),
                entries: heapless::Vec::from_slice(&[everything]).unwrap(),
            }),
            PolicyRow::Class(ClassRow {
                layer: LayerId(2),
                identity: identity(0),
                ports: SpanId(1),
            }),
            layer(1, false),
            layer(2, true),
        ];
        let pods = (0..PODS).map(|pod| (link_of(pod), self.ingress[pod], self.egress[pod]));
        let node = (LinkId::HOST, self.guard.0, self.guard.1);
        for (link, ingress, egress) in pods.chain([node]) {
            rows.push(PolicyRow::Binding(BindingRow {
                link,
                ingress: RulesetId(match ingress {
                    Ingress::Everything => 0,
                    Ingress::Nothing => 1,
                    Ingress::FirstPod => 2,
                }),
                egress: RulesetId(u64::from(!egress)),
            }));
        }
        rows
    }
}

pub(crate) fn link_of(pod: usize) -> LinkId {
    LinkId::new(16 + pod as u16).unwrap()
}

fn identity(pod: usize) -> Identity {
    Identity(300 + pod as u32)
}

fn svc() -> impl Strategy<Value = Svc> {
    let flags = || prop::array::uniform3(any::<bool>());
    (
        prop::bool::weighted(0.85),
        any::<bool>(),
        flags(),
        flags(),
        flags(),
        any::<(bool, bool)>(),
        prop::sample::select(vec![0u32, 0, 40]),
    )
        .prop_map(
            |(
                present,
                udp,
                endpoints,
                local,
                terminating,
                (internal_local, external_local),
                affinity,
            )| Svc {
                present,
                protocol: if udp { Protocol::Udp } else { Protocol::Tcp },
                endpoints,
                local,
                terminating,
                internal_local,
                external_local,
                affinity,
            },
        )
}

pub(crate) fn change() -> impl Strategy<Value = Change> {
    let ingress = prop::sample::select(vec![
        Ingress::Everything,
        Ingress::Everything,
        Ingress::Nothing,
        Ingress::FirstPod,
    ]);
    prop_oneof![
        6 => (0..SERVICES, svc()).prop_map(|(n, svc)| Change::Service(n, svc)),
        3 => (0..PODS, ingress.clone()).prop_map(|(pod, what)| Change::Ingress(pod, what)),
        2 => (ingress, prop::bool::weighted(0.7)).prop_map(|(what, may)| Change::Guard(what, may)),
        2 => (0..PODS, prop::bool::weighted(0.7)).prop_map(|(pod, may)| Change::Egress(pod, may)),
        2 => (0..PODS).prop_map(Change::Restart),
        2 => any::<(bool, bool, bool)>().prop_map(|(a, b, c)| Change::Nat(a, b, c)),
        1 => any::<bool>().prop_map(Change::Kept),
        2 => Just(Change::Again),
    ]
}

/// Who sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    Pod(usize),
    Node,
    Outside,
    OtherNode,
}

impl Sender {
    pub(crate) fn link(self) -> LinkId {
        match self {
            Self::Pod(pod) => link_of(pod),
            Self::Node => LinkId::new(HOST).unwrap(),
            Self::Outside | Self::OtherNode => LinkId::new(UPLINK).unwrap(),
        }
    }

    pub(crate) fn address(self, a: &Addresses) -> &'static str {
        match self {
            Self::Pod(pod) => a.pods[pod],
            Self::Node => a.node,
            Self::Outside => a.outside,
            Self::OtherNode => a.other_node,
        }
    }
}
