//! What became of a frame and why, in words: the steps that the dataplane noted, the stage that decided, the row it read.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::net::IpAddr;

use serde::Serialize;
use sluice_appliance::connection::{Path, Way};
use sluice_appliance::observe::Step;
use sluice_appliance::{Direction, Flow, Verdict};
use sluice_contract::overlay::OverlayKey;
use sluice_contract::policy::{Direction as PolicyDirection, PolicyKey};
use sluice_contract::row::Key;
use sluice_contract::service::{PortId, ServiceKey};
use sluice_contract::{DropReason, LinkId, Row};

use crate::tables::Links;

/// Where each row stands in the document.
#[derive(Debug)]
pub struct Index {
    paths: BTreeMap<Key, String>,
}

impl Index {
    pub fn of(rows: &[(String, Row)]) -> Self {
        let paths = rows.iter().map(|(path, row)| (row.key(), path.clone()));
        Self {
            paths: paths.collect(),
        }
    }

    /// The path of the row of that key.
    pub fn path(&self, key: Key) -> Option<&str> {
        self.paths.get(&key).map(String::as_str)
    }

    fn named(&self, key: Key) -> Option<String> {
        self.path(key).map(str::to_owned)
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    Forwarded,
    Replied,
    Dropped,
    Held,
}

impl End {
    pub const fn word(self) -> &'static str {
        match self {
            Self::Forwarded => "forwarded",
            Self::Replied => "replied",
            Self::Dropped => "dropped",
            Self::Held => "held",
        }
    }
}

/// The verdict over one frame of the capture.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Counted from 1, as in the capture.
    pub packet: u64,
    /// Seconds since the first packet of the capture.
    pub time: String,
    pub from: String,
    pub verdict: End,
    /// The link by which it left.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub to: Option<String>,
    /// Who decided.
    pub stage: &'static str,
    /// Why it was dropped, or answered instead of sent on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'static str>,
    /// The row of the tables that decided, by its path.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub row: Option<String>,
    pub steps: Vec<StepReport>,
}

/// One decision on the way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum StepReport {
    Flow {
        flow: String,
    },
    Connection {
        direction: String,
        state: String,
        judged_again: bool,
    },
    Invalid {
        why: String,
    },
    New,
    Related {
        direction: String,
    },
    Fragment {
        flow: String,
    },
    Frontend {
        service: u32,
        kind: String,
    },
    Backend {
        endpoint: String,
    },
    Masquerade {
        source: String,
    },
    Policy {
        direction: &'static str,
        link: String,
        peer: u32,
        rule: u32,
        accepted: bool,
    },
    Unwrapped {
        peer: u16,
        identity: Option<u32>,
    },
    Route {
        way: String,
    },
    Rewritten {
        flow: String,
    },
    Refused {
        reason: &'static str,
    },
}

/// What reports are made with.
#[derive(Clone, Copy, Debug)]
pub struct Words<'t> {
    pub links: &'t Links,
    pub index: &'t Index,
}

