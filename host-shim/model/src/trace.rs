//! May this one talk to that one, and which rule says so? Compiles the rules of both ends and asks the guest's own code.
//!
//! Works on any store: the daemon's, or one that was just read from a directory of manifests.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sluice_appliance::hash::Hasher;
use sluice_appliance::policy::{Decision, Limits, Policy, Query};
use sluice_appliance::{Arena, OutOfMemory};
use sluice_contract::policy::{Direction, RuleId, port_key};
use sluice_contract::{Identity, LinkId, Protocol, Row};

use crate::compile::rules::Applied;
use crate::compile::{Attached, Config, Group, Rehearsal, RuleName};
use crate::diff::Tables;
use crate::explain::{Far, Restriction, Restrictions, Told, direction_name, restrictions};
use crate::object::{Name, NamedPort};
use crate::store::Store;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Pod(Name),
    /// A node itself.
    Node(Arc<str>),
    Address(IpAddr),
}

/// Before the name of a node.
const NODE: &str = "node:";

/// `namespace/pod`, `pod` (in `default`), `node:name` or an address.
impl FromStr for End {
    type Err = Wrong;

    fn from_str(text: &str) -> Result<Self, Wrong> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        if let Some(name) = text.strip_prefix(NODE).filter(|it| !it.is_empty()) {
            return Ok(Self::Node(name.into()));
        }
        let (namespace, name) = text.split_once('/').unwrap_or(("default", text));
        if namespace.is_empty() || name.is_empty() || name.contains('/') {
            return Err(Wrong::Question(text.into()));
        }
        Ok(Self::Pod(Name::new(namespace, name)))
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pod(name) => write!(f, "{name}"),
            Self::Node(name) => write!(f, "node {name}"),
            Self::Address(address) => write!(f, "{address}"),
        }
    }
}

/// The connection that is asked about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub from: End,
    pub to: End,
    pub port: u16,
    /// `None`: a protocol that policy cannot name, such as ICMP.
    pub protocol: Option<Protocol>,
}

impl Question {
    /// From `FROM` and `TO:PORT/PROTO`; TCP where no protocol is given. An IPv6 address stands in brackets.
    ///
    /// # Errors
    /// [`Wrong::Question`]
    pub fn parse(from: &str, to: &str) -> Result<Self, Wrong> {
        let wrong = || Wrong::Question(to.to_owned());
        let (target, rest) = match to.rsplit_once(':') {
            Some((target, rest)) if !rest.contains(']') => (target, rest),
            _ => return Err(wrong()),
        };
        let (port, protocol) = rest.split_once('/').unwrap_or((rest, "tcp"));
        let protocol = match protocol.to_ascii_lowercase().as_str() {
            "tcp" => Some(Protocol::Tcp),
            "udp" => Some(Protocol::Udp),
            "sctp" => Some(Protocol::Sctp),
            "icmp" => None,
            _ => return Err(wrong()),
        };
        let target = target
            .strip_prefix('[')
            .and_then(|it| it.strip_suffix(']'))
            .unwrap_or(target);
        Ok(Self {
            from: from.parse()?,
            to: target.parse()?,
            port: port.parse().map_err(|_| wrong())?,
            protocol,
        })
    }
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    #[error(
        "{0:?} is not NAMESPACE/POD, node:NAME or an address, with :PORT/PROTOCOL behind the destination"
    )]
    Question(String),
    #[error("There is no pod {0}")]
    NoPod(Name),
    #[error("There is no node {0}")]
    NoNode(Arc<str>),
    #[error("The rules do not fit into {0} bytes")]
    TooLarge(usize),
}

/// The answer: both ends have to agree. Between nodes nothing passes the appliance, and neither has a say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub accepted: bool,
    /// The source's egress first; an end that is neither a pod of the cluster nor a node has nothing to say.
    pub sides: Vec<Side>,
}

