//! A node with two pods, the host link, an uplink, another node without a tunnel in between, and a Service whose backend is a
//! program of the node's own: what the model says of policy, under packets that are real.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use sluice_appliance::Verdict;
use sluice_appliance::testing::node::{self, Addresses, HOST, Svc, UPLINK, V4, V6, packet};
use sluice_appliance::testing::{Bench, Builder, End, pod_row};
use sluice_contract::overlay::{NextHopId, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelRow};
use sluice_contract::{DropReason, LinkId, Mac, Protocol, Row, ToGuest};
use sluice_model::compile::{Attached, Config, Model};
use sluice_model::diff::Step;
use sluice_model::explain::Told;
use sluice_model::object::{Kind, Name, ObjectKey};
use sluice_model::store::Event;
use sluice_model::trace::{End as Side, Question, trace};
use sluice_model::validate::admit_as;

pub(crate) const HERE: &str = "here";
pub(crate) const WEB: u16 = 16;
pub(crate) const DB: u16 = 17;
/// Behind which node ports there is a program of the node's own, at port 8080.
pub(crate) const NODE_PORT: u16 = 30080;

/// Who is at an end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Who {
    Web,
    Db,
    /// A pod of another node.
    Far,
    Node,
    /// A client outside the cluster.
    Outside,
}

impl Who {
    pub(crate) fn address(self, a: &Addresses) -> &'static str {
        match self {
            Self::Web => a.pods[0],
            Self::Db => a.pods[1],
            Self::Far => a.remote,
            Self::Node => a.node,
            Self::Outside => a.outside,
        }
    }

    pub(crate) fn link(self) -> u16 {
        match self {
            Self::Web => WEB,
            Self::Db => DB,
            Self::Node => HOST,
            Self::Far | Self::Outside => UPLINK,
        }
    }

    fn end(self, a: &Addresses) -> Side {
        match self {
            Self::Web => Side::Pod(Name::new("x", "web")),
            Self::Db => Side::Pod(Name::new("y", "db")),
            Self::Far => Side::Pod(Name::new("z", "far")),
            Self::Node => Side::Node(HERE.into()),
            Self::Outside => Side::Address(self.address(a).parse().unwrap()),
        }
    }
}

/// What a connection is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Tcp(u16),
    Udp(u16),
    Ping,
}

impl What {
    pub(crate) fn port(self) -> u16 {
        match self {
            Self::Tcp(port) | Self::Udp(port) => port,
            Self::Ping => 0,
        }
    }

    fn protocol(self) -> Option<Protocol> {
        match self {
            Self::Tcp(_) => Some(Protocol::Tcp),
            Self::Udp(_) => Some(Protocol::Udp),
            Self::Ping => None,
        }
    }
}

pub(crate) fn put(kind: Kind, object: Value) -> Event {
    let admission = admit_as(kind, object);
    let object = admission.object;
    Event::Put(object.unwrap_or_else(|| panic!("{:#?}", admission.findings)))
}

pub(crate) fn policy(name: &str, spec: Value) -> Event {
    put(
        Kind::NodePolicy,
        json!({"metadata": {"name": name}, "spec": spec}),
    )
}

pub(crate) fn no_policy(name: &str) -> Event {
    Event::Removed(ObjectKey {
        kind: Kind::NodePolicy,
        name: Name::new("", name),
    })
}

/// What there is besides policies.
pub(crate) fn objects() -> Vec<Event> {
    let addresses = |who: Who| [V4, V6].map(|a| json!({"ip": who.address(&a)}));
    let pod = |namespace: &str, name: &str, node: &str, who: Who| {
        put(
            Kind::Pod,
            json!({"metadata": {"name": name, "namespace": namespace, "labels": {"app": name}},
                "spec": {"nodeName": node, "containers": [
                    {"name": "c", "ports": [{"name": "sql", "containerPort": 5432}]}]},
                "status": {"podIPs": addresses(who)}}),
        )
    };
    let inside = [V4, V6].map(|a| json!({"type": "InternalIP", "address": a.node}));
    let mut all = vec![
        put(
            Kind::Node,
            json!({"metadata": {"name": HERE, "labels": {"role": "worker"}}, "status": {"addresses": inside}}),
        ),
        pod("x", "web", HERE, Who::Web),
        pod("y", "db", HERE, Who::Db),
        pod("z", "far", "there", Who::Far),
    ];
    all.extend(["x", "y", "z"].map(|name| {
        put(
            Kind::Namespace,
            json!({"metadata": {"name": name, "labels": {"team": name}}}),
        )
    }));
    all
}

/// The model and the dataplane that follows it.
pub(crate) struct Ground {
    pub(crate) model: Model,
    pub(crate) bench: Bench,
    /// Every question is another connection.
    port: u16,
}

