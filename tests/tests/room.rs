//! More Services than the appliance has room for: those that do not fit are left out by name, and policy is in force.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{
    FRIENDS_ONLY, OBJECTS, connects, prepare, remove, settled, until, write,
};
use std::fmt::Write as _;
use std::time::Duration;

const SERVICES: usize = 2_000;
const ENDPOINTS: usize = 10;

/// What no appliance of 64 MiB holds.
fn services() -> String {
    let mut text = String::new();
    for n in 0..SERVICES {
        let (a, b) = (n / 250, n % 250 + 1);
        // Writing to a string does not fail.
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n:04}, namespace: ns{}}}\n\
             spec: {{clusterIP: 10.97.{a}.{b}, ports: [{{port: 80}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: s{n:04}-1, namespace: ns{}, labels: {{kubernetes.io/service-name: s{n:04}}}}}\n\
             addressType: IPv4\nports: [{{port: 8080}}]\nendpoints:\n",
            n % 20,
            n % 20
        );
        for endpoint in 0..ENDPOINTS {
            let _ = writeln!(
                text,
                "- {{addresses: [10.{}.{a}.{b}], conditions: {{ready: true}}}}",
                100 + endpoint
            );
        }
    }
    text
}

fn left_out(lab: &Lab) -> Result<u64> {
    let status = lab.status()?;
    let findings = status["cluster"]["findings"].to_string();
    ensure!(
        findings.contains("Service ns") && findings.contains("memory_mib"),
        "{findings}"
    );
    Ok(status["cluster"]["left_out"].as_u64().unwrap_or_default())
}

fn what_does_not_fit_costs_nobody_else() -> Result<()> {
    let plan = Plan {
        memory: 64,
        ..Plan::default()
    };
    let mut lab = prepare(&plan)?;
    write(&lab, "objects.yaml", OBJECTS)?;
    write(&lab, "many.yaml", &services())?;
    lab.start_node()?;
    let _server = lab.serve(1)?;
    let server = lab.pods[1].v4.to_string();
    until(&lab.pods[0], &server, 7000, true)?;
    let out = left_out(&lab)?;
    ensure!((400..600).contains(&out), "{out} are left out");

    write(&lab, "deny.yaml", FRIENDS_ONLY)?;
    let took = until(&lab.pods[0], &server, 7000, false)?;
    settled(&lab, 1)?;
    println!("a policy that denies is in force after {took:?}");
    ensure!(took < Duration::from_secs(3), "{took:?}");
    let generation = |lab: &Lab| lab.status().map(|it| it["control"]["generation"].clone());
    let before = generation(&lab)?;

    if let Some(node) = lab.node() {
        node.signal(Signal::SIGKILL);
    }
    lab.forget_node();
    lab.start_node()?;
    ensure!(
        !connects(&lab.pods[0], &server, 7000)?,
        "the policy is gone"
    );
    remove(&lab, "deny.yaml")?;
    until(&lab.pods[0], &server, 7000, true)?;
    ensure!(
        left_out(&lab)? == out,
        "others are left out after a restart"
    );
    let after = generation(&lab)?;
    println!("generations: {before} before the restart, {after} after");
    std::thread::sleep(Duration::from_secs(3));
    ensure!(
        generation(&lab)? == after,
        "everything is sent again and again"
    );
    Ok(())
}

#[test]
fn services_that_do_not_fit_cost_nobody_else() {
    need!(
        "services_that_do_not_fit_cost_nobody_else",
        Root,
        Kvm,
        Tool("ip")
    );
    what_does_not_fit_costs_nobody_else().expect("a node that goes on");
}
