//! The lab as a program: `make run`, `make demo` and `make bench` start this.

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use sluice_tests::bench::{Extent, forwarder, nodes, one_node, vxlan};
use sluice_tests::cluster::{Cluster, Mode};
use sluice_tests::lab::{Lab, Plan, Wiring};
use sluice_tests::need::Need;
use sluice_tests::snapshot::Snapshot;
use sluice_tests::{claims, policy, signals};
use sluice_tests::{
    cluster_claims, cluster_frames, cluster_policy, cluster_services, cluster_trouble,
};
use std::path::PathBuf;

/// Nodes and pods in network namespaces: shown, measured, and gone without a trace
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the node of an example and show its status until Ctrl-C
    Run {
        /// A folder with a node.json
        example: PathBuf,
    },
    /// Bring a node up, send traffic, print a checklist
    Demo {
        /// kvm, tcg or auto
        #[arg(long, default_value = "auto")]
        isolation: String,
        /// How many nodes
        #[arg(long, default_value_t = 1)]
        nodes: u32,
        /// Pings in the loss check
        #[arg(long, default_value_t = 10_000)]
        pings: u32,
    },
    /// Mixed load for minutes: nothing arrives wrong, nothing stands still, memory is flat
    Soak {
        #[arg(long, default_value_t = 10.0)]
        minutes: f64,
        /// veth or tap
        #[arg(long, default_value = "veth")]
        wiring: String,
    },
    /// Measure against the kernel's paths and others, interleaved
    Bench {
        #[arg(default_value = "node")]
        what: What,
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Seconds of each measurement
        #[arg(long, default_value_t = 2.0)]
        seconds: f64,
        /// Fewer contenders
        #[arg(long)]
        few: bool,
    },
    /// Move frames between two pods and look at nothing (for `bench`)
    #[command(hide = true)]
    Forward { one: PathBuf, other: PathBuf },
    /// Move frames between a pod and a node's card in VXLAN and look at nothing (for `bench`)
    #[command(hide = true)]
    ForwardVxlan {
        pod: PathBuf,
        node: PathBuf,
        /// This node as MAC,address
        from: vxlan::End,
        /// The other one
        to: vxlan::End,
    },
}

/// How many nodes are measured.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum What {
    /// Two pods of one node
    Node,
    /// Pods of two nodes
    Nodes,
}

fn main() -> Result<()> {
    if let Some(reason) = Need::Root.missing() {
        anyhow::bail!("The lab {reason}: run it as root");
    }
    let command = Arguments::parse().command;
    signals::note_ends()?;
    match command {
        Command::Run { example } => sluice_tests::run::run(&example),
        Command::Demo {
            isolation,
            nodes,
            pings,
        } => demo(&isolation, nodes, pings),
        Command::Soak { minutes, wiring } => {
            let wiring = match wiring.as_str() {
                "veth" => Wiring::Veth,
                "tap" => Wiring::Tap,
                other => anyhow::bail!("There is no wiring {other}: it is veth or tap"),
            };
            let time = std::time::Duration::try_from_secs_f64(minutes * 60.0)?;
            println!("{}", sluice_tests::soak::run(time, wiring)?);
            Ok(())
        }
        Command::Bench {
            what,
            rounds,
            seconds,
            few,
        } => {
            let extent = Extent {
                rounds,
                seconds,
                few,
            };
            match what {
                What::Node => one_node::run(extent),
                What::Nodes => nodes::run(extent),
            }
        }
        Command::Forward { one, other } => forwarder::run(&one, &other),
        Command::ForwardVxlan {
            pod,
            node,
            from,
            to,
        } => vxlan::run(&pod, &node, (from, to)),
    }
}

/// A line per claim and the numbers at the end.
#[derive(Default)]
struct Checklist {
    passed: u32,
    failed: u32,
}

impl Checklist {
    fn line(&mut self, claim: &str, seen: Result<String>) {
        match seen {
            Ok(detail) => {
                self.passed += 1;
                println!("  ok    {claim}: {detail}");
            }
            Err(error) => {
                self.failed += 1;
                println!("  FAIL  {claim}: {error:#}");
            }
        }
    }
}

