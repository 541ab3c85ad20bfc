//! The thread that keeps the appliance's rows and the card's filters as the host's tables are.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sluice_contract::{Key, Row};

use super::Shared;
use super::filter::Claims;
use super::flannel;
use super::mirror::Changes;
use super::probe::Target;
use super::report::{NetworkReport, ORIGIN_CLUSTER};
use super::rows::{Follower, Look};
use crate::control::Control;
use crate::hostlink;
use crate::wiring::netlink::{Change, Netlink, Redirect, SETS};

/// The longest time in which a change is noticed that the kernel does not tell of.
const LONGEST: Duration = Duration::from_secs(1);
/// How often the thread looks whether it is to end.
const TICK_MS: u16 = 250;
/// How long further changes are waited for before rows are made, so that a burst of them costs one change.
const SETTLE_MS: u16 = 20;

/// What the thread knows.
#[derive(Debug)]
pub(super) struct Following {
    follower: Follower,
    netlink: Netlink,
    card: u32,
    tap: u32,
    shared: Arc<Shared>,
    rows: BTreeMap<Key, Row>,
    claims: Option<Claims>,
    targets: Vec<Target>,
    mtu: u16,
    /// What is left of it for pods.
    pod_mtu: u16,
    /// The control channel is held until the nodes of the cluster are known and their rows put.
    holds: bool,
}

impl Following {
    pub(super) fn new(
        follower: Follower,
        netlink: Netlink,
        (card, tap): (u32, u32),
        shared: Arc<Shared>,
        holds: bool,
    ) -> Self {
        Self {
            follower,
            netlink,
            card,
            tap,
            shared,
            rows: BTreeMap::new(),
            claims: None,
            targets: Vec::new(),
            mtu: 0,
            pod_mtu: 0,
            holds,
        }
    }