/// What the policies of one end say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Side {
    /// A pod, or `node` and a name.
    pub pod: String,
    /// `egress` or `ingress`.
    pub direction: String,
    pub accepted: bool,
    /// The rule that decides; `None`: no policy has a say.
    pub rule: Option<String>,
    /// In one sentence.
    pub because: String,
    /// All rules that were asked or could have been, and why those that do not match do not.
    pub considered: Vec<Restriction>,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.accepted {
            "accepted\n"
        } else {
            "denied\n"
        })?;
        for side in &self.sides {
            let word = if side.accepted { "accepts" } else { "denies" };
            writeln!(
                f,
                "  {} of {} {word}: {}",
                side.direction, side.pod, side.because
            )?;
            for it in &side.considered {
                let why = match (&it.mismatch, &it.learnt) {
                    (Some(why), _) => why.clone(),
                    (None, Some(learnt)) => format!("matches, since {learnt}"),
                    (None, None) => "matches".into(),
                };
                writeln!(f, "    {} ({}): {why}", it.rule, it.action)?;
            }
        }
        Ok(())
    }
}

/// Where a pod without an address is put for the while: a prefix that goes nowhere (RFC 6666), so that no block matches it.
const NOWHERE: [u16; 2] = [0x100, 0];

/// A pod of this node, or of another.
struct FoundPod {
    group: Group,
    link: LinkId,
    address: IpAddr,
    /// Where it runs, if anybody says so.
    node: Option<Arc<str>>,
}

/// Who is at an end, and has policies.
enum Found {
    Pod(FoundPod),
    Node(Arc<str>),
    Other,
}

/// Answers a question on a store. `here`: the pods of this node, if there is one. `told`: what such a pod was told of names;
/// asked only if its rules name any.
///
/// # Errors
/// A pod or node is not there, or the rules are beyond measure.
pub fn trace(
    store: &Store,
    config: &Config,
    here: &BTreeMap<LinkId, Attached>,
    question: &Question,
    told: impl Fn(LinkId) -> Told,
) -> Result<Answer, Wrong> {
    let mut links = here.clone();
    let ends = [&question.from, &question.to];
    let found = [
        find(store, config, &question.from, 0, &mut links)?,
        find(store, config, &question.to, 1, &mut links)?,
    ];
    let mut answer = Answer {
        accepted: true,
        sides: Vec::new(),
    };
    let node = match &found {
        [Found::Node(_), Found::Node(_)] => return Ok(answer),
        [Found::Node(node), _] | [_, Found::Node(node)] => node.clone(),
        _ => config.node.clone(),
    };
    // The tables of the node that has a say.
    let config = &Config {
        node,
        ..config.clone()
    };
    let ports: &[NamedPort] = match &found[1] {
        Found::Pod(pod) => &pod.group.ports,
        _ => &[],
    };
    let rehearsal = Rehearsal::new(store, config, &links);
    for (own, far, direction) in [(0, 1, Direction::Egress), (1, 0, Direction::Ingress)] {
        let (group, is_own_pod) = match &found[far] {
            Found::Pod(pod) => (
                Some(&pod.group),
                pod.node.as_ref().is_none_or(|it| *it == config.node),
            ),
            _ => (None, false),
        };
        let applied = applied(store, config, &found[own], direction);
        let is_outside = matches!(&found[far], Found::Other);
        let asked = match &found[own] {
            Found::Pod(pod)
                if is_outside && direction == Direction::Egress && here.contains_key(&pod.link) =>
            {
                let rules = restrictions(store, applied.clone(), direction, None).rules;
                rules.iter().any(|it| it.names_domains).then_some(pod.link)
            }
            _ => None,
        };
        let told = match asked {
            Some(link) => told(link),
            None if is_outside => Told::ELSEWHERE,
            None => Told::IN_CLUSTER,
        };
        let far_end = Far {
            told: &told,
            group,
            address: address(store, config, ends[far], &found[far]),
            ports,
            key: port_key(question.protocol, question.port),
        };
        let query = |link| Query {
            link,
            direction,
            peer: Identity::WORLD,
            peer_address: far_end.address.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            protocol: question.protocol,
            port: question.port,
        };
        let names = told.names_of(far_end.address);
        let restrictions = restrictions(store, applied, direction, Some(far_end));
        let judged = match &found[own] {
            Found::Other => continue,
            Found::Pod(pod) => {
                let is_by_host = matches!(found[far], Found::Node(_))
                    && pod.node.as_ref().is_none_or(|it| *it == config.node);
                let peer = is_by_host.then_some(Identity::HOST);
                judge(&rehearsal, &query(pod.link), peer, |policy, query| {
                    Some(policy.judge_named(query, &names))
                })
            }
            Found::Node(_) => judge(&rehearsal, &query(LinkId::HOST), None, |policy, query| {
                policy.judge_node(query, is_own_pod)
            }),
        };
        let Some(decision) = judged? else { continue };
        let subject = match &found[own] {
            Found::Node(name) => End::Node(name.clone()).to_string(),
            _ => ends[own].to_string(),
        };
        let side = say(&rehearsal, decision, subject, direction, restrictions);
        answer.accepted &= side.accepted;
        answer.sides.push(side);
    }
    Ok(answer)
}

