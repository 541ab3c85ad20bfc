//! Services and address translation. Sets carry their backends, ports their source ranges, as people think of them; each
//! becomes the rows of the contract.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Deserialize;
use sluice_contract::service::{
    AddressRow, BackendRow, ConnectionsRow, FrontendRow, NatRow, PortId, PortRow, PrefixRow,
    ServiceRow, SetId, SetRow, SlotsRow, SourceRow,
};
use sluice_contract::{Row, limits};

use super::text::{
    EndpointText, FamilyWord, KindWord, PrefixText, ProtocolWord, RoleWord, UseWord,
};
use super::{Rows, TablesError};

/// See [`NatRow`].
#[derive(Debug, Deserialize)]
#[serde(remote = "NatRow", default = "NatRow::default", deny_unknown_fields)]
struct NatFields {
    node4: Option<Ipv4Addr>,
    node6: Option<Ipv6Addr>,
    first_port: u16,
    last_port: u16,
    masquerade_egress: bool,
    masquerade_all: bool,
    detect_local: bool,
    answer_ping: bool,
    reset_gone: bool,
    deny_encap: bool,
    maglev_seed: [u8; 16],
}

#[derive(Debug, Deserialize)]
pub(super) struct Nat(#[serde(with = "NatFields")] NatRow);

/// See [`ConnectionsRow`].
#[derive(Debug, Deserialize)]
#[serde(
    remote = "ConnectionsRow",
    default = "ConnectionsRow::default",
    deny_unknown_fields
)]
struct ConnectionsFields {
    tcp_opening: u32,
    tcp_established: u32,
    tcp_half_closed: u32,
    tcp_closing: u32,
    tcp_time_wait: u32,
    tcp_closed: u32,
    udp: u32,
    udp_stream: u32,
    icmp: u32,
    sctp_opening: u32,
    sctp_established: u32,
    sctp_closing: u32,
    other: u32,
    pod_share: u8,
    tenant_share: u8,
    adopt_midflow: u32,
}

#[derive(Debug, Deserialize)]
pub(super) struct Connections(#[serde(with = "ConnectionsFields")] ConnectionsRow);

/// See [`PrefixRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Range {
    prefix: PrefixText,
    #[serde(rename = "use")]
    purpose: UseWord,
}

/// See [`AddressRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Role {
    address: IpAddr,
    role: RoleWord,
}

/// See [`SetRow`], [`BackendRow`], [`SlotsRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Set {
    id: u32,
    family: FamilyWord,
    backends: Vec<EndpointText>,
    /// The whole Maglev table: a backend's place in the list per slot.
    #[serde(default)]
    slots: Vec<u16>,
}

/// See [`PortRow`], [`SourceRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Port {
    id: u32,
    family: FamilyWord,
    cluster: Option<u32>,
    local: Option<u32>,
    serving: Option<u32>,
    /// Without it: whether there is a set at all.
    endpoints: Option<bool>,
    #[serde(default)]
    internal_local: bool,
    #[serde(default)]
    external_local: bool,
    #[serde(default)]
    direct_return: bool,
    #[serde(default)]
    affinity: u32,
    #[serde(default)]
    sources: Vec<PrefixText>,
}

/// See [`FrontendRow`].
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Frontend {
    address: IpAddr,
    protocol: ProtocolWord,
    port: u16,
    service: u32,
    kind: KindWord,
}

/// Everything about Services.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Services {
    sets: Vec<Set>,
    ports: Vec<Port>,
    frontends: Vec<Frontend>,
}

impl Nat {
    pub(super) fn row(&self) -> Row {
        Row::Service(ServiceRow::Nat(self.0.clone()))
    }
}

impl Connections {
    pub(super) fn row(&self) -> Row {
        Row::Service(ServiceRow::Connections(self.0))
    }
}

impl Range {
    pub(super) fn row(&self) -> Row {
        Row::Service(ServiceRow::Prefix(PrefixRow {
            prefix: self.prefix.0,
            purpose: self.purpose.0,
        }))
    }
}

