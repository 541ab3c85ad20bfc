//! May this connection begin? The pod at one end, its peer, protocol and port in; a verdict and the rule that gave it out.
//!
//! Asked once per connection and direction (a hit in conntrack asks nobody). The pod's link names its ruleset, the ruleset
//! has up to three layers (Admin, NetworkPolicy, Baseline), the peer is looked up by identity and by address.
//!
//! A change is prepared beside the tables in force and takes effect as a whole with [`Policy::commit`]. Before and after,
//! [`Policy::settle`] does the housekeeping in slices.
//!
//! # Cost
//! Per layer: one class lookup, two walks through spans. With the binding and the ruleset at most 2 + 3 × (1 + 2 × 24) table lookups
//! of at most sixteen comparisons each; for a pod whose policies name pods and ports: five.

mod guard;
mod lookup;
mod names;
mod rows;
mod table;

use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use core::net::IpAddr;
use heapless::Vec;
use lookup::{Found, SPAN_SLOT, Spans};
use names::{NAME_SLOT, Names};
use rows::{LAYER_WORDS, RULESET_SLOT, address_words, pack_ruleset, unpack_layer};
use sluice_contract::name::NameId;
use sluice_contract::policy::{
    Action, BindingRow, Direction, Established, Layer, PolicyKey, PolicyRow, RuleId, RulesetId,
    SettingsRow, SpanId, port_key,
};
use sluice_contract::{Identity, LinkId, Protocol};
use table::{Full, Table};

/// How many rows of each kind there is room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Addresses of pods, local and remote.
    pub identities: usize,
    /// Links with a binding: as many as there can be, so that none is ever without its own.
    pub bindings: usize,
    /// Local pods' policy sets × directions.
    pub rulesets: usize,
    /// Identities that rulesets single out.
    pub classes: usize,
    /// Pieces of port and address maps.
    pub spans: usize,
    /// Domain names in rules.
    pub names: usize,
    /// Those, by ruleset and tier.
    pub named: usize,
}

impl Limits {
    /// For one node of a large cluster, in about 64 MiB.
    pub const LARGE: Self = Self {
        identities: 500_000,
        bindings: 4_000,
        rulesets: 4_000,
        classes: 500_000,
        spans: 16_000,
        names: 2_000,
        named: 16_000,
    };
    /// For a node of a cluster with some thousand pods, in about 4 MiB.
    pub const SMALL: Self = Self {
        identities: 16_000,
        bindings: 4_000,
        rulesets: 500,
        classes: 32_000,
        spans: 4_000,
        names: 500,
        named: 2_000,
    };
}

impl Limits {
    /// Bytes that tables of these limits take from an arena, at most.
    pub const fn bytes(&self) -> usize {
        table::bytes(self.identities, 4)
            + table::bytes(self.bindings, 3)
            + table::bytes(self.rulesets, RULESET_SLOT)
            + table::bytes(self.classes, 3)
            + table::bytes(self.spans, SPAN_SLOT)
            + table::bytes(self.names, NAME_SLOT)
            + table::bytes(self.named, 4)
            + table::bytes(RESOLVERS, 3)
    }
}

/// Addresses that are asked for the addresses of names, at most.
const RESOLVERS: usize = 256;
/// Names of rules that one name of a question is, at most: itself, and what lies above it.
pub const SAME: usize = 8;

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Query {
    /// The link of the pod whose policies are asked.
    pub link: LinkId,
    /// `Ingress`: that pod is the destination.
    pub direction: Direction,
    /// Who is at the other end, and at which address.
    pub peer: Identity,
    pub peer_address: IpAddr,
    /// `None` for protocols that policy cannot name, such as ICMP.
    pub protocol: Option<Protocol>,
    /// The destination port.
    pub port: u16,
}

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub accepted: bool,
    pub rule: RuleId,
}

/// The row was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The table is full; its capacity.
    Full(u32),
    /// The row contradicts itself.
    Invalid,
    /// There is no such row.
    Missing,
    /// [`Policy::settle`] has something left to do first.
    Busy,
}

/// Rows in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Rows {
    pub identities: u32,
    pub bindings: u32,
    pub rulesets: u32,
    pub classes: u32,
    pub spans: u32,
}

/// Rows that did not fit, and without which a search could miss a denial.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Missing {
    identities: bool,
    classes: bool,
}

impl Missing {
    /// Whether a denial of this layer might be about that peer, of which the tables say nothing else.
    ///
    /// A layer that denies by default says only what it accepts: without a row it accepts less.
    fn concerns(self, layer: &Layer, peer: Identity) -> bool {
        let tells_pods_apart = layer.classes || layer.pods != layer.others;
        layer.miss != Action::Deny
            && match peer {
                Identity::UNLISTED => tells_pods_apart,
                Identity::WORLD => self.identities && tells_pods_apart,
                peer => self.classes && layer.classes && peer.is_pod(),
            }
    }
}

