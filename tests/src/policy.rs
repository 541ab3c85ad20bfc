//! A node that follows a directory of manifests, and what it shows of policy and Services.
//!
//! Whether a connection may begin is found out by beginning it; whether the node thinks so as well, by `sluice policy trace`.

use crate::command;
use crate::lab::{Lab, Plan, Pod};
use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How long anything here may take: far more than the second that is the goal, which the demo prints.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The ClusterIPs of the Service in [`OBJECTS`].
pub const SERVICE: [&str; 2] = ["10.96.0.10", "fd00:96::10"];

/// Two pods and a Service in front of the second one.
pub const OBJECTS: &str = "\
apiVersion: v1
kind: Pod
metadata: {name: pod-0, namespace: default, labels: {role: client}}
---
apiVersion: v1
kind: Pod
metadata: {name: pod-1, namespace: default, labels: {role: server}}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: default}
spec:
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00:96::10']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {role: server}
  ports: [{port: 80, targetPort: 7000}]
";

/// The second pod is reached by friends only, and the first is none.
pub const FRIENDS_ONLY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only, namespace: default}
spec:
  podSelector: {matchLabels: {role: server}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {role: friend}}}]
";

/// Starts a node that follows manifests, with those of [`OBJECTS`].
///
/// # Errors
/// If it does not become healthy.
pub fn start(plan: &Plan) -> Result<Lab> {
    let mut lab = prepare(plan)?;
    write(&lab, "objects.yaml", OBJECTS)?;
    lab.start_node()?;
    Ok(lab)
}

/// The same, with an empty directory and without starting it.
///
/// # Errors
/// If the files cannot be written.
pub fn prepare(plan: &Plan) -> Result<Lab> {
    let lab = Lab::prepare(plan)?;
    std::fs::create_dir_all(lab.manifests())?;
    lab.change_config(|config| config["source"] = json!({"directory": lab.manifests()}))?;
    Ok(lab)
}

/// Writes a manifest, as an editor would.
///
/// # Errors
/// As the file system says.
pub fn write(lab: &Lab, file: &str, text: &str) -> Result<()> {
    let path = lab.manifests().join(file);
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)?;
    std::fs::rename(beside, path).context("rename")
}

/// Removes a manifest.
///
/// # Errors
/// As the file system says.
pub fn remove(lab: &Lab, file: &str) -> Result<()> {
    std::fs::remove_file(lab.manifests().join(file)).context("remove the manifest")
}

/// Whether a TCP connection from a pod comes about, within a moment.
///
/// # Errors
/// If that cannot be tried.
pub fn connects(pod: &Pod, address: &str, port: u16) -> Result<bool> {
    let connect = format!("exec 3<>/dev/tcp/{address}/{port}");
    let output = pod
        .netns
        .output(&["timeout", "0.3", "bash", "-c", &connect])?;
    Ok(output.status.success())
}

/// Waits until connections come about, or do not any more; says how long that took.
///
/// # Errors
/// If they go on as before.
pub fn until(pod: &Pod, address: &str, port: u16, accepted: bool) -> Result<Duration> {
    let start = Instant::now();
    let what = if accepted {
        "a connection"
    } else {
        "no connection"
    };
    command::until(what, PATIENCE, || {
        ensure!(connects(pod, address, port)? == accepted, "not yet");
        Ok(())
    })?;
    Ok(start.elapsed())
}

/// Waits until the node has taken in a number of policies and told the appliance. That a connection does not come about may
/// be the fault of a machine that is busy with something else.
///
/// # Errors
/// If it does not in time.
pub fn settled(lab: &Lab, policies: u64) -> Result<()> {
    command::until("the policies in force", PATIENCE, || {
        let status = lab.status()?;
        ensure!(
            status["cluster"]["objects"]["NetworkPolicy"] == policies,
            "not taken in"
        );
        ensure!(status["control"]["settled"] == true, "not in force");
        Ok(())
    })
}

fn pods(lab: &Lab) -> Result<(&Pod, &Pod)> {
    match lab.pods.as_slice() {
        [a, b, ..] => Ok((a, b)),
        _ => anyhow::bail!("the lab has fewer than two pods"),
    }
}

fn trace(lab: &Lab, from: &str, to: &str) -> Result<Value> {
    let answer = lab.sluice(&["policy", "trace", from, to, "-o", "json"])?;
    serde_json::from_str(&answer).context("the trace is not JSON")
}

