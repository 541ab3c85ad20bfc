//! The rows of policy: what the host compiled, in the form in which the guest looks things up.
//!
//! ```text
//! link → Binding → Ruleset (one per direction) → up to three layers, asked in order
//! layer: peer's identity → Class ─┐
//!        peer's address  → Span  ─┼→ Span over protocol and port → rule
//!        names learnt of it → Named ─┘
//! ```
//!
//! All sides of a layer are asked; of the rules found the one with the lowest order wins. `Accept` and `Deny` end the search,
//! `Pass` asks the next layer, and what no layer decides is accepted, as Kubernetes has it. Names of policies stay on
//! the host: the guest carries [`RuleId`]s.
//!
//! A [`SpanRow`] is a piece of a search tree over 32-bit keys: entry `i` holds for the keys from its `start` up to the next
//! entry's. Larger maps are trees of spans, IPv6 addresses are four words one after the other. An id of a span names its
//! contents, so equal parts of different rulesets are sent and kept once.

use crate::name::{NameId, NameRow};
use crate::types::{Identity, LinkId, Protocol};
use core::net::IpAddr;
use heapless::Vec;
use serde::{Deserialize, Serialize};

/// Tiers: Admin, NetworkPolicy, Baseline.
pub const LAYERS: usize = 3;
/// Entries of one span: with its id, four cache lines in the guest.
pub const SPAN_ENTRIES: usize = 15;
/// Spans between a root and a rule, at most. The host refuses what would be deeper, the guest stops (and denies) there.
pub const SPAN_DEPTH: usize = 24;

/// Towards the pod, or away from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Direction {
    Ingress,
    Egress,
}

/// What a rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Action {
    Accept,
    Deny,
    /// Ask the next layer.
    Pass,
}

/// A rule of a policy, by the number under which the host knows its name.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct RuleId(pub u32);

impl RuleId {
    /// No policy had anything to say.
    pub const NONE: Self = Self(0);
    /// The node reaches its own pods whatever policy says.
    pub const HOST: Self = Self(1);
    /// The link has no binding.
    pub const UNBOUND: Self = Self(2);
    /// A row that another row names is missing, or a search went deeper than [`SPAN_DEPTH`]. Denied.
    pub const BROKEN: Self = Self(3);
    /// The pod's policies do not fit into the guest. Denied.
    pub const NO_ROOM: Self = Self(4);
    /// The host numbers the rules of policies from here.
    pub const FIRST: u32 = 16;
}

/// The rules of one direction for all pods that the same policies select.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct RulesetId(pub u64);

impl RulesetId {
    /// No policy selects the pod in this direction: everything is accepted.
    pub const NONE: Self = Self(0);
    /// The pod's policies do not fit into the guest: everything is denied.
    pub const NO_ROOM: Self = Self(4);
}

/// One tier of one ruleset.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct LayerId(pub u64);

/// A span, by its contents.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
pub struct SpanId(pub u64);

impl SpanId {
    /// The span in which nothing matches. It is never sent.
    pub const NOTHING: Self = Self(0);
}

/// One row of policy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PolicyRow {
    Settings(SettingsRow),
    Identity(IdentityRow),
    Binding(BindingRow),
    Ruleset(RulesetRow),
    Class(ClassRow),
    Span(SpanRow),
    Name(NameRow),
    Named(NamedRow),
    /// Whoever has this address may say which addresses names have.
    Resolver(IpAddr),
}

/// What names a row of policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum PolicyKey {
    Settings,
    Identity(IpAddr),
    Binding(LinkId),
    Ruleset(RulesetId),
    Class(LayerId, Identity),
    Span(SpanId),
    Name(NameId),
    Named(LayerId, NameId),
    Resolver(IpAddr),
}

impl PolicyRow {
    /// The key under which this row is found.
    pub const fn key(&self) -> PolicyKey {
        match self {
            Self::Settings(_) => PolicyKey::Settings,
            Self::Identity(row) => PolicyKey::Identity(row.address),
            Self::Binding(row) => PolicyKey::Binding(row.link),
            Self::Ruleset(row) => PolicyKey::Ruleset(row.id),
            Self::Class(row) => PolicyKey::Class(row.layer, row.identity),
            Self::Span(row) => PolicyKey::Span(row.id),
            Self::Name(row) => PolicyKey::Name(row.id),
            Self::Named(row) => PolicyKey::Named(row.layer, row.name),
            Self::Resolver(address) => PolicyKey::Resolver(*address),
        }
    }
}

