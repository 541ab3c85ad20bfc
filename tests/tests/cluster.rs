//! Several nodes of ours on one wire: every claim of `cluster_claims`, in every mode and over both families.

use anyhow::{Context as _, Result};
use sluice_tests::cluster::{Cluster, Mode};
use sluice_tests::cluster_claims::{self as claims, Claim};
use sluice_tests::cluster_trouble as trouble;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};

/// Shows claims on a cluster; what the nodes say is printed if one fails.
fn show(nodes: u8, mode: Mode, six: bool, claims: &[(&str, Claim)]) {
    shown(nodes, mode, six, claims).expect("every claim holds");
}

fn shown(nodes: u8, mode: Mode, six: bool, claims: &[(&str, Claim)]) -> Result<()> {
    let cluster = Cluster::start(nodes, mode, six)?;
    for (name, claim) in claims {
        let on = format!("{} over {}", mode.word(), if six { "IPv6" } else { "IPv4" });
        let seen = claim(&cluster).with_context(|| format!("{on}: {name}"));
        if seen.is_err() {
            eprintln!("{}", cluster.words());
        }
        println!("{on}: {name}: {}", seen?);
    }
    Ok(())
}

const ACROSS: (&str, Claim) = ("pods of two nodes", claims::pods_talk_across_nodes);
const HOSTS: (&str, Claim) = ("nodes and pods", claims::nodes_and_pods_talk);

#[test]
fn o01_o11_w06_pods_and_nodes_talk_through_vxlan_and_geneve_over_both_families() {
    need!(
        "o01_o11_w06_pods_and_nodes_talk_through_vxlan_and_geneve_over_both_families",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    show(2, Mode::Vxlan, false, &[ACROSS, HOSTS]);
    show(2, Mode::Vxlan, true, &[ACROSS]);
    show(2, Mode::VxlanGbp, false, &[ACROSS]);
    show(2, Mode::Geneve, false, &[ACROSS]);
    show(2, Mode::Geneve, true, &[ACROSS, HOSTS]);
}

#[test]
fn o10_o17_w06_pods_and_nodes_talk_without_a_tunnel() {
    need!(
        "o10_o17_w06_pods_and_nodes_talk_without_a_tunnel",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    show(2, Mode::Direct, false, &[ACROSS, HOSTS]);
}

#[test]
fn e01_b01_pods_and_the_outside_reach_each_other_and_the_hosts_own_stays_the_hosts() {
    need!(
        "e01_b01_pods_and_the_outside_reach_each_other_and_the_hosts_own_stays_the_hosts",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    show(
        3,
        Mode::Vxlan,
        false,
        &[
            ("three nodes", ACROSS.1),
            ("egress", claims::pods_reach_the_outside_as_their_node),
            ("host ports", claims::the_outside_reaches_host_ports),
            (
                "the host's own",
                claims::the_hosts_own_traffic_stays_the_hosts,
            ),
        ],
    );
}

#[test]
fn o16_pods_find_each_other_again_whatever_befalls_the_underlay() {
    need!(
        "o16_pods_find_each_other_again_whatever_befalls_the_underlay",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tc")
    );
    let mut cluster = Cluster::start(2, Mode::Vxlan, false).expect("a cluster");
    type Trouble = fn(&mut Cluster) -> Result<String>;
    let all: [(&str, Trouble); 4] = [
        ("a peer's MAC changes", trouble::a_peers_mac_changes),
        ("the uplink flaps", trouble::the_uplink_flaps),
        ("a peer is replaced", trouble::a_peer_is_replaced),
        (
            "the underlay loses packets",
            trouble::the_underlay_loses_packets,
        ),
    ];
    for (name, befall) in all {
        let seen = befall(&mut cluster);
        if seen.is_err() {
            eprintln!("{}", cluster.words());
        }
        println!("{name}: {}", seen.expect(name));
    }
}
