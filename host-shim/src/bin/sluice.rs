//! `sluice`: what a person asks a node.

#[path = "sluice/cluster.rs"]
mod cluster;
#[path = "sluice/network.rs"]
mod network;

use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::Value;
use sluice_host::api::{self, ClientError, Request};
use sluice_host::cni::command::{CommandError, InstallFlags, UninstallFlags};
use sluice_host::config::PodConfig;
use sluice_host::node::report::{DropReport, LinkReport};
use sluice_host::wiring::Mode;

use cluster::{Asker, Failure, PolicyCommand};

/// Shows and changes what a Sluice node on this machine does.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, after_help = AFTER_HELP)]
struct Flags {
    /// The run directory of the node
    #[arg(long, global = true, value_name = "DIR", default_value = "/run/sluice")]
    run_dir: PathBuf,

    /// How to print
    #[arg(
        long,
        short,
        global = true,
        value_name = "FORMAT",
        default_value = "text"
    )]
    output: Output,

    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Exit status: 0 done (of status: healthy, of policy trace: accepted, of validate: no error),
1 refused (something is wrong, denied, errors), 3 no node answers.";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For a person
    Text,
    /// As the node answers
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Is everything well, and what runs where?
    Status,
    /// The pods' links
    #[command(subcommand)]
    Link(LinkCommand),
    /// Where and why packets ended
    Drops,
    /// The other nodes: where they are known from, how they are reached, and why not
    Peers,
    /// This node as a manifest for others: addresses, pod ranges, and the annotations that flannel reads
    Node,
    /// Which policies there are, what they say about a pod, and who decides about a connection
    #[command(subcommand)]
    Policy(PolicyCommand),
    /// The Services and the endpoints that connections from here are spread over
    Services {
        #[command(flatten)]
        from: cluster::From,
    },
    /// Read a directory of manifests as a node would, and say all that is wrong, with file and line
    Validate {
        /// The directory
        directory: PathBuf,
    },
    /// Make the node's network the one of the container runtime, once the node forwards
    Install(InstallFlags),
    /// Take it away again
    Uninstall(UninstallFlags),
}

#[derive(Debug, Subcommand)]
enum LinkCommand {
    /// List the links and what they carried
    List,
    /// Link a pod; returns when the appliance has it in force
    Add(PodFlags),
    /// Remove a pod's link
    Del {
        /// The pod
        name: String,
    },
}

#[derive(Args, Debug)]
struct PodFlags {
    /// The pod, like default/web
    name: String,
    /// Its network namespace, like /run/netns/web
    #[arg(long, value_name = "PATH")]
    netns: PathBuf,
    /// An address of the pod; repeated
    #[arg(long = "address", value_name = "IP", required = true)]
    addresses: Vec<IpAddr>,
    /// Name of its interface
    #[arg(long, value_name = "NAME", default_value = "eth0")]
    interface: String,
    /// How it is wired: veth or tap
    #[arg(long, value_name = "MODE", value_parser = wiring)]
    wiring: Option<Mode>,
    /// Its MAC address
    #[arg(long, value_name = "MAC")]
    mac: Option<String>,
    /// Its MTU
    #[arg(long, value_name = "BYTES")]
    mtu: Option<u16>,
}

fn wiring(text: &str) -> Result<Mode, String> {
    match text {
        "veth" => Ok(Mode::Veth),
        "tap" => Ok(Mode::Tap),
        _ => Err("it is veth or tap".into()),
    }
}

