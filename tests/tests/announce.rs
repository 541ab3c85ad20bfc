//! What routers learn of nodes: BIRD outside the cluster, in a session with every node.

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use sluice_tests::bird::{Bird, NODES_ASN, OWN_ASN};
use sluice_tests::cluster::{Cluster, Mode};
use sluice_tests::cluster_objects::{CLUSTER_LB, LOCAL_LB, SERVICE_PORT};
use sluice_tests::command::{self, Running};
use sluice_tests::membership;
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::traffic::{at, load, serve};
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// Far more than the second that is the goal.
const PATIENCE: Duration = Duration::from_secs(30);

fn announcing(router: &str, password_file: Option<PathBuf>) -> Value {
    let mut peer = json!({"address": router, "asn": OWN_ASN, "hold_seconds": 9});
    if let Some(file) = password_file {
        peer["password_file"] = json!(file);
    }
    json!({"pods": true, "bgp": {"asn": NODES_ASN, "peers": [peer]}})
}

/// Two nodes that send to each other as they are, and the router outside.
fn bed(change: impl Fn(&mut Value)) -> Result<(Cluster, Bird)> {
    let [router, _] = Cluster::near();
    let cluster = Cluster::start_with(2, Mode::Direct, false, |config| {
        config["announce"] = announcing(&router, None);
        change(config);
    })?;
    let nodes = [1, 2].map(|number| Cluster::own(number)[0].clone());
    let bird = Bird::start(
        &cluster.outside,
        &nodes.each_ref().map(String::as_str),
        None,
    )?;
    Ok((cluster, bird))
}

fn until_ways(cluster: &Cluster, bird: &Bird, route: &str, wanted: &[String]) -> Result<()> {
    command::until("a route", PATIENCE, || {
        let ways = bird.ways(&cluster.outside, route)?;
        ensure!(ways == wanted, "{route} leads to {ways:?}, not {wanted:?}");
        Ok(())
    })
    .with_context(|| format!("{}\n{}", bird.log(), cluster.words()))
}

fn routers_learn_and_forget() -> Result<()> {
    let (mut cluster, bird) = bed(own_image)?;
    for family in [0, 1] {
        let [one, two] = [1, 2].map(|number| Cluster::own(number)[family].clone());
        let both = [one.clone(), two.clone()];
        let pods = ["10.244.1.0/24", "fd00:244:0:1::/64"][family];
        until_ways(&cluster, &bird, pods, std::slice::from_ref(&one))?;
        until_ways(&cluster, &bird, CLUSTER_LB[family], &both)?;
        // Its only endpoint is at the second node.
        until_ways(
            &cluster,
            &bird,
            LOCAL_LB[family],
            std::slice::from_ref(&two),
        )?;
    }
    // What was learned is true: nothing but these routes leads to pods and to the load balancers' addresses.
    let _serving = serve(&cluster.pod(2)?.netns)?;
    let pod = cluster.pod(2)?.addresses();
    for family in [0, 1] {
        for to in [
            at(CLUSTER_LB[family], SERVICE_PORT),
            at(LOCAL_LB[family], SERVICE_PORT),
            at(&pod[family], 7000),
        ] {
            let words = ["connect", &to, "--time", "0.5"];
            let outcome = load(&cluster.outside, &words).with_context(|| cluster.words())?;
            ensure!(outcome.done > 0, "nothing of {to}");
        }
    }
    let status: Value = cluster.lab(1)?.status()?;
    let announce = &status["announce"];
    ensure!(announce["routers"][0]["established"] == true, "{announce}");
    ensure!(
        announce["routes"].as_array().map(Vec::len) == Some(4),
        "{announce}"
    );
    // A node whose appliance is away for good serves nothing.
    let (one, two) = (Cluster::own(1)[0].clone(), Cluster::own(2)[0].clone());
    let image = cluster.lab(1)?.run_dir().with_file_name("image");
    let away = image.with_extension("away");
    std::fs::rename(&image, &away)?;
    let begin = Instant::now();
    kill_appliance(&status)?;
    until_ways(&cluster, &bird, CLUSTER_LB[0], std::slice::from_ref(&two))?;
    until_ways(&cluster, &bird, "10.244.1.0/24", &[])?;
    let passed = begin.elapsed();
    println!("routes of a node without an appliance are taken back after {passed:?}");
    std::fs::rename(&away, &image)?;
    until_ways(&cluster, &bird, CLUSTER_LB[0], &[one, two.clone()])?;
    // An orderly end is said, so that the router does not keep what it knows.
    let node = cluster.nodes.first_mut().and_then(|it| it.node());
    node.context("the first node")?.stop(PATIENCE);
    let left = bird.ways(&cluster.outside, "10.244.1.0/24")?;
    ensure!(left.is_empty(), "{left:?} are left: {}", bird.log());
    Ok(())
}

