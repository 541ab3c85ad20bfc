//! Links by name, and what refers to them.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Deserialize;
use sluice_contract::overlay::NextHopId;
use sluice_contract::row::{LinkRow, NodeRow, RouteRow};
use sluice_contract::{Identity, LinkId, Mac, Row, Tenant};

use super::text::{MacText, PrefixText};
use super::{Rows, TablesError};

/// See [`NodeRow`].
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Node {
    gateway4: std::net::Ipv4Addr,
    gateway6: std::net::Ipv6Addr,
    gateway_mac: MacText,
}

impl Default for Node {
    fn default() -> Self {
        let row = NodeRow::default();
        Self {
            gateway4: row.gateway4,
            gateway6: row.gateway6,
            gateway_mac: MacText(row.gateway_mac),
        }
    }
}

impl Node {
    pub(super) fn row(&self) -> Row {
        Row::Node(NodeRow {
            gateway4: self.gateway4,
            gateway6: self.gateway6,
            gateway_mac: self.gateway_mac.0,
        })
    }
}

/// See [`LinkRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Link {
    /// `uplink`, `host`, or `pod:` and the pod's name.
    name: String,
    /// Of a pod; without it, the lowest that is free.
    id: Option<u16>,
    mac: Option<MacText>,
    #[serde(default)]
    addresses: Vec<IpAddr>,
    #[serde(default = "mtu")]
    mtu: u16,
    identity: Option<u32>,
    #[serde(default = "incarnation")]
    incarnation: u32,
    #[serde(default)]
    tenant: Tenant,
}

const fn mtu() -> u16 {
    1500
}

const fn incarnation() -> u32 {
    1
}

/// The links of the tables: names and numbers.
#[derive(Clone, Debug, Default)]
pub struct Links {
    by_name: BTreeMap<String, LinkId>,
    by_id: BTreeMap<LinkId, String>,
}

impl Links {
    /// The link of that name.
    pub fn id(&self, name: &str) -> Option<LinkId> {
        self.by_name.get(name).copied()
    }

    /// The name of that link; frames only ever leave by links that have one.
    pub fn name(&self, id: LinkId) -> &str {
        self.by_id.get(&id).map_or("?", String::as_str)
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = (LinkId, &str)> {
        self.by_id.iter().map(|(id, name)| (*id, name.as_str()))
    }

    fn free(&self) -> Option<LinkId> {
        (LinkId::FIRST_POD..=LinkId::LAST)
            .filter_map(LinkId::new)
            .find(|id| !self.by_id.contains_key(id))
    }

    /// Names and numbers of all links; numbers that are asked for are given first.
    pub(super) fn of(links: &[Link]) -> Result<Self, TablesError> {
        let mut all = Self::default();
        for wanted in [true, false] {
            for (at, link) in links.iter().enumerate() {
                if link.is_numbered() == wanted {
                    all.add(link)
                        .map_err(|what| TablesError::value(format!("links[{at}].{what}")))?;
                }
            }
        }
        Ok(all)
    }

    fn add(&mut self, link: &Link) -> Result<(), String> {
        let id = match (link.name.as_str(), link.id) {
            ("uplink", None) => LinkId::UPLINK,
            ("host", None) => LinkId::HOST,
            ("uplink" | "host", Some(_)) => return Err("id: Only pods are numbered".into()),
            (_, None) => self.free().ok_or("id: There are too many links")?,
            (_, Some(raw)) => LinkId::new(raw).filter(|id| id.is_pod()).ok_or(format!(
                "id: {raw} is no number of a pod's link (16 to 4094)"
            ))?,
        };
        let is_pod = |name: &str| name.strip_prefix("pod:").is_some_and(|pod| !pod.is_empty());
        if id.is_pod() && !is_pod(&link.name) {
            let name = &link.name;
            return Err(format!(
                "name: {name:?} is neither uplink, host nor pod:NAME"
            ));
        }
        if let Some(other) = self.by_id.insert(id, link.name.clone()) {
            return Err(format!("id: {id} is that of {other:?} already"));
        }
        if self.by_name.insert(link.name.clone(), id).is_some() {
            return Err(format!("name: There are two links {:?}", link.name));
        }
        Ok(())
    }
}

impl Link {
    fn is_numbered(&self) -> bool {
        self.id.is_some() || matches!(self.name.as_str(), "uplink" | "host")
    }

    pub(super) fn row(&self, links: &Links) -> Result<Row, String> {
        let id = links.id(&self.name).ok_or("name: Not numbered")?;
        let mac = match &self.mac {
            Some(mac) => mac.0,
            None if id.is_pod() => Mac::of_pod(id),
            None => return Err("mac: Missing; only a pod's has a default".into()),
        };
        let identity = match (self.identity, id) {
            (Some(identity), _) => Identity(identity),
            (None, LinkId::UPLINK) => Identity::WORLD,
            (None, LinkId::HOST) => Identity::HOST,
            (None, id) => Identity(Identity::FIRST_POD + u32::from(id.raw())),
        };
        let addresses = heapless::Vec::from_slice(&self.addresses);
        Ok(Row::Link(LinkRow {
            id,
            mac,
            addresses: addresses.map_err(|_| "addresses: More than a link can have")?,
            mtu: self.mtu,
            identity,
            incarnation: self.incarnation,
            tenant: self.tenant,
        }))
    }
}

/// See [`RouteRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Route {
    prefix: PrefixText,
    next_hop: Option<u16>,
}

impl Route {
    pub(super) fn put(&self, at: usize, rows: &mut Rows) {
        rows.put(
            format!("routes[{at}]"),
            Row::Route(RouteRow {
                prefix: self.prefix.0,
                next_hop: self.next_hop.map(NextHopId),
            }),
        );
    }
}
