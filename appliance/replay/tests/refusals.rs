//! Tables that cannot be used are refused with the place and the cause; nothing is guessed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says where"
)]

use sluice_contract::service::{PortRow, ServiceRow};
use sluice_contract::{LinkId, Row};
use sluice_replay::replay::{Replay, memory};
use sluice_replay::tables::Tables;

/// The error of the document, of reading it or of putting it in force.
fn refused(json: &str) -> String {
    let tables = match Tables::read(json) {
        Ok(tables) => tables,
        Err(error) => return error.to_string(),
    };
    let mut memory = memory(&tables);
    match Replay::new(&tables, 0, &mut memory, &[], std::io::sink()) {
        Ok(_) => panic!("{json} was taken"),
        Err(error) => error.to_string(),
    }
}

const POD: &str = r#"{ "name": "pod:a", "addresses": ["10.0.0.1"] }"#;

#[test]
fn every_refusal_names_path_and_field() {
    let pod = |rest: &str| format!(r#"{{ "capacity": "tiny", "links": [{POD}], {rest} }}"#);
    let cases: &[(String, &str)] = &[
        (
            r#"{ "lnks": [] }"#.into(),
            "lnks: unknown field `lnks`, expected one of",
        ),
        (
            r#"{ "links": [{ "name": "pod:a", "adresses": [] }] }"#.into(),
            "links[0].adresses: unknown field",
        ),
        (
            r#"{ "links": [{ "name": "pod:a", "addresses": ["10.0.0"] }] }"#.into(),
            "links[0].addresses[0]: invalid IP address",
        ),
        (
            r#"{ "links": [{ "name": "eth0" }] }"#.into(),
            r#"links[0].name: "eth0" is neither uplink, host nor pod:NAME"#,
        ),
        (
            r#"{ "links": [{ "name": "uplink" }] }"#.into(),
            "links[0].mac: Missing; only a pod's has a default",
        ),
        (
            format!(r#"{{ "links": [{POD}, {POD}] }}"#),
            r#"links[1].name: There are two links "pod:a""#,
        ),
        (
            r#"{ "links": [{ "name": "pod:a", "id": 3 }] }"#.into(),
            "links[0].id: 3 is no number of a pod's link (16 to 4094)",
        ),
        (
            r#"{ "links": [{ "name": "pod:a", "mac": "2:0:0:0:0:1" }] }"#.into(),
            "links[0].mac: \"2:0:0:0:0:1\" is no MAC",
        ),
        (
            pod(r#""routes": [{ "prefix": "10.0.0.1/8", "next_hop": 1 }]"#),
            "routes[0].prefix: \"10.0.0.1/8\" is no prefix, such as 10.0.0.0/16 with all bits behind it zero",
        ),
        (
            pod(r#""nat": { "node4": "fd00::1" }"#),
            "nat.node4: invalid IPv4 address",
        ),
        (
            pod(r#""connections": { "tcp": 3 }"#),
            "connections.tcp: unknown field",
        ),
        (
            pod(r#""connections": { "udp": 0 }"#),
            "connections: The dataplane refuses it: Timeout: Invalid",
        ),
        (
            pod(r#""services": { "ports": [{ "id": 1, "family": "v4", "cluster": 9 }] }"#),
            "services.ports[0]: The dataplane refuses it: Set: Missing",
        ),
        (
            pod(
                r#""services": { "sets": [{ "id": 1, "family": "v6", "backends": ["10.0.0.2:80"] }] }"#,
            ),
            "services.sets[0].backends[0]: The dataplane refuses it: Family: Invalid",
        ),
        (
            pod(
                r#""services": { "frontends": [{ "address": "10.9.0.1", "protocol": "icmp", "port": 1, "service": 1, "kind": "cluster-ip" }] }"#,
            ),
            "services.frontends[0].protocol: unknown variant `icmp`, expected one of `tcp`, `udp`, `sctp`",
        ),
        (
            pod(
                r#""policy": { "spans": [{ "id": 1, "entries": [{ "start": "tcp", "target": "nowhere" }] }] }"#,
            ),
            "policy.spans[0].entries[0].target: unknown variant `nowhere`",
        ),
        (
            pod(r#""policy": { "bindings": [{ "link": "pod:z" }] }"#),
            r#"policy.bindings[0].link: There is no "pod:z""#,
        ),
        (
            pod(
                r#""overlay": { "peers": [{ "id": 1, "address": "10.9.9.9", "mac": "02:00:00:00:00:09", "next_hop": 4, "mtu": 1500 }] }"#,
            ),
            "overlay.peers[0]: The dataplane refuses it: NextHop: Missing",
        ),
        (
            "{ \"links\": [] } trailing".into(),
            ".: trailing characters at line 1",
        ),
        (
            "{ \"links\": [".into(),
            "links: EOF while parsing a list at line 1",
        ),
    ];
    for (json, says) in cases {
        let error = refused(json);
        assert!(error.starts_with(says), "{json}\nsays {error}\nnot  {says}");
    }
}

#[test]
fn what_is_not_said_has_the_value_that_the_documentation_names() {
    let json = r#"{
        "links": [
            { "name": "pod:second" },
            { "name": "pod:first", "id": 16 },
            { "name": "host", "mac": "02:00:00:00:00:02" }
        ],
        "services": {
            "sets": [{ "id": 5, "family": "v4", "backends": [] }],
            "ports": [{ "id": 1, "family": "v4", "local": 5, "sources": ["10.0.0.0/8", "11.0.0.0/8", "0.0.0.0/0"] }]
        }
    }"#;
    let tables = Tables::read(json).unwrap();
    let id = |name| tables.links.id(name).map(LinkId::raw);
    assert_eq!(
        (id("pod:first"), id("pod:second"), id("host")),
        (Some(16), Some(17), Some(2))
    );
    let links: Vec<_> = tables
        .rows
        .iter()
        .filter_map(|(_, row)| match row {
            Row::Link(link) => Some((link.id.raw(), link.mtu, link.identity.0, link.incarnation)),
            _ => None,
        })
        .collect();
    assert_eq!(
        links,
        [(17, 1500, 273, 1), (16, 1500, 272, 1), (2, 1500, 1, 1)]
    );
    let ports: Vec<&PortRow> = tables
        .rows
        .iter()
        .filter_map(|(_, row)| match row {
            Row::Service(ServiceRow::Port(port)) => Some(port),
            _ => None,
        })
        .collect();
    assert_eq!(ports[0].serving.map(|set| set.0), Some(5));
    assert!(ports[0].endpoints);
    assert_eq!(ports[0].source_lengths.as_slice(), [0, 8]);
}