impl Ground {
    pub(crate) fn new(config: Config, more: impl IntoIterator<Item = Event>) -> Self {
        let mut model = Model::new(
            &Config {
                node: HERE.into(),
                ..config
            },
            [],
        );
        let mut ground = Self {
            bench: node::node(),
            port: 1024,
            model: {
                for (link, who) in [(WEB, Who::Web), (DB, Who::Db)] {
                    let Side::Pod(pod) = who.end(&V4) else {
                        panic!("{who:?} is no pod")
                    };
                    let addresses = [V4, V6].map(|a| who.address(&a).parse().unwrap()).into();
                    model.attach(LinkId::new(link).unwrap(), Attached { pod, addresses });
                }
                for event in objects().into_iter().chain(more) {
                    model.apply(event);
                }
                model
            },
        };
        ground.furnish();
        ground.follow();
        ground
    }

    /// What is no policy's.
    fn furnish(&mut self) {
        self.model.compile();
        let mut rows = vec![
            Row::Overlay(OverlayRow::Tunnel(TunnelRow {
                source4: Some("192.168.0.10".parse().unwrap()),
                ..TunnelRow::default()
            })),
            Row::Overlay(OverlayRow::Peer(PeerRow {
                id: PeerId(7),
                address: V4.other_node.parse().unwrap(),
                mac: Mac([2, 0, 0, 0, 1, 3]),
                next_hop: NextHopId(0),
                mtu: 1500,
                direct: true,
            })),
        ];
        for a in [V4, V6] {
            let whole = if a.remote.contains(':') { 128 } else { 32 };
            rows.push(Row::Overlay(OverlayRow::Remote(RemoteRow {
                prefix: node::prefix(&format!("{}/{whole}", a.remote)),
                peer: PeerId(7),
            })));
            let id = u32::from(whole == 128);
            let service = Svc {
                id,
                ..Svc::new(&[(a.node, 8080)], &[(a.node, 8080)])
            };
            rows.extend(service.rows(&a));
        }
        for (link, n) in [(WEB, 1), (DB, 2)] {
            let mut row = pod_row(link, n);
            row.identity = self.model.identity(row.id).unwrap();
            rows.push(Row::Link(row));
        }
        self.bench.commit(&rows);
    }

    /// Takes events, and brings the dataplane up to date.
    pub(crate) fn hear(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.model.apply(event);
        }
        self.follow();
    }

    fn follow(&mut self) {
        self.model.compile();
        let of_policy = |step: Step| match step {
            Step::Put(row @ Row::Policy(_)) => Some(ToGuest::Put(row)),
            Step::Remove(key @ sluice_contract::Key::Policy(_)) => Some(ToGuest::Remove(key)),
            _ => None,
        };
        let delta = self.model.tables().take_delta().into_iter();
        let delta: Vec<_> = delta.filter_map(of_policy).collect();
        let outcome = self.bench.change(&delta);
        assert!(outcome.is_whole(), "{outcome:?}");
    }

    /// The first packet of a connection, from a source port of its own.
    pub(crate) fn opening(&mut self, a: &Addresses, from: Who, to: &str, what: What) -> Builder {
        self.port += 1;
        let builder = packet(from.link(), from.address(a), to);
        match what {
            What::Tcp(port) => builder.tcp(self.port, port, 0x02),
            What::Udp(port) => builder.udp(self.port, port),
            What::Ping => builder.echo(self.port, 1),
        }
    }

    pub(crate) fn send(&mut self, from: Who, packet: &Builder) -> End {
        self.bench.send(from.link(), &packet.build())
    }

    /// Whether a connection's first packet arrives.
    pub(crate) fn allows(&mut self, a: &Addresses, from: Who, to: Who, what: What) -> bool {
        let packet = self.opening(a, from, to.address(a), what);
        self.arrives(from, to, &packet)
    }

    pub(crate) fn arrives(&mut self, from: Who, to: Who, packet: &Builder) -> bool {
        match self.send(from, packet).verdict {
            Verdict::Forward(link) if link.raw() == to.link() => true,
            Verdict::Drop(DropReason::PolicyEgress | DropReason::PolicyIngress) => false,
            other => panic!("{from:?} → {to:?} {packet:?}: {other:?}"),
        }
    }

    /// What `sluice policy trace` says.
    pub(crate) fn traced(&self, a: &Addresses, from: Who, to: Who, what: What) -> bool {
        let now = self.model.snapshot();
        let at = |who: Who| match who {
            // By address, so that the family is the same.
            Who::Node => Side::Address(who.address(a).parse::<IpAddr>().unwrap()),
            _ => who.end(a),
        };
        let question = Question {
            from: at(from),
            to: at(to),
            port: what.port(),
            protocol: what.protocol(),
        };
        let links: BTreeMap<_, _> = now.links.clone();
        let answer = trace(&now.store, &now.config, &links, &question, |_| {
            Told::ELSEWHERE
        })
        .unwrap();
        answer.accepted
    }
}
