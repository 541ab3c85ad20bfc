//! What a large cluster costs a running node: 10 000 Services with 100 000 endpoints, and 5 000 policies with 150 000 pods
//! elsewhere, from manifests to the appliance's acknowledgement. Prints; passes and fails by nothing.

// row: S-29

use anyhow::{Context as _, Result};
use serde_json::Value;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::{command, policy};
use std::fmt::Write as _;
use std::time::{Duration, Instant};

const SERVICES: usize = 10_000;
const ENDPOINTS: usize = 10;
const POLICIES: usize = 5_000;
const PODS: usize = 150_000;
/// Objects of one file.
const FILE: usize = 1_000;
const CHANGES: usize = 21;

fn main() {
    need!("bench model", Root, Kvm, Tool("ip"));
    let only = std::env::args()
        .skip(1)
        .find(|word| !word.starts_with("--"));
    for (name, measure) in [
        ("services", services as fn() -> Result<()>),
        ("policies", policies),
    ] {
        if only.as_deref().is_some_and(|only| only != name) {
            continue;
        }
        if let Err(error) = measure() {
            println!("  {name}: {error:#}");
        }
    }
}

fn lab() -> Result<Lab> {
    let lab = policy::prepare(&Plan {
        memory: 1024,
        ..Plan::default()
    })?;
    policy::write(&lab, "objects.yaml", policy::OBJECTS)?;
    Ok(lab)
}

fn service(n: usize) -> String {
    let (a, b) = (n / 250, n % 250 + 1);
    let mut text = format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: ns{}}}\n\
         spec: {{clusterIP: 10.97.{a}.{b}, ports: [{{name: http, port: 80, targetPort: 8080}}]}}\n",
        n % 100
    );
    text += &slice(n, true);
    text
}

fn slice(n: usize, first_is_ready: bool) -> String {
    let mut text = format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: s{n}-1, namespace: ns{}, labels: {{kubernetes.io/service-name: s{n}}}}}\n\
         addressType: IPv4\nports: [{{name: http, port: 8080, protocol: TCP}}]\nendpoints:\n",
        n % 100
    );
    for endpoint in 0..ENDPOINTS {
        let number = n * ENDPOINTS + endpoint;
        let (a, b, c) = (1 + number / 62_500, number / 250 % 250, number % 250 + 1);
        let ready = endpoint > 0 || first_is_ready;
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "- {{addresses: [10.{a}.{b}.{c}], conditions: {{ready: {ready}}}}}"
        );
    }
    text
}

fn services() -> Result<()> {
    let mut lab = lab()?;
    println!(
        "{SERVICES} Services, {} endpoints, a running node:",
        SERVICES * ENDPOINTS
    );
    // The last Service's slice has a file of its own, to be changed.
    for first in (0..SERVICES).step_by(FILE) {
        let text: String = (first..first + FILE).map(service).collect();
        policy::write(&lab, &format!("services-{first}.yaml"), &text)?;
    }
    let extra = SERVICES;
    let own = service(extra);
    policy::write(&lab, "one.yaml", &own)?;
    begin(&mut lab)?;
    changes(&lab, "one endpoint", |n| {
        let text = service(extra).replace(&slice(extra, true), &slice(extra, n % 2 == 1));
        policy::write(&lab, "one.yaml", &text)
    })?;
    many_rows(&lab)?;
    end(&mut lab)
}

/// Every endpoint of a tenth of the Services gets another port: some ten thousand rows in one change, twice, so that the second
/// one meets memory that was in use before.
fn many_rows(lab: &Lab) -> Result<()> {
    let slices = |status: &Value| {
        ["slices", "long_slices"].map(|it| number(status, &format!("/guest/{it}")))
    };
    for port in ["port: 8081, protocol", "port: 8082, protocol"] {
        let before = lab.status()?;
        let text: String = (0..FILE).map(service).collect();
        let text = text.replace("port: 8080, protocol", port);
        policy::write(lab, "services-0.yaml", &text)?;
        let after = command::until("the change in force", Duration::from_secs(20), || {
            let status = lab.status()?;
            let generation = |status: &Value| status["control"]["generation"].clone();
            anyhow::ensure!(generation(&status) != generation(&before), "not yet");
            Ok(status)
        })?;
        let [[a, b], [c, d]] = [slices(&before), slices(&after)];
        println!(
            "  {} endpoints change their port: compiled in {:.1} ms, pushed and acknowledged in {:.1} ms; {} of {} slices over 100 µs",
            FILE * ENDPOINTS,
            number(&after, "/cluster/compile_ms"),
            number(&after, "/control/last_change_ms"),
            d - b,
            c - a,
        );
    }
    Ok(())
}