/// The node's image, which is its own.
fn own_image(config: &mut Value) {
    let run_dir = config["run_dir"].as_str().expect("a directory");
    let own = PathBuf::from(run_dir).with_file_name("image");
    std::fs::copy(sluice_tests::lab::image(), &own).expect("a copy");
    config["image"] = json!(own);
}

fn kill_appliance(status: &Value) -> Result<()> {
    let pid = status["machine"]["pid"].as_i64().context("a VMM")?;
    nix::sys::signal::kill(Pid::from_raw(i32::try_from(pid)?), Signal::SIGKILL)?;
    Ok(())
}

fn a_restart_is_nobodys_business() -> Result<()> {
    let (mut cluster, bird) = bed(|config| config["on_stop"] = json!("leave"))?;
    let pods = "10.244.1.0/24";
    let own = [Cluster::own(1)[0].clone()];
    until_ways(&cluster, &bird, pods, &own)?;
    let monitor = Monitor::start(&cluster.outside)?;
    let sessions = |cluster: &Cluster| -> Result<Value> {
        Ok(cluster.lab(1)?.status()?["announce"]["routers"][0].clone())
    };
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let lab = cluster.nodes.first_mut().context("a node")?;
        let node = lab.node().context("its daemon")?;
        node.signal(signal);
        node.wait()?;
        lab.forget_node();
        ensure!(bird.ways(&cluster.outside, pods)? == own, "{}", bird.log());
        let lab = cluster.nodes.first_mut().context("a node")?;
        lab.start_node()?;
        command::until("another session", PATIENCE, || {
            let router = sessions(&cluster)?;
            ensure!(router["established"] == true, "{router}");
            Ok(())
        })
        .with_context(|| bird.log())?;
    }
    // The router has heard everything once more, and nothing has changed in between.
    until_ways(
        &cluster,
        &bird,
        CLUSTER_LB[0],
        &[own[0].clone(), Cluster::own(2)[0].clone()],
    )?;
    let seen = monitor.end()?;
    ensure!(
        !seen.contains("Deleted"),
        "routes went:\n{seen}\n{}",
        bird.log()
    );
    Ok(())
}

fn a_password_is_needed_where_the_router_wants_one() -> Result<()> {
    let [router, _] = Cluster::near();
    let directory = std::env::temp_dir().join(format!("sluice-bgp-{}", std::process::id()));
    std::fs::create_dir_all(&directory)?;
    let file = directory.join("password");
    std::fs::write(&file, "wrong\n")?;
    let cluster = Cluster::start_with(1, Mode::Direct, false, |config| {
        config["announce"] = announcing(&router, Some(file.clone()));
    })?;
    let node = Cluster::own(1)[0].clone();
    let bird = Bird::start(&cluster.outside, &[&node], Some("secret"))?;
    let router =
        || -> Result<Value> { Ok(cluster.lab(1)?.status()?["announce"]["routers"][0].clone()) };
    command::until("a failed attempt", PATIENCE, || {
        let router = router()?;
        ensure!(router["problem"].is_string(), "{router}");
        Ok(())
    })?;
    ensure!(
        router()?["sessions"] == 0,
        "a session with the wrong password"
    );
    let said = cluster.lab(1)?.sluice(&["status"])?;
    ensure!(said.contains("known to 0 of 1 routers"), "{said}");
    std::fs::write(&file, "secret\n")?;
    let came = command::until("a session", Duration::from_secs(90), || {
        let router = router()?;
        ensure!(router["established"] == true, "{router}");
        Ok(())
    });
    std::fs::remove_dir_all(&directory)?;
    came.with_context(|| bird.log())
}

