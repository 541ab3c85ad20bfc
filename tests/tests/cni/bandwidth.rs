//! Row B-07 with real traffic: never more than the rate, whoever sends it, and nothing for a pod that has no limit.

use super::serve;
use serde_json::{Value, json};
use sluice_tests::cni::CniLab;
use sluice_tests::lab::{Wiring, program};
use sluice_tests::load::Outcome;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;

/// Bits per second and bits at once.
const RATE: u64 = 40_000_000;
const BURST: u64 = 4_000_000;
const SECONDS: &str = "2";

/// TCP as fast as it goes, with large frames.
fn bulk(from: &Netns, to: &str) -> Outcome {
    let program = program("sluice-load");
    let program = program.to_str().expect("path");
    let said = from
        .run(&["timeout", "60", program, "bulk", to, "--time", SECONDS])
        .expect("traffic");
    serde_json::from_str(&said).expect("an outcome")
}

fn dropped(lab: &CniLab, reason: &str) -> u64 {
    let drops = lab.lab.sluice(&["drops", "-o", "json"]).expect("drops");
    let drops: Value = serde_json::from_str(&drops).expect("json");
    let drops = drops.as_array().expect("a list");
    let of_reason = drops.iter().find(|drop| drop["reason"] == reason);
    of_reason.map_or(0, |drop| drop["count"].as_u64().expect("a count"))
}

#[test]
fn b07_a_pod_gets_and_sends_no_more_than_its_bandwidth() {
    need!(
        "b07_a_pod_gets_and_sends_no_more_than_its_bandwidth",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ss")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let limits = json!({"runtimeConfig": {"bandwidth": {
            "ingressRate": RATE, "ingressBurst": BURST, "egressRate": RATE / 2, "egressBurst": BURST,
        }}});
        let (limited, of_limited) = lab.add("limited", &limits).expect("a pod");
        let (free, of_free) = lab.add("free", &Value::Null).expect("a pod");
        let _servers = [&limited, &free].map(|pod| serve(pod).expect("a server"));
        let address = |of: &Value, n: usize| {
            let text = of["ips"][n]["address"].as_str().expect("an address");
            let ip: std::net::IpAddr = text.split('/').next().expect("ip").parse().expect("ip");
            std::net::SocketAddr::new(ip, 7000).to_string()
        };
        for family in [0, 1] {
            for (from, to, rate, reason) in [
                (
                    &free,
                    address(&of_limited, family),
                    RATE,
                    "bandwidth_ingress",
                ),
                (
                    &limited,
                    address(&of_free, family),
                    RATE / 2,
                    "bandwidth_egress",
                ),
            ] {
                let before = dropped(&lab, reason);
                let outcome = bulk(from, &to);
                let most = (rate as f64 * outcome.seconds + BURST as f64) / 8.0;
                let bits = outcome.rate() * 8.0;
                println!(
                    "{wiring:?} {to}: {:.1} of {} Mbit/s",
                    bits / 1e6,
                    rate / 1_000_000
                );
                assert!(outcome.done > 0, "something arrives");
                // One frame may leave a debt.
                assert!(
                    (outcome.done as f64) < most + 65_536.0,
                    "{} bytes in {} s",
                    outcome.done,
                    outcome.seconds
                );
                assert!(
                    dropped(&lab, reason) > before,
                    "too much was dropped as {reason}"
                );
            }
        }
        // A daemon that comes back knows the limits again; the pod's end takes them away.
        let row = lab
            .lab
            .sluice(&["link", "list", "-o", "json"])
            .expect("links");
        assert!(row.contains("limited"), "{row}");
        lab.del("limited", "")
            .expect("del")
            .result()
            .expect("success");
        lab.del("free", "").expect("del").result().expect("success");
        assert_eq!(lab.left().expect("a look"), [""; 0]);
        assert!(
            lab.lab.status().expect("status")["control"]["refused"]
                .as_array()
                .is_none_or(Vec::is_empty)
        );
    }
}