impl Role {
    pub(super) fn row(&self) -> Row {
        Row::Service(ServiceRow::Address(AddressRow {
            address: self.address,
            role: self.role.0,
        }))
    }
}

impl Services {
    /// All rows, each behind those it refers to.
    pub(super) fn put(&self, rows: &mut Rows) -> Result<(), TablesError> {
        for (at, set) in self.sets.iter().enumerate() {
            let place = format!("services.sets[{at}]");
            set.put(&place, rows)
                .map_err(|what| TablesError::value(format!("{place}.{what}")))?;
        }
        for (at, port) in self.ports.iter().enumerate() {
            let place = format!("services.ports[{at}]");
            port.put(&place, rows)
                .map_err(|what| TablesError::value(format!("{place}.{what}")))?;
        }
        for (at, frontend) in self.frontends.iter().enumerate() {
            rows.put(
                format!("services.frontends[{at}]"),
                Row::Service(ServiceRow::Frontend(FrontendRow {
                    address: frontend.address,
                    protocol: frontend.protocol.0,
                    port: frontend.port,
                    service: PortId(frontend.service),
                    kind: frontend.kind.0,
                })),
            );
        }
        Ok(())
    }
}

impl Set {
    fn put(&self, place: &str, rows: &mut Rows) -> Result<(), String> {
        let many = |_| "backends: More than a set can have";
        let id = SetId(self.id);
        rows.put(
            place.to_owned(),
            Row::Service(ServiceRow::Set(SetRow {
                id,
                family: self.family.0,
                count: u16::try_from(self.backends.len()).map_err(many)?,
                slots: u16::try_from(self.slots.len())
                    .map_err(|_| "slots: More than a set can have")?,
            })),
        );
        for (at, backend) in self.backends.iter().enumerate() {
            rows.put(
                format!("{place}.backends[{at}]"),
                Row::Service(ServiceRow::Backend(BackendRow {
                    set: id,
                    index: u16::try_from(at).map_err(many)?,
                    address: backend.0.ip(),
                    port: backend.0.port(),
                })),
            );
        }
        for (chunk, slots) in self.slots.chunks(limits::SLOT_CHUNK).enumerate() {
            // Not more than a chunk holds, and fewer chunks than slots.
            let (Ok(chunk), Ok(slots)) = (u16::try_from(chunk), heapless::Vec::from_slice(slots))
            else {
                continue;
            };
            rows.put(
                format!("{place}.slots"),
                Row::Service(ServiceRow::Slots(SlotsRow {
                    set: id,
                    chunk,
                    slots,
                })),
            );
        }
        Ok(())
    }
}

impl Port {
    fn put(&self, place: &str, rows: &mut Rows) -> Result<(), String> {
        let mut lengths: Vec<u8> = self.sources.iter().map(|s| s.0.length()).collect();
        lengths.sort_unstable();
        lengths.dedup();
        let id = PortId(self.id);
        let some_set = self.cluster.or(self.local).is_some();
        rows.put(
            place.to_owned(),
            Row::Service(ServiceRow::Port(PortRow {
                id,
                family: self.family.0,
                cluster: self.cluster.map(SetId),
                local: self.local.map(SetId),
                serving: self.serving.or(self.cluster).or(self.local).map(SetId),
                endpoints: self.endpoints.unwrap_or(some_set),
                internal_local: self.internal_local,
                external_local: self.external_local,
                direct_return: self.direct_return,
                affinity: self.affinity,
                source_lengths: heapless::Vec::from_slice(&lengths)
                    .map_err(|_| "sources: Of more different lengths than a port can have")?,
            })),
        );
        for (at, source) in self.sources.iter().enumerate() {
            rows.put(
                format!("{place}.sources[{at}]"),
                Row::Service(ServiceRow::Source(SourceRow {
                    port: id,
                    prefix: source.0,
                })),
            );
        }
        Ok(())
    }
}
