//! Questions about the cluster: asked of the node, or of a directory of manifests that no node has seen.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use sluice_host::api::{self, ClientError, Request};
use sluice_host::cluster::report::{LearntName, LearntNames, PodPolicies};
use sluice_model::compile::Config;
use sluice_model::explain::{Restrictions, Told};
use sluice_model::finding::Severity;
use sluice_model::object::{Forwarding, Kind};
use sluice_model::overview::{self, PolicySummary, PortSummary, ServiceSummary};
use sluice_model::source::dir;
use sluice_model::store::Store;
use sluice_model::trace::{self, Answer, End, Question};

use crate::{Output, table};

/// Where the answer comes from.
#[derive(Args, Clone, Debug)]
pub(crate) struct From {
    /// Ask a directory of manifests instead of the node
    #[arg(long, value_name = "DIR")]
    manifests: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PolicyCommand {
    /// All policies in the order in which they are asked, and how many pods or nodes each is about
    List {
        #[command(flatten)]
        from: From,
    },
    /// The rules that hold for a pod or for a node itself, in both directions
    Show {
        /// The pod, like default/web, or the node, like node:worker-1
        pod: String,
        #[command(flatten)]
        from: From,
    },
    /// The addresses that pods of this node were told names in their rules have, and for how many seconds that holds
    Names {
        /// The pod, like default/web; all of them if none is named
        pod: Option<String>,
    },
    /// May this connection begin, which rule decides, and why do the others not match?
    ///
    /// Both ends are asked: the egress of the source and the ingress of the destination; a node where NodePolicies select it. The appliance's own code
    /// decides, on the tables that it gets. Exit status: 0 accepted, 1 denied.
    #[command(after_help = "\
Examples:
  sluice policy trace shop/client shop/web:8080/tcp
  sluice policy trace 192.0.2.1 shop/web:80
  sluice policy trace shop/client node:worker-1:9100
  sluice policy trace shop/client '[2001:db8::1]:53/udp' --manifests examples/shop/manifests")]
    Trace {
        /// NAMESPACE/POD, POD (in default), node:NAME or an address
        #[arg(value_name = "FROM")]
        source: String,
        /// NAMESPACE/POD, POD, node:NAME or an address, with the destination port; tcp unless udp, sctp or icmp is given
        #[arg(value_name = "TO:PORT[/PROTOCOL]")]
        target: String,
        #[command(flatten)]
        from: From,
    },
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Node(#[from] ClientError),
    #[error("The manifests in {0} cannot be read")]
    Manifests(PathBuf, #[source] io::Error),
    #[error(transparent)]
    Question(#[from] trace::Wrong),
    #[error("The answer cannot be printed")]
    Print(#[from] io::Error),
}

/// Asks, prints, and says how to exit.
pub(crate) struct Asker<'a> {
    pub(crate) socket: &'a Path,
    pub(crate) output: Output,
}

impl Asker<'_> {
    pub(crate) fn policy(&self, command: &PolicyCommand) -> Result<ExitCode, Failure> {
        match command {
            PolicyCommand::List { from } => {
                let policies = self.answer(from, &Request::Policies, |store| {
                    Ok(overview::policies(store, None, std::iter::empty()))
                })?;
                self.print(&policies, |it: &Vec<PolicySummary>| list(it))
            }
            PolicyCommand::Show { pod, from } => {
                let request = Request::PolicyOf { pod: pod.clone() };
                let shown = self.answer(from, &request, |store| {
                    let end: End = pod.parse()?;
                    let directions =
                        trace::show(store, &Config::default(), &BTreeMap::new(), &end)?.into();
                    let pod = end.to_string();
                    Ok(PodPolicies {
                        pod,
                        directions,
                        names: Vec::new(),
                    })
                })?;
                self.print(&shown, show)
            }
            PolicyCommand::Names { pod } => {
                let request = Request::Names { pod: pod.clone() };
                let learnt = api::ask(self.socket, &request)?;
                self.print(&learnt, names)
            }
            PolicyCommand::Trace {
                source,
                target,
                from,
            } => {
                let request = Request::Trace {
                    from: source.clone(),
                    to: target.clone(),
                };
                let answer = self.answer(from, &request, |store| {
                    let question = Question::parse(source, target)?;
                    let answer = trace::trace(
                        store,
                        &Config::default(),
                        &BTreeMap::new(),
                        &question,
                        |_| Told::ELSEWHERE,
                    )?;
                    Ok(answer)
                })?;
                self.print(&answer, Answer::to_string)?;
                Ok(ExitCode::from(u8::from(!answer.accepted)))
            }
        }
    }

    pub(crate) fn services(&self, from: &From) -> Result<ExitCode, Failure> {
        let services = self.answer(from, &Request::Services, |store| {
            let config = Config {
                endpoints_from_selectors: true,
                ..Config::default()
            };
            Ok(overview::services_of(store, &config))
        })?;
        self.print(&services, |it: &Vec<ServiceSummary>| services_table(it))
    }

    pub(crate) fn validate(&self, directory: &Path) -> Result<ExitCode, Failure> {
        let report = read(directory)?;
        let of = |severity| {
            report
                .findings
                .iter()
                .filter(move |it| it.severity == severity)
        };
        let (errors, warnings) = (of(Severity::Error).count(), of(Severity::Warning).count());
        let objects: BTreeMap<&str, usize> = Kind::ALL
            .into_iter()
            .map(|kind| (kind.name(), report.store.count(kind)))
            .filter(|(_, count)| *count > 0)
            .collect();
        let answer = json!({
            "findings": report.findings, "errors": errors, "warnings": warnings, "objects": objects,
        });
        self.print(&answer, |_| {
            let mut text: String = report.findings.iter().map(|it| format!("{it}\n")).collect();
            let counted: Vec<_> = objects
                .iter()
                .map(|(kind, count)| format!("{count} {kind}"))
                .collect();
            let used = if counted.is_empty() {
                "no object".into()
            } else {
                counted.join(", ")
            };
            text += &format!("{used}; {errors} errors, {warnings} warnings\n");
            text
        })?;
        Ok(ExitCode::from(u8::from(errors > 0)))
    }

    fn answer<T: DeserializeOwned>(
        &self,
        from: &From,
        request: &Request,
        offline: impl FnOnce(&Store) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let Some(directory) = &from.manifests else {
            return Ok(api::ask(self.socket, request)?);
        };
        let report = read(directory)?;
        for finding in &report.findings {
            eprintln!("sluice: {finding}");
        }
        offline(&report.store)
    }

    fn print<T: Serialize>(
        &self,
        answer: &T,
        text: impl FnOnce(&T) -> String,
    ) -> Result<ExitCode, Failure> {
        let text = match self.output {
            Output::Json => {
                let value: Value = serde_json::to_value(answer).map_err(io::Error::from)?;
                format!("{value:#}\n")
            }
            Output::Text => text(answer),
        };
        io::stdout().write_all(text.as_bytes())?;
        Ok(ExitCode::SUCCESS)
    }
}

fn read(directory: &Path) -> Result<dir::Report, Failure> {
    dir::validate(directory).map_err(|error| Failure::Manifests(directory.into(), error))
}

fn list(policies: &[PolicySummary]) -> String {
    let rules = |count: Option<usize>| match count {
        None => "-".into(),
        Some(0) => "deny all".into(),
        Some(1) => "1 rule".into(),
        Some(count) => format!("{count} rules"),
    };
    let row = |it: &PolicySummary| {
        let tier = match (&it.tier, it.priority) {
            (Some(tier), Some(priority)) => format!("{tier} {priority}"),
            _ => "-".into(),
        };
        [
            it.kind.to_string(),
            it.name.clone(),
            tier,
            rules(it.ingress_rules),
            rules(it.egress_rules),
            match it.nodes {
                None => it.pods.to_string(),
                Some(1) => "1 node".into(),
                Some(count) => format!("{count} nodes"),
            },
            match (it.nodes, it.node_here) {
                (None, _) => it.pods_here.to_string(),
                (_, Some(true)) => "the node".into(),
                _ => "-".into(),
            },
        ]
    };
    let head = ["KIND", "NAME", "TIER", "INGRESS", "EGRESS", "PODS", "HERE"];
    table(head, &policies.iter().map(row).collect::<Vec<_>>())
}

fn show(shown: &PodPolicies) -> String {
    let mut text = format!("{}\n", shown.pod);
    for it in &shown.directions {
        text += &direction(it);
    }
    for it in &shown.names {
        text += &format!(
            "told: {} has {}, for {} s\n",
            it.name, it.address, it.seconds
        );
    }
    text
}

fn names(learnt: &LearntNames) -> String {
    let head = ["POD", "LINK", "NAME", "ADDRESS", "SECONDS"];
    let row = |it: &LearntName| {
        [
            it.pod.clone(),
            it.link.to_string(),
            it.name.clone(),
            it.address.to_string(),
            it.seconds.to_string(),
        ]
    };
    let mut text = table(head, &learnt.names.iter().map(row).collect::<Vec<_>>());
    if learnt.more {
        text += "there is more than is told at once: name a pod to see all of its own\n";
    }
    text
}

fn direction(it: &Restrictions) -> String {
    let otherwise = if it.isolated {
        "what no rule accepts is denied"
    } else {
        "what no rule decides is accepted"
    };
    let mut text = format!("{}: {otherwise}\n", it.direction);
    for rule in &it.rules {
        let join = |words: &[String], none: &str| {
            if words.is_empty() {
                none.to_owned()
            } else {
                words.join(", ")
            }
        };
        let way = if it.direction == "ingress" {
            "from"
        } else {
            "to"
        };
        text += &format!(
            "  {} {way} {} on {}  ({})\n",
            rule.action,
            join(&rule.peers, "nobody"),
            join(&rule.ports, "every port"),
            rule.rule,
        );
    }
    text
}

fn services_table(services: &[ServiceSummary]) -> String {
    let rows: Vec<_> = services.iter().flat_map(service_rows).collect();
    let head = ["SERVICE", "ADDRESSES", "PORT", "READY HERE", "ENDPOINTS"];
    let mut text = table(head, &rows);
    for service in services {
        for problem in &service.problems {
            text += &format!("! {}: {problem}\n", service.name);
        }
    }
    text
}

fn service_rows(service: &ServiceSummary) -> Vec<[String; 5]> {
    let inside = service.cluster_ips.iter().map(ToString::to_string);
    let outside = service.external_ips.iter().map(|it| format!("{it} (ext)"));
    let addresses = inside.chain(outside).collect::<Vec<_>>().join(",");
    let row = |port: &PortSummary| {
        let node_port = port.node_port.map(|it| format!(":{it}"));
        let first: Vec<&str> = port.endpoints.iter().take(3).map(String::as_str).collect();
        let endpoints = match port.endpoints.len() {
            0 => "none".into(),
            count if count > first.len() => {
                format!("{} and {} more", first.join(","), count - first.len())
            }
            _ => first.join(","),
        };
        let name = match service.forwarding {
            Forwarding::Snat => service.name.clone(),
            Forwarding::Dsr => format!("{} (dsr)", service.name),
        };
        [
            name,
            addresses.clone(),
            port.port.clone() + node_port.as_deref().unwrap_or_default(),
            port.local_ready.to_string(),
            endpoints,
        ]
    };
    service.ports.iter().map(row).collect()
}