    /// The first look: filters stand and rows are put when this returns.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn begin(&mut self, control: &Control) -> io::Result<()> {
        self.once(control)
    }

    /// Until the end is asked for.
    pub(super) fn run(&mut self, changes: &Changes, control: &Control) {
        let mut last = Instant::now();
        while !self.shared.ending.load(Ordering::Acquire) {
            let heard = changes.wait(TICK_MS);
            if !heard && last.elapsed() < LONGEST {
                continue;
            }
            changes.wait(SETTLE_MS);
            last = Instant::now();
            if let Err(error) = self.once(control) {
                let text = format!("The host's tables cannot be followed: {error}");
                self.tell(vec![text]);
            }
        }
    }

    fn once(&mut self, control: &Control) -> io::Result<()> {
        let host_ports = self.shared.host_ports().clone();
        let members = self.shared.members().clone();
        let limits = self.shared.probes.limits();
        let looked = self
            .follower
            .look(&mut self.netlink, &host_ports, members.as_ref(), &limits);
        if let Ok(look) = &looked {
            self.put(look, control);
        }
        if self.holds && members.is_some() {
            // Whatever came of it, nothing more is known of the cluster's nodes.
            self.holds = false;
            control.release();
        }
        let look = looked?;
        if look.card.mtu != self.mtu {
            let change = Change {
                mtu: Some(look.card.mtu),
                ..Change::default()
            };
            self.netlink.change(self.tap, &change)?;
            self.mtu = look.card.mtu;
        }
        // Until the nodes of the cluster are known, a look claims less than an earlier life did.
        let waits = self.holds && self.claims.is_none() && self.is_filtered()?;
        if !waits && self.claims.as_ref() != Some(&look.claims) {
            self.filter(&look.claims)?;
            self.claims = Some(look.claims);
        }
        if members.is_some()
            && let Some(announcer) = &*self.shared.announcer()
        {
            announcer.say(flannel::to_write(&look.report.annotations));
        }
        if self.targets != look.targets {
            self.shared.probes.retarget(&look.targets);
            self.targets = look.targets;
        }
        self.host_link(look.report.pod_mtu, control)?;
        self.report(look.report);
        self.tell(look.problems);
        Ok(())
    }

    fn put(&mut self, look: &Look, control: &Control) {
        let changed: Vec<Row> = look
            .rows
            .iter()
            .filter(|(key, row)| self.rows.get(key) != Some(row))
            .map(|(_, row)| row.clone())
            .collect();
        let gone: Vec<Key> = self
            .rows
            .keys()
            .filter(|key| !look.rows.contains_key(key))
            .copied()
            .collect();
        if !changed.is_empty() || !gone.is_empty() {
            tracing::info!(
                rows = changed.len(),
                gone = gone.len(),
                "the underlay has changed"
            );
        }
        // At once: a node that moves is never behind nobody.
        let revision = if changed.is_empty() && gone.is_empty() {
            control.revision()
        } else {
            control.change(changed, gone)
        };
        self.follower
            .settle(look, revision, |revision| control.is_in_force(revision));
        self.rows.clone_from(&look.rows);
    }

    /// Whether the card has filters that lead to the tap.
    fn is_filtered(&mut self) -> io::Result<bool> {
        let redirects = self.netlink.redirects(self.card)?;
        let ours = |it: &Redirect| it.set().is_some() && it.to == self.tap;
        Ok(redirects.iter().any(ours))
    }

    /// The new filters stand before the old ones go, those of an earlier life among them.
    fn filter(&mut self, claims: &Claims) -> io::Result<()> {
        let redirects = self.netlink.redirects(self.card)?;
        let count = |set: usize| redirects.iter().filter(|it| it.set() == Some(set)).count();
        // With none free, of lives that were killed one after the other, the one with the fewest was never finished.
        let next = (0..SETS).min_by_key(|set| count(*set)).unwrap_or_default();
        self.netlink.unredirect_set(self.card, next)?;
        let filtered = claims.matches().iter().try_for_each(|one| {
            let place = (next, one.ethertype);
            self.netlink
                .redirect_matching(self.card, self.tap, place, one.selector())
        });
        if let Err(error) = filtered {
            // What there was stays in use.
            let _ = self.netlink.unredirect_set(self.card, next);
            return Err(error);
        }
        (0..SETS)
            .filter(|set| *set != next)
            .try_for_each(|set| self.netlink.unredirect_set(self.card, set))
    }

    /// The host link takes what pods take. It is made with the first MTU, after the first look.
    fn host_link(&mut self, pod_mtu: u16, control: &Control) -> io::Result<()> {
        let former = self.pod_mtu;
        if former != 0
            && former != pod_mtu
            && let Some(config) = self.follower.host_link()
        {
            let row = hostlink::change_mtu(&mut self.netlink, config, pod_mtu)?;
            control.put([row]);
        }
        self.pod_mtu = pod_mtu;
        Ok(())
    }

    /// Nodes that cannot be used are logged once, those that can be again as well.
    fn report(&self, report: NetworkReport) {
        let mut last = self.shared.report();
        if *last == report {
            return;
        }
        let odd = |report: &NetworkReport| -> BTreeMap<String, String> {
            let own = report.wrong.clone().map(|why| (report.node.clone(), why));
            let of_cluster = report
                .peers
                .iter()
                .filter(|peer| peer.origin == ORIGIN_CLUSTER);
            let peers = of_cluster.filter_map(|it| Some((it.name.clone(), it.problem.clone()?)));
            own.into_iter().chain(peers).collect()
        };
        let (before, now) = (odd(&last), odd(&report));
        for (node, reason) in now
            .iter()
            .filter(|(node, why)| before.get(*node) != Some(why))
        {
            tracing::warn!(
                node,
                reason,
                "a node of the cluster cannot be used as it is"
            );
        }
        for node in before.keys().filter(|node| !now.contains_key(*node)) {
            tracing::info!(node, "a node of the cluster was put right, or is gone");
        }
        *last = report;
    }

    fn tell(&self, problems: Vec<String>) {
        let mut told = self.shared.problems();
        if *told != problems {
            for problem in &problems {
                tracing::warn!("{problem}");
            }
            *told = problems;
        }
    }
}
