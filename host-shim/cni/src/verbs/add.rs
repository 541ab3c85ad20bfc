//! ADD: claim the attachment, its ports and its addresses, make the link, and undo everything if any step fails.

use super::address::{self, Given, Source};
use super::node::{Defaults, Health, Link, Made, Node, NodeError};
use super::record::{self, Key, Record};
use super::{Deliver, Verbs, disk};
use crate::capability::{PortMapping, parse_mac};
use crate::config::Config;
use crate::env::{Args, Environment};
use crate::error::{CniError, Code};
use crate::result::{CniResult, Interface, Ip, Route};
use crate::rpc::Body;
use serde_json::Value;
use sluice_ipam::{Lease, Owner};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError};

impl<N: Node> Verbs<N> {
    /// Delivers the result itself, while the attachment is still claimed: `Ok(None)`.
    pub(super) fn add(
        &self,
        env: &Environment,
        config: &Config,
        deliver: &mut Deliver<'_>,
    ) -> Result<Option<Value>, CniError> {
        if let Health::Unavailable(why) | Health::Degraded(why) = self.node.health() {
            return Err(NodeError::Down(why).into());
        }
        let args = Args::parse(&env.args)?;
        let previous = config.previous()?;
        let key = Key::of(env, config);
        let _claim = self.busy.claim(&key)?;
        self.settle_deferred(&key)?;
        if self.records.read(&key).is_some() {
            let Key {
                network,
                container_id,
                ifname,
            } = &key;
            let msg = format!("{container_id} is attached to {network} with {ifname} already");
            return Err(CniError::new(Code::Exists, msg));
        }
        let link = self.wanted(env, config, &args, previous.as_ref())?;
        let pool = match args.pod() {
            Some(pod) if config.ipam_type().is_none() => self.node.pool_of(&pod)?,
            _ => None,
        };
        let source = address::source(&self.pools, &self.node, config, pool.as_deref())?;
        let mut record = self.claim_ports_and_name(env, config, key, link)?;
        let given = self.addresses(
            env,
            config,
            &args,
            &mut record,
            (previous.as_ref(), &source),
        );
        let made = given.and_then(|given| Ok((given, self.make(&mut record)?)));
        let (given, made) = made.inspect_err(|_| self.give_up(&record))?;
        let defaults = self.node.defaults();
        let result = result(&record.link, &given, &made, &defaults, previous, config);
        let delivered = result.to_json(config.version).and_then(|value| {
            let told = deliver(Body::Result(value));
            told.map_err(|e| CniError::new(Code::Io, "nobody hears the result").details(&e))
        });
        delivered.inspect_err(|_| self.give_up(&record))?;
        Ok(None)
    }

    /// The link as far as it is known before there are addresses.
    fn wanted(
        &self,
        env: &Environment,
        config: &Config,
        args: &Args,
        previous: Option<&CniResult>,
    ) -> Result<Link, CniError> {
        let defaults = self.node.defaults();
        let capabilities = &config.capabilities;
        let mac = match capabilities.mac {
            Some(mac) => Some(mac),
            None => args.value("MAC").map(parse_mac).transpose()?,
        };
        let adopted = previous.and_then(|result| adopted(result, &env.ifname));
        Ok(Link {
            netns: env.netns.clone(),
            ifname: env.ifname.clone(),
            addresses: Vec::new(),
            mac: mac.or(adopted.as_ref().and_then(|(mac, _)| *mac)),
            mtu: config.mtu.unwrap_or(defaults.mtu),
            wiring: config.wiring.unwrap_or(defaults.wiring),
            sysctl: config.sysctl.clone(),
            pod: args.pod(),
            ports: capabilities.port_mappings.clone(),
            bandwidth: capabilities.bandwidth,
            aliases: capabilities.aliases.clone(),
            ip_masq: config.ip_masq.unwrap_or(true),
            adopt: adopted.map(|(_, host)| host),
        })
    }

    /// Writes the attachment down before anything of it exists: from here on a crash is cleaned up after.
    fn claim_ports_and_name(
        &self,
        env: &Environment,
        config: &Config,
        key: Key,
        link: Link,
    ) -> Result<Record, CniError> {
        let _ports = self.ports.lock().unwrap_or_else(PoisonError::into_inner);
        let records = self.records.all(None);
        for record in &records {
            refuse_clash(&link.ports, record)?;
        }
        let name = free_name(&key, &link, &records);
        let mut raw = config.raw.clone();
        if let Some(object) = raw.as_object_mut() {
            object.remove("prevResult");
        }
        let record = Record {
            v: record::VERSION,
            key,
            name,
            complete: false,
            link,
            config: raw,
            path: env.path.clone(),
        };
        self.records
            .write(&record)
            .map_err(disk("write the attachment"))?;
        Ok(record)
    }

    fn addresses(
        &self,
        env: &Environment,
        config: &Config,
        args: &Args,
        record: &mut Record,
        (previous, source): (Option<&CniResult>, &Source),
    ) -> Result<Given, CniError> {
        let given = match (&record.link.adopt, previous) {
            // The plugin before us has given the addresses.
            (Some(_), Some(previous)) if config.ipam.is_none() => Given {
                addresses: previous.ips.iter().filter_map(Ip::ip).collect(),
                dns: previous.dns.clone(),
            },
            _ => source.add(env, config, args, &|lease| self.lives(&record.key, lease))?,
        };
        refuse_unusable(&given.addresses)?;
        // Written down with the rest when it is made: undoing a half-made attachment asks the store, not the record.
        record.link.addresses.clone_from(&given.addresses);
        Ok(given)
    }

