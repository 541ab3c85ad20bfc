//! Several nodes of ours on one wire: every claim of `cluster_claims`, in every mode and over both families.

use anyhow::{Context as _, Result};
use sluice_tests::cluster::{Cluster, Mode};
use sluice_tests::cluster_claims::{self as claims, Claim};
use sluice_tests::cluster_direct as direct;
use sluice_tests::cluster_frames as frames;
use sluice_tests::cluster_policy as policy;
use sluice_tests::cluster_services as services;
use sluice_tests::cluster_trouble as trouble;
use sluice_tests::cluster_tunnels as tunnels;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};

/// Shows claims on a cluster; what the nodes say is printed if one fails.
fn show(nodes: u8, mode: Mode, six: bool, claims: &[(&str, Claim)]) {
    shown(nodes, mode, six, claims).expect("every claim holds");
}

fn shown(nodes: u8, mode: Mode, six: bool, claims: &[(&str, Claim)]) -> Result<()> {
    hold(&Cluster::start(nodes, mode, six)?, claims)
}

fn hold(cluster: &Cluster, claims: &[(&str, Claim)]) -> Result<()> {
    let (mode, six) = (cluster.mode, cluster.six);
    for (name, claim) in claims {
        let on = format!("{} over {}", mode.word(), if six { "IPv6" } else { "IPv4" });
        let seen = claim(cluster).with_context(|| format!("{on}: {name}"));
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
fn o01_o02_o08_o10_o11_o13_v02_pods_talk_in_every_mode_over_both_families_in_frames_as_they_should_be()
 {
    need!(
        "o01_o02_o08_o10_o11_o13_v02_pods_talk_in_every_mode_over_both_families_in_frames_as_they_should_be",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ethtool"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    for mode in Mode::ALL {
        for six in [false, true] {
            show(2, mode, six, &[ACROSS, frames::CLAIM]);
        }
    }
}

#[test]
fn w06_nodes_and_pods_talk_through_tunnels_and_without() {
    need!(
        "w06_nodes_and_pods_talk_through_tunnels_and_without",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    for (mode, six) in [
        (Mode::Vxlan, false),
        (Mode::Geneve, true),
        (Mode::Ipip, false),
        (Mode::Direct, false),
    ] {
        show(2, mode, six, &[HOSTS]);
    }
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
fn s02_s07_s08_s10_s11_s12_s13_s19_s21_w06_n24_services_are_reached_across_nodes_and_from_outside()
{
    need!(
        "s02_s07_s08_s10_s11_s12_s13_s19_s21_w06_n24_services_are_reached_across_nodes_and_from_outside",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    let all = [&services::ALL[..], &[policy::PROBES]].concat();
    show(3, Mode::Vxlan, false, &all);
}

#[test]
fn w08_no_service_leads_a_pod_into_another_nodes_tunnel() {
    need!(
        "w08_no_service_leads_a_pod_into_another_nodes_tunnel",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    for mode in [Mode::Vxlan, Mode::Direct] {
        show(2, mode, false, &[tunnels::CLAIM]);
    }
}

#[test]
fn s28_a_backends_node_answers_clients_outside_itself() {
    need!(
        "s28_a_backends_node_answers_clients_outside_itself",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("tcpdump"),
        Tool("tshark")
    );
    for (mode, six) in [(Mode::Geneve, false), (Mode::GeneveIp, true)] {
        let cluster = Cluster::start_with(2, mode, six, direct::turn_on).expect("a cluster");
        hold(&cluster, &[direct::CLAIM]).expect("the claim holds");
    }
}

#[test]
fn o14_policy_goes_by_the_identity_that_the_tunnel_tells() {
    need!(
        "o14_policy_goes_by_the_identity_that_the_tunnel_tells",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    show(3, Mode::Geneve, false, &[policy::IDENTITIES]);
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
    for (name, befall) in trouble::ALL {
        let seen = befall(&mut cluster);
        if seen.is_err() {
            eprintln!("{}", cluster.words());
        }
        println!("{name}: {}", seen.expect(name));
    }
}