/// All tables of policy.
#[derive(Debug)]
pub struct Policy<'m> {
    settings: Option<SettingsRow>,
    next_settings: Option<SettingsRow>,
    missing: Missing,
    next_missing: Missing,
    identities: Table<'m, 4, 2>,
    bindings: Table<'m, 3, 0>,
    rulesets: Table<'m, RULESET_SLOT, 1>,
    classes: Table<'m, 3, 1>,
    spans: Spans<'m>,
    names: Names<'m>,
    named: Table<'m, 4, 2>,
    resolvers: Table<'m, 3, 2>,
}

impl<'m> Policy<'m> {
    /// Empty tables: everything is accepted.
    ///
    /// # Errors
    /// The arena is too small.
    pub fn new(
        arena: &mut Arena<'m>,
        limits: &Limits,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        Ok(Self {
            settings: None,
            next_settings: None,
            missing: Missing::default(),
            next_missing: Missing::default(),
            identities: Table::new(arena, limits.identities, hasher)?,
            bindings: Table::new(arena, limits.bindings, hasher)?,
            rulesets: Table::new(arena, limits.rulesets, hasher)?,
            classes: Table::new(arena, limits.classes, hasher)?,
            spans: Spans {
                table: Table::new(arena, limits.spans, hasher)?,
            },
            names: Names {
                table: Table::new(arena, limits.names, hasher)?,
            },
            named: Table::new(arena, limits.named, hasher)?,
            resolvers: Table::new(arena, RESOLVERS, hasher)?,
        })
    }

    /// Whose address this is: a pod's identity, or [`Identity::WORLD`].
    #[inline]
    pub fn identity_of(&self, address: IpAddr) -> Identity {
        self.identities
            .find(0, &address_words(address))
            .and_then(|value| value.first())
            .map_or(Identity::WORLD, |identity| Identity(*identity as u32))
    }

    /// Whether pods elsewhere may be missing in the rows, for want of room.
    pub fn leaves_pods_out(&self) -> bool {
        self.settings.is_some_and(|settings| settings.unlisted_pods)
    }

    /// What becomes of connections that began before a change.
    pub fn established(&self) -> Established {
        self.settings
            .map_or(Established::Judged, |settings| settings.established)
    }

    /// Whether what is denied passes nevertheless, and is only told.
    pub fn is_audited(&self) -> bool {
        self.settings.is_some_and(|settings| settings.audit)
    }

    /// May this connection begin, as far as the pod at `query.link` is concerned?
    pub fn judge(&self, query: &Query) -> Decision {
        self.judge_named(query, &[])
    }

    /// The same of a peer whose address the pod learnt under these names.
    pub fn judge_named(&self, query: &Query, names: &[NameId]) -> Decision {
        let Some(settings) = self.settings else {
            return accept(RuleId::NONE);
        };
        if query.peer == Identity::HOST
            && query.direction == Direction::Ingress
            && settings.host_reaches_pods
        {
            return accept(RuleId::HOST);
        }
        let Some([ingress, egress]) = self.bindings.find(u32::from(query.link.raw()), &[]) else {
            return Decision {
                accepted: settings.unbound == Action::Accept,
                rule: RuleId::UNBOUND,
            };
        };
        let ruleset = match query.direction {
            Direction::Ingress => *ingress,
            Direction::Egress => *egress,
        };
        if ruleset == RulesetId::NONE.0 {
            return accept(RuleId::NONE);
        }
        self.ask(RulesetId(ruleset), query, names)
    }

    fn ask(&self, ruleset: RulesetId, query: &Query, names: &[NameId]) -> Decision {
        let Some(layers) = self.rulesets.find(0, &[ruleset.0]) else {
            return BROKEN;
        };
        let port = port_key(query.protocol, query.port);
        for words in layers.chunks_exact(LAYER_WORDS) {
            let Some(layer) = unpack_layer(words) else {
                break;
            };
            match self.ask_layer(&layer, query, names, port) {
                (Action::Accept, rule) => return accept(rule),
                (Action::Deny, rule) => {
                    return Decision {
                        accepted: false,
                        rule,
                    };
                }
                (Action::Pass, _) => {}
            }
        }
        accept(RuleId::NONE)
    }

