//! Where an attachment's addresses come from: the node's own pool, a delegated plugin, or the plugin before us.
//!
//! All three answer the same questions, so the verbs do not know which it is.

use crate::config::Config;
use crate::env::{Args, Environment};
use crate::error::{CniError, Code};
use crate::result::{CniResult, Dns};
use crate::verbs::node::{Defaults, Node};
use crate::verbs::record::Key;
use serde::Deserialize;
use serde_json::{Value, json};
use sluice_ipam::delegate::{self, Call, DelegateError};
use sluice_ipam::pool::Usage;
use sluice_ipam::range::RangeConfig;
use sluice_ipam::{Ask, IpamError, Lease, Owner, Plan, Pool};
use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where `host-local` keeps its networks.
pub const DATA_DIR: &str = "/var/lib/cni/networks";
/// A delegate that is slower is ended: it leaves time for our own answer within 30 s.
const DELEGATE: Duration = Duration::from_secs(20);
/// Freed addresses are avoided this long, unless the configuration says otherwise.
const COOLDOWN: Duration = Duration::from_secs(60);

impl From<IpamError> for CniError {
    fn from(error: IpamError) -> Self {
        let code = match error {
            IpamError::Range(_) | IpamError::NotAllowed { .. } | IpamError::Moved { .. } => {
                Code::Config
            }
            IpamError::Exhausted { .. } => Code::Exhausted,
            IpamError::Taken { .. } => Code::AddressTaken,
            IpamError::Duplicate { .. } => Code::Exists,
            IpamError::Disk { .. } => Code::Io,
        };
        let details = match &error {
            IpamError::Moved { .. } => {
                "remove the pods that have them, or restore the former pod CIDRs".into()
            }
            IpamError::Exhausted { .. } => {
                "remove pods, have the runtime call GC if some are leaked, or give the network more ranges".into()
            }
            error => std::error::Error::source(error).map_or_else(String::new, |e| e.to_string()),
        };
        Self::new(code, error.to_string()).details(&details)
    }
}

impl From<DelegateError> for CniError {
    fn from(error: DelegateError) -> Self {
        let code = match error {
            DelegateError::NotFound { .. } | DelegateError::Name(_) => Code::Config,
            DelegateError::Run { .. } => Code::Io,
            DelegateError::Late { .. } => Code::Later,
        };
        Self::new(code, error.to_string())
    }
}

/// The `ipam` object of our own allocator; `host-local`'s keys mean what they mean there.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OwnConfig {
    #[serde(default)]
    ranges: Vec<Vec<RangeConfig>>,
    #[serde(default)]
    subnet: String,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
    gateway: Option<IpAddr>,
    data_dir: Option<PathBuf>,
    cooldown_seconds: Option<u64>,
    /// Ranges by name, for namespaces that ask for one.
    #[serde(default)]
    pools: BTreeMap<String, Vec<Vec<RangeConfig>>>,
}

/// Addresses that were given.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Given {
    pub addresses: Vec<IpAddr>,
    pub dns: Dns,
}

/// The source of one network's addresses.
#[derive(Debug)]
pub enum Source {
    Own(Own),
    Delegate(Delegate),
}

/// A plugin that allocates.
#[derive(Debug)]
pub struct Delegate {
    pub name: String,
    /// Where `host-local` keeps the network's addresses, and which it may give: versions of it that know neither GC nor
    /// STATUS keep a store that we can read.
    pub store: Option<(PathBuf, Plan)>,
}

/// The node's own pool, and what of it this attachment may use.
#[derive(Debug)]
pub struct Own {
    pub pool: Arc<Pool>,
    /// What may be given, and if that is the node's pod CIDRs, all that may be held. Freeing works whatever became of the
    /// ranges.
    plan: Result<(Plan, Vec<Plan>), CniError>,
    cooldown: Duration,
}

/// The open pools: one per directory, so that what was read is not read again.
#[derive(Debug, Default)]
pub struct Pools(Mutex<HashMap<PathBuf, Arc<Pool>>>);

