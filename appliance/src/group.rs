//! Who shares room: the pods of one namespace together, a pod without one by itself, the uplink, and the node.
//!
//! Connections and fragments are counted by group, so what the pods of one namespace, or strangers, do costs the others no more
//! than their share.

use sluice_contract::{LinkId, Tenant};

/// Numbers of groups: links of their own, then tenants.
pub const GROUPS: usize = 2 * TENANTS;
const TENANTS: usize = LinkId::LAST as usize + 1;

/// A group, as an index into a table of [`GROUPS`] entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Group(u16);

impl Group {
    /// What comes from other nodes by a tunnel: no stranger can send that. No link has this number.
    pub const TUNNEL: Self = Self(0);

    /// The group of a link.
    #[inline]
    pub const fn of(link: LinkId, tenant: Tenant) -> Self {
        Self(match (link, tenant.raw()) {
            // The node probes on its own behalf.
            (LinkId::PROBES, _) => LinkId::HOST.raw(),
            (link, 0) => link.raw(),
            (_, tenant) => TENANTS as u16 + tenant,
        })
    }

    /// The group with that index.
    pub(crate) const fn at(index: u16) -> Self {
        Self(index)
    }

    pub const fn index(self) -> usize {
        self.0 as usize
    }

    pub(crate) const fn raw(self) -> u16 {
        self.0
    }

    /// Whether this is the uplink or the node itself.
    pub const fn is_of_the_node(self) -> bool {
        self.0 < LinkId::FIRST_POD
    }

    /// Whether this is a namespace.
    pub const fn is_tenant(self) -> bool {
        self.index() >= TENANTS
    }
}