fn main() -> ExitCode {
    let flags = Flags::parse();
    let socket = flags.run_dir.join("node.sock");
    let asker = Asker {
        socket: &socket,
        output: flags.output,
    };
    let request = match flags.command {
        Command::Policy(command) => return end(asker.policy(&command)),
        Command::Services { from } => return end(asker.services(&from)),
        Command::Validate { directory } => return end(asker.validate(&directory)),
        Command::Peers => return end(network::peers(&socket, flags.output)),
        Command::Node => return end(network::node(&socket, flags.output)),
        Command::Install(install) => return tell(install.run(&flags.run_dir)),
        Command::Uninstall(uninstall) => return tell(uninstall.run(&flags.run_dir)),
        Command::Status => Request::Status,
        Command::Drops => Request::Drops,
        Command::Link(LinkCommand::List) => Request::Links,
        Command::Link(LinkCommand::Del { name }) => Request::LinkDel { name },
        Command::Link(LinkCommand::Add(pod)) => Request::LinkAdd { pod: pod.into() },
    };
    match run(&socket, flags.output, &request) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("sluice: {:#}", anyhow::Error::from(error));
            ExitCode::from(1)
        }
    }
}

/// How a question about the cluster ends.
fn end(asked: Result<ExitCode, Failure>) -> ExitCode {
    asked.unwrap_or_else(|error| {
        let is_absent = matches!(&error, Failure::Node(ClientError::Connect { .. }));
        eprintln!("sluice: {:#}", anyhow::Error::from(error));
        ExitCode::from(if is_absent { 3 } else { 1 })
    })
}