impl Pools {
    /// The pool in `dir`.
    ///
    /// # Errors
    /// As the disk says.
    pub fn open(&self, dir: &Path) -> Result<Arc<Pool>, IpamError> {
        let mut pools = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pool) = pools.get(dir) {
            return Ok(pool.clone());
        }
        let pool = Arc::new(Pool::open(dir)?);
        if let Ok(boot) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
            pool.enter_boot(boot.trim())?;
        }
        pools.insert(dir.to_owned(), pool.clone());
        Ok(pool)
    }
}

/// Finds out where the addresses of `config`'s network come from: from the pool of that name, if one is asked for.
///
/// # Errors
/// Code 6 or 7 for a configuration that cannot be, 5 if the disk refuses.
pub fn source(
    pools: &Pools,
    node: &dyn Node,
    config: &Config,
    pool: Option<&str>,
) -> Result<Source, CniError> {
    let own = match &config.ipam {
        None => OwnConfig::default(),
        Some(ipam) => serde_path_to_error::deserialize(ipam).map_err(|error| {
            CniError::new(Code::Decode, "the ipam configuration cannot be read").details(&error)
        })?,
    };
    let data_dir = own
        .data_dir
        .clone()
        .unwrap_or_else(|| DATA_DIR.into())
        .join(&config.name);
    if let Some(name) = config.ipam_type() {
        if name.contains('/') || name.starts_with('.') {
            return Err(CniError::new(
                Code::Config,
                format!("ipam type {name:?} is a path"),
            ));
        }
        let plan = (name == "host-local").then(|| plan(&own, config, &node.defaults(), None));
        let store = plan.and_then(Result::ok).map(|(plan, _)| (data_dir, plan));
        return Ok(Source::Delegate(Delegate {
            name: name.to_owned(),
            store,
        }));
    }
    Ok(Source::Own(Own {
        pool: pools.open(&data_dir)?,
        plan: plan(&own, config, &node.defaults(), pool),
        cooldown: own.cooldown_seconds.map_or(COOLDOWN, Duration::from_secs),
    }))
}

fn plan(
    own: &OwnConfig,
    config: &Config,
    defaults: &Defaults,
    pool: Option<&str>,
) -> Result<(Plan, Vec<Plan>), CniError> {
    if let Some(name) = pool {
        let known = pools(own, defaults)?;
        let plan = known.get(name).filter(|plan| !plan.sets().is_empty());
        let plan = plan.ok_or_else(|| empty_pool(name, &known))?;
        return Ok((plan.clone(), Vec::new()));
    }
    let mut sets: Vec<Vec<RangeConfig>> = Vec::new();
    if let Some(ranges) = &config.capabilities.ip_ranges {
        sets = Deserialize::deserialize(ranges).map_err(|error| {
            CniError::new(Code::Decode, "runtimeConfig ipRanges cannot be read").details(&error)
        })?;
    }
    if !own.subnet.is_empty() {
        sets.push(vec![RangeConfig {
            subnet: own.subnet.clone(),
            range_start: own.range_start,
            range_end: own.range_end,
            gateway: own.gateway,
        }]);
    }
    sets.extend(own.ranges.iter().cloned());
    if sets.is_empty() {
        let subnets = defaults.subnets.iter().map(String::as_str);
        let plan = Plan::of_subnets(subnets)?;
        let mut confined = vec![plan.clone()];
        confined.extend(pools(own, defaults)?.into_values());
        return Ok((plan, confined));
    }
    Ok((Plan::new(&sets)?, Vec::new()))
}

/// The pools of the network and of the node; of two of one name the network's.
fn pools(own: &OwnConfig, defaults: &Defaults) -> Result<BTreeMap<String, Plan>, CniError> {
    let mut all = BTreeMap::new();
    for (name, subnets) in defaults.pools.iter().filter(|(_, it)| !it.is_empty()) {
        let plan = Plan::of_subnets(subnets.iter().map(String::as_str))?;
        all.insert(name.clone(), plan);
    }
    for (name, sets) in own.pools.iter().filter(|(_, it)| !it.is_empty()) {
        all.insert(name.clone(), Plan::new(sets)?);
    }
    Ok(all)
}

