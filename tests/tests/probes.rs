//! What nodes find out about the ways to each other, on a wire that loses packets, is narrower than it should be, or ends.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_tests::command;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::membership::{self, object, seen};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::underlay::{Flannel, Peer, Underlay, node4};
use std::time::{Duration, Instant};

/// Far more than three rounds and a search take.
const PATIENCE: Duration = Duration::from_secs(60);

fn quick() -> Value {
    json!({"probes": {"interval_ms": 200}})
}

/// Nodes 1 to `count`, which know each other by their objects.
fn nodes(underlay: &Underlay, count: u8) -> Result<Vec<Lab>> {
    let node = |number| membership::prepare(underlay, number, 1450, &quick());
    let mut all = (1..=count).map(node).collect::<Result<Vec<_>>>()?;
    for (number, lab) in (1..).zip(&all) {
        for other in (1..=count).filter(|other| *other != number) {
            membership::write(lab, &object(other))?;
        }
    }
    for lab in &mut all {
        lab.start_node()?;
    }
    Ok(all)
}

/// Waits until a node says of a peer's probes what is wanted.
fn until(lab: &Lab, peer: &str, what: &str, is: impl Fn(&Value) -> bool) -> Result<Value> {
    let seen = command::until(what, PATIENCE, || {
        let peer = seen(lab, peer)?;
        ensure!(is(&peer["probe"]), "{:#}", peer["probe"]);
        Ok(peer)
    });
    seen.with_context(|| {
        format!(
            "{}\n{}",
            lab.sluice(&["peers"]).unwrap_or_default(),
            lab.log_tail()
        )
    })
}

fn is_clean(probe: &Value) -> bool {
    let lost = |size: &str| &probe[size]["lost"] == 0 && probe[size]["sent"].as_u64() >= Some(5);
    probe["state"] == "reachable"
        && probe["largest"] == 1450
        && probe["full"]["size"] == 1450
        && probe["finding"].is_null()
        && probe["rtt_us"].as_u64() < Some(1_000_000)
        && probe["last_answer_ms"].as_u64() < Some(2_000)
        && lost("small")
        && lost("full")
}

/// Each node of each other, and what the status says of it.
fn all_reach_all(all: &[Lab]) -> Result<()> {
    for (number, lab) in (1..).zip(all) {
        for other in (1..=all.len()).filter(|other| *other != number) {
            until(lab, &format!("node-{other}"), "a good way", is_clean)?;
        }
        let status = lab.sluice(&["status"])?;
        let words = format!(
            "{} answer, 0 do not, 0 have not yet, 0 not probed",
            all.len() - 1
        );
        ensure!(status.contains(&words), "{status}");
    }
    Ok(())
}

fn a_peer_goes_and_comes_back() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let mut all = nodes(&underlay, 3)?;
    all_reach_all(&all)?;

    let third = all[2].node().context("no node")?;
    third.signal(Signal::SIGKILL);
    third.wait()?;
    all[2].forget_node();
    for lab in &all[..2] {
        let peer = until(lab, "node-3", "a lost peer", |it| {
            it["state"] == "unreachable"
        })?;
        let finding = peer["probe"]["finding"].as_str().unwrap_or_default();
        ensure!(
            finding.starts_with("does not answer any more, for "),
            "{peer:#}"
        );
        let words = lab.sluice(&["status"])?;
        ensure!(
            words.contains("! node node-3: does not answer any more"),
            "{words}"
        );
        // Another node's trouble is not this one's.
        ensure!(lab.status()?["healthy"] == true, "{:#}", lab.status()?);
    }
    all[2].start_node()?;
    all_reach_all(&all)
}

#[test]
fn o22_t07_nodes_probe_each_other_and_see_one_go_and_come_back() {
    need!(
        "o22_t07_nodes_probe_each_other_and_see_one_go_and_come_back",
        Root,
        Kvm,
        Tool("ip")
    );
    a_peer_goes_and_comes_back().expect("every step");
}

/// Every second packet of a probe is lost on its way from node 1.
fn half_is_lost() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let all = nodes(&underlay, 2)?;
    all_reach_all(&all)?;
    let wire = |words: &str| underlay.netns.run(&words.split(' ').collect::<Vec<_>>());
    wire("ip link add hole type veth peer name nowhere")?;
    wire("tc qdisc add dev port1 clsact")?;
    // The third bit of the number of an echo request within VXLAN within IPv4.
    wire(
        "tc filter add dev port1 ingress protocol ip u32 match u8 8 0xff at 70 match u8 4 4 at 77 action mirred egress redirect dev hole",
    )?;
    until(&all[0], "node-2", "half of them lost", |it| {
        it["small"]["lost"].as_u64() >= Some(8)
    })?;
    let began = Instant::now();
    while began.elapsed() < Duration::from_secs(5) {
        let peer = seen(&all[0], "node-2")?;
        let probe = &peer["probe"];
        ensure!(probe["state"] == "reachable", "{peer:#}");
        // Loss is no matter of size.
        ensure!(peer["mtu"] == 1450 && probe["largest"] == 1450, "{peer:#}");
        let finding = probe["finding"].as_str().unwrap_or_default();
        ensure!(finding.ends_with(" probes were lost"), "{peer:#}");
        ensure!(
            all[0].status()?["healthy"] == true,
            "a lossy way is no fault of the node"
        );
    }
    // The other way round nothing is lost.
    until(&all[1], "node-1", "a good way back", is_clean)?;
    wire("tc qdisc del dev port1 clsact")?;
    all_reach_all(&all)
}

