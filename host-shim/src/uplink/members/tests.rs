use super::*;

fn config(changes: &str) -> UplinkConfig {
    serde_json::from_str(&format!(r#"{{"interface": "eth0"{changes}}}"#)).unwrap()
}

fn enroller(changes: &str) -> Enroller {
    let config = config(changes);
    config.check().unwrap();
    Enroller::new(config, Vec::new(), "here".into())
}

fn own() -> Vec<IpAddr> {
    vec![[192, 0, 2, 1].into(), "2001:db8::1".parse().unwrap()]
}

fn member(name: &str, addresses: &[&str], pods: &[&str], said: &[(&str, &str)]) -> Member {
    let range = |text: &&str| {
        let prefix = parse_prefix(text).unwrap();
        sluice_model::object::Prefix::new(prefix.address(), prefix.length()).unwrap()
    };
    let annotation = |(name, value): &(&str, &str)| {
        (format!("flannel.alpha.coreos.com/{name}"), (*value).into())
    };
    Member {
        name: name.into(),
        addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
        external: Vec::new(),
        pods: pods.iter().map(range).collect(),
        annotations: said.iter().map(annotation).collect(),
    }
}

fn others(others: Vec<Member>) -> Arc<Members> {
    Arc::new(Members { own: None, others })
}

/// Each peer as `name address way`, each unused node as `name: reason`.
fn words(roster: &Roster) -> Vec<String> {
    let peer = |it: &Peer| format!("{} {} {:?}", it.name, it.address, it.way);
    let unused = |it: &Unused| format!("{}: {}", it.name, it.reason);
    let peers = roster.peers.iter().map(peer);
    peers.chain(roster.unused.iter().map(unused)).collect()
}

const DATA: &str = r#"{"VNI":1,"VtepMAC":"0a:58:00:00:00:04"}"#;
const DATA6: &str = r#"{"VNI":1,"VtepMAC":"0a:58:00:00:00:06"}"#;

#[test]
fn nodes_that_cannot_be_used_are_named_and_the_others_do_not_feel_it() {
    let mut enroller = enroller("");
    let members = others(vec![
        member("a", &["192.0.2.2"], &["10.244.2.0/24"], &[]),
        member("b", &["192.0.2.3"], &[], &[]),
        member("c", &[], &["10.244.3.0/24"], &[]),
        member("d", &["192.0.2.4"], &["10.244.2.128/25"], &[]),
        member("e", &["192.0.2.2"], &["10.244.4.0/24"], &[]),
        member("f", &["192.0.2.1"], &["10.244.5.0/24"], &[]),
        member("g", &["192.0.2.5"], &["0.0.0.0/1"], &[]),
        member("h", &["127.0.0.1"], &["10.244.6.0/24"], &[]),
        member("i", &["192.0.2.6"], &["192.0.2.0/24"], &[]),
        member(
            "j",
            &["192.0.2.7"],
            &["10.244.7.0/24"],
            &[("backend-type", "wireguard")],
        ),
        member(
            "k",
            &["192.0.2.8"],
            &["10.244.8.0/24"],
            &[
                ("backend-type", "vxlan"),
                ("backend-data", r#"{"VNI":7,"VtepMAC":"0a:58:00:00:00:04"}"#),
            ],
        ),
        member(
            "l",
            &["2001:db8::9"],
            &["fd00::/64"],
            &[("backend-type", "vxlan"), ("backend-data", "[]")],
        ),
        member("m", &["192.0.2.9"], &["ff00::/64"], &[]),
    ]);
    let roster = enroller.roster(&own(), Some(&members));
    let seen = words(&roster);
    let expected = [
        "a 192.0.2.2 Tunnel",
        "b: spec.podCIDRs: it has no range of pods",
        "c: status.addresses: it has no InternalIP",
        "d: 10.244.2.128/25 overlaps 10.244.2.0/24, the pods of a",
        "e: 192.0.2.2 is an address of a",
        "f: 192.0.2.1 is an address of this node",
        "g: spec.podCIDRs: 0.0.0.0/1 is no range for pods",
        "h: status.addresses: 127.0.0.1 is no address of a node",
        "i: 192.0.2.0/24 has 192.0.2.1 in it, an address of this node",
        "j: its flannel's backend is \"wireguard\", which is not spoken here",
        "k: its flannel's VNI is 7, this node's 1",
        "l: flannel.alpha.coreos.com/backend-data: \"[]\" is not understood",
        "m: spec.podCIDRs: ff00::/64 is no range for pods",
    ];
    assert_eq!(seen.len(), expected.len(), "{seen:#?}");
    for (seen, expected) in seen.iter().zip(expected) {
        assert!(seen.starts_with(expected), "{seen} is not {expected}");
    }
    assert!(roster.own.unwrap().contains("node_name"));
}

#[test]
fn who_has_a_range_keeps_it_whatever_comes_later() {
    let mut enroller = enroller("");
    let m = |name: &str, last: u8, pods: &str| {
        member(name, &[&format!("192.0.2.{last}")], &[pods], &[])
    };
    let first = others(vec![m("m", 2, "10.244.2.0/24")]);
    assert_eq!(
        words(&enroller.roster(&own(), Some(&first))),
        ["m 192.0.2.2 Tunnel"]
    );
    let second = others(vec![m("a", 3, "10.244.2.0/24"), m("m", 2, "10.244.2.0/24")]);
    let seen = words(&enroller.roster(&own(), Some(&second)));
    assert_eq!(
        seen,
        [
            "m 192.0.2.2 Tunnel",
            "a: 10.244.2.0/24 overlaps 10.244.2.0/24, the pods of m"
        ]
    );
    // The one that had it moves away: the other may have it.
    let third = others(vec![m("a", 3, "10.244.2.0/24"), m("m", 2, "10.244.9.0/24")]);
    let seen = words(&enroller.roster(&own(), Some(&third)));
    assert_eq!(seen, ["a 192.0.2.3 Tunnel", "m 192.0.2.2 Tunnel"]);
}

#[test]
fn peers_of_the_configuration_come_before_node_objects() {
    let peers = r#", "peers": [{"address": "192.0.2.9", "mac": "02:00:00:00:00:09", "pods": ["10.244.9.0/24"]}]"#;
    let mut enroller = enroller(peers);
    let members = others(vec![
        member("same-address", &["192.0.2.9"], &["10.244.1.0/24"], &[]),
        member("same-range", &["192.0.2.2"], &["10.244.9.0/24"], &[]),
        member("third", &["192.0.2.3"], &["10.244.3.0/24"], &[]),
    ]);
    let seen = words(&enroller.roster(&own(), Some(&members)));
    assert_eq!(
        seen,
        [
            "192.0.2.9 192.0.2.9 Tunnel",
            "third 192.0.2.3 Tunnel",
            "same-address: 192.0.2.9 is an address of a peer of the configuration",
            "same-range: 10.244.9.0/24 overlaps 10.244.9.0/24, the pods of a peer of the configuration",
        ]
    );
    for (bad, part) in [
        (
            peers.replace("10.244.9.0/24\"]", "10.244.9.0/24\", \"10.244.0.0/16\"]"),
            "overlaps",
        ),
        (
            peers.replace(
                "}]",
                r#"}, {"address": "192.0.2.9", "mac": "02:00:00:00:00:08", "pods": []}]"#,
            ),
            "is an address of",
        ),
        (
            format!(r#", "pods": ["10.244.0.0/16"]{peers}"#),
            "the pods of this node",
        ),
    ] {
        let (field, why) = config(&bad).check().unwrap_err();
        assert_eq!(field, "uplink.peers");
        assert!(why.contains(part), "{why:?} does not say {part:?}");
    }
}

#[test]
fn o03_flannels_macs_and_addresses_count_in_each_family() {
    let both = |name: &str, last: u8| {
        let (v4, v6) = (format!("198.51.100.{last}"), format!("2001:db8:9::{last}"));
        member(
            name,
            &[&format!("192.0.2.{last}")],
            &[
                &format!("10.244.{last}.0/24"),
                &format!("fd00:244:0:{last}::/64"),
            ],
            &[
                ("backend-type", "vxlan"),
                ("backend-data", DATA),
                ("backend-v6-data", DATA6),
                ("public-ip", &v4),
                ("public-ipv6", &v6),
                ("kube-subnet-manager", "true"),
            ],
        )
    };
    let mut enroller = enroller("");
    // This node has not said that it has an end in IPv6: all goes over IPv4.
    let alone = others(vec![both("f", 7)]);
    let roster = enroller.roster(&own(), Some(&alone));
    assert_eq!(words(&roster), ["f 198.51.100.7 Tunnel"]);
    assert_eq!(roster.peers[0].mac.to_string(), "0a:58:00:00:00:04");
    assert_eq!(roster.peers[0].pods.len(), 2);
    let v6: IpAddr = "2001:db8:9::7".parse().unwrap();
    assert_eq!(roster.peers[0].node_addresses, [v6, [192, 0, 2, 7].into()]);
    assert_eq!(roster.mac, Some(mac_of("here")));

    let members = Arc::new(Members {
        own: Some(both("here", 1)),
        others: vec![both("f", 7)],
    });
    let roster = enroller.roster(&own(), Some(&members));
    assert_eq!(
        words(&roster),
        ["f 198.51.100.7 Tunnel", "f 2001:db8:9::7 Tunnel"]
    );
    assert_eq!(roster.peers[1].mac.to_string(), "0a:58:00:00:00:06");
    let pods = |index: usize| {
        roster.peers[index]
            .pods
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
    };
    assert_eq!(
        (pods(0), pods(1)),
        (
            vec!["10.244.7.0/24".into()],
            vec!["fd00:244:0:7::/64".into()]
        )
    );
    // Without an address in IPv6 there is one end, whatever the object says.
    let one = enroller.roster(&own()[..1], Some(&members));
    assert_eq!(words(&one), ["f 198.51.100.7 Tunnel"]);
    // Others send to the MAC that our own object says.
    assert_eq!(roster.mac.unwrap().to_string(), "0a:58:00:00:00:04");
    assert_eq!(roster.pods.len(), 2);
}

#[test]
fn o10_the_way_follows_configuration_and_backend() {
    for (changes, backend, expected) in [
        ("", "vxlan", "n 192.0.2.2 Tunnel"),
        (
            r#", "direct": "same-subnet""#,
            "vxlan",
            "n 192.0.2.2 DirectOnLink",
        ),
        (r#", "direct": "always""#, "vxlan", "n 192.0.2.2 Direct"),
        ("", "host-gw", "n 192.0.2.2 Direct"),
        (r#", "underlay": "ipv6""#, "vxlan", "n 2001:db8::2 Tunnel"),
        (
            r#", "tunnel": {"protocol": "geneve"}"#,
            "vxlan",
            "n: its flannel's backend is vxlan, this node's tunnel is another",
        ),
        (
            r#", "tunnel": {"protocol": "geneve"}"#,
            "",
            "n 192.0.2.2 Tunnel",
        ),
    ] {
        let said = [("backend-type", backend)];
        let said = if backend.is_empty() { &[][..] } else { &said };
        let members = others(vec![member(
            "n",
            &["192.0.2.2", "2001:db8::2"],
            &["10.244.2.0/24"],
            said,
        )]);
        assert_eq!(
            words(&enroller(changes).roster(&own(), Some(&members))),
            [expected]
        );
    }
}

#[test]
fn mac_of_a_name_never_changes() {
    assert_eq!(mac_of("node-1").to_string(), "02:53:54:c4:33:83");
}

#[test]
fn ranges_outside_the_clusters_are_not_taken() {
    let cluster = vec![parse_prefix("10.244.0.0/16").unwrap()];
    let mut enroller = Enroller::new(config(""), cluster, "here".into());
    let members = others(vec![
        member(
            "inside",
            &["192.0.2.2"],
            &["10.244.2.0/24", "fd00::/64"],
            &[],
        ),
        member("outside", &["192.0.2.3"], &["10.99.0.0/24"], &[]),
    ]);
    let seen = words(&enroller.roster(&own(), Some(&members)));
    assert_eq!(seen[0], "inside 192.0.2.2 Tunnel");
    assert!(
        seen[1].starts_with("outside: spec.podCIDRs: 10.99.0.0/24 lies in none"),
        "{seen:?}"
    );
}
