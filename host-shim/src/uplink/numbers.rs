//! The numbers by which the appliance knows peers. A number stays with its address, so that a node that is replaced or gets
//! other pods is a change of rows in place, and a node that moves has its new rows before the old ones go.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use sluice_contract::overlay::PeerId;

/// The numbers given.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    given: BTreeMap<IpAddr, Number>,
    taken: BTreeSet<u16>,
    /// All below are taken: thousands of nodes that come at once are each given the next.
    lowest: u16,
}

#[derive(Debug)]
struct Number {
    id: PeerId,
    /// Nobody has the address since this revision.
    gone: Option<u64>,
}

impl Numbers {
    /// The number of an address; `None` if there are no more.
    pub(super) fn of(&mut self, address: IpAddr) -> Option<PeerId> {
        if let Some(number) = self.given.get(&address) {
            return Some(number.id);
        }
        let free = (self.lowest..=u16::MAX).find(|id| !self.taken.contains(id))?;
        self.taken.insert(free);
        self.lowest = free;
        let id = PeerId(free);
        self.given.insert(address, Number { id, gone: None });
        Some(id)
    }

    /// `present` are the addresses of all peers as of `revision`. Others keep their numbers until the appliance has forgotten
    /// them: it is told of new rows before old ones go, and an address is one peer's.
    pub(super) fn settle(
        &mut self,
        present: &BTreeSet<IpAddr>,
        revision: u64,
        is_in_force: impl Fn(u64) -> bool,
    ) {
        let (taken, lowest) = (&mut self.taken, &mut self.lowest);
        self.given.retain(|address, number| {
            if present.contains(address) {
                number.gone = None;
                return true;
            }
            let gone = *number.gone.get_or_insert(revision);
            if is_in_force(gone) {
                taken.remove(&number.id.0);
                *lowest = number.id.0.min(*lowest);
                return false;
            }
            true
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn a_number_is_given_again_only_when_the_appliance_has_forgotten_it() {
        let mut numbers = Numbers::default();
        let (a, b) = (numbers.of(ip(1)), numbers.of(ip(2)));
        assert_eq!((a, b), (Some(PeerId(0)), Some(PeerId(1))));
        let only_b = BTreeSet::from([ip(2)]);
        numbers.settle(&only_b, 7, |revision| revision <= 6);
        assert_eq!(numbers.of(ip(3)), Some(PeerId(2)));
        assert_eq!(numbers.of(ip(1)), a, "it may come back meanwhile");
        let others = BTreeSet::from([ip(2), ip(3)]);
        numbers.settle(&others, 8, |revision| revision <= 7);
        assert_eq!(numbers.of(ip(4)), a);
        assert_eq!(numbers.of(ip(2)), b);
    }

    #[test]
    fn whoever_comes_back_keeps_its_number() {
        let mut numbers = Numbers::default();
        let a = numbers.of(ip(1));
        numbers.settle(&BTreeSet::new(), 3, |_| false);
        numbers.settle(&BTreeSet::from([ip(1)]), 4, |_| false);
        numbers.settle(&BTreeSet::new(), 9, |revision| revision <= 8);
        assert_eq!(numbers.of(ip(1)), a);
    }
}
