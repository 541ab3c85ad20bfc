//! The node's links: who has which id, what is written down of them, and the row the appliance gets.
//!
//! An id is written down before anything of its link exists and forgotten after everything is gone, so whatever a crash
//! leaves behind is found by the next life of the daemon.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_contract::row::LinkRow;
use sluice_contract::types::Identity;
use sluice_contract::{LinkId, Mac, Row};
use sluice_model::object::Name;

use super::{bandwidth, ports};
use crate::cluster::pod_name;
use crate::config::{PodConfig, parse_mac};
use crate::files;
use crate::wiring::netns::{Netns, NetnsId};
use crate::wiring::{LinkSpec, Mode};

/// What is written down of a link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedLink {
    pub id: LinkId,
    pub incarnation: u32,
    /// It comes from the configuration file and goes with it.
    pub from_config: bool,
    pub pod: PodConfig,
    pub wiring: Mode,
    pub mac: Mac,
    pub mtu: u16,
    /// The pod's network namespace; an earlier version did not write it down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub netns_id: Option<NetnsId>,
}

impl SavedLink {
    /// How it is wired.
    pub fn spec(&self) -> LinkSpec {
        LinkSpec {
            id: self.id,
            netns: self.pod.netns.clone(),
            netns_id: self.netns_id,
            interface: self.pod.interface.clone(),
            addresses: self.pod.addresses.clone(),
            mac: self.mac,
            mtu: self.mtu,
            mode: self.wiring,
            adopt: self.pod.adopt.clone(),
        }
    }

    /// What belongs to it beside its link: how much it may carry, and the host ports that lead to it.
    pub fn own_rows(&self) -> Vec<Row> {
        let bandwidth = bandwidth::row(self.id, &self.pod.bandwidth);
        let ports = ports::rows(self.id, &self.pod);
        bandwidth.into_iter().chain(ports).collect()
    }

    /// Its link as the appliance knows it. Its identity is the cluster's to say; without a cluster every pod has its own.
    pub fn row(&self) -> LinkRow {
        LinkRow {
            id: self.id,
            mac: self.mac,
            // The configuration was checked against the same limit.
            addresses: self.pod.addresses.iter().copied().collect(),
            mtu: self.mtu,
            identity: Identity(Identity::FIRST_POD + u32::from(self.id.raw())),
            incarnation: self.incarnation,
            tenant: sluice_contract::Tenant::NONE,
        }
    }

    /// The pod of the cluster behind it.
    pub fn pod_name(&self) -> Name {
        pod_name(self.pod.pod.as_ref().unwrap_or(&self.pod.name))
    }
}

/// A link in use.
#[derive(Clone, Debug)]
pub struct Link {
    pub saved: SavedLink,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    /// Of this file's form.
    version: u32,
    /// The last incarnation given.
    incarnation: u32,
    links: Vec<SavedLink>,
}

const FORM: u32 = 1;

/// All links, and the file they are written down in.
#[derive(Debug)]
pub struct LinkTable {
    path: PathBuf,
    incarnation: u32,
    links: BTreeMap<LinkId, Link>,
}

/// Why a pod gets no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("A link named {0} is there already")]
    NameTaken(String),
    #[error("{address} is the address of {name}")]
    AddressTaken {
        address: std::net::IpAddr,
        name: String,
    },
    #[error("All {} link ids are in use", LinkId::LAST - LinkId::FIRST_POD + 1)]
    NoId,
    #[error("There is no link named {0}")]
    Unknown(String),
    #[error("The links cannot be written down in {path}")]
    Save { path: PathBuf, source: io::Error },
    #[error("{path} is not a list of links: {reason}")]
    Load { path: PathBuf, reason: String },
}