impl Words<'_> {
    /// Who decided, why, and by which row.
    pub fn decision(
        &self,
        verdict: Verdict,
        ingress: LinkId,
        steps: &[Step],
    ) -> (&'static str, Option<DropReason>, Option<String>) {
        let refused = steps.iter().rev().find_map(|step| match step {
            Step::Refused(reason) => Some(*reason),
            _ => None,
        });
        match (verdict, refused) {
            (Verdict::Drop(reason), _) | (Verdict::Reply, Some(reason)) => (
                stage(reason),
                Some(reason),
                self.deciding_row(reason, ingress, steps),
            ),
            (Verdict::Reply, None) => ("answer", None, None),
            (Verdict::Held, _) => ("fragments", None, None),
            (Verdict::Forward(_), _) => {
                let path = steps.iter().rev().find_map(|step| match step {
                    Step::Route(path) => Some(*path),
                    _ => None,
                });
                ("route", None, path.and_then(|path| self.row_of(path)))
            }
        }
    }

    fn row_of(&self, path: Path) -> Option<String> {
        match path.way {
            Way::Link => self.index.named(Key::Link(path.link)),
            Way::Neighbor(id) => self.index.named(Key::Overlay(OverlayKey::NextHop(id))),
            Way::Peer(peer) => self.index.named(Key::Overlay(OverlayKey::Peer(peer))),
        }
    }

    fn deciding_row(&self, reason: DropReason, ingress: LinkId, steps: &[Step]) -> Option<String> {
        let mut latest = steps.iter().rev();
        if reason == DropReason::SvcUndefinedPort {
            return latest.find_map(|step| match step {
                Step::Flow(flow) => {
                    let address = ServiceKey::Address(flow.destination().into());
                    self.index.named(Key::Service(address))
                }
                _ => None,
            });
        }
        match stage(reason) {
            "policy" => latest.find_map(|step| match step {
                Step::Policy {
                    link,
                    rule,
                    accepted: false,
                    ..
                } => {
                    let binding = Key::Policy(PolicyKey::Binding(*link));
                    let binding = self.index.path(binding).unwrap_or("policy.settings");
                    Some(format!("{binding}, rule {}", rule.0))
                }
                _ => None,
            }),
            "service" => latest.find_map(|step| match step {
                Step::Frontend { service, .. } => self.port(*service),
                _ => None,
            }),
            "route" => latest.find_map(|step| match step {
                Step::Route(path) => self.row_of(*path),
                _ => None,
            }),
            "classify" => self.index.named(Key::Link(ingress)),
            _ => None,
        }
    }

    fn port(&self, id: PortId) -> Option<String> {
        self.index.named(Key::Service(ServiceKey::Port(id)))
    }

    /// The steps, without repetitions.
    pub fn steps(&self, steps: &[Step]) -> Vec<StepReport> {
        let mut all: Vec<StepReport> = steps.iter().map(|step| self.step(step)).collect();
        all.dedup();
        all
    }

    fn step(&self, step: &Step) -> StepReport {
        match *step {
            Step::Flow(flow) => StepReport::Flow { flow: show(&flow) },
            Step::Connection {
                direction,
                state,
                judged_again,
            } => StepReport::Connection {
                direction: way(direction),
                state: words(state),
                judged_again,
            },
            Step::Invalid(why) => StepReport::Invalid { why: words(why) },
            Step::New => StepReport::New,
            Step::Related { direction } => StepReport::Related {
                direction: way(direction),
            },
            Step::Fragment(flow) => StepReport::Fragment { flow: show(&flow) },
            Step::Frontend { service, kind } => StepReport::Frontend {
                service: service.0,
                kind: words(kind),
            },
            Step::Backend { address, port } => StepReport::Backend {
                endpoint: endpoint(address.into(), port),
            },
            Step::Masquerade { address, port } => StepReport::Masquerade {
                source: endpoint(address.into(), port),
            },
            Step::Policy {
                direction,
                link,
                peer,
                rule,
                accepted,
            } => StepReport::Policy {
                direction: match direction {
                    PolicyDirection::Ingress => "ingress",
                    PolicyDirection::Egress => "egress",
                },
                link: self.links.name(link).to_owned(),
                peer: peer.0,
                rule: rule.0,
                accepted,
            },
            Step::Unwrapped(origin) => StepReport::Unwrapped {
                peer: origin.peer.0,
                identity: origin.identity.map(|identity| identity.0),
            },
            Step::Route(path) => StepReport::Route {
                way: self.way_of(path),
            },
            Step::Rewritten(flow) => StepReport::Rewritten { flow: show(&flow) },
            Step::Refused(reason) => StepReport::Refused {
                reason: reason.name(),
            },
        }
    }

    fn way_of(&self, path: Path) -> String {
        let link = self.links.name(path.link);
        match path.way {
            Way::Link => link.to_owned(),
            Way::Neighbor(id) => format!("{link} to next hop {}", id.0),
            Way::Peer(peer) => format!("{link} to peer {}", peer.0),
        }
    }
}

impl Report {
    /// Stage, reason and row, for a comment and the text.
    pub fn summary(&self) -> String {
        let mut text = self.verdict.word().to_owned();
        if let Some(to) = &self.to {
            text.push_str(&format!(" to {to}"));
        }
        text.push_str(&format!(" by {}", self.stage));
        if let Some(reason) = self.reason {
            text.push_str(&format!(": {reason}"));
        }
        if let Some(row) = &self.row {
            text.push_str(&format!(" ({row})"));
        }
        for step in &self.steps {
            text.push_str(&format!("; {step}"));
        }
        text
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>6} {:>14} {}  {}",
            self.packet,
            self.time,
            self.from,
            self.summary()
        )
    }
}

