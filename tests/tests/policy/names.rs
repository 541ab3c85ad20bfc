//! Domain names in policy: a real resolver in a pod, a real client in another, and where outside the cluster that one may go.

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use sluice_tests::command::Running;
use sluice_tests::lab::{Lab, Plan, Pod};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::policy;
use sluice_tests::traffic::serve;
use sluice_tests::underlay::{Underlay, node4, node6};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

/// The client may ask the resolver, and go where two names lead; nowhere else.
const NAMES_ONLY: &str = "\
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names-only}
spec:
  tier: Admin
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {role: client}}}}
  egress:
  - action: Accept
    to: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {role: server}}}}]
    protocols: [{udp: {destinationPort: {number: 53}}}, {tcp: {destinationPort: {number: 53}}}]
  - action: Accept
    to: [{domainNames: [site.test, '*.cdn.test']}]
    protocols: [{tcp: {destinationPort: {number: 7000}}}]
  - action: Deny
    to: [{networks: ['0.0.0.0/0', '::/0']}]
";

/// What a namespace's programs find in `/etc/resolv.conf`.
struct ResolvConf(PathBuf);

impl ResolvConf {
    fn new(netns: &Netns, server: &str) -> Self {
        let directory = PathBuf::from("/etc/netns").join(netns.name());
        std::fs::create_dir_all(&directory).expect("a directory");
        let text = format!("nameserver {server}\noptions timeout:5 attempts:4\n");
        std::fs::write(directory.join("resolv.conf"), text).expect("a file");
        Self(directory)
    }
}

impl Drop for ResolvConf {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.0) {
            eprintln!("{} stays behind: {error}", self.0.display());
        }
    }
}

/// The site's number on the wire.
const SITE: u8 = 200;

/// A node with three pods and a card, not started, and a site outside the cluster on the same wire.
fn prepare() -> (Lab, Netns, Underlay) {
    let underlay = Underlay::new(1500).expect("a wire");
    let site = Netns::new("site").expect("a site");
    underlay.attach(&site, SITE).expect("the site's card");
    let own = [node4(1), node6(1)];
    let plan = Plan {
        pods: 3,
        number: 1,
        mtu: 1450,
        node_addresses: own.to_vec(),
        ..Plan::default()
    };
    let lab = underlay.node(&plan, &json!({}), &[]).expect("a lab");
    std::fs::create_dir_all(lab.manifests()).expect("a directory");
    let [own4, own6] = lab.pods[1].addresses();
    lab.change_config(|config| {
        let routes = ["10.244.0.0/16", "fd00:244::/48", "10.96.0.0/16"];
        config["host_link"] = json!({"addresses": own, "routes": routes});
        config["source"] = json!({"directory": lab.manifests()});
        config["policy"] = json!({"resolvers": [own4, own6]});
    })
    .expect("a configuration");
    (lab, site, underlay)
}

/// dnsmasq, with names that lead to `site` and one that leads to itself.
fn resolver(own: &Pod, site: &[String; 2]) -> Running {
    let (own_addresses, site) = (own.addresses().join(","), site.join(","));
    let mut command = own.netns.command("dnsmasq");
    command
        .args([
            "--keep-in-foreground",
            "--conf-file=/dev/null",
            "--pid-file=",
        ])
        .args([
            "--no-resolv",
            "--no-hosts",
            "--user=root",
            "--local-ttl=600",
        ])
        .arg(format!("--host-record=site.test,{site}"))
        .arg(format!("--host-record=www.site.test,{site}"))
        .arg(format!("--host-record=other.test,{own_addresses}"))
        .arg(format!("--host-record=real.origin.test,{site}"))
        .arg("--cname=a.b.cdn.test,real.origin.test")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Running::start("dnsmasq", &mut command).expect("a resolver")
}

/// Resolves a name and connects, in one program, once. The limit is only for what never comes about.
fn reaches(pod: &Pod, name: &str, limit: &str) -> bool {
    let connect = format!("exec 3<>/dev/tcp/{name}/7000");
    let words = ["timeout", limit, "bash", "-c", &connect];
    pod.netns
        .output(&words)
        .expect("an attempt")
        .status
        .success()
}

/// Whether a name is answered, whatever policy says of its address.
fn is_resolved(pod: &Pod, name: &str) -> bool {
    let output = pod.netns.output(&["getent", "ahosts", name]);
    output.expect("an attempt").status.success()
}

