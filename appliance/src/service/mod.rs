//! Which backend does a new connection get, and is its source rewritten? kube-proxy's answers, from tables of constant cost.
//!
//! ```text
//!                      Cluster policy          Local policy
//! ClusterIP            all, masq unless pod    local endpoints, masq unless pod
//! others, from a pod   all, masq               all, no masq      (the traffic is cut short, as if it had gone outside)
//! others, from node    all, masq               all, masq
//! others, from outside all, masq               local endpoints, no masq
//! ```
//!
//! With direct return nothing from outside is masqueraded, where the tunnel can [name the backend](crate::overlay::target).
//!
//! The choice is a function of the flow and a secret, not of chance: two packets of one flow on two queues get one backend
//! (row K-06). A client with affinity keeps the backend that [`affinity`] remembers.

pub mod affinity;
mod apply;
pub mod tables;
mod touch;

pub use affinity::Affinities;
pub use tables::{Frontend, Limits, Port, Services};
pub(crate) use touch::touch;

use crate::address::{Address, Family};
use crate::flow::Flow;
use crate::overlay::Target;
use crate::tables::{Nat, Place, Tables};
use crate::time::Instant;
use sluice_contract::service::{FrontendKind, NatRow, PortId, SetId};
use sluice_contract::{LinkId, Protocol, limits};

/// Where a packet comes from, as Services see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    Pod,
    Node,
    Outside,
}

impl Origin {
    /// By the link of the packet.
    pub const fn of(ingress: LinkId) -> Self {
        match ingress {
            LinkId::UPLINK => Self::Outside,
            link if link.is_pod() => Self::Pod,
            _ => Self::Node,
        }
    }
}

/// What was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub service: PortId,
    pub kind: FrontendKind,
    pub address: Address,
    pub port: u16,
    /// The source becomes the node's.
    pub masquerade: bool,
    /// Answers may go from the backend's node straight to the client, which then keeps its address.
    pub direct: bool,
    /// How long the client is to keep this backend, in seconds; 0: not at all.
    pub affinity: u32,
}

/// Why there is no backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoChoice {
    /// No Service is meant.
    NotAService,
    /// The address is a Service's, the port is not.
    UndefinedPort,
    /// The source is in none of the ranges.
    SourceRange(PortId),
    /// There is no endpoint anywhere.
    NoEndpoint(PortId),
    /// There are endpoints, but none where this traffic may go.
    NoLocalEndpoint(PortId),
}

/// What the decision is made of.
#[derive(Debug)]
pub struct Question<'q> {
    pub flow: &'q Flow,
    /// Where the flow's destination is.
    pub place: Place,
    pub origin: Origin,
    pub now: Instant,
}

/// The Service that the destination names, if it does.
pub fn frontend<'t>(
    tables: &'t Tables<'_>,
    flow: &Flow,
    place: Place,
) -> Result<&'t Frontend, NoChoice> {
    let has_frontends = matches!(
        place,
        Place::Node { .. } | Place::Peer | Place::Cluster | Place::External
    );
    let protocol = Protocol::from_number(flow.protocol());
    let (true, Some(protocol)) = (has_frontends, protocol) else {
        return Err(nobody(place));
    };
    let services = tables.services();
    let port = flow.destination_port();
    if let Some(exact) = services.frontend(flow.destination(), protocol, port) {
        return Ok(exact);
    }
    if let Place::Node { ports: true } = place {
        let any = Address::any(flow.destination().family());
        return services
            .frontend(any, protocol, port)
            .ok_or(NoChoice::NotAService);
    }
    Err(nobody(place))
}

const fn nobody(place: Place) -> NoChoice {
    match place {
        Place::Cluster | Place::External => NoChoice::UndefinedPort,
        _ => NoChoice::NotAService,
    }
}