impl Display for StepReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flow { flow } => f.write_str(flow),
            Self::Connection {
                direction,
                state,
                judged_again,
            } => {
                let again = if *judged_again { ", judged again" } else { "" };
                write!(f, "connection ({direction}, {state}{again})")
            }
            Self::Invalid { why } => write!(f, "invalid ({why})"),
            Self::New => f.write_str("new connection"),
            Self::Related { direction } => write!(f, "about a connection ({direction})"),
            Self::Fragment { flow } => write!(f, "fragment of {flow}"),
            Self::Frontend { service, kind } => write!(f, "service {service} ({kind})"),
            Self::Backend { endpoint } => write!(f, "backend {endpoint}"),
            Self::Masquerade { source } => write!(f, "source becomes {source}"),
            Self::Policy {
                direction,
                link,
                peer,
                rule,
                accepted,
            } => {
                let verdict = if *accepted { "accepts" } else { "denies" };
                write!(
                    f,
                    "{direction} policy of {link} {verdict} identity {peer} by rule {rule}"
                )
            }
            Self::Unwrapped { peer, identity } => match identity {
                Some(identity) => write!(f, "from peer {peer}, identity {identity}"),
                None => write!(f, "from peer {peer}"),
            },
            Self::Route { way } => write!(f, "route to {way}"),
            Self::Rewritten { flow } => write!(f, "leaves as {flow}"),
            Self::Refused { reason } => write!(f, "refused: {reason}"),
        }
    }
}

/// The stage that gives a reason.
pub const fn stage(reason: DropReason) -> &'static str {
    use DropReason as R;
    match reason {
        R::Malformed
        | R::EtherType
        | R::BadChecksum
        | R::VlanTag
        | R::Martian
        | R::SourceRoute
        | R::ExtensionHeaders
        | R::FragmentTiny => "parse",
        R::UnknownLink
        | R::Spoof
        | R::NotForUs
        | R::Multicast
        | R::NeighborIgnored
        | R::GatewayNotServed
        | R::RogueRouter
        | R::EncapFromPod
        | R::NotServed => "classify",
        R::RateLimited => "answer",
        R::FragmentOverlap | R::FragmentRefused | R::FragmentLimit | R::FragmentTimeout => {
            "fragments"
        }
        R::TunnelUnknownPeer
        | R::TunnelSpoof
        | R::TunnelHeader
        | R::TunnelVni
        | R::TunnelOption
        | R::TunnelChecksum
        | R::TunnelEcn
        | R::OuterFragment
        | R::TunnelUnready
        | R::PathMtu => "tunnel",
        R::CtInvalid | R::CtNotOpening | R::CtFull | R::CtQuota | R::IcmpUnrelated => "conntrack",
        R::SvcNoEndpoint
        | R::SvcNoLocalEndpoint
        | R::SvcUnallocated
        | R::SvcUndefinedPort
        | R::SvcSourceRange
        | R::SvcBackendGone
        | R::SvcDirectReturn => "service",
        R::PolicyEgress | R::PolicyIngress => "policy",
        R::NatExhausted | R::NatNoAddress => "nat",
        R::BandwidthEgress
        | R::BandwidthIngress
        | R::PacketRateEgress
        | R::PacketRateIngress
        | R::ConnectionRateEgress
        | R::ConnectionRateIngress => "bandwidth",
        R::TtlExpired | R::NoRoute | R::TooBig | R::TxFull | R::NoNeighbor => "route",
    }
}

fn way(direction: Direction) -> String {
    words(direction)
}

/// A name of the code as words: `UdpUnreplied` is `udp-unreplied`.
fn words(name: impl fmt::Debug) -> String {
    let mut text = String::new();
    for c in format!("{name:?}").chars() {
        if c.is_ascii_uppercase() && !text.is_empty() {
            text.push('-');
        }
        text.push(c.to_ascii_lowercase());
    }
    text
}

fn show(flow: &Flow) -> String {
    let protocol = match flow.protocol() {
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        132 => "sctp".to_owned(),
        1 => "icmp".to_owned(),
        58 => "icmp6".to_owned(),
        other => format!("protocol {other}"),
    };
    let from = endpoint(flow.source().into(), flow.source_port());
    let to = endpoint(flow.destination().into(), flow.destination_port());
    format!("{protocol} {from} > {to}")
}

/// Address and port; the port of what has none is 0 and not shown.
fn endpoint(address: IpAddr, port: u16) -> String {
    match (address, port) {
        (address, 0) => address.to_string(),
        (IpAddr::V4(v4), port) => format!("{v4}:{port}"),
        (IpAddr::V6(v6), port) => format!("[{v6}]:{port}"),
    }
}