    fn make(&self, record: &mut Record) -> Result<Vec<Made>, CniError> {
        let made = self.node.attach(&record.name, &record.link)?;
        record.complete = true;
        self.records
            .write(record)
            .map_err(disk("write the attachment"))?;
        Ok(made)
    }

    /// Whether the holder of a lease has an attachment whose pod is there.
    fn lives(&self, key: &Key, lease: &Lease) -> bool {
        let records = self.records.all(Some(&key.network));
        records.iter().any(|record| {
            let Key {
                container_id,
                ifname,
                ..
            } = &record.key;
            let owner = Owner {
                container_id: container_id.clone(),
                ifname: ifname.clone(),
            };
            lease.is_of(&owner) && (!record.complete || self.node.is_alive(&record.link))
        })
    }

    /// After a failed step: nothing is left.
    fn give_up(&self, record: &Record) {
        if let Err(error) = self.remove(record) {
            tracing::warn!(%error, "CNI: a failed ADD left something behind");
        }
    }
}

/// The pod's name; a second sandbox of the pod, which comes before the first is gone, is named after its container.
fn free_name(key: &Key, link: &Link, records: &[Arc<Record>]) -> String {
    let Key {
        container_id,
        ifname,
        ..
    } = key;
    let pod = link
        .pod
        .as_ref()
        .map(|pod| format!("{}/{}", pod.namespace, pod.name));
    let is_free =
        |name: &String| name.len() <= 253 && !records.iter().any(|record| record.name == *name);
    match pod.filter(is_free) {
        Some(name) => name,
        None => format!("{container_id}:{ifname}"),
    }
}

/// Row B-03: the first to claim a port keeps it.
fn refuse_clash(wanted: &[PortMapping], holder: &Record) -> Result<(), CniError> {
    for port in wanted {
        if let Some(held) = holder
            .link
            .ports
            .iter()
            .find(|held| held.clashes_with(port))
        {
            let protocol = format!("{:?}", held.protocol).to_ascii_lowercase();
            let (number, id) = (held.host_port, &holder.key.container_id);
            let msg = format!("host port {number}/{protocol} is claimed by container {id}");
            return Err(CniError::new(Code::PortClash, msg));
        }
    }
    Ok(())
}

/// A delegate may give what no pod can have.
fn refuse_unusable(addresses: &[IpAddr]) -> Result<(), CniError> {
    let is_unusable = |ip: &&IpAddr| ip.is_unspecified() || ip.is_loopback() || ip.is_multicast();
    match addresses.iter().find(is_unusable) {
        None => Ok(()),
        Some(ip) => Err(CniError::new(
            Code::Config,
            format!("the IPAM plugin gave the address {ip}"),
        )),
    }
}

/// The MAC of the pod's interface that a plugin before us made, and the host's end of it.
fn adopted(previous: &CniResult, ifname: &str) -> Option<(Option<[u8; 6]>, String)> {
    let index = previous.pod_interface(ifname)?;
    let mac = previous
        .interfaces
        .get(index)
        .and_then(|pod| parse_mac(&pod.mac).ok());
    // The reference plugins list the bridge first, if any, and the host's end of the pair last.
    let host = previous
        .interfaces
        .iter()
        .rfind(|interface| interface.sandbox.is_empty())?;
    Some((mac, host.name.clone()))
}

fn text_of(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn result(
    link: &Link,
    given: &Given,
    made: &[Made],
    defaults: &Defaults,
    previous: Option<CniResult>,
    config: &Config,
) -> CniResult {
    let mut result = previous.unwrap_or_default();
    for made in made {
        let interface = Interface {
            name: made.name.clone(),
            mac: text_of(made.mac),
            mtu: Some(u32::from(made.mtu)),
            sandbox: if made.in_pod {
                link.netns.clone()
            } else {
                String::new()
            },
            ..Interface::default()
        };
        let same = |other: &&mut Interface| {
            other.name == interface.name && other.sandbox == interface.sandbox
        };
        match result.interfaces.iter_mut().find(same) {
            Some(known) => {
                (known.mac, known.mtu) = (interface.mac, interface.mtu);
            }
            None => result.interfaces.push(interface),
        }
    }
    let interface = result.pod_interface(&link.ifname);
    result
        .ips
        .retain(|ip| ip.ip().is_none_or(|ip| !given.addresses.contains(&ip)));
    if link.adopt.is_some() {
        // The routes through the former gateways went with them.
        result
            .routes
            .retain(|route| !matches!(route.dst.as_str(), "0.0.0.0/0" | "::/0"));
    }
    for address in &given.addresses {
        let (bits, gateway, everywhere) = match address {
            IpAddr::V4(_) => (32, defaults.gateway4, "0.0.0.0/0"),
            IpAddr::V6(_) => (128, defaults.gateway6, "::/0"),
        };
        result.ips.push(Ip {
            address: format!("{address}/{bits}"),
            gateway: Some(gateway),
            interface,
            ..Ip::default()
        });
        if !result.routes.iter().any(|route| route.dst == everywhere) {
            let route = Route {
                dst: everywhere.into(),
                gw: Some(gateway),
                ..Route::default()
            };
            result.routes.push(route);
        }
    }
    let said = [
        config.capabilities.dns.as_ref(),
        Some(&config.dns),
        Some(&given.dns),
    ];
    if let Some(dns) = said.into_iter().flatten().find(|dns| !dns.is_empty()) {
        result.dns = dns.clone();
    }
    result
}