/// Chooses a backend for a new connection.
///
/// # Errors
/// [`NoChoice`].
///
/// # Cost
/// At most two frontends, the port, a lookup per length of its source ranges, an affinity, a slot and a backend; whatever the
/// number of Services and endpoints.
pub fn choose(
    tables: &Tables<'_>,
    affinities: &Affinities<'_>,
    question: &Question<'_>,
) -> Result<Choice, NoChoice> {
    let frontend = frontend(tables, question.flow, question.place)?;
    let services = tables.services();
    let id = frontend.service();
    // The rows refer to each other only as long as both are there.
    let port = services.port(id).ok_or(NoChoice::NotAService)?;
    let kind = frontend.kind();
    if kind == FrontendKind::LoadBalancer && !may_use(services, id, port, question) {
        return Err(NoChoice::SourceRange(id));
    }
    let default = NatRow::default();
    let nat = tables.nat().map_or(&default, |nat: &Nat| &nat.row);
    let (local, masquerade) = outcome(kind, port, question.origin, nat);
    let set = if local { port.local() } else { port.cluster() };
    let found = set.and_then(|set| backend(tables, affinities, question, id, port, set));
    let Some((address, backend_port)) = found else {
        return Err(if port.has_endpoints() {
            NoChoice::NoLocalEndpoint(id)
        } else {
            NoChoice::NoEndpoint(id)
        });
    };
    Ok(Choice {
        service: id,
        kind,
        address,
        port: backend_port,
        direct: port.direct_return()
            && question.origin == Origin::Outside
            && may_return(kind, port),
        // What comes back to its sender would not pass here again otherwise.
        masquerade: masquerade || address == question.flow.source(),
        affinity: port.affinity,
    })
}

/// Whether there is anything for direct return to spare: what is masqueraded although it comes from outside.
const fn may_return(kind: FrontendKind, port: &Port) -> bool {
    match kind {
        FrontendKind::NodePort | FrontendKind::ExternalIp | FrontendKind::LoadBalancer => {
            !port.external_local()
        }
        FrontendKind::ClusterIp | FrontendKind::HostPort => false,
    }
}

/// The choice that another node made for a client outside, if it could be made here.
///
/// # Errors
/// [`NoChoice`]: the destination is no frontend with direct return, its source ranges leave the client out, or `target`
/// does not serve it.
pub fn confirm(
    tables: &Tables<'_>,
    question: &Question<'_>,
    target: Target,
) -> Result<Choice, NoChoice> {
    let flow = question.flow;
    let services = tables.services();
    let protocol = Protocol::from_number(flow.protocol()).ok_or(NoChoice::NotAService)?;
    let at = |address| services.frontend(address, protocol, flow.destination_port());
    let any = || {
        let peer = question.place == Place::Peer;
        peer.then(|| at(Address::any(flow.destination().family())))
            .flatten()
    };
    let frontend = at(flow.destination()).or_else(any);
    let frontend = frontend.ok_or(NoChoice::NotAService)?;
    let (id, kind) = (frontend.service(), frontend.kind());
    let port = services.port(id).ok_or(NoChoice::NotAService)?;
    if !port.direct_return() || !may_return(kind, port) {
        return Err(NoChoice::NotAService);
    }
    if kind == FrontendKind::LoadBalancer && !may_use(services, id, port, question) {
        return Err(NoChoice::SourceRange(id));
    }
    let serves = |set| services.is_usable(set) && services.has(set, target.address, target.port);
    if !port.serving().is_some_and(serves) {
        return Err(NoChoice::NoLocalEndpoint(id));
    }
    Ok(Choice {
        service: id,
        kind,
        address: target.address,
        port: target.port,
        masquerade: false,
        direct: true,
        // The node that was asked remembers.
        affinity: 0,
    })
}