/// Applying and removing a policy changes what pods can do, in both families, and the node says which rule decides.
///
/// # Errors
/// If it does not.
pub fn policy_file_decides(lab: &Lab) -> Result<String> {
    let _server = lab.serve(1)?;
    let (client, server) = pods(lab)?;
    let addresses = [server.v4.to_string(), server.v6.to_string()];
    for address in &addresses {
        until(client, address, 7000, true)
            .with_context(|| format!("{address} is not reached without any policy"))?;
    }
    write(lab, "friends-only.yaml", FRIENDS_ONLY)?;
    let denied = until(client, &addresses[0], 7000, false)?;
    settled(lab, 1)?;
    ensure!(
        !connects(client, &addresses[1], 7000)?,
        "{} is reached in spite of the policy",
        addresses[1]
    );
    let answer = trace(lab, "pod-0", "pod-1:7000/tcp")?;
    let rule = answer["sides"][1]["rule"].as_str().unwrap_or_default();
    ensure!(
        answer["accepted"] == false && rule.contains("friends-only"),
        "the trace says {answer}"
    );
    remove(lab, "friends-only.yaml")?;
    let accepted = until(client, &addresses[0], 7000, true)?;
    until(client, &addresses[1], 7000, true)?;
    ensure!(trace(lab, "pod-0", "pod-1:7000/tcp")?["accepted"] == true);
    Ok(format!(
        "denied {} ms after the file was written, accepted {} ms after it was removed",
        denied.as_millis(),
        accepted.as_millis()
    ))
}

/// A Service's address leads to its pod, in both families, as soon as its manifest is there and no longer.
///
/// # Errors
/// If it does not.
pub fn service_leads_to_its_pod(lab: &Lab) -> Result<String> {
    let _server = lab.serve(1)?;
    let (client, _) = pods(lab)?;
    for address in SERVICE {
        until(client, address, 80, true)?;
    }
    let services: Value = serde_json::from_str(&lab.sluice(&["services", "-o", "json"])?)?;
    let endpoints = services[0]["ports"][0]["endpoints"].clone();
    Ok(format!(
        "{} and {} lead to {endpoints}",
        SERVICE[0], SERVICE[1]
    ))
}

/// A manifest with a mistake is reported with file and line, and everything goes on as before.
///
/// # Errors
/// If it is not reported, or changes something.
pub fn typo_changes_nothing(lab: &Lab) -> Result<String> {
    let _server = lab.serve(1)?;
    let (client, server) = pods(lab)?;
    let address = server.v4.to_string();
    write(lab, "friends-only.yaml", FRIENDS_ONLY)?;
    settled(lab, 1)?;
    until(client, &address, 7000, false)?;
    let generation = |status: &Value| status["control"]["generation"].clone();
    let before = generation(&lab.status()?);

    let broken = FRIENDS_ONLY.replace(
        "podSelector: {matchLabels: {role: friend}}",
        "podSelektor: {}",
    );
    write(lab, "friends-only.yaml", &broken)?;
    let status = command::until("a report of the mistake", PATIENCE, || {
        let status = lab.status()?;
        ensure!(status["cluster"]["errors"] != 0, "not yet");
        Ok(status)
    })?;
    let findings = status["cluster"]["findings"].as_array();
    let mut findings = findings.into_iter().flatten().filter_map(Value::as_str);
    let finding = findings
        .find(|it| it.contains("podSelektor"))
        .context("no finding names the field")?
        .to_owned();
    ensure!(
        finding.contains("friends-only.yaml:8:"),
        "the finding is {finding:?}"
    );
    ensure!(status["healthy"] == false, "the node calls itself healthy");
    ensure!(
        lab.log_tail().contains("podSelektor"),
        "the log has nothing of it"
    );
    ensure!(generation(&status) == before, "the tables have changed");
    ensure!(
        !connects(client, &address, 7000)?,
        "the policy is not in force any more"
    );
    let validated = lab.sluice(&["validate", &lab.manifests().to_string_lossy()])?;
    ensure!(validated.contains(&finding), "validate says {validated}");

    remove(lab, "friends-only.yaml")?;
    until(client, &address, 7000, true)?;
    let directory = format!("{}/", lab.manifests().display());
    let finding = finding.trim_start_matches(&directory);
    Ok(format!("{finding}; the policy before it stayed in force"))
}