/// What the kernel says of routes from now on.
struct Monitor {
    process: Running,
    path: PathBuf,
}

impl Monitor {
    fn start(netns: &Netns) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("{}.routes", netns.name()));
        let mut command = netns.command("ip");
        command.args(["monitor", "route"]);
        command.stdout(Stdio::from(std::fs::File::create(&path)?));
        let process = Running::start("ip monitor", &mut command)?;
        Ok(Self { process, path })
    }

    fn end(mut self) -> Result<String> {
        self.process.stop(Duration::from_secs(5));
        let seen = std::fs::read_to_string(&self.path)?;
        std::fs::remove_file(&self.path)?;
        Ok(seen)
    }
}

#[test]
fn o18_o20_routers_learn_what_a_node_serves_and_forget_one_that_serves_nothing() {
    need!(
        "o18_o20_routers_learn_what_a_node_serves_and_forget_one_that_serves_nothing",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bird")
    );
    routers_learn_and_forget().expect("every step");
}

#[test]
fn o19_routers_keep_their_routes_while_a_daemon_restarts() {
    need!(
        "o19_routers_keep_their_routes_while_a_daemon_restarts",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bird")
    );
    a_restart_is_nobodys_business().expect("every step");
}

#[test]
fn o18_a_router_that_wants_a_password_talks_to_nobody_without() {
    need!(
        "o18_a_router_that_wants_a_password_talks_to_nobody_without",
        Root,
        Kvm,
        Tool("ip"),
        Tool("bird")
    );
    a_password_is_needed_where_the_router_wants_one().expect("every step");
}

/// The MAC by which a neighbor is known; nothing while it is not.
fn neighbor(netns: &Netns, address: &str) -> Result<Option<String>> {
    let text = netns.run(&["ip", "-j", "neigh", "show", address, "dev", "eth0"])?;
    let entries: Vec<Value> = serde_json::from_str(&text).with_context(|| text.clone())?;
    let mac = entries.first().and_then(|it| it["lladdr"].as_str());
    Ok(mac.map(str::to_owned))
}

fn card(netns: &Netns) -> Result<String> {
    let text = netns.run(&["ip", "-j", "link", "show", "dev", "eth0"])?;
    let links: Vec<Value> = serde_json::from_str(&text)?;
    let mac = links.first().and_then(|it| it["address"].as_str());
    mac.map(str::to_owned).context("a MAC")
}

fn answered(cluster: &Cluster, number: usize) -> Result<Vec<String>> {
    let status = cluster.lab(number)?.status()?;
    let all = status["announce"]["answered"].as_array().cloned();
    let all = all.with_context(|| status["announce"].to_string())?;
    Ok(all
        .iter()
        .filter_map(Value::as_str)
        .map(str::to_owned)
        .collect())
}

