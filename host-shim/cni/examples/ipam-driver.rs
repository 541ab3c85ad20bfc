//! An IPAM plugin in a process of its own: how an external allocator (a cloud's, a DHCP server's) plugs in.
//!
//! It speaks the CNI specification's IPAM delegation: ADD, DEL, CHECK, GC and STATUS in `CNI_COMMAND`, the configuration on
//! standard input, a result without interfaces on standard output. This one allocates from files, with the library that
//! the node uses itself.

use serde::Deserialize;
use serde_json::{Value, json};
use sluice_ipam::range::RangeConfig;
use sluice_ipam::{Ask, Owner, Plan, Pool};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    cni_version: String,
    name: String,
    ipam: Ipam,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Ipam {
    data_dir: std::path::PathBuf,
    ranges: Vec<Vec<RangeConfig>>,
}

fn main() -> ExitCode {
    match answer() {
        Ok(Some(result)) => {
            println!("{result}");
            ExitCode::SUCCESS
        }
        Ok(None) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{}", json!({"code": 100, "msg": error.to_string()}));
            ExitCode::FAILURE
        }
    }
}

fn answer() -> Result<Option<Value>, Box<dyn std::error::Error>> {
    let config: Config = serde_json::from_reader(std::io::stdin())?;
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let owner = Owner {
        container_id: variable("CNI_CONTAINERID"),
        ifname: variable("CNI_IFNAME"),
    };
    let pool = Pool::open(config.ipam.data_dir.join(&config.name))?;
    let plan = Plan::new(&config.ipam.ranges)?;
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)?
        .as_secs();
    match variable("CNI_COMMAND").as_str() {
        "ADD" => {
            let cooldown = Duration::ZERO;
            let ask = Ask {
                owner: &owner,
                plan: &plan,
                fixed: &[],
                confined: &[],
                cooldown,
                now,
            };
            let given = pool.allocate(&ask, &|_| true)?;
            let ips: Vec<Value> = given
                .iter()
                .map(|a| {
                    let version = if a.ip.is_ipv4() { "4" } else { "6" };
                    json!({"version": version, "address": format!("{}/{}", a.ip, a.prefix), "gateway": a.gateway})
                })
                .collect();
            Ok(Some(json!({"cniVersion": config.cni_version, "ips": ips})))
        }
        "DEL" => {
            pool.release(&owner, now)?;
            Ok(None)
        }
        "CHECK" if !pool.leases()?.iter().any(|lease| lease.is_of(&owner)) => {
            Err("no address is reserved for this attachment".into())
        }
        "STATUS" if pool.usage(&plan)?.is_full() => Err("no address is left".into()),
        "CHECK" | "STATUS" | "GC" => Ok(None),
        other => Err(format!("unknown CNI_COMMAND {other:?}").into()),
    }
}
