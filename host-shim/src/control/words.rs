//! Rows and refusals in words, for people who never saw a table.

use sluice_contract::overlay::OverlayKey;
use sluice_contract::policy::PolicyKey;
use sluice_contract::report::{Field, Reject, RejectReason};
use sluice_contract::service::ServiceKey;
use sluice_contract::{Key, LinkId, Protocol};

/// One sentence on what is not in force, and what can be done.
pub(super) fn sentence(reject: &Reject) -> String {
    let what = reject.object.map_or("A change".into(), what);
    format!("{what} is not in force: {}", why(reject))
}

fn what(key: Key) -> String {
    match key {
        Key::Node => "The pods' gateway".into(),
        Key::Link(link) => link_name(link),
        Key::Policy(key) => policy(key),
        Key::Service(key) => service(key),
        Key::Overlay(OverlayKey::Tunnel) => "The tunnel".into(),
        Key::Overlay(OverlayKey::NextHop(id)) => format!("Neighbor {} on the uplink", id.0),
        Key::Overlay(OverlayKey::Peer(id)) => format!("Other node {}", id.0),
        Key::Overlay(OverlayKey::Remote(prefix)) => format!("Range {prefix} of another node"),
        Key::Bandwidth(link) => format!("The bandwidth of {link}"),
        Key::Marking(link) => format!("The DSCP of {link}"),
        Key::Rates(link) => format!("The packet and connection rates of {link}"),
        Key::Route(prefix) => format!("The route to {prefix}"),
    }
}

fn link_name(link: LinkId) -> String {
    match link {
        LinkId::UPLINK => "The uplink".into(),
        LinkId::HOST => "The host's link".into(),
        LinkId::PROBES => "The link of the probes".into(),
        link => format!("Link {}", link.raw()),
    }
}

fn policy(key: PolicyKey) -> String {
    match key {
        PolicyKey::Settings => "What policy does by default".into(),
        PolicyKey::Identity(address) => format!("The identity of the pod at {address}"),
        PolicyKey::Binding(link) => format!("Policy of {link}"),
        PolicyKey::Ruleset(_) => "A set of policies".into(),
        PolicyKey::Class(_, identity) => {
            format!("A policy's rule for pods of identity {}", identity.0)
        }
        PolicyKey::Span(_) => "A part of a policy's rules".into(),
        PolicyKey::Name(_) | PolicyKey::Named(..) => "A domain name in a policy".into(),
        PolicyKey::Resolver(address) => format!("Resolver {address}"),
    }
}

fn service(key: ServiceKey) -> String {
    match key {
        ServiceKey::Nat => "Address translation".into(),
        ServiceKey::Connections => "Tracking of connections".into(),
        ServiceKey::Prefix(prefix) => format!("The meaning of range {prefix}"),
        ServiceKey::Address(address) => format!("Service address {address}"),
        ServiceKey::Set(id) => format!("Set {} of a Service's endpoints", id.0),
        ServiceKey::Backend { set, index } => {
            format!("Endpoint {index} of set {} of a Service's endpoints", set.0)
        }
        ServiceKey::Slots { set, .. } => format!("The table of set {} of endpoints", set.0),
        ServiceKey::Port(id) => format!("Port {} of the Services' ports", id.0),
        ServiceKey::Source { prefix, .. } => format!("Source range {prefix} of a Service"),
        ServiceKey::Frontend {
            address,
            protocol,
            port,
        } => {
            let protocol = match protocol {
                Protocol::Tcp => "TCP",
                Protocol::Udp => "UDP",
                Protocol::Sctp => "SCTP",
            };
            format!("Port {port}/{protocol} of Service address {address}")
        }
    }
}

fn why(reject: &Reject) -> String {
    let part = part(reject.field);
    match (reject.object, reject.reason) {
        (Some(Key::Service(ServiceKey::Frontend { .. })), RejectReason::Missing)
            if reject.field == Field::Address =>
        {
            "the address is not one at which Services are served here, because a node or a pod has it. \
             Give the Service another address"
                .into()
        }
        (_, RejectReason::Full(room)) => format!(
            "the appliance has room for {room} of its kind. Raise memory_mib, or delete what is not needed"
        ),
        (_, RejectReason::Taken) => format!("something else has the same {part}"),
        (_, RejectReason::Invalid) => format!("its {part} cannot be used"),
        (_, RejectReason::Missing) => format!("the {part} that it refers to is not in force"),
        (_, RejectReason::InUse(users)) => format!("{users} others still refer to it"),
        (_, RejectReason::Incomplete(parts)) => {
            format!("{parts} of its parts are not in force")
        }
        (_, RejectReason::OutOfOrder) => "the appliance expected another message".into(),
    }
}

const fn part(field: Field) -> &'static str {
    match field {
        Field::Whole => "content",
        Field::Generation => "generation",
        Field::Id => "number",
        Field::Mac => "MAC address",
        Field::Addresses | Field::Address => "address",
        Field::Mtu => "MTU",
        Field::Gateway => "gateway",
        Field::Port => "port",
        Field::Set => "set of endpoints",
        Field::Service => "Service port",
        Field::Link => "link",
        Field::Index => "index",
        Field::Count => "number of parts",
        Field::Slots => "slots",
        Field::Prefix => "range",
        Field::Timeout => "timeout",
        Field::Family => "address family",
        Field::Protocol => "protocol",
        Field::Peer => "node",
        Field::NextHop => "neighbor",
        Field::Rate => "rate",
        Field::Dscp => "DSCP",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sluice_contract::service::SetId;

    #[test]
    fn refusals_are_sentences_that_name_the_thing_and_what_to_do() {
        let address = "192.0.2.7".parse().unwrap();
        let frontend = ServiceKey::Frontend {
            address,
            protocol: Protocol::Udp,
            port: 53,
        };
        let set = ServiceKey::Set(SetId(7));
        for (object, field, reason, expected) in [
            (
                Key::Service(frontend),
                Field::Address,
                RejectReason::Missing,
                "Port 53/UDP of Service address 192.0.2.7 is not in force: the address is not one at which Services \
                 are served here, because a node or a pod has it. Give the Service another address",
            ),
            (
                Key::Link(LinkId::new(17).unwrap()),
                Field::Addresses,
                RejectReason::Taken,
                "Link 17 is not in force: something else has the same address",
            ),
            (
                Key::Service(set),
                Field::Count,
                RejectReason::Incomplete(2),
                "Set 7 of a Service's endpoints is not in force: 2 of its parts are not in force",
            ),
            (
                Key::Policy(PolicyKey::Identity(address)),
                Field::Whole,
                RejectReason::Full(16_000),
                "The identity of the pod at 192.0.2.7 is not in force: the appliance has room for 16000 of its kind. \
                 Raise memory_mib, or delete what is not needed",
            ),
        ] {
            let object = Some(object);
            let reject = Reject {
                object,
                field,
                reason,
            };
            assert_eq!(sentence(&reject), expected);
        }
    }
}