fn one_node_answers_for_an_address() -> Result<()> {
    let mut cluster = Cluster::start_with(2, Mode::Vxlan, false, |config| {
        config["announce"] = json!({"l2": true});
        config["uplink"]["probes"] = json!({"interval_ms": 500});
        // They know each other by name: from Node objects.
        config["uplink"]["peers"] = json!([]);
        config["uplink"]["tunnel"]["mac"].take();
        let directory = config["source"]["directory"].as_str().expect("one");
        for number in [1, 2] {
            let object = membership::object(number);
            let path = PathBuf::from(directory).join(format!("node-{number}.json"));
            std::fs::write(path, object.to_string()).expect("a manifest");
        }
    })?;
    // They are on the link itself: whoever wants one looks for its MAC.
    for range in ["198.51.100.0/24", "2001:db8:80::/64"] {
        cluster
            .outside
            .run(&["ip", "route", "add", range, "dev", "eth0"])?;
    }
    let macs = [1, 2].map(|number| card(&cluster.lab(number)?.host));
    let macs: Vec<String> = macs.into_iter().collect::<Result<_>>()?;
    let _serving = serve(&cluster.pod(2)?.netns)?;
    // Both know of each other, so each address has one of them; where the policy is Local, the one with the endpoint.
    let owner = |cluster: &Cluster, address: &str| -> Result<usize> {
        let answering = [1, 2]
            .map(|number| answered(cluster, number).map(|all| all.iter().any(|it| it == address)));
        match answering {
            [Ok(true), Ok(false)] => Ok(1),
            [Ok(false), Ok(true)] => Ok(2),
            other => anyhow::bail!("{address} is answered for by {other:?}"),
        }
    };
    let reached = |cluster: &Cluster, address: &str| -> Result<()> {
        let to = at(address, SERVICE_PORT);
        let outcome = load(&cluster.outside, &["connect", &to, "--time", "0.3"])?;
        ensure!(outcome.done > 0, "nothing of {to}");
        Ok(())
    };
    let led_to = |cluster: &Cluster, address: &str, mac: &str| {
        command::until("an answer of the right node", PATIENCE, || {
            reached(cluster, address)?;
            let known = neighbor(&cluster.outside, address)?;
            ensure!(
                known.as_deref() == Some(mac),
                "{address} is at {known:?}, not {mac}"
            );
            Ok(())
        })
        .with_context(|| cluster.words())
    };
    for family in [0, 1] {
        let (shared, local) = (CLUSTER_LB[family], LOCAL_LB[family]);
        let at_two = command::until("one owner", PATIENCE, || owner(&cluster, local))?;
        ensure!(at_two == 2, "{local} is node {at_two}'s");
        led_to(&cluster, local, &macs[1])?;
        let owner = command::until("one owner", PATIENCE, || owner(&cluster, shared))
            .with_context(|| cluster.words())?;
        led_to(&cluster, shared, &macs[owner - 1])?;
    }
    // The second node goes without a word; what was its own and can be elsewhere is.
    let lab = cluster.nodes.get_mut(1).context("the second node")?;
    let vmm = lab.status()?;
    lab.node().context("its daemon")?.signal(Signal::SIGKILL);
    kill_appliance(&vmm)?;
    let begin = Instant::now();
    command::until("the first node to take over", PATIENCE, || {
        let all = answered(&cluster, 1)?;
        let has = |it: &&str| all.iter().any(|answered| answered == it);
        ensure!(CLUSTER_LB.iter().all(has), "node 1 answers for {all:?}");
        // Nobody has an endpoint of these but the one that is gone.
        ensure!(!LOCAL_LB.iter().any(has), "node 1 answers for {all:?}");
        Ok(())
    })
    .with_context(|| cluster.words())?;
    println!(
        "addresses of a node that is gone have moved after {:?}",
        begin.elapsed()
    );
    for address in CLUSTER_LB {
        // It was said unasked: the outside knows, although it has had another answer before.
        command::until("the new way", PATIENCE, || {
            let known = neighbor(&cluster.outside, address)?;
            ensure!(
                known.as_deref() == Some(&macs[0]),
                "{address} is at {known:?}"
            );
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn o20_one_node_answers_for_an_address_on_the_link_and_another_takes_over() {
    need!(
        "o20_one_node_answers_for_an_address_on_the_link_and_another_takes_over",
        Root,
        Kvm,
        Tool("ip")
    );
    one_node_answers_for_an_address().expect("every step");
}