fn network_policy(n: usize, port: usize) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p{n}, namespace: ns{}}}\n\
         spec:\n  podSelector: {{matchLabels: {{app: a{n}}}}}\n  policyTypes: [Ingress]\n  ingress:\n\
         \x20 - {{from: [{{podSelector: {{matchLabels: {{app: a{}}}}}}}], ports: [{{port: {port}}}]}}\n\
         \x20 - {{from: [{{namespaceSelector: {{}}, podSelector: {{matchLabels: {{tier: t1}}}}}}], ports: [{{port: 9090}}]}}\n",
        n % 500,
        (n + 500) % POLICIES,
    )
}

fn pod(n: usize) -> String {
    let app = n % POLICIES;
    let (a, b, c) = (1 + n / 62_500, n / 250 % 250, n % 250 + 1);
    format!(
        "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: q{n}, namespace: ns{}, labels: {{app: a{app}, tier: t{}}}}}\n\
         status: {{podIP: 10.{a}.{b}.{c}}}\n",
        app % 500,
        app % 3
    )
}

fn policies() -> Result<()> {
    let mut lab = lab()?;
    println!("{POLICIES} policies, {PODS} pods elsewhere, a running node:");
    for first in (0..PODS).step_by(10 * FILE) {
        let text: String = (first..first + 10 * FILE).map(pod).collect();
        policy::write(&lab, &format!("pods-{first}.yaml"), &text)?;
    }
    for first in (0..POLICIES).step_by(FILE) {
        let text: String = (first..first + FILE)
            .map(|n| network_policy(n, 8080))
            .collect();
        policy::write(&lab, &format!("policies-{first}.yaml"), &text)?;
    }
    begin(&mut lab)?;
    changes(&lab, "one policy of a local pod", |n| {
        let friend = ["role: friend", "role: server"][n % 2];
        let text = policy::FRIENDS_ONLY.replace("role: friend", friend);
        policy::write(&lab, "friends-only.yaml", &text)
    })?;
    end(&mut lab)
}

fn begin(lab: &mut Lab) -> Result<()> {
    let start = Instant::now();
    lab.start_node_only()?;
    lab.healthy(Duration::from_secs(180))?;
    let took = start.elapsed();
    let log = std::fs::read_to_string(lab.log_path())?;
    let known = log
        .lines()
        .find(|line| line.contains("the cluster is known"));
    let status = lab.status()?;
    println!("  {}", known.unwrap_or_default().trim());
    println!(
        "  healthy {:.1} s after the start; push to the acknowledgement {:.0} ms; {} rows",
        took.as_secs_f64(),
        number(&status, "/control/longest_change_ms"),
        status["control"]["rows"],
    );
    Ok(())
}

fn changes(lab: &Lab, what: &str, mut change: impl FnMut(usize) -> Result<()>) -> Result<()> {
    let (mut compiled, mut pushed, mut all) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..CHANGES {
        let before = lab.status()?["control"]["generation"].clone();
        let start = Instant::now();
        change(n)?;
        let status = command::until("the change in force", Duration::from_secs(20), || {
            let status = lab.status()?;
            anyhow::ensure!(status["control"]["generation"] != before, "not yet");
            Ok(status)
        })?;
        all.push(start.elapsed().as_secs_f64() * 1e3);
        compiled.push(number(&status, "/cluster/compile_ms"));
        pushed.push(number(&status, "/control/last_change_ms"));
    }
    for (name, mut times) in [
        ("compiled", compiled),
        ("pushed and acknowledged", pushed),
        ("seen from outside, from the file on", all),
    ] {
        times.sort_by(f64::total_cmp);
        println!(
            "  {what} changes, {name}: median {:.2} ms, slowest {:.2} ms",
            times[CHANGES / 2],
            times[CHANGES - 1]
        );
    }
    Ok(())
}

fn end(lab: &mut Lab) -> Result<()> {
    let status = lab.status()?;
    println!(
        "  {} of {} slices of the appliance's bookkeeping took more than 100 µs, the longest {:.0} µs",
        number(&status, "/guest/long_slices"),
        number(&status, "/guest/slices"),
        number(&status, "/guest/longest_slice_nanos") / 1e3
    );
    let vmm = status["machine"]["pid"].as_i64().context("no VMM")?;
    let node = lab.node().context("no node")?.pid();
    for (name, pid) in [
        ("daemon", i64::from(node.as_raw())),
        ("VMM with guest", vmm),
    ] {
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let of = |field: &str| {
            let line = text.lines().find(|line| line.starts_with(field));
            let words = line.and_then(|line| line.split_whitespace().nth(1));
            words
                .and_then(|it| it.parse::<f64>().ok())
                .unwrap_or(f64::NAN)
                / 1024.0
        };
        println!(
            "  {name}: {:.1} MiB resident, {:.1} MiB at most",
            of("VmRSS:"),
            of("VmHWM:")
        );
    }
    Ok(())
}

fn number(status: &Value, pointer: &str) -> f64 {
    status
        .pointer(pointer)
        .and_then(Value::as_f64)
        .unwrap_or(f64::NAN)
}
