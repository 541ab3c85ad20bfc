//! How policy is applied as a whole: audited before it is enforced, and with or without a default.

use serde_json::json;
use sluice_tests::lab::Plan;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::policy::{self, FRIENDS_ONLY};

#[test]
fn n16_audited_policy_lets_pass_and_says_so_until_it_is_enforced() {
    need!(
        "n16_audited_policy_lets_pass_and_says_so_until_it_is_enforced",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let mut lab = policy::prepare(&Plan::default()).expect("a lab");
    lab.change_config(|config| config["policy"] = json!({"mode": "audit"}))
        .expect("a configuration");
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    policy::write(&lab, "friends-only.yaml", FRIENDS_ONLY).expect("a policy");
    lab.start_node().expect("a node");
    let _server = lab.serve(1).expect("a server");
    let address = lab.pods[1].v4.to_string();
    policy::until(&lab.pods[0], &address, 7000, true).expect("it passes");
    sluice_tests::command::until("the line in the log", policy::PATIENCE, || {
        let log = std::fs::read_to_string(lab.log_path())?;
        let line = log.lines().find(|line| line.contains("policy would deny"));
        let line = line.ok_or_else(|| anyhow::anyhow!("not yet"))?;
        for word in ["default/pod-1", "ingress", "7000", "default/friends-only"] {
            anyhow::ensure!(line.contains(word), "no {word} in {line}");
        }
        Ok(())
    })
    .expect("it is told");
    let status = lab.status().expect("a status");
    assert_eq!(status["cluster"]["policy_mode"], "audit");
    assert!(
        status["guest"]["would_deny"].as_u64() > Some(0),
        "{}",
        status["guest"]
    );

    // Enforced by a new daemon, with the same pods.
    let end = lab.node().expect("a node");
    end.signal(nix::sys::signal::Signal::SIGKILL);
    end.wait().expect("its end");
    lab.forget_node();
    lab.change_config(|config| config["policy"] = json!({"mode": "enforce"}))
        .expect("a configuration");
    lab.start_node().expect("a node");
    policy::until(&lab.pods[0], &address, 7000, false).expect("it is denied");
}

#[test]
fn n17_without_a_policy_pods_may_do_what_the_default_says() {
    need!(
        "n17_without_a_policy_pods_may_do_what_the_default_says",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash")
    );
    let mut lab = policy::prepare(&Plan::default()).expect("a lab");
    let address = lab.pods[1].v4.to_string();
    let exception = json!({"cidr": format!("{address}/32"), "port": 7000});
    lab.change_config(|config| config["policy"] = json!({"default_deny": {"egress": [exception]}}))
        .expect("a configuration");
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    lab.start_node().expect("a node");
    let _server = lab.serve(1).expect("a server");
    // The way out is an exception; the way in is not, until a policy opens it.
    assert!(!policy::connects(&lab.pods[0], &address, 7000).expect("an attempt"));
    let open = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: open, namespace: default}
spec: {podSelector: {matchLabels: {role: server}}, policyTypes: [Ingress], ingress: [{}]}
";
    policy::write(&lab, "open.yaml", open).expect("a policy");
    policy::until(&lab.pods[0], &address, 7000, true).expect("it is open");
    // The other family's address is no exception.
    let six = lab.pods[1].v6.to_string();
    assert!(!policy::connects(&lab.pods[0], &six, 7000).expect("an attempt"));
}
