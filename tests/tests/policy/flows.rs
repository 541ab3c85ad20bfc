//! Whole connections under policy: replies, flows that are older than a policy, Services, errors, and much change at once.

use sluice_tests::command::{self, Running};
use sluice_tests::lab::{Lab, Plan, Pod, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{self, FRIENDS_ONLY, settled, until};
use sluice_tests::traffic;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

/// Nobody reaches the pods of a role.
fn isolate(name: &str, role: &str) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}, namespace: default}}\n\
         spec: {{podSelector: {{matchLabels: {{role: {role}}}}}, policyTypes: [Ingress]}}\n"
    )
}

/// A connection that echoes a line every tenth of a second until it is told to stop. Ends with 7 if an answer stays away.
struct Conversation {
    bash: Running,
    /// How many answers came.
    count: PathBuf,
    stop: PathBuf,
}

impl Conversation {
    /// Begins; at least one answer has come when this returns.
    fn begin(lab: &Lab, client: &Pod, address: &str) -> Self {
        let (count, stop) = (lab.run_dir().join("answers"), lab.run_dir().join("stop"));
        let script = format!(
            "exec 3<>/dev/tcp/{address}/7000; printf E >&3\n\
             until [ -e {} ]; do echo line >&3; read -t 10 -u 3 answer || exit 7; echo >> {}; sleep 0.1; done",
            stop.display(),
            count.display(),
        );
        let mut command = client.netns.command("bash");
        let bash = Running::start("bash", command.args(["-c", &script])).expect("a connection");
        let begun = Self { bash, count, stop };
        begun.goes_on(1);
        begun
    }

    /// Waits for so many more answers.
    fn goes_on(&self, more: u64) {
        let answers = || std::fs::metadata(&self.count).map_or(0, |file| file.len());
        let before = answers();
        command::until("an answer", policy::PATIENCE, || {
            anyhow::ensure!(answers() >= before + more, "{} answers", answers());
            Ok(())
        })
        .expect("an answer");
    }

    /// Whether every line was answered to its end.
    fn ends_well(mut self) -> bool {
        std::fs::write(&self.stop, "").expect("a word");
        self.bash.wait().expect("an end").success()
    }

    /// Whether an answer stays away.
    fn breaks_off(mut self) -> bool {
        !self.bash.wait().expect("an end").success()
    }
}

#[test]
fn n06_replies_pass_whatever_the_other_direction_says() {
    need!(
        "n06_replies_pass_whatever_the_other_direction_says",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    let _server = lab.serve(1).expect("a server");
    let (client, server) = (&lab.pods[0], lab.pods[1].v4.to_string());
    let before = Conversation::begin(&lab, client, &server);
    policy::write(&lab, "no-way-in.yaml", &isolate("no-way-in", "client")).expect("a policy");
    settled(&lab, 1).expect("in force");
    until(client, &server, 7000, true).expect("replies to a new connection");
    before.goes_on(3);
    assert!(before.ends_well(), "replies to one that was there");
}

#[test]
fn n07_flows_that_a_policy_would_not_let_begin_end_or_live_as_configured() {
    need!(
        "n07_flows_that_a_policy_would_not_let_begin_end_or_live_as_configured",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    for (mode, lives) in [("judged", false), ("kept", true)] {
        let mut lab = policy::prepare(&Plan::default()).expect("a lab");
        lab.change_config(|config| config["policy"] = serde_json::json!({"established": mode}))
            .expect("a configuration");
        policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
        lab.start_node().expect("a node");
        let _server = lab.serve(1).expect("a server");
        let (client, server) = (&lab.pods[0], lab.pods[1].v4.to_string());
        let old = Conversation::begin(&lab, client, &server);
        policy::write(&lab, "friends-only.yaml", FRIENDS_ONLY).expect("a policy");
        settled(&lab, 1).expect("in force");
        until(client, &server, 7000, false).expect("no new connection");
        if lives {
            old.goes_on(5);
            assert!(old.ends_well(), "established: {mode}");
        } else {
            assert!(old.breaks_off(), "established: {mode}");
        }
    }
}

#[test]
fn n05_egress_is_judged_by_the_endpoint_and_not_by_the_services_address() {
    need!(
        "n05_egress_is_judged_by_the_endpoint_and_not_by_the_services_address",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    let _server = lab.serve(1).expect("a server");
    let client = &lab.pods[0];
    let only = |port: u16| {
        format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: out, namespace: default}}\n\
             spec:\n  podSelector: {{matchLabels: {{role: client}}}}\n  policyTypes: [Egress]\n  egress:\n\
             \x20 - {{to: [{{podSelector: {{matchLabels: {{role: server}}}}}}], ports: [{{port: {port}}}]}}\n"
        )
    };
    for address in policy::SERVICE {
        until(client, address, 80, true).expect("the Service without a policy");
        policy::write(&lab, "out.yaml", &only(80)).expect("a policy");
        until(client, address, 80, false)
            .expect("the Service's own port is none of the endpoint's");
        policy::write(&lab, "out.yaml", &only(7000)).expect("a policy");
        until(client, address, 80, true).expect("the endpoint's port");
        policy::remove(&lab, "out.yaml").expect("no policy");
        settled(&lab, 0).expect("in force");
    }
}