#[test]
fn o22_real_loss_is_counted_and_not_taken_for_an_end() {
    need!(
        "o22_real_loss_is_counted_and_not_taken_for_an_end",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tc")
    );
    half_is_lost().expect("every step");
}

/// The wire to node 2 takes less than its card, and says nothing.
fn a_narrow_wire() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let all = nodes(&underlay, 3)?;
    all_reach_all(&all)?;
    let mtu = |mtu: &str| {
        underlay
            .netns
            .run(&["ip", "link", "set", "port2", "mtu", mtu])
    };
    let (from, to) = (&all[0].pods[0].netns, all[1].pods[0].v4.to_string());
    let large = || {
        from.output(&[
            "ping", "-n", "-c", "1", "-W", "2", "-M", "do", "-s", "1422", &to,
        ])
    };
    ensure!(large()?.status.success(), "a full packet before");

    mtu("1400")?;
    let narrow = |it: &Value| it["largest"] == 1350 && it["state"] == "reachable";
    let peer = until(&all[0], "node-2", "the largest size", narrow)?;
    let finding = peer["probe"]["finding"].as_str().unwrap_or_default();
    ensure!(
        finding.starts_with("packets of 1450 bytes do not arrive, of 1350 do: "),
        "{peer:#}"
    );
    let status = all[0].sluice(&["status"])?;
    ensure!(
        status.contains("! node node-2: packets of 1450 bytes"),
        "{status}"
    );
    // It holds for pods, who are told, and for that peer alone.
    command::until("pods to be told", PATIENCE, || {
        let peer = seen(&all[0], "node-2")?;
        ensure!(peer["mtu"] == 1350, "{peer:#}");
        let text = String::from_utf8_lossy(&large()?.stdout).into_owned();
        ensure!(
            text.contains("mtu = 1350") || text.contains("mtu=1350"),
            "{text}"
        );
        Ok(())
    })?;
    let fits = [
        "ping", "-n", "-c", "3", "-i", "0.1", "-W", "2", "-M", "do", "-s", "1322", &to,
    ];
    from.run(&fits)?;
    until(&all[0], "node-3", "another good way", is_clean)?;
    ensure!(
        seen(&all[0], "node-3")?["mtu"] == 1450,
        "the third node has all of it"
    );

    mtu("1500")?;
    all_reach_all(&all)?;
    command::until("the full size again", PATIENCE, || {
        let peer = seen(&all[0], "node-2")?;
        ensure!(peer["mtu"] == 1450, "{peer:#}");
        // The pod's own kernel remembers for ten minutes.
        from.run(&["ip", "route", "flush", "cache"])?;
        ensure!(large()?.status.success(), "a full packet");
        Ok(())
    })
}

#[test]
fn m03_o22_a_narrow_underlay_is_measured_and_holds_for_that_peer_alone() {
    need!(
        "m03_o22_a_narrow_underlay_is_measured_and_holds_for_that_peer_alone",
        Root,
        Kvm,
        Tool("ip")
    );
    a_narrow_wire().expect("every step");
}

/// A node of flannel answers; a node of which nothing is known need not.
fn nodes_of_others() -> Result<()> {
    let underlay = Underlay::new(1500)?;
    let plan = Plan {
        pods: 1,
        number: 1,
        mtu: 1450,
        ..Plan::default()
    };
    let peer = |number| Peer {
        number,
        six: false,
        direct: false,
    };
    let mut lab = underlay.node(&plan, &json!({}), &[peer(2), peer(3)])?;
    lab.change_config(|config| config["uplink"]["probes"] = json!({"interval_ms": 200}))?;
    lab.start_node()?;
    let _flannel = Flannel::new(&underlay, 2, &peer(1))?;
    until(&lab, &node4(2), "an answer of flannel's", is_clean)?;
    until(&lab, &node4(3), "a few rounds", |it| {
        it["full"]["sent"].as_u64() >= Some(8)
    })?;
    let silent = seen(&lab, &node4(3))?;
    ensure!(
        silent["probe"]["state"] == "no_answer_yet" && silent["probe"]["finding"].is_null(),
        "{silent:#}"
    );
    ensure!(lab.status()?["healthy"] == true, "{:#}", lab.status()?);
    Ok(())
}

#[test]
fn o22_flannel_answers_and_who_never_did_is_not_called_broken() {
    need!(
        "o22_flannel_answers_and_who_never_did_is_not_called_broken",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bridge")
    );
    nodes_of_others().expect("every step");
}
