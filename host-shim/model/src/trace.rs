//! May this one talk to that one, and which rule says so? Compiles the rules of both ends and asks the guest's own code.
//!
//! Works on any store: the daemon's, or one that was just read from a directory of manifests.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sluice_appliance::policy::{Limits, Policy, Query};
use sluice_appliance::{Arena, OutOfMemory};
use sluice_contract::name::NameId;
use sluice_contract::policy::{Direction, RuleId, port_key};
use sluice_contract::{Identity, LinkId, Protocol, Row};

use crate::compile::{Attached, Config, Group, Rehearsal, RuleName};
use crate::diff::Tables;
use crate::explain::{Far, Restriction, Restrictions, Told, direction_name, restrictions};
use crate::object::{Name, NamedPort};
use crate::store::Store;

/// One end of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Pod(Name),
    Address(IpAddr),
}

/// `namespace/pod`, `pod` (in `default`) or an address.
impl FromStr for End {
    type Err = Wrong;

    fn from_str(text: &str) -> Result<Self, Wrong> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
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
    #[error("{0:?} is not NAMESPACE/POD or an address, with :PORT/PROTOCOL behind the destination")]
    Question(String),
    #[error("There is no pod {0}")]
    NoPod(Name),
    #[error("The rules do not fit into {0} bytes")]
    TooLarge(usize),
}

/// The answer: both ends have to agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Answer {
    pub accepted: bool,
    /// The source's egress first; an end that is no pod of the cluster has nothing to say.
    pub sides: Vec<Side>,
}

/// What the policies of one end say.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Side {
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
struct Found {
    group: Group,
    link: LinkId,
    address: IpAddr,
}

/// Answers a question on a store. `here`: the pods of this node, if there is one. `told`: what such a pod was told of names;
/// asked only if its rules name any.
///
/// # Errors
/// A pod is not there, or the rules are beyond measure.
pub fn trace(
    store: &Store,
    config: &Config,
    here: &BTreeMap<LinkId, Attached>,
    question: &Question,
    told: impl Fn(LinkId) -> Told,
) -> Result<Answer, Wrong> {
    let ends = [&question.from, &question.to];
    let mut pods: [Option<Found>; 2] = [None, None];
    let mut links = here.clone();
    for (index, (end, found)) in (0u16..).zip(ends.into_iter().zip(&mut pods)) {
        let End::Pod(name) = end else { continue };
        *found = find(store, name, index, &mut links)?;
    }
    let address = |index: usize| match (ends[index], &pods[index]) {
        (End::Address(address), _) => Some(*address),
        (_, Some(found)) => Some(found.address),
        // On its node's network.
        (End::Pod(name), None) => store.pod(name).and_then(|it| it.addresses.first().copied()),
    };
    let ports: &[NamedPort] = pods[1].as_ref().map_or(&[], |it| &it.group.ports);
    let mut rehearsal = Rehearsal::new(store, config, &links);
    let mut answer = Answer {
        accepted: true,
        sides: Vec::new(),
    };
    for (own, far, direction) in [(0, 1, Direction::Egress), (1, 0, Direction::Ingress)] {
        let (Some(pod), End::Pod(name)) = (&pods[own], ends[own]) else {
            continue;
        };
        let named = direction == Direction::Egress && here.contains_key(&pod.link) && {
            let rules = restrictions(store, &pod.group, direction, None).rules;
            rules.iter().any(|it| it.names_domains)
        };
        let told = if named {
            told(pod.link)
        } else {
            Told::ELSEWHERE
        };
        let far = Far {
            told: &told,
            group: pods[far].as_ref().map(|it| &it.group),
            address: address(far),
            ports,
            key: port_key(question.protocol, question.port),
        };
        let query = Query {
            link: pod.link,
            direction,
            peer: Identity::WORLD,
            peer_address: far.address.unwrap_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
            protocol: question.protocol,
            port: question.port,
        };
        let restrictions = restrictions(store, &pod.group, direction, Some(far));
        let names = told.names_of(far.address);
        let side = judge(&mut rehearsal, (&query, &names), name, restrictions)?;
        answer.accepted &= side.accepted;
        answer.sides.push(side);
    }
    Ok(answer)
}

/// The pod of that name, on its link. `None`: it is on its node's network, where no policy reaches it.
fn find(
    store: &Store,
    name: &Name,
    index: u16,
    links: &mut BTreeMap<LinkId, Attached>,
) -> Result<Option<Found>, Wrong> {
    let described = store.pod(name);
    let attached = links.iter().find(|(_, it)| it.pod == *name);
    if let Some((link, attached)) = attached {
        return Ok(attached.addresses.first().map(|address| Found {
            group: described.map_or_else(|| Group::undescribed(name), Group::of),
            link: *link,
            address: *address,
        }));
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
    let Some(link) = free.next().filter(|_| !pod.host_network) else {
        return Ok(None);
    };
    links.insert(
        link,
        Attached {
            pod: name.clone(),
            addresses: vec![address],
        },
    );
    Ok(Some(Found {
        group: Group::of(pod),
        link,
        address,
    }))
}

fn judge(
    rehearsal: &mut Rehearsal,
    (query, names): (&Query, &[NameId]),
    pod: &Name,
    restrictions: Restrictions,
) -> Result<Side, Wrong> {
    let decision = rehearse(&rehearsal.tables, |policy| {
        let peer = policy.identity_of(query.peer_address);
        policy.judge_named(&Query { peer, ..*query }, names)
    })
    .map_err(|error| Wrong::TooLarge(error.wanted))?;
    let name = rehearsal.names().get(decision.rule);
    let because = match (decision.rule, name) {
        (RuleId::NONE, _) if restrictions.rules.is_empty() => "no policy selects the pod".into(),
        (RuleId::NONE, _) => "no rule matches, and the pod is not isolated".into(),
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
    Ok(Side {
        pod: pod.to_string(),
        direction: direction_name(query.direction).into(),
        accepted: decision.accepted,
        rule: name.map(ToString::to_string),
        because,
        considered: restrictions.rules,
    })
}

/// What policies say about a pod, in both directions: ingress first.
///
/// # Errors
/// [`Wrong::NoPod`]
pub fn show(
    store: &Store,
    here: &BTreeMap<LinkId, Attached>,
    name: &Name,
) -> Result<[Restrictions; 2], Wrong> {
    let is_here = here.values().any(|it| it.pod == *name);
    let group = match store.pod(name) {
        Some(pod) => Group::of(pod),
        None if is_here => Group::undescribed(name),
        None => return Err(Wrong::NoPod(name.clone())),
    };
    let of = |direction| restrictions(store, &group, direction, None);
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
    let mut policy = Policy::new(&mut Arena::new(&mut region), &limits)?;
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
