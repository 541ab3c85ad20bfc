//! When a source is rewritten, and to which port: mappings are endpoint-independent as long as ports permit (RFC 4787 REQ-1).
//!
//! The first port tried is a secret function of the inside address and port alone, so one inside endpoint has one outside port
//! towards everybody, with its parity preserved (REQ-4). A port may serve several destinations; what tells the answers apart
//! is the whole flow, and if that is taken the next port is tried. No protocol is looked into (REQ-10).
//!
//! Towards a remote end that has many connections, ports that are known to be taken are passed over (see
//! [`Sources`](crate::conntrack::Sources)), so a few tries suffice however few ports are left.

use crate::connection::{Path, Way};
use crate::conntrack::Range;
use crate::flow::Flow;
use crate::hash::Hasher;
use crate::tables::{Nat, Place};
use sluice_contract::service::PrefixUse;

/// Ports that are tried for one packet before giving up. Of a remote end of which less than a quarter is in use, one flow in
/// 10⁹ finds none; of others it is known which are taken.
pub const ATTEMPTS: u32 = 16;

/// Whether traffic from a pod to a destination of that purpose, leaving by `egress`, gets the node's address (row E-01). What lies
/// behind another node does not leave.
pub fn leaves_cluster(nat: &Nat, purpose: Option<PrefixUse>, place: Place, egress: Path) -> bool {
    nat.row.masquerade_egress
        && matches!(egress.way, Way::Neighbor(_))
        && place == Place::Elsewhere
        && !matches!(purpose, Some(PrefixUse::Pods | PrefixUse::Keep))
}

/// The ports of the configured range.
pub fn range(nat: &Nat) -> Range {
    let (first, last) = (nat.row.first_port, nat.row.last_port);
    Range {
        first,
        count: u32::from(last.saturating_sub(first)) + 1,
    }
}

/// The ports to try for a flow, in order.
#[derive(Clone, Debug)]
pub struct Candidates {
    first: u32,
    count: u32,
    next: u32,
    step: Step,
    left: u32,
}

/// How far it is from one port to the next. Most flows need no second one, so it is only worked out for that.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// No port was tried yet; the number from which on a step is looked for.
    Unused(u32),
    /// The first one was.
    Rough(u32),
    Exact(u32),
}

impl Candidates {
    /// For the inside source of `flow`, out of the configured range.
    pub fn of(hasher: &Hasher, nat: &Nat, flow: &Flow) -> Self {
        let Range { first, count } = range(nat);
        let first = u32::from(first);
        let source = flow.source();
        let port = u32::from(flow.source_port()) | u32::from(flow.protocol()) << 16;
        let hash = hasher.hash([source.high(), source.low(), u64::from(port), 0x6e61_7421]);
        let mut start = (hash as u32) % count;
        if count > 1 && (start + first) & 1 != port & 1 {
            start = (start ^ 1) % count;
        }
        let step = ((hash >> 32) as u32 % count) | 1;
        Self {
            first,
            count,
            next: start,
            step: Step::Unused(step),
            left: ATTEMPTS.min(count),
        }
    }

    /// The one to begin with.
    pub fn first(&self) -> u16 {
        u16::try_from(self.first + self.next).unwrap_or(u16::MAX)
    }
}

/// The next number from `step` on that has no factor in common with `count`, so that steps of it visit everything.
fn coprime(step: u32, count: u32) -> u32 {
    let mut step = step.max(1);
    while gcd(step, count) != 1 {
        step += 1;
    }
    step
}

const fn gcd(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

impl Iterator for Candidates {
    type Item = u16;

    fn next(&mut self) -> Option<u16> {
        self.left = self.left.checked_sub(1)?;
        let step = match self.step {
            Step::Unused(from) => {
                self.step = Step::Rough(from);
                0
            }
            Step::Rough(from) => coprime(from, self.count),
            Step::Exact(step) => step,
        };
        if step > 0 {
            self.step = Step::Exact(step);
            self.next = (self.next + step) % self.count;
        }
        let port = self.first + self.next;
        u16::try_from(port).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::Address;
    use proptest::prelude::*;
    use sluice_contract::service::NatRow;
    use std::collections::HashSet;

    proptest! {
        #[test]
        fn e03_candidates_are_different_ports_of_the_range(first in 1u16.., span: u16, source: u16) {
            let last = first.saturating_add(span);
            let nat = Nat { row: NatRow { first_port: first, last_port: last, ..NatRow::default() }, present: true };
            let flow = Flow::new(Address::v4([10, 0, 0, 1]), Address::v4([1, 1, 1, 1]), 17, source, 53);
            let all: std::vec::Vec<u16> = Candidates::of(&Hasher::new([1; 16]), &nat, &flow).collect();
            let count = u32::from(last - first) + 1;
            prop_assert_eq!(all.len() as u32, count.min(ATTEMPTS));
            prop_assert!(all.iter().all(|port| (first..=last).contains(port)));
            prop_assert_eq!(all.iter().collect::<HashSet<_>>().len(), all.len());
            let other = Flow::new(Address::v4([10, 0, 0, 1]), Address::v4([9, 9, 9, 9]), 17, source, 99);
            prop_assert!(Candidates::of(&Hasher::new([1; 16]), &nat, &other).eq(all));
        }
    }
}
