//! The thread that keeps the appliance's rows and the card's filters as the host's tables are.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sluice_contract::{Key, Row};

use super::Shared;
use super::filter::Claims;
use super::mirror::Changes;
use super::rows::{Follower, Look};
use crate::control::Control;
use crate::wiring::netlink::{Change, Netlink};

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
    /// Which of the card's two sets of filters is in use.
    filters: usize,
    mtu: u16,
}

impl Following {
    pub(super) fn new(
        follower: Follower,
        netlink: Netlink,
        (card, tap): (u32, u32),
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            follower,
            netlink,
            card,
            tap,
            shared,
            rows: BTreeMap::new(),
            claims: None,
            filters: 0,
            mtu: 0,
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
        let mut host_ports = self.shared.host_ports().clone();
        while !self.shared.ending.load(Ordering::Acquire) {
            let heard = changes.wait(TICK_MS);
            let asked = *self.shared.host_ports() != host_ports;
            if !heard && !asked && last.elapsed() < LONGEST {
                continue;
            }
            changes.wait(SETTLE_MS);
            host_ports = self.shared.host_ports().clone();
            last = Instant::now();
            if let Err(error) = self.once(control) {
                let text = format!("The host's tables cannot be followed: {error}");
                self.tell(vec![text]);
            }
        }
    }

    fn once(&mut self, control: &Control) -> io::Result<()> {
        let host_ports = self.shared.host_ports().clone();
        let look = self.follower.look(&mut self.netlink, &host_ports)?;
        self.put(&look, control);
        if look.card.mtu != self.mtu {
            let change = Change {
                mtu: Some(look.card.mtu),
                ..Change::default()
            };
            self.netlink.change(self.tap, &change)?;
            self.mtu = look.card.mtu;
        }
        if self.claims.as_ref() != Some(&look.claims) {
            self.filter(&look.claims)?;
            self.claims = Some(look.claims);
        }
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
        if !changed.is_empty() {
            control.put(changed);
        }
        if !gone.is_empty() {
            control.remove(gone);
        }
        self.rows.clone_from(&look.rows);
    }

    /// The new filters stand before the old ones go.
    fn filter(&mut self, claims: &Claims) -> io::Result<()> {
        let next = 1 - self.filters;
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
        self.netlink.unredirect_set(self.card, self.filters)?;
        self.filters = next;
        Ok(())
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