/// Who that is.
fn find(
    store: &Store,
    config: &Config,
    end: &End,
    index: u16,
    links: &mut BTreeMap<LinkId, Attached>,
) -> Result<Found, Wrong> {
    match end {
        End::Pod(name) => find_pod(store, config, name, index, links),
        End::Node(name) if store.node(name).is_none() && *name != config.node => {
            Err(Wrong::NoNode(name.clone()))
        }
        End::Node(name) => Ok(Found::Node(name.clone())),
        End::Address(address) => {
            let node = node_at(store, config, *address);
            Ok(node.map_or(Found::Other, Found::Node))
        }
    }
}

/// The node that has an address: this one, or any if there is none.
fn node_at(store: &Store, config: &Config, address: IpAddr) -> Option<Arc<str>> {
    if !config.node.is_empty() {
        let described = store.node(&config.node);
        let described = described.into_iter().flat_map(|it| &it.addresses);
        let mut own = own_addresses(config).chain(described.map(|it| it.address));
        let is_own = own.any(|it| it == address);
        return is_own.then(|| config.node.clone());
    }
    let mut nodes = store.nodes();
    let node = nodes.find(|it| it.addresses.iter().any(|it| it.address == address));
    node.map(|it| it.name.name.clone())
}

/// What the configuration says of this node's addresses.
fn own_addresses(config: &Config) -> impl Iterator<Item = IpAddr> {
    let all = config.host_addresses.iter().chain(&config.node_addresses);
    all.copied()
}

/// Where an end is, as far as that is known.
fn address(store: &Store, config: &Config, end: &End, found: &Found) -> Option<IpAddr> {
    match (end, found) {
        (End::Address(address), _) => Some(*address),
        (_, Found::Pod(pod)) => Some(pod.address),
        (End::Node(name), _) => {
            let described = store.node(name).and_then(|it| it.addresses.first());
            let own = own_addresses(config)
                .next()
                .filter(|_| *name == config.node);
            described.map(|it| it.address).or(own)
        }
        // On its node's network.
        (End::Pod(name), _) => store.pod(name).and_then(|it| it.addresses.first().copied()),
    }
}

/// Which policies hold for an end.
fn applied(store: &Store, config: &Config, found: &Found, direction: Direction) -> Option<Applied> {
    match found {
        Found::Pod(pod) => Applied::find(store, &pod.group, direction),
        Found::Node(name) => {
            let labels = store.node_labels(name);
            config.host_policy.applied(store, &labels, direction)
        }
        Found::Other => None,
    }
}

/// The pod of that name, on its link, or the node whose network it is on.
fn find_pod(
    store: &Store,
    config: &Config,
    name: &Name,
    index: u16,
    links: &mut BTreeMap<LinkId, Attached>,
) -> Result<Found, Wrong> {
    let described = store.pod(name);
    let attached = links.iter().find(|(_, it)| it.pod == *name);
    if let Some((link, attached)) = attached {
        let found = attached.addresses.first().map(|address| FoundPod {
            group: described.map_or_else(|| Group::undescribed(name), Group::of),
            link: *link,
            address: *address,
            node: Some(config.node.clone()),
        });
        return Ok(found.map_or(Found::Other, Found::Pod));
    }
    let pod = described.ok_or_else(|| Wrong::NoPod(name.clone()))?;
    let nowhere = Ipv6Addr::new(NOWHERE[0], NOWHERE[1], 0, 0, 0, 0, 0, 1 + index);
    let address = pod
        .addresses
        .first()
        .copied()
        .unwrap_or(IpAddr::V6(nowhere));
    let free = (LinkId::FIRST_POD..=LinkId::LAST).rev();
    let mut free = free
        .filter_map(LinkId::new)
        .filter(|it| !links.contains_key(it));
    if pod.host_network {
        return Ok(pod.node.clone().map_or(Found::Other, Found::Node));
    }
    let Some(link) = free.next() else {
        return Ok(Found::Other);
    };
    links.insert(
        link,
        Attached {
            pod: name.clone(),
            addresses: vec![address],
        },
    );
    Ok(Found::Pod(FoundPod {
        group: Group::of(pod),
        link,
        address,
        node: pod.node.clone(),
    }))
}