fn denied(lab: &Lab) -> u64 {
    let drops = lab.sluice(&["drops", "-o", "json"]).expect("drops");
    let drops: Value = serde_json::from_str(&drops).expect("json");
    let mut drops = drops.as_array().expect("a list").iter();
    let of_reason = drops.find(|drop| drop["reason"] == "policy_egress");
    of_reason.map_or(0, |drop| drop["count"].as_u64().expect("a count"))
}

/// The node says what its client was told, and by which name it passes.
fn assert_told(lab: &Lab, site: &str) {
    let names = lab.sluice(&["policy", "names", "pod-0", "-o", "json"]);
    let names: Value = serde_json::from_str(&names.expect("names")).expect("json");
    let mut told = names["names"].as_array().expect("a list").iter();
    let told = told.find(|it| it["address"] == site).expect("the site");
    assert_eq!(
        (&told["name"], &told["pod"]),
        (&json!("site.test"), &json!("default/pod-0"))
    );
    // The resolver's 600 seconds and five more.
    let seconds = told["seconds"].as_i64().expect("seconds");
    assert!((1..=605).contains(&seconds), "{seconds}");
    let target = format!("{site}:7000");
    let trace = lab
        .sluice(&["policy", "trace", "pod-0", &target])
        .expect("a trace");
    assert!(
        trace.contains(&format!("site.test has {site}, for ")),
        "{trace}"
    );
}

#[test]
fn n14_d05_names_lead_where_the_resolver_said_and_nowhere_else() {
    need!(
        "n14_d05_names_lead_where_the_resolver_said_and_nowhere_else",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bash"),
        Tool("dnsmasq"),
        Tool("getent")
    );
    let (mut lab, site, _underlay) = prepare();
    let [own4, _] = lab.pods[1].addresses();
    policy::write(&lab, "objects.yaml", policy::OBJECTS).expect("objects");
    lab.start_node().expect("a node");
    let _servers = [&lab.pods[1].netns, &site].map(|netns| serve(netns).expect("a server"));
    let [site4, site6] = [node4(SITE), node6(SITE)];
    let _resolver = resolver(&lab.pods[1], &[site4.clone(), site6.clone()]);
    let _conf = ResolvConf::new(&lab.pods[0].netns, &own4);
    {
        let client = &lab.pods[0];
        for address in [&site4, &site6] {
            policy::until(client, address, 7000, true).expect("no policy yet");
        }
        policy::write(&lab, "names.yaml", NAMES_ONLY).expect("a policy");
        policy::until(client, &site4, 7000, false).expect("denied by address");
        assert!(!reaches(client, &site6, "0.3"));

        // The first packet after the answer passes: nothing is denied on the way.
        let before = denied(&lab);
        assert!(reaches(client, "site.test", "30"), "by its name");
        assert_eq!(
            denied(&lab),
            before,
            "packets were denied before one passed"
        );
        policy::until(client, &site4, 7000, true).expect("what was learnt");

        assert_told(&lab, &site4);

        // Nothing is hidden, and nothing else is allowed.
        assert!(is_resolved(client, "other.test"));
        assert!(!reaches(client, "other.test", "2"));
        assert!(!reaches(client, &own4, "0.3"));
        // Nobody learns from what another pod was told.
        assert!(reaches(&lab.pods[2], &own4, "30"), "a pod without rules");
    }

    // The daemon dies, and another one takes over: what the appliance has learnt is still there.
    let node = lab.node().expect("a node");
    node.signal(Signal::SIGKILL);
    node.wait().expect("its end");
    lab.forget_node();
    lab.start_node().expect("a new daemon");
    assert_eq!(lab.status().expect("a status")["machine"]["adopted"], true);
    let client = &lab.pods[0];
    policy::until(client, &site4, 7000, true).expect("still known");
    assert!(
        reaches(client, "a.b.cdn.test", "30"),
        "through a chain of names"
    );
    assert!(!reaches(client, "other.test", "2"));

    // Without the rule nothing is left of what it allowed.
    let changed = NAMES_ONLY.replace("[site.test, '*.cdn.test']", "[elsewhere.test]");
    policy::write(&lab, "names.yaml", &changed).expect("another policy");
    policy::until(client, &site4, 7000, false).expect("no longer named");
    policy::remove(&lab, "names.yaml").expect("no policy");
    policy::until(client, &site4, 7000, true).expect("free again");
    lab.healthy(Duration::from_secs(60))
        .expect("a healthy node");
}