fn empty_pool(name: &str, known: &BTreeMap<String, Plan>) -> CniError {
    let known: Vec<&str> = known.keys().map(String::as_str).collect();
    let known = match known.as_slice() {
        [] => "this node has no pools".to_owned(),
        known => format!("this node has {}", known.join(", ")),
    };
    let msg = format!("the address pool {name:?} is empty here");
    let details = format!(
        "{known}; give it ranges in the node's cni.pools or in ipam.pools of the network, or change the annotation"
    );
    CniError::new(Code::Config, msg).details(&details)
}

/// Addresses that the runtime asks for. Of three places the first that says something counts (checklist 64).
fn fixed(config: &Config, args: &Args) -> Result<Vec<IpAddr>, CniError> {
    let asked: Vec<&str> = if !config.capabilities.ips.is_empty() {
        config.capabilities.ips.iter().map(String::as_str).collect()
    } else if !config.args_ips.is_empty() {
        config.args_ips.iter().map(String::as_str).collect()
    } else {
        args.value("IP")
            .into_iter()
            .flat_map(|ips| ips.split(','))
            .collect()
    };
    let parse = |text: &str| {
        let ip = text.split('/').next().unwrap_or_default().trim();
        ip.parse()
            .map_err(|_| CniError::new(Code::Config, format!("invalid address {text:?}")))
    };
    asked.into_iter().map(parse).collect()
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

impl Source {
    /// Allocates. `live` tells whether the holder of a lease lives.
    ///
    /// # Errors
    /// As the pool or the delegate says; nothing is held then.
    pub fn add(
        &self,
        env: &Environment,
        config: &Config,
        args: &Args,
        live: &dyn Fn(&Lease) -> bool,
    ) -> Result<Given, CniError> {
        match self {
            Self::Own(own) => own.add(env, config, args, live),
            Self::Delegate(Delegate { name, .. }) => {
                let result = delegate_result(name, env, config).inspect_err(|_| {
                    // It may have failed after it allocated (checklist 25); the first failure is the one to tell.
                    let _told_already = ask_delegate(name, "DEL", env, config);
                })?;
                let addresses = result
                    .ips
                    .iter()
                    .filter_map(crate::result::Ip::ip)
                    .collect();
                Ok(Given {
                    addresses,
                    dns: result.dns,
                })
            }
        }
    }

    /// Frees.
    ///
    /// # Errors
    /// As the disk or the delegate says.
    pub fn del(&self, env: &Environment, config: &Config) -> Result<(), CniError> {
        match self {
            Self::Own(own) => {
                own.pool.release(&owner(env), now())?;
                Ok(())
            }
            Self::Delegate(Delegate { name, .. }) => {
                ask_delegate(name, "DEL", env, config).map(drop)
            }
        }
    }

    /// Whether the reservation stands.
    ///
    /// # Errors
    /// Code 106 naming the address that is not reserved, or what the delegate says.
    pub fn check(
        &self,
        env: &Environment,
        config: &Config,
        addresses: &[IpAddr],
    ) -> Result<(), CniError> {
        match self {
            Self::Own(own) => {
                let (owner, leases) = (owner(env), own.pool.leases()?);
                let is_held = |ip: &IpAddr| leases.iter().any(|l| l.ip == *ip && l.is_of(&owner));
                match addresses.iter().find(|ip| !is_held(ip)) {
                    None => Ok(()),
                    Some(ip) => {
                        let msg = format!("missing: the reservation of address {ip}");
                        Err(CniError::new(Code::CheckFailed, msg))
                    }
                }
            }
            Self::Delegate(Delegate { name, .. }) => {
                ask_delegate(name, "CHECK", env, config).map(drop)
            }
        }
    }

    /// How full it is, as far as that is known.
    ///
    /// # Errors
    /// As the disk or the delegate says.
    pub fn status(
        &self,
        env: &Environment,
        config: &Config,
        pools: &Pools,
    ) -> Result<Option<Usage>, CniError> {
        match self {
            Self::Own(own) => {
                let (plan, _) = own.plan.as_ref().map_err(Clone::clone)?;
                Ok(Some(own.pool.usage(plan)?))
            }
            Self::Delegate(Delegate { name, store }) => {
                match (ask_delegate(name, "STATUS", env, config), store) {
                    (Err(error), Some((dir, plan))) if is_unknown_verb(&error) => {
                        Ok(Some(pools.open(dir)?.usage(plan)?))
                    }
                    (Err(error), None) if is_unknown_verb(&error) => Ok(None),
                    (answer, _) => answer.map(|_| None),
                }
            }
        }
    }
}

/// Whether a delegate says that it has no such verb: it is older than GC and STATUS. The reference skeleton of those days
/// asks for a container id first.
pub(crate) fn is_unknown_verb(error: &CniError) -> bool {
    matches!(
        error.code,
        Code::Environment | Code::IncompatibleVersion | Code::UnknownContainer
    )
}

impl Own {
    fn add(
        &self,
        env: &Environment,
        config: &Config,
        args: &Args,
        live: &dyn Fn(&Lease) -> bool,
    ) -> Result<Given, CniError> {
        let (plan, confined) = self.plan.as_ref().map_err(Clone::clone)?;
        let (owner, fixed) = (owner(env), fixed(config, args)?);
        let ask = Ask {
            owner: &owner,
            plan,
            fixed: &fixed,
            confined,
            cooldown: self.cooldown,
            now: now(),
        };
        let given = self.pool.allocate(&ask, live)?;
        let addresses = given.into_iter().map(|address| address.ip).collect();
        Ok(Given {
            addresses,
            dns: Dns::default(),
        })
    }
}

fn owner(env: &Environment) -> Owner {
    Owner {
        container_id: env.container_id.clone(),
        ifname: env.ifname.clone(),
    }
}

/// The owner behind a record's key.
pub(crate) fn owner_of(key: &Key) -> Owner {
    Owner {
        container_id: key.container_id.clone(),
        ifname: key.ifname.clone(),
    }
}

fn delegate_result(name: &str, env: &Environment, config: &Config) -> Result<CniResult, CniError> {
    let answer = ask_delegate(name, "ADD", env, config)?;
    let result = CniResult::from_json(&answer, config.version)?;
    if result.ips.is_empty() {
        return Err(CniError::new(
            Code::Config,
            format!("IPAM plugin {name} gave no address"),
        ));
    }
    Ok(result)
}

/// Runs the delegate and returns what it printed.
pub(crate) fn ask_delegate(
    name: &str,
    verb: &str,
    env: &Environment,
    config: &Config,
) -> Result<Value, CniError> {
    if env.path.is_empty() {
        let msg = format!("required variables are missing: CNI_PATH (for IPAM plugin {name})");
        return Err(CniError::new(Code::Environment, msg));
    }
    let program = delegate::find(name, &env.path)?;
    let mut variables = vec![
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", env.container_id.as_str()),
        ("CNI_IFNAME", env.ifname.as_str()),
        ("CNI_NETNS", env.netns.as_str()),
        ("CNI_ARGS", env.args.as_str()),
        ("CNI_PATH", env.path.as_str()),
    ];
    variables.retain(|(_, value)| !value.is_empty());
    let said = delegate::run(&Call {
        program: &program,
        variables: &variables,
        stdin: &serde_json::to_vec(&config.raw).unwrap_or_default(),
        deadline: Instant::now() + DELEGATE,
    })?;
    if said.status.success() {
        return Ok(serde_json::from_slice(&said.stdout).unwrap_or(Value::Null));
    }
    let answer: Value = serde_json::from_slice(&said.stdout)
        .unwrap_or_else(|_| json!({"code": 999, "msg": said.stderr.trim()}));
    let code = answer
        .get("code")
        .and_then(Value::as_u64)
        .and_then(|c| u32::try_from(c).ok());
    let text = |key: &str| answer.get(key).and_then(Value::as_str).unwrap_or_default();
    Err(CniError::new(
        code.map_or(Code::Other(999), Code::from),
        format!("IPAM plugin {name}: {}", text("msg")),
    )
    .details(&text("details")))
}
