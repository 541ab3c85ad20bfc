//! The uplink: a tap beside the node's network card, tc filters that bring the appliance its own, and the rows that tell
//! it how to reach the other nodes.
//!
//! `filter` says what belongs to the appliance, `mirror` what the host knows of the underlay, `rows` makes rows of both.
//! A thread follows the host's changes and puts rows that differ.

pub mod config;
mod filter;
mod mirror;
mod rows;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use sluice_contract::{Key, Row};

use self::config::{SegmentationBy, UplinkConfig, parse_prefix};
use self::mirror::Changes;
use crate::control::Control;
use crate::wiring::netlink::{Change, Netlink};
use crate::wiring::{quiet, tap};

/// The tap beside the card.
pub const TAP: &str = "sluplink";
/// The longest time in which a change is noticed that the kernel does not tell of.
const TICK_MS: u16 = 1000;
/// How long further changes are waited for before rows are made, so that a burst of them costs one change.
const SETTLE_MS: u16 = 20;

/// What of the uplink cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("Uplink {interface}: cannot {step}")]
pub struct UplinkError {
    pub interface: String,
    pub step: &'static str,
    pub source: io::Error,
}

/// The running uplink.
#[derive(Debug)]
pub struct Uplink {
    interface: String,
    ending: Arc<AtomicBool>,
    follower: Option<JoinHandle<()>>,
}

impl Uplink {
    /// Makes the tap and the filters and tells the appliance of the other nodes. The tap is for the trunk's link 1.
    ///
    /// # Errors
    /// The step that failed; what was made before is taken back.
    pub fn start(config: &UplinkConfig, control: &Control) -> Result<(Self, File), UplinkError> {
        let failed = |step| {
            let interface = config.interface.clone();
            move |source| UplinkError {
                interface,
                step,
                source,
            }
        };
        let mut netlink = Netlink::open().map_err(failed("open netlink"))?;
        let changes = Changes::listen().map_err(failed("listen for changes"))?;
        let card = netlink
            .interface(&config.interface)
            .and_then(|card| card.ok_or_else(|| io::ErrorKind::NotFound.into()))
            .map_err(failed("find the network card"))?;
        // What a life before this one has left there leads nowhere now.
        let _ = netlink.unredirect(card.index);
        let mut follower = rows::Follower::new(config.clone());
        let first = follower
            .rows(&mut netlink)
            .map_err(failed("read the host's tables"))?;
        let tap = match config.segmentation {
            SegmentationBy::Auto => tap::attach_for_tunnels(TAP),
            SegmentationBy::Daemon => tap::attach(TAP),
        }
        .map_err(failed("make the tap"))?;
        quiet(TAP).map_err(failed("keep the host's IPv6 off the tap"))?;
        let index = netlink.index(TAP).map_err(failed("find the tap"))?;
        let change = Change {
            up: true,
            mtu: Some(card.mtu),
            ..Change::default()
        };
        netlink
            .change(index, &change)
            .map_err(failed("set up the tap"))?;
        netlink
            .redirect(index, card.index)
            .map_err(failed("redirect the tap to the card"))?;
        let direct: Vec<_> = config.pods.iter().filter_map(|p| parse_prefix(p)).collect();
        let direct = if config.peers.iter().any(|peer| peer.direct) {
            direct
        } else {
            Vec::new()
        };
        let tunnel = &config.tunnel;
        let own: Vec<IpAddr> = follower.addresses().to_vec();
        let matches = filter::matches(tunnel.protocol.into(), tunnel.port, &own, &direct);
        let filtered = matches.iter().try_for_each(|one| {
            netlink.redirect_matching(card.index, index, one.ethertype, one.selector())
        });
        if let Err(error) = filtered {
            let _ = netlink.unredirect(card.index);
            return Err(failed("redirect the card to the tap")(error));
        }
        control.put(first.values().cloned());
        let ending = Arc::new(AtomicBool::new(false));
        let (stop, control) = (ending.clone(), control.clone());
        let thread = std::thread::Builder::new()
            .name("uplink".into())
            .spawn(move || {
                follow(
                    &changes,
                    &mut netlink,
                    &mut follower,
                    first,
                    &control,
                    &stop,
                );
            })
            .map_err(failed("follow the host's changes"))?;
        tracing::info!(interface = %config.interface, peers = config.peers.len(), "uplink in use");
        let uplink = Self {
            interface: config.interface.clone(),
            ending,
            follower: Some(thread),
        };
        Ok((uplink, tap))
    }

    /// Gives the card back to the host. The tap goes with its last descriptor.
    pub fn stop(&mut self) {
        self.ending.store(true, Ordering::Release);
        if let Some(thread) = self.follower.take() {
            // It has nothing to say.
            let _ = thread.join();
        }
        let given_back = Netlink::open().and_then(|mut netlink| {
            let card = netlink.index(&self.interface)?;
            netlink.unredirect(card)
        });
        if let Err(error) = given_back {
            tracing::warn!(interface = %self.interface, %error, "the card keeps its filters");
        }
    }
}

fn follow(
    changes: &Changes,
    netlink: &mut Netlink,
    follower: &mut rows::Follower,
    mut present: BTreeMap<Key, Row>,
    control: &Control,
    ending: &AtomicBool,
) {
    while !ending.load(Ordering::Acquire) {
        changes.wait(TICK_MS / 4);
        changes.wait(SETTLE_MS);
        match follower.rows(netlink) {
            Ok(rows) => {
                let changed: Vec<Row> = rows
                    .iter()
                    .filter(|(key, row)| present.get(key) != Some(row))
                    .map(|(_, row)| row.clone())
                    .collect();
                if !changed.is_empty() {
                    tracing::info!(rows = changed.len(), "the underlay has changed");
                    control.put(changed);
                }
                present = rows;
            }
            Err(error) => tracing::warn!(%error, "the host's tables cannot be read"),
        }
    }
}