/// What holds for all links. Without this row policy is not in use: a pod without a binding may do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsRow {
    /// What happens to traffic of a pod that has no binding.
    pub unbound: Action,
    /// The node reaches its own pods whatever policy says: probes of the kubelet.
    pub host_reaches_pods: bool,
    /// What becomes of connections that a change of policy would not let begin.
    pub established: Established,
    /// What rules deny passes, and is told to the host as [`WouldDeny`].
    pub audit: bool,
    /// The same of what the node's own policy denies: that of [`LinkId::HOST`].
    pub audit_node: bool,
    /// Some pods elsewhere have no [`IdentityRow`], because there is no room: who is at an address where such a pod may be is
    /// [`Identity::UNLISTED`](crate::Identity::UNLISTED).
    pub unlisted_pods: bool,
}

/// A connection that began although a rule denies it, because policy is only audited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WouldDeny {
    /// The pod whose policy was asked, or [`LinkId::HOST`].
    pub link: LinkId,
    pub direction: Direction,
    pub peer: IpAddr,
    pub protocol: u8,
    pub port: u16,
    pub rule: RuleId,
}

/// See [`SettingsRow::established`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Established {
    /// Judged again with their next packet, and ended if they are denied now.
    Judged,
    /// They live.
    Kept,
}

/// Who has an address: all pods of the cluster, local and remote.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityRow {
    pub address: IpAddr,
    pub identity: Identity,
}

/// Which rules hold for the pod behind a link; at [`LinkId::HOST`], for the node itself. A node without such a row may do
/// everything, whatever [`SettingsRow::unbound`] says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindingRow {
    pub link: LinkId,
    pub ingress: RulesetId,
    pub egress: RulesetId,
}

/// The layers in the order in which they are asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RulesetRow {
    pub id: RulesetId,
    pub layers: Vec<Layer, LAYERS>,
}

/// One tier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    pub id: LayerId,
    /// Whether there are [`ClassRow`]s of this layer at all.
    pub classes: bool,
    /// For peers that are pods without a class of their own.
    pub pods: SpanId,
    /// For peers that are no pods.
    pub others: SpanId,
    /// Rules that name IPv4 addresses: a map of the peer's address.
    pub v4: SpanId,
    /// The same for IPv6.
    pub v6: SpanId,
    /// What holds if no rule matches.
    pub miss: Action,
    /// Why: the policy that isolates the pod.
    pub miss_rule: RuleId,
}

/// What one layer holds for one identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassRow {
    pub layer: LayerId,
    pub identity: Identity,
    /// A map of protocol and port.
    pub ports: SpanId,
}

/// What one layer holds for addresses that a name has. Only for outgoing traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedRow {
    pub layer: LayerId,
    pub name: NameId,
    /// A map of protocol and port.
    pub ports: SpanId,
}

/// A piece of a search tree. The first entry starts at 0, starts grow strictly.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpanRow {
    pub id: SpanId,
    pub entries: Vec<SpanEntry, SPAN_ENTRIES>,
}

/// From `start` on, up to the next entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SpanEntry {
    pub start: u32,
    pub target: Target,
}

/// Where a key leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// No rule matches.
    Nothing,
    /// This rule does.
    Rule {
        action: Action,
        /// Lower wins where both sides of a layer find a rule.
        order: u16,
        rule: RuleId,
    },
    /// The same key, in a finer span.
    Finer(SpanId),
    /// The next 32 bits of the address.
    Word(SpanId),
    /// The end of the address: now protocol and port.
    Ports(SpanId),
}

/// The key of a protocol and a destination port: `protocol class << 16 | port`. Protocols without ports that policy can
/// name share the last class, with port 0.
pub const fn port_key(protocol: Option<Protocol>, port: u16) -> u32 {
    let (class, port) = match protocol {
        Some(Protocol::Tcp) => (0, port),
        Some(Protocol::Udp) => (1, port),
        Some(Protocol::Sctp) => (2, port),
        None => (3, 0),
    };
    class << 16 | port as u32
}

/// One more than the highest [`port_key`].
pub const PORT_KEYS: u32 = 4 << 16;