    fn ask_layer(
        &self,
        layer: &Layer,
        query: &Query,
        names: &[NameId],
        port: u32,
    ) -> (Action, RuleId) {
        let class = || {
            let found = self.classes.find(query.peer.0, &[layer.id.0]);
            found.and_then(|value| value.first()).copied().map(SpanId)
        };
        let is_pod = query.peer.is_pod();
        let class = (is_pod && layer.classes).then(class).flatten();
        if class.is_none() && self.missing.concerns(layer, query.peer) {
            let is_known = query.peer == Identity::UNLISTED;
            let rule = if is_known {
                RuleId::NO_ROOM
            } else {
                RuleId::BROKEN
            };
            return (Action::Deny, rule);
        }
        let ports = class.unwrap_or(if is_pod { layer.pods } else { layer.others });
        let by_identity = self.spans.walk(ports, &[], port);
        let by_address = match query.peer_address.to_canonical() {
            IpAddr::V4(v4) => self.spans.walk(layer.v4, &[v4.to_bits()], port),
            IpAddr::V6(v6) => {
                let bits = v6.to_bits();
                let words = [96, 64, 32, 0].map(|shift| (bits >> shift) as u32);
                self.spans.walk(layer.v6, &words, port)
            }
        };
        let mut found = by_identity.or(by_address);
        for name in names {
            let span = self.named.find(0, &[layer.id.0, name.0]);
            let span = span.and_then(|value| value.first());
            let span = span.map_or(SpanId::NOTHING, |span| SpanId(*span));
            found = found.or(self.spans.walk(span, &[], port));
        }
        match found {
            Found::Broken => (Action::Deny, RuleId::BROKEN),
            Found::Nothing => (layer.miss, layer.miss_rule),
            Found::Rule { action, rule, .. } => (action, rule),
        }
    }

    /// Whether any rule names a domain.
    #[inline]
    pub fn knows_names(&self) -> bool {
        self.named.rows() > 0
    }

    /// Whether what this address says of names is believed.
    pub fn is_resolver(&self, address: IpAddr) -> bool {
        self.resolvers.find(0, &address_words(address)).is_some()
    }

    /// Which names in the rules for what the pod sends are `name`, which is in lower case, or lie above it.
    pub fn names_of(&self, link: LinkId, name: &[u8]) -> Vec<NameId, SAME> {
        let mut all = Vec::new();
        let binding = self.bindings.find(u32::from(link.raw()), &[]);
        let Some(&[_, egress]) = binding else {
            return all;
        };
        let Some(layers) = self.rulesets.find(0, &[egress]) else {
            return all;
        };
        for id in self.names.ends_of(name) {
            let mut layers = layers.chunks_exact(LAYER_WORDS).map_while(unpack_layer);
            let is_named = |layer: Layer| self.named.find(0, &[layer.id.0, id.0]).is_some();
            if layers.any(is_named) && all.push(id).is_err() {
                break;
            }
        }
        all
    }

    /// Rows in force, for the status.
    pub fn rows(&self) -> Rows {
        Rows {
            identities: self.identities.rows(),
            bindings: self.bindings.rows(),
            rulesets: self.rulesets.rows(),
            classes: self.classes.rows(),
            spans: self.spans.table.rows(),
        }
    }
}