/// Only local endpoints, and masquerade: the table at the top.
const fn outcome(kind: FrontendKind, port: &Port, origin: Origin, nat: &NatRow) -> (bool, bool) {
    match (kind, origin) {
        (FrontendKind::HostPort, _) => (false, false),
        (FrontendKind::ClusterIp, origin) => {
            let strange = nat.detect_local && !matches!(origin, Origin::Pod);
            (port.internal_local(), nat.masquerade_all || strange)
        }
        _ if !port.external_local() => (false, true),
        (_, Origin::Pod) if nat.detect_local => (false, false),
        (_, Origin::Node) => (false, true),
        (_, Origin::Pod | Origin::Outside) => (true, false),
    }
}

/// Whether the source may use the load balancer's address. The node always may (row S-21).
fn may_use(services: &Services<'_>, id: PortId, port: &Port, question: &Question<'_>) -> bool {
    let mut restricted = false;
    let source = question.flow.source();
    for length in port.source_lengths() {
        restricted = true;
        let key = (id.0, length, masked(source, length));
        if services.sources.find(key).is_some() {
            return true;
        }
    }
    !restricted || question.origin == Origin::Node
}

/// The address with all bits behind the first `length` zero.
fn masked(address: Address, length: u8) -> Address {
    let length = match address.family() {
        Family::V4 => u32::from(length) + 96,
        Family::V6 => u32::from(length),
    };
    let mask = u128::MAX.checked_shl(128 - length.min(128)).unwrap_or(0);
    Address((u128::from_be_bytes(address.0) & mask).to_be_bytes())
}

fn backend(
    tables: &Tables<'_>,
    affinities: &Affinities<'_>,
    question: &Question<'_>,
    id: PortId,
    port: &Port,
    set: SetId,
) -> Option<(Address, u16)> {
    let services = tables.services();
    let row = services.sets.find(set.0).filter(|set| set.is_complete())?;
    if port.affinity != 0
        && let Some((address, port)) = affinities.recall(id, question.flow.source(), question.now)
        && services.has(set, address, port)
    {
        return Some((address, port));
    }
    let index = match place_in(tables, row, question.flow)? {
        Spread::Backend(index) => index,
        Spread::Slot { chunk, slot } => {
            let chunk = services.chunks.find((set.0, chunk))?;
            // A set that shrank may have slots of its former size until they are sent again.
            chunk.slot(slot)? % row.count
        }
    };
    let backend = services.backends.find((set.0, index))?;
    Some((backend.address, backend.port))
}

/// Where in its set a flow's backend is found.
enum Spread {
    Backend(u16),
    /// In this piece of its Maglev table.
    Slot {
        chunk: u16,
        slot: usize,
    },
}

#[inline]
fn place_in(tables: &Tables<'_>, set: &tables::Set, flow: &Flow) -> Option<Spread> {
    if set.count == 0 {
        return None;
    }
    if set.slots == 0 {
        let hash = flow_hash(&tables.services().hasher, flow);
        return Some(Spread::Backend(spread(hash, set.count)));
    }
    let nat = tables.nat();
    let seed = nat.map_or(NatRow::default().maglev_seed, |nat| nat.row.maglev_seed);
    let common = crate::hash::Hasher::new(seed);
    let slot = usize::from(spread(flow_hash(&common, flow), set.slots));
    Some(Spread::Slot {
        chunk: u16::try_from(slot / limits::SLOT_CHUNK).ok()?,
        slot: slot % limits::SLOT_CHUNK,
    })
}

/// The flow's hash in this direction only, so that the table's and this one are not the same number.
fn flow_hash(hasher: &crate::hash::Hasher, flow: &Flow) -> u64 {
    let (from, to) = (flow.source(), flow.destination());
    let ports = u64::from(flow.source_port())
        | u64::from(flow.destination_port()) << 16
        | u64::from(flow.protocol()) << 32;
    hasher.hash([from.high(), from.low(), to.high(), to.low(), ports])
}

/// A number below `count`, each as likely as the other.
const fn spread(hash: u64, count: u16) -> u16 {
    (((hash >> 32) * count as u64) >> 32) as u16
}
