//! Which neighbors on the uplink the appliance is told of, and under which numbers: next hops of peers and gateways, and
//! whoever else the kernel knows, so that those on the wire itself are answered. A number stays with its address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use sluice_contract::Mac;
use sluice_contract::overlay::{NextHopId, NextHopRow};

use super::mirror::Neighbor;

/// Neighbors that are told of although nothing is routed by them. Each costs a row; a wire has seldom more clients.
const MOST_OTHERS: usize = 192;
/// Numbers kept for neighbors that are not there at the moment.
const MOST_KEPT: usize = 400;
/// For so long a neighbor that packets waited for is kept fresh.
const ASKED: Duration = Duration::from_secs(600);

/// Neighbors that packets waited for, and when.
#[derive(Clone, Debug, Default)]
pub(super) struct Asked(Arc<Mutex<BTreeMap<IpAddr, Instant>>>);

impl Asked {
    /// A packet waits for this one.
    pub(super) fn add(&self, address: IpAddr) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        all.retain(|_, at| now.duration_since(*at) < ASKED);
        if all.len() < MOST_OTHERS || all.contains_key(&address) {
            all.insert(address, now);
        }
    }

    fn has(&self, address: IpAddr) -> bool {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.get(&address).is_some_and(|at| at.elapsed() < ASKED)
    }
}

/// The numbers given.
#[derive(Debug, Default)]
pub(super) struct Hops {
    known: BTreeMap<IpAddr, (NextHopId, Option<Mac>)>,
    pub(super) asked: Asked,
}

/// The neighbors of one look at the host's tables.
#[derive(Debug)]
pub(super) struct Present<'h> {
    hops: &'h mut Hops,
    neighbors: BTreeMap<IpAddr, Neighbor>,
    rows: BTreeMap<NextHopId, NextHopRow>,
    /// Those of whom the kernel is to make sure.
    doubtful: BTreeSet<IpAddr>,
}

impl Hops {
    pub(super) fn present(&mut self, neighbors: BTreeMap<IpAddr, Neighbor>) -> Present<'_> {
        Present {
            hops: self,
            neighbors,
            rows: BTreeMap::new(),
            doubtful: BTreeSet::new(),
        }
    }

    fn free_id(&self) -> NextHopId {
        let taken: BTreeSet<_> = self.known.values().map(|(id, _)| *id).collect();
        let free = (0..u16::MAX).map(NextHopId).find(|id| !taken.contains(id));
        free.unwrap_or_default()
    }
}

impl Present<'_> {
    /// The number of a neighbor that something is routed by.
    pub(super) fn need(&mut self, address: IpAddr) -> NextHopId {
        let known = self.neighbors.get(&address).copied();
        if known.is_none_or(|neighbor| !neighbor.fresh) {
            self.doubtful.insert(address);
        }
        self.take(address, known)
    }

    /// A neighbor in the middle of being asked for keeps the MAC it had.
    fn take(&mut self, address: IpAddr, known: Option<Neighbor>) -> NextHopId {
        let (id, former) = match self.hops.known.get(&address) {
            Some(entry) => *entry,
            None => (self.hops.free_id(), None),
        };
        let mac = match known {
            Some(Neighbor { mac: Some(new), .. }) => Some(new),
            Some(Neighbor { failed: true, .. }) => None,
            _ => former,
        };
        self.hops.known.insert(address, (id, mac));
        self.rows.insert(id, NextHopRow { id, address, mac });
        id
    }

    /// All of them, with those that nothing is routed by.
    pub(super) fn finish(mut self) -> (Vec<NextHopRow>, Vec<IpAddr>) {
        let needed: BTreeSet<IpAddr> = self.rows.values().map(|row| row.address).collect();
        let others: Vec<(IpAddr, Neighbor)> = self
            .neighbors
            .iter()
            .filter(|(address, neighbor)| {
                let needed = needed.contains(*address);
                let there = neighbor.mac.is_some() || self.hops.asked.has(**address);
                !needed && there && is_global(**address)
            })
            .map(|(address, neighbor)| (*address, *neighbor))
            .collect();
        // Who was asked for comes before who just happened to be seen.
        let (asked, seen): (Vec<_>, Vec<_>) = others
            .into_iter()
            .partition(|(address, _)| self.hops.asked.has(*address));
        for (address, neighbor) in &asked {
            if !neighbor.fresh {
                self.doubtful.insert(*address);
            }
        }
        for (address, neighbor) in asked.into_iter().chain(seen).take(MOST_OTHERS) {
            self.take(address, Some(neighbor));
        }
        if self.hops.known.len() > MOST_KEPT {
            let rows = &self.rows;
            self.hops.known.retain(|_, (id, _)| rows.contains_key(id));
        }
        let doubtful = self.doubtful.into_iter().collect();
        (self.rows.into_values().collect(), doubtful)
    }
}

/// Others than these are nobody's destination behind the uplink.
fn is_global(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_link_local() && !v4.is_multicast() && !v4.is_broadcast(),
        IpAddr::V6(v6) => !v6.is_unicast_link_local() && !v6.is_multicast(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(mac: Option<u8>, fresh: bool, failed: bool) -> Neighbor {
        Neighbor {
            mac: mac.map(|last| Mac([2, 0, 0, 0, 0, last])),
            fresh,
            failed,
        }
    }

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_number_stays_with_its_address_and_a_mac_until_it_fails() {
        let mut hops = Hops::default();
        let mut look = |neighbors: &[(u8, Neighbor)]| {
            let map = neighbors.iter().map(|(last, n)| (ip(*last), *n)).collect();
            let mut present = hops.present(map);
            let id = present.need(ip(1));
            let (rows, doubtful) = present.finish();
            (id, rows, doubtful)
        };
        let (id, rows, doubtful) = look(&[]);
        assert_eq!((rows.len(), rows[0].mac), (1, None));
        assert_eq!(doubtful, [ip(1)]);
        let (same, rows, doubtful) = look(&[
            (1, seen(Some(9), true, false)),
            (7, seen(Some(3), false, false)),
        ]);
        assert_eq!(same, id);
        assert!(doubtful.is_empty());
        assert_eq!(
            rows.iter().map(|r| r.address).collect::<Vec<_>>(),
            [ip(1), ip(7)]
        );
        let mac = rows[0].mac;
        let (_, rows, doubtful) = look(&[(1, seen(None, false, false))]);
        assert_eq!((rows.len(), rows[0].mac), (1, mac), "being asked for");
        assert_eq!(doubtful, [ip(1)]);
        let (_, rows, _) = look(&[(1, seen(None, false, true))]);
        assert_eq!(rows[0].mac, None);
    }
}