/// What a command did that asks the node nothing, or more than one thing.
fn tell(done: Result<String, CommandError>) -> ExitCode {
    match done {
        Ok(told) => {
            print!("{told}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("sluice: {:#}", anyhow::Error::from(error));
            ExitCode::from(1)
        }
    }
}

fn run(socket: &Path, output: Output, request: &Request) -> io::Result<ExitCode> {
    let answer: Value = match api::ask(socket, request) {
        Ok(answer) => answer,
        Err(error) => {
            let code = if matches!(error, ClientError::Connect { .. }) {
                3
            } else {
                1
            };
            eprintln!("sluice: {:#}", anyhow::Error::from(error));
            return Ok(ExitCode::from(code));
        }
    };
    let healthy = answer
        .get("healthy")
        .and_then(Value::as_bool)
        .unwrap_or(true);
    let text = match output {
        Output::Json => format!("{answer:#}\n"),
        Output::Text => render(request, answer)?,
    };
    io::stdout().write_all(text.as_bytes())?;
    Ok(if healthy {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

impl From<PodFlags> for PodConfig {
    fn from(flags: PodFlags) -> Self {
        let PodFlags {
            name,
            netns,
            addresses,
            interface,
            wiring,
            mac,
            mtu,
        } = flags;
        Self {
            name,
            netns,
            addresses,
            interface,
            wiring,
            mac,
            mtu,
            adopt: None,
            pod: None,
            host_ports: Vec::new(),
            bandwidth: Default::default(),
        }
    }
}

fn render(request: &Request, answer: Value) -> io::Result<String> {
    Ok(match request {
        Request::Status => status(&answer)?,
        Request::Links => links(&serde_json::from_value::<Vec<LinkReport>>(answer)?),
        // Those that are about the cluster are printed where they are asked.
        Request::SelfTest
        | Request::Policies
        | Request::PolicyOf { .. }
        | Request::Names { .. }
        | Request::Trace { .. }
        | Request::Services => format!("{answer}\n"),
        Request::Drops => drops(&serde_json::from_value::<Vec<DropReport>>(answer)?),
        Request::LinkAdd { .. } | Request::LinkDel { .. } => {
            links(&[serde_json::from_value::<LinkReport>(answer)?])
        }
    })
}

/// A value of the answer by its path, as text.
fn text(answer: &Value, pointer: &str) -> String {
    match answer.pointer(pointer) {
        None | Some(Value::Null) => "-".into(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Number(n)) if n.is_f64() => format!("{:.1}", n.as_f64().unwrap_or_default()),
        Some(other) => other.to_string(),
    }
}

fn status(answer: &Value) -> io::Result<String> {
    let at = |pointer: &str| text(answer, pointer);
    let healthy = answer.pointer("/healthy") == Some(&Value::Bool(true));
    let mut out = String::new();
    let mut line = |name: &str, value: String| out.push_str(&format!("{name:<12}{value}\n"));
    line(
        "health",
        if healthy {
            "well".into()
        } else {
            "something is wrong".into()
        },
    );
    for problem in answer
        .pointer("/problems")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        line("", format!("! {}", problem.as_str().unwrap_or_default()));
    }
    line(
        "isolation",
        format!(
            "{}: {} ({})",
            at("/machine/isolation"),
            at("/machine/isolates"),
            at("/machine/why")
        ),
    );
    let adopted = if at("/machine/adopted") == "true" {
        ", adopted"
    } else {
        ""
    };
    line(
        "process",
        format!(
            "{}, pid {}{adopted}, up {} ms, {} restarts, log {}",
            at("/machine/program"),
            at("/machine/pid"),
            at("/machine/uptime_ms"),
            at("/machine/restarts"),
            at("/machine/log"),
        ),
    );
    if let Some(reason) = answer
        .pointer("/machine/cgroup_problem")
        .and_then(Value::as_str)
    {
        line("", format!("shares the daemon's control group: {reason}"));
    }
    if answer
        .pointer("/machine/last_ending")
        .is_some_and(|e| !e.is_null())
    {
        let (status, said) = (
            at("/machine/last_ending/status"),
            at("/machine/last_ending/line"),
        );
        line("last end", format!("{status}: {said}"));
    }
    line(
        "appliance",
        format!(
            "contract {} (node {}), image {}, {} MiB, generation {} with {} rows, last change in force after {} ms, {} resyncs",
            at("/control/guest_version"),
            at("/contract_version"),
            at("/control/image"),
            at("/control/ram_mib"),
            at("/control/generation"),
            at("/control/rows"),
            at("/control/last_change_ms"),
            at("/control/resyncs"),
        ),
    );
    if answer.get("cluster").is_some() {
        line("cluster", cluster_line(&at));
        line("policy", policy_line(&at));
        let findings = answer.pointer("/cluster/findings");
        for finding in findings.and_then(Value::as_array).into_iter().flatten() {
            line("", format!("! {}", finding.as_str().unwrap_or_default()));
        }
    }
    match answer.get("network") {
        Some(network) => {
            let network = serde_json::from_value(network.clone())?;
            for (name, value) in network::status_lines(&network) {
                line(name, value);
            }
        }
        None => line("peers", "none: the node has no uplink".into()),
    }
    if let Some(announce) = answer.get("announce") {
        let announce = serde_json::from_value(announce.clone())?;
        for (name, value) in network::announce_lines(&announce) {
            line(name, value);
        }
    }
    line("pod mtu", at("/pod_mtu"));
    line(
        "started",
        format!(
            "configured after {} ms, first frame forwarded after {} ms",
            at("/start/to_configured_ms"),
            at("/start/to_first_forwarded_ms"),
        ),
    );
    line(
        "trunk",
        format!(
            "serving {}, {} ports, features {}, {} calls, {} sleeps, {} starved; frames moved {}: {}",
            at("/trunk/serving"),
            at("/trunk/ports"),
            at("/trunk/features"),
            at("/trunk/calls"),
            at("/trunk/sleeps"),
            at("/trunk/starved"),
            at("/trunk/drive"),
            at("/trunk/drive_reason"),
        ),
    );
    line(
        "packets",
        format!(
            "received {}, forwarded {}, replied {}, gso {}",
            at("/guest/received"),
            at("/guest/forwarded"),
            at("/guest/replied"),
            at("/guest/gso_forwarded"),
        ),
    );
    let reports = answer.pointer("/links").cloned().unwrap_or_default();
    out.push('\n');
    out.push_str(&links(&serde_json::from_value::<Vec<LinkReport>>(reports)?));
    Ok(out)
}

fn cluster_line(at: &impl Fn(&str) -> String) -> String {
    let age = match at("/cluster/heard_ms").as_str() {
        "-" => "heard nothing yet".into(),
        ms => format!("last heard {ms} ms ago"),
    };
    let state = match (
        at("/cluster/in_sync").as_str(),
        at("/cluster/lost").as_str(),
    ) {
        ("true", "-") => "in sync".into(),
        ("true", reason) => format!("not followed now ({reason})"),
        (_, "-") => "not known yet".into(),
        (_, reason) => format!("not known yet ({reason})"),
    };
    let policy = match at("/cluster/policy_mode").as_str() {
        "audit" => "; policy is only audited",
        _ => "",
    };
    let nodes = match at("/cluster/objects/NodePolicy").as_str() {
        "0" | "-" => String::new(),
        count => format!(
            ", {count} node policies ({})",
            at("/cluster/host_policy_mode")
        ),
    };
    format!(
        "{} {}, {state}, {age}{policy}; {} pods, {} services, {} network policies, {} cluster policies, {} nodes{nodes}",
        at("/cluster/source"),
        at("/cluster/place"),
        at("/cluster/objects/Pod"),
        at("/cluster/objects/Service"),
        at("/cluster/objects/NetworkPolicy"),
        at("/cluster/objects/ClusterNetworkPolicy"),
        at("/cluster/objects/Node"),
    )
}

fn policy_line(at: &impl Fn(&str) -> String) -> String {
    format!(
        "{} rows (identities {}, rulesets {}, classes {}, spans {}), last compiled in {} ms",
        at("/cluster/rows/all"),
        at("/cluster/rows/identities"),
        at("/cluster/rows/rulesets"),
        at("/cluster/rows/classes"),
        at("/cluster/rows/spans"),
        at("/cluster/compile_ms"),
    )
}

fn links(links: &[LinkReport]) -> String {
    let head = [
        "ID",
        "POD",
        "WIRING",
        "ADDRESSES",
        "MTU",
        "FROM POD",
        "TO POD",
        "GSO",
        "DROPS",
    ];
    let row = |l: &LinkReport| {
        let addresses: Vec<_> = l.addresses.iter().map(IpAddr::to_string).collect();
        [
            l.id.to_string(),
            l.pod.clone(),
            format!("{:?}", l.wiring).to_lowercase(),
            addresses.join(","),
            l.mtu.to_string(),
            l.from_pod.frames.to_string(),
            l.to_pod.frames.to_string(),
            (l.from_pod.gso + l.to_pod.gso).to_string(),
            l.drops.values().sum::<u64>().to_string(),
        ]
    };
    table(head, &links.iter().map(row).collect::<Vec<_>>())
}

fn drops(drops: &[DropReport]) -> String {
    let head = ["COUNT", "PLACE", "POD", "REASON", "MEANING"];
    let row = |d: &DropReport| {
        let pod = d.pod.clone().unwrap_or_else(|| "-".into());
        [
            d.count.to_string(),
            d.place.clone(),
            pod,
            d.reason.clone(),
            d.meaning.clone(),
        ]
    };
    table(head, &drops.iter().map(row).collect::<Vec<_>>())
}

/// Columns as wide as their widest cell.
fn table<const N: usize>(head: [&str; N], rows: &[[String; N]]) -> String {
    let width = |column: usize| {
        let cells = rows
            .iter()
            .filter_map(|row| row.get(column))
            .map(String::len);
        cells
            .chain(head.get(column).map(|h| h.len()))
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<_> = (0..N).map(width).collect();
    let line = |cells: &[&str]| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        let line = padded.collect::<Vec<_>>().join("  ");
        format!("{}\n", line.trim_end())
    };
    let body = rows
        .iter()
        .map(|row| line(&row.each_ref().map(String::as_str)));
    std::iter::once(line(&head)).chain(body).collect()
}