/// Changes: `begin`, rows, `commit` or `abort`. After each of these but the rows, [`Self::settle`] until it says `true`.
impl Policy<'_> {
    /// Starts a change. `fresh`: from empty tables instead of those in force.
    ///
    /// # Errors
    /// [`Refusal::Busy`]
    pub fn begin(&mut self, fresh: bool) -> Result<(), Refusal> {
        self.settled()?;
        self.next_settings = if fresh { None } else { self.settings };
        self.next_missing = if fresh {
            Missing::default()
        } else {
            self.missing
        };
        self.identities.begin(fresh);
        self.bindings.begin(fresh);
        self.rulesets.begin(fresh);
        self.classes.begin(fresh);
        self.spans.table.begin(fresh);
        self.names.table.begin(fresh);
        self.named.begin(fresh);
        self.resolvers.begin(fresh);
        Ok(())
    }

    fn settled(&self) -> Result<(), Refusal> {
        let settled = self.identities.is_settled()
            && self.classes.is_settled()
            && self.spans.table.is_settled()
            && self.names.table.is_settled()
            && self.named.is_settled()
            && self.resolvers.is_settled()
            && self.rulesets.is_settled()
            && self.bindings.is_settled();
        if settled { Ok(()) } else { Err(Refusal::Busy) }
    }

    /// Does housekeeping, at most `budget` slots of it (some nanoseconds each). `true`: nothing is left to do.
    pub fn settle(&mut self, mut budget: u32) -> bool {
        self.identities.settle(&mut budget)
            && self.classes.settle(&mut budget)
            && self.spans.table.settle(&mut budget)
            && self.names.table.settle(&mut budget)
            && self.named.settle(&mut budget)
            && self.resolvers.settle(&mut budget)
            && self.rulesets.settle(&mut budget)
            && self.bindings.settle(&mut budget)
    }

    /// Puts a row into the change.
    ///
    /// # Errors
    /// [`Refusal::Full`], [`Refusal::Busy`], or [`Refusal::Invalid`] for a span that cannot be walked and an IPv4 address
    /// dressed up as an IPv6 one.
    pub fn put(&mut self, row: &PolicyRow) -> Result<(), Refusal> {
        self.settled()?;
        match row {
            PolicyRow::Settings(settings) => {
                self.next_settings = Some(*settings);
                Ok(())
            }
            PolicyRow::Identity(row) if row.address != row.address.to_canonical() => {
                Err(Refusal::Invalid)
            }
            PolicyRow::Identity(row) => {
                let value = [u64::from(row.identity.0)];
                let done = self.identities.put(0, &address_words(row.address), &value);
                self.next_missing.identities |= done.is_err();
                done.map_err(|Full| Refusal::Full(self.identities.capacity()))
            }
            PolicyRow::Binding(BindingRow {
                link,
                ingress,
                egress,
            }) => {
                let done = self
                    .bindings
                    .put(u32::from(link.raw()), &[], &[ingress.0, egress.0]);
                done.map_err(|Full| Refusal::Full(self.bindings.capacity()))
            }
            PolicyRow::Ruleset(row) if row.id == RulesetId::NONE => Err(Refusal::Invalid),
            PolicyRow::Ruleset(row) => {
                let done = self.rulesets.put(0, &[row.id.0], &pack_ruleset(row));
                done.map_err(|Full| Refusal::Full(self.rulesets.capacity()))
            }
            PolicyRow::Class(row) => {
                let done = self
                    .classes
                    .put(row.identity.0, &[row.layer.0], &[row.ports.0]);
                self.next_missing.classes |= done.is_err();
                done.map_err(|Full| Refusal::Full(self.classes.capacity()))
            }
            PolicyRow::Span(row) if !lookup::is_well_formed(row) => Err(Refusal::Invalid),
            PolicyRow::Span(row) => {
                let done = self.spans.put(row);
                done.map_err(|Full| Refusal::Full(self.spans.table.capacity()))
            }
            PolicyRow::Name(row) if !row.is_valid() => Err(Refusal::Invalid),
            PolicyRow::Name(row) => {
                let done = self.names.put(row);
                done.map_err(|Full| Refusal::Full(self.names.table.capacity()))
            }
            PolicyRow::Named(row) => {
                let done = self
                    .named
                    .put(0, &[row.layer.0, row.name.0], &[row.ports.0]);
                done.map_err(|Full| Refusal::Full(self.named.capacity()))
            }
            PolicyRow::Resolver(address) if *address != address.to_canonical() => {
                Err(Refusal::Invalid)
            }
            PolicyRow::Resolver(address) => {
                let done = self.resolvers.put(0, &address_words(*address), &[]);
                done.map_err(|Full| Refusal::Full(self.resolvers.capacity()))
            }
        }
    }

    /// Takes a row out.
    ///
    /// # Errors
    /// [`Refusal::Missing`], [`Refusal::Busy`]
    pub fn remove(&mut self, key: &PolicyKey) -> Result<(), Refusal> {
        self.settled()?;
        let there = match key {
            PolicyKey::Settings => self.next_settings.take().is_some(),
            PolicyKey::Identity(address) => self.identities.remove(0, &address_words(*address)),
            PolicyKey::Binding(link) => self.bindings.remove(u32::from(link.raw()), &[]),
            PolicyKey::Ruleset(id) => self.rulesets.remove(0, &[id.0]),
            PolicyKey::Class(layer, identity) => self.classes.remove(identity.0, &[layer.0]),
            PolicyKey::Span(id) => self.spans.table.remove(0, &[id.0]),
            PolicyKey::Name(id) => self.names.table.remove(0, &[id.0]),
            PolicyKey::Named(layer, name) => self.named.remove(0, &[layer.0, name.0]),
            PolicyKey::Resolver(address) => self.resolvers.remove(0, &address_words(*address)),
        };
        if there { Ok(()) } else { Err(Refusal::Missing) }
    }

    /// The change is in force.
    pub fn commit(&mut self) {
        self.settings = self.next_settings;
        self.missing = self.next_missing;
        self.identities.commit();
        self.bindings.commit();
        self.rulesets.commit();
        self.classes.commit();
        self.spans.table.commit();
        self.names.table.commit();
        self.named.commit();
        self.resolvers.commit();
    }

    /// The change never was.
    pub fn abort(&mut self) {
        self.next_settings = self.settings;
        self.next_missing = self.missing;
        self.identities.abort();
        self.bindings.abort();
        self.rulesets.abort();
        self.classes.abort();
        self.spans.table.abort();
        self.names.table.abort();
        self.named.abort();
        self.resolvers.abort();
    }
}

const BROKEN: Decision = Decision {
    accepted: false,
    rule: RuleId::BROKEN,
};

const fn accept(rule: RuleId) -> Decision {
    Decision {
        accepted: true,
        rule,
    }
}
