//! What the stages decided about a packet, told to whoever asked. The packet path asks nobody and pays nothing; `trace` and
//! `sluice-replay` listen to the very same code.

use crate::address::Address;
use crate::connection::Path;
use crate::conntrack::{Invalid, State};
use crate::decap;
use crate::flow::{Direction, Flow};
use heapless::Vec;
use sluice_contract::policy::{Direction as PolicyDirection, RuleId};
use sluice_contract::service::{FrontendKind, PortId};
use sluice_contract::{DropReason, Identity, LinkId};

/// A decision of a stage, with the row that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// The packet is of this flow.
    Flow(Flow),
    /// It belongs to a connection of the present tables, or of former ones and was judged again.
    Connection {
        direction: Direction,
        state: State,
        judged_again: bool,
    },
    /// It is no valid part of its connection, or cannot begin one.
    Invalid(Invalid),
    /// It would begin a connection.
    New,
    /// An ICMP error about a connection.
    Related { direction: Direction },
    /// A later fragment of a datagram of this flow.
    Fragment(Flow),
    /// A Service was reached.
    Frontend { service: PortId, kind: FrontendKind },
    /// Of its endpoints, this one.
    Backend { address: Address, port: u16 },
    /// The source becomes this.
    Masquerade { address: Address, port: u16 },
    /// Policy was asked for the pod behind `link`.
    Policy {
        direction: PolicyDirection,
        link: LinkId,
        peer: Identity,
        rule: RuleId,
        accepted: bool,
    },
    /// It came in a tunnel.
    Unwrapped(decap::Origin),
    /// It leaves this way.
    Route(Path),
    /// It leaves as a packet of this flow.
    Rewritten(Flow),
    /// A stage refused it; its sender may be told.
    Refused(DropReason),
}

/// Somebody who listens.
pub trait Observer {
    /// Nothing is changed by the packet: no connection begins, no bucket is charged. Only the frame itself is.
    const DRY: bool;

    /// A stage decided.
    fn note(&mut self, step: Step);
}

/// Nobody listens.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    const DRY: bool = false;

    #[inline(always)]
    fn note(&mut self, _: Step) {}
}

/// Steps that one packet can take, at most.
pub const STEPS: usize = 16;

/// The steps of one packet. `DRY`: of one that leaves no trace.
#[derive(Clone, Debug, Default)]
pub struct Record<const DRY: bool> {
    pub steps: Vec<Step, STEPS>,
}

impl<const DRY: bool> Observer for Record<DRY> {
    const DRY: bool = DRY;

    fn note(&mut self, step: Step) {
        // More steps than a packet can take are not noted.
        let _ = self.steps.push(step);
    }
}