#[test]
fn n08_errors_of_allowed_flows_pass_and_pings_obey_policy() {
    need!(
        "n08_errors_of_allowed_flows_pass_and_pings_obey_policy",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("ping")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    let (client, server) = (&lab.pods[0], &lab.pods[1]);
    let address = server.v4.to_string();
    policy::write(&lab, "no-way-in.yaml", &isolate("no-way-in", "client")).expect("a policy");
    settled(&lab, 1).expect("in force");
    // Nobody listens on the discard port: a later write meets the error that an earlier one caused.
    let script = format!(
        "exec 3<>/dev/udp/{address}/9; for i in $(seq 100); do echo $i >&3 || exit 7; sleep 0.1; done"
    );
    let told = client.netns.output(&["bash", "-c", &script]).expect("bash");
    assert_eq!(told.status.code(), Some(7), "no error came back");
    let ping = |from: &Pod, to: &str| {
        let output = from
            .netns
            .output(&["ping", "-c", "1", "-W", "1", to])
            .expect("ping");
        output.status.success()
    };
    traffic::ping(&client.netns, &address, 1, 56).expect("the answer to a ping of its own");
    assert!(
        !ping(server, &client.v4.to_string()),
        "a ping that nobody allowed"
    );
}

#[test]
fn n09_pod_reaches_itself_directly_and_through_its_service_under_deny_all() {
    need!(
        "n09_pod_reaches_itself_directly_and_through_its_service_under_deny_all",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    // What a pod sends to itself through a Service comes back from the node.
    let plan = Plan {
        node_addresses: vec!["192.0.2.1".into(), "2001:db8::1".into()],
        ..Plan::default()
    };
    let lab = policy::start(&plan).expect("a node");
    let _server = lab.serve(1).expect("a server");
    let server = &lab.pods[1];
    policy::write(&lab, "no-way-in.yaml", &isolate("no-way-in", "server")).expect("a policy");
    until(&lab.pods[0], &server.v4.to_string(), 7000, false).expect("isolation");
    until(server, &server.v4.to_string(), 7000, true).expect("its own address");
    for address in policy::SERVICE {
        until(server, address, 80, true).expect("its own Service");
    }
}

#[test]
fn n22_labels_that_change_all_the_time_end_where_the_last_change_says() {
    need!(
        "n22_labels_that_change_all_the_time_end_where_the_last_change_says",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    let _server = lab.serve(1).expect("a server");
    policy::write(&lab, "friends-only.yaml", FRIENDS_ONLY).expect("a policy");
    let (client, address) = (&lab.pods[0], lab.pods[1].v4.to_string());
    until(client, &address, 7000, false).expect("isolation");
    let start = Instant::now();
    for n in 0..600 {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: q{}, namespace: default, labels: {{role: r{n}}}}}\n\
             status: {{podIP: 10.9.{}.{}}}\n",
            n % 50,
            n / 200,
            n % 200 + 1
        );
        policy::write(&lab, &format!("pod-{}.yaml", n % 50), &pod).expect("a pod");
        if n % 100 == 50 {
            let role = if n % 200 == 50 { "friend" } else { "client" };
            let objects = policy::OBJECTS.replace("role: client", &format!("role: {role}"));
            policy::write(&lab, "objects.yaml", &objects).expect("labels");
            let took =
                until(client, &address, 7000, role == "friend").expect("the new label's verdict");
            println!(
                "{role}: {} ms after the change, among others",
                took.as_millis()
            );
        }
        std::thread::sleep(Duration::from_millis(4));
    }
    println!("600 changes in {} ms", start.elapsed().as_millis());
    command::until("a node that is up to date", policy::PATIENCE, || {
        anyhow::ensure!(lab.status()?["healthy"] == true, "changes are on their way");
        Ok(())
    })
    .expect("health after the last change");
    until(client, &address, 7000, false).expect("a client is no friend");
}

#[test]
fn t11_status_says_what_the_node_follows_and_its_exit_code_whether_it_is_well() {
    need!(
        "t11_status_says_what_the_node_follows_and_its_exit_code_whether_it_is_well",
        Root,
        Kvm,
        Tool("ip")
    );
    let mut lab = policy::start(&Plan::default()).expect("a node");
    let run_dir = lab.run_dir().to_string_lossy().into_owned();
    let status = || {
        let mut command = Command::new(program("sluice"));
        let output = command
            .args(["--run-dir", &run_dir, "status"])
            .output()
            .expect("sluice");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    let (code, text) = status();
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "isolation",
        "generation",
        "directory /",
        "in sync",
        "last heard",
        "2 pods, 1 services",
        "peers",
        "pod mtu",
    ] {
        assert!(text.contains(part), "{part:?} is not in\n{text}");
    }
    policy::write(&lab, "friends-only.yaml", "kind: [").expect("a mistake");
    command::until("an unwell node", Duration::from_secs(20), || {
        anyhow::ensure!(status().0 == Some(1), "not yet");
        Ok(())
    })
    .expect("an unwell node");
    assert!(status().1.contains("friends-only.yaml:2"), "{}", status().1);
    lab.node().expect("a node").stop(Duration::from_secs(10));
    assert_eq!(status().0, Some(3));
}