impl LinkTable {
    /// Reads the links of an earlier life; none when there was none.
    ///
    /// # Errors
    /// When the file is there and cannot be understood.
    pub fn load(run_dir: &Path) -> Result<(Self, Vec<SavedLink>), LinkError> {
        let path = run_dir.join("links.json");
        let refused = |reason: String| LinkError::Load {
            path: path.clone(),
            reason,
        };
        let saved: Saved = match fs::read(&path) {
            // Empty: the run directory is on a disk after all, and the power went.
            Ok(text) if !text.is_empty() => {
                serde_json::from_slice(&text).map_err(|e| refused(e.to_string()))?
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(refused(e.to_string())),
            _ => Saved {
                version: FORM,
                ..Saved::default()
            },
        };
        if saved.version != FORM {
            return Err(refused(format!(
                "its form is {}, this daemon knows {FORM}",
                saved.version
            )));
        }
        let table = Self {
            path,
            incarnation: saved.incarnation,
            links: BTreeMap::new(),
        };
        Ok((table, saved.links))
    }

    /// Gives a pod an id and writes it down; wiring may begin.
    ///
    /// # Errors
    /// When its name or an address is taken, no id is free, or the file cannot be written.
    pub fn plan(
        &mut self,
        pod: PodConfig,
        defaults: (Mode, u16),
        from_config: bool,
    ) -> Result<Link, LinkError> {
        for link in self.links.values() {
            let other = &link.saved.pod;
            if other.name == pod.name {
                return Err(LinkError::NameTaken(pod.name));
            }
            if let Some(address) = pod.addresses.iter().find(|a| other.addresses.contains(a)) {
                let name = other.name.clone();
                return Err(LinkError::AddressTaken {
                    address: *address,
                    name,
                });
            }
        }
        let free = |id: &LinkId| !self.links.contains_key(id);
        let mut ids = (LinkId::FIRST_POD..=LinkId::LAST).filter_map(LinkId::new);
        let id = ids.find(free).ok_or(LinkError::NoId)?;
        self.incarnation = self.incarnation.wrapping_add(1);
        // One that is not there is told when the link is made.
        let netns = Netns::open(&pod.netns).and_then(|netns| netns.identity());
        let saved = SavedLink {
            id,
            incarnation: self.incarnation,
            from_config,
            wiring: pod.wiring.unwrap_or(defaults.0),
            mac: pod
                .mac
                .as_deref()
                .and_then(parse_mac)
                .unwrap_or(Mac::of_pod(id)),
            mtu: pod.mtu.unwrap_or(defaults.1),
            netns_id: netns.ok(),
            pod,
        };
        self.keep(saved)
    }

    /// Takes a link in and writes all down.
    ///
    /// # Errors
    /// When the file cannot be written: then the link is not in.
    pub fn keep(&mut self, saved: SavedLink) -> Result<Link, LinkError> {
        let id = saved.id;
        let link = Link { saved };
        self.links.insert(id, link.clone());
        if let Err(error) = self.save() {
            self.links.remove(&id);
            return Err(error);
        }
        Ok(link)
    }

    /// Forgets a link of which nothing is left.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn forget(&mut self, id: LinkId) -> Result<(), LinkError> {
        self.links.remove(&id);
        self.save()
    }

    /// The link of that name.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(&self, name: &str) -> Result<Link, LinkError> {
        let found = self.links.values().find(|l| l.saved.pod.name == name);
        found
            .cloned()
            .ok_or_else(|| LinkError::Unknown(name.into()))
    }

    /// All links in the order of their ids.
    pub fn all(&self) -> impl Iterator<Item = &Link> {
        self.links.values()
    }

    /// Removes the file.
    pub fn remove_file(&self) {
        files::remove(&self.path);
    }

    fn save(&self) -> Result<(), LinkError> {
        let links = self.links.values().map(|l| l.saved.clone()).collect();
        let saved = Saved {
            version: FORM,
            incarnation: self.incarnation,
            links,
        };
        files::write_json(&self.path, &saved).map_err(|source| LinkError::Save {
            path: self.path.clone(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(name: &str, address: &str) -> PodConfig {
        let text = format!(r#"{{"name": "{name}", "netns": "/n", "addresses": ["{address}"]}}"#);
        serde_json::from_str(&text).unwrap()
    }

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("sluice-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn links_are_known_again_in_the_next_life_and_incarnations_grow() {
        let dir = Dir::new("links");
        let defaults = (Mode::Tap, 1400);
        let (mut table, saved) = LinkTable::load(&dir.0).unwrap();
        assert!(saved.is_empty());
        let a = table.plan(pod("a", "10.0.0.1"), defaults, false).unwrap();
        let b = table.plan(pod("b", "10.0.0.2"), defaults, true).unwrap();
        assert_eq!((a.saved.id.raw(), b.saved.id.raw()), (16, 17));
        assert_eq!((a.saved.mac, a.saved.mtu), (Mac::of_pod(a.saved.id), 1400));

        let (mut table, saved) = LinkTable::load(&dir.0).unwrap();
        assert_eq!(saved, [a.saved.clone(), b.saved.clone()]);
        saved.into_iter().for_each(|l| drop(table.keep(l).unwrap()));
        table.forget(a.saved.id).unwrap();
        let again = table.plan(pod("a", "10.0.0.1"), defaults, false).unwrap();
        assert_eq!((again.saved.id, again.saved.incarnation), (a.saved.id, 3));
    }

    #[test]
    fn names_and_addresses_have_one_owner() {
        let dir = Dir::new("owners");
        let (mut table, _) = LinkTable::load(&dir.0).unwrap();
        let defaults = (Mode::Veth, 1500);
        table.plan(pod("a", "10.0.0.1"), defaults, false).unwrap();
        let name = table
            .plan(pod("a", "10.0.0.2"), defaults, false)
            .unwrap_err();
        assert!(name.to_string().contains("named a"), "{name}");
        let address = table
            .plan(pod("b", "10.0.0.1"), defaults, false)
            .unwrap_err();
        assert_eq!(address.to_string(), "10.0.0.1 is the address of a");
        assert!(table.named("b").is_err());
    }

    #[test]
    fn file_of_another_form_is_refused_and_kept() {
        let dir = Dir::new("form");
        let path = dir.0.join("links.json");
        for text in ["{", r#"{"version": 9, "incarnation": 0, "links": []}"#] {
            fs::write(&path, text).unwrap();
            let error = LinkTable::load(&dir.0).unwrap_err();
            assert!(error.to_string().contains("links.json"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), text);
        }
    }
}