fn demo(isolation: &str, nodes: u32, pings: u32) -> Result<()> {
    let before = Snapshot::take()?;
    let mut list = Checklist::default();
    match u8::try_from(nodes) {
        Ok(1) => one_node(&mut list, isolation, pings)?,
        Ok(nodes @ 2..=9) => many_nodes(&mut list, nodes)?,
        _ => anyhow::bail!("NODES={nodes}: 1 to 9 can be shown"),
    }
    signals::go_on()?;
    let left = Snapshot::take()?.added_since(&before, std::process::id());
    list.line(
        "nothing is left behind",
        if left.is_empty() {
            Ok("as before".into())
        } else {
            Err(anyhow::anyhow!(left.join("; ")))
        },
    );
    println!("{} passed, {} failed", list.passed, list.failed);
    if list.failed > 0 {
        std::process::exit(1);
    }
    Ok(())
}

/// Several nodes on one wire: pods of each other in every mode over both families, and everything else in a tunnel over each
/// family and without one.
fn many_nodes(list: &mut Checklist, nodes: u8) -> Result<()> {
    let whole = [
        (Mode::Vxlan, false),
        (Mode::Geneve, true),
        (Mode::Direct, false),
    ];
    let of_all = || Mode::ALL.iter().flat_map(|it| [(*it, false), (*it, true)]);
    for (mode, six) in of_all() {
        signals::go_on()?;
        let wire = if six { "IPv6" } else { "IPv4" };
        println!("{nodes} nodes, {} over {wire}:", mode.word());
        let mut cluster = match Cluster::start(nodes, mode, six) {
            Ok(cluster) => cluster,
            Err(error) => {
                list.line("the nodes start", Err(error));
                continue;
            }
        };
        let mut claims = vec![cluster_claims::ALL[0]];
        if whole.contains(&(mode, six)) {
            claims = [&cluster_claims::ALL[..], &cluster_services::ALL[..]].concat();
            claims.push(cluster_policy::PROBES);
            if nodes > 2 && mode == Mode::Geneve {
                claims.push(cluster_policy::IDENTITIES);
            }
        }
        claims.push(cluster_frames::CLAIM);
        for (claim, show) in claims {
            list.line(claim, show(&cluster));
        }
        if (mode, six) == whole[0] {
            for (trouble, befall) in cluster_trouble::ALL {
                list.line(trouble, befall(&mut cluster));
            }
        }
    }
    Ok(())
}

fn one_node(list: &mut Checklist, isolation: &str, pings: u32) -> Result<()> {
    for wiring in [Wiring::Veth, Wiring::Tap] {
        signals::go_on()?;
        println!("one node, two pods, wiring {}:", wiring.word());
        let plan = Plan {
            isolation: isolation.to_owned(),
            wiring,
            ..Plan::default()
        };
        match Lab::start(&plan) {
            Ok(mut lab) => claims_of(list, &mut lab, pings),
            Err(error) => list.line("the node starts", Err(error)),
        }
    }
    signals::go_on()?;
    println!("one node that follows manifests:");
    let plan = Plan {
        isolation: isolation.to_owned(),
        ..Plan::default()
    };
    match policy::start(&plan) {
        Ok(lab) => claims_of_policy(list, &lab),
        Err(error) => list.line("the node starts", Err(error)),
    }
    Ok(())
}

fn claims_of(list: &mut Checklist, lab: &mut Lab, pings: u32) {
    list.line("the node starts", claims::node_says_what_it_runs_on(lab));
    list.line("pods ping each other", claims::pods_ping_each_other(lab));
    list.line("the gateway answers", claims::gateway_answers(lab));
    list.line(
        "no ping of a series at 1 ms is lost",
        claims::no_ping_is_lost(lab, pings),
    );
    list.line(
        "TCP arrives byte for byte",
        claims::tcp_is_intact(lab, 200_000_000),
    );
    list.line("UDP passes", claims::udp_passes(lab));
    list.line(
        "64 KiB frames cross whole",
        claims::gso_frames_cross_whole(lab),
    );
    list.line(
        "a forged source is dropped",
        claims::spoofed_source_is_dropped(lab),
    );
    list.line(
        "a killed VMM comes back by itself",
        claims::killed_vmm_comes_back(lab),
    );
    list.line(
        "a killed daemon finds its taps again",
        claims::killed_node_finds_its_taps(lab),
    );
    list.line("idle costs nothing", claims::idle_is_cheap(lab, 0.02));
    list.line("the image is small", claims::image_is_small());
    list.line("the VMM is small", claims::vmm_is_small(lab));
}

fn claims_of_policy(list: &mut Checklist, lab: &Lab) {
    list.line(
        "a policy file decides who may connect",
        policy::policy_file_decides(lab),
    );
    list.line(
        "a Service's address leads to its pod",
        policy::service_leads_to_its_pod(lab),
    );
    list.line(
        "a typo is reported and changes nothing",
        policy::typo_changes_nothing(lab),
    );
}