/// What the guest's code says, if the end has a say; `peer`: who is at the far end, unless that goes by the address.
fn judge(
    rehearsal: &Rehearsal,
    query: &Query,
    peer: Option<Identity>,
    ask: impl FnOnce(&Policy<'_>, &Query) -> Option<Decision>,
) -> Result<Option<Decision>, Wrong> {
    rehearse(&rehearsal.tables, |policy| {
        let peer = peer.unwrap_or_else(|| policy.identity_of(query.peer_address));
        ask(policy, &Query { peer, ..*query })
    })
    .map_err(|error| Wrong::TooLarge(error.wanted))
}

/// The same for people.
fn say(
    rehearsal: &Rehearsal,
    decision: Decision,
    subject: String,
    direction: Direction,
    restrictions: Restrictions,
) -> Side {
    let name = rehearsal.names().get(decision.rule);
    let because = match (decision.rule, name) {
        (RuleId::NONE, _) if restrictions.rules.is_empty() => "no policy selects the pod".into(),
        (RuleId::NONE, _) => "no rule matches, and the pod is not isolated".into(),
        (RuleId::HOST, _) => "the node reaches its own pods".into(),
        (_, Some(name @ RuleName { index: None, .. })) => format!("no rule matches; {name}"),
        (_, Some(name)) => {
            let name = name.to_string();
            let rule = restrictions.rules.iter().find(|it| it.rule == name);
            match rule.and_then(|it| it.learnt.as_ref()) {
                Some(learnt) => format!("{name}: {learnt}"),
                None => name,
            }
        }
        (rule, None) => format!("rule {}", rule.0),
    };
    Side {
        pod: subject,
        direction: direction_name(direction).into(),
        accepted: decision.accepted,
        rule: name.map(ToString::to_string),
        because,
        considered: restrictions.rules,
    }
}

/// What policies say about a pod or a node, in both directions: ingress first.
///
/// # Errors
/// [`Wrong::NoPod`], [`Wrong::NoNode`], [`Wrong::Question`] about an address.
pub fn show(
    store: &Store,
    config: &Config,
    here: &BTreeMap<LinkId, Attached>,
    subject: &End,
) -> Result<[Restrictions; 2], Wrong> {
    let is_here = |name: &Name| here.values().any(|it| it.pod == *name);
    let group = match subject {
        End::Pod(name) => Some(match store.pod(name) {
            Some(pod) => Group::of(pod),
            None if is_here(name) => Group::undescribed(name),
            None => return Err(Wrong::NoPod(name.clone())),
        }),
        _ => None,
    };
    let node = match find(store, config, subject, 0, &mut BTreeMap::new()) {
        _ if group.is_some() => Found::Other,
        Ok(Found::Other) => return Err(Wrong::Question(subject.to_string())),
        found => found?,
    };
    let of = |direction| {
        let applied = match &group {
            Some(group) => Applied::find(store, group, direction),
            None => applied(store, config, &node, direction),
        };
        restrictions(store, applied, direction, None)
    };
    Ok([of(Direction::Ingress), of(Direction::Egress)])
}

/// Runs `work` on tables as the guest has them.
///
/// # Errors
/// They do not fit into memory.
pub fn rehearse<T>(tables: &Tables, work: impl FnOnce(&Policy<'_>) -> T) -> Result<T, OutOfMemory> {
    let count = tables.counts();
    let limits = Limits {
        identities: count.identities,
        bindings: count.bindings,
        rulesets: count.rulesets,
        classes: count.classes,
        spans: count.spans,
        names: count.names,
        named: count.named,
    };
    let mut region = vec![0u8; limits.bytes()];
    let mut policy = Policy::new(&mut Arena::new(&mut region), &limits, Hasher::new([0; 16]))?;
    let full = OutOfMemory {
        wanted: limits.bytes(),
        left: 0,
    };
    policy.begin(false).map_err(|_| full)?;
    for row in tables.all() {
        if let Row::Policy(row) = row {
            policy.put(&row).map_err(|_| full)?;
        }
    }
    policy.commit();
    Ok(work(&policy))
}
