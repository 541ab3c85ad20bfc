//! What policy sees of pods: the identity and the addresses of each, and whose an address is.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use sluice_contract::Identity;

use super::identity::{Displaced, Group, Identities};
use super::{Attached, Undescribed};
use crate::object::{Name, Pod};
use crate::store::Store;

/// All pods.
#[derive(Debug)]
pub(crate) struct Pods {
    undescribed: Undescribed,
    identities: Identities,
    views: HashMap<Name, View>,
    /// Pods that say that they have an address: one, as a rule.
    claims: BTreeMap<IpAddr, BTreeSet<Name>>,
}

/// What policy sees of a pod.
#[derive(Debug, PartialEq, Eq)]
struct View {
    /// None for a pod that is left out.
    identity: Option<Identity>,
    addresses: Vec<IpAddr>,
}

/// What a change of a pod has touched.
#[derive(Debug, Default)]
pub(crate) struct Touched {
    /// Whose owner may be another one now.
    pub(crate) addresses: Vec<IpAddr>,
    /// An identity that was not there before, and one that is not there any more.
    pub(crate) appeared: Option<Identity>,
    pub(crate) gone: Option<Identity>,
}

impl Pods {
    pub(crate) fn new(
        undescribed: Undescribed,
        displaced: impl IntoIterator<Item = Displaced>,
    ) -> Self {
        Self {
            undescribed,
            identities: Identities::new(displaced),
            views: HashMap::new(),
            claims: BTreeMap::new(),
        }
    }

    pub(crate) fn identities(&self) -> &Identities {
        &self.identities
    }

    pub(crate) fn identity(&self, pod: &Name) -> Option<Identity> {
        self.views.get(pod).and_then(|view| view.identity)
    }

    /// How many addresses a pod has, as policy sees it.
    pub(crate) fn addresses(
        &self,
        name: &Name,
        pod: Option<&Pod>,
        attached: Option<&Attached>,
    ) -> usize {
        let seen = self.see(name, pod, attached);
        seen.map_or(0, |(_, addresses)| addresses.len())
    }

    /// Group and addresses of a pod; `None`: policy does not see it.
    fn see(
        &self,
        name: &Name,
        pod: Option<&Pod>,
        attached: Option<&Attached>,
    ) -> Option<(Group, Vec<IpAddr>)> {
        match (pod, attached, self.undescribed) {
            (None, Some(attached), Undescribed::AsBefore) => {
                let group = self.identities.group(self.identity(name)?)?;
                Some((group.clone(), attached.addresses.clone()))
            }
            _ => see(name, pod, attached),
        }
    }

    /// A pod has appeared, changed or gone, or there is room for it or none any more.
    pub(crate) fn update(
        &mut self,
        name: &Name,
        pod: Option<&Pod>,
        attached: Option<&Attached>,
        is_left_out: bool,
    ) -> Touched {
        let mut touched = Touched::default();
        let seen = self.see(name, pod, attached);
        let former = self.views.remove(name);
        let view = seen.map(|(group, addresses)| {
            let identity = (!is_left_out).then(|| {
                let (identity, is_new) = self.identities.acquire(group);
                touched.appeared = is_new.then_some(identity);
                identity
            });
            View {
                identity,
                addresses,
            }
        });
        // What a pod claims may count for more or less now even if it claims the same: it is being deleted, it was attached.
        for view in former.iter().chain(&view) {
            touched.addresses.extend(&view.addresses);
        }
        if let Some(former) = former {
            for address in &former.addresses {
                if let Some(claims) = self.claims.get_mut(address) {
                    claims.remove(name);
                    if claims.is_empty() {
                        self.claims.remove(address);
                    }
                }
            }
            // After the new one was acquired: if it is the same identity it lives on.
            touched.gone = (former.identity).filter(|identity| self.identities.release(*identity));
        }
        if let Some(view) = view {
            for address in &view.addresses {
                self.claims
                    .entry(*address)
                    .or_default()
                    .insert(name.clone());
            }
            self.views.insert(name.clone(), view);
        }
        touched
    }

    /// A pod that says it has the address.
    pub(crate) fn at(&self, address: IpAddr) -> Option<&Name> {
        self.claims.get(&address)?.first()
    }

    /// Whose an address is: of several pods that claim it the one that is attached here, then one that is not being
    /// deleted, then the first by name.
    pub(crate) fn owner(
        &self,
        address: IpAddr,
        store: &Store,
        is_attached: impl Fn(&Name) -> bool,
    ) -> Option<Identity> {
        let owner = self.claims.get(&address)?.iter().min_by_key(|name| {
            let terminating = store.pod(name).is_some_and(|it| it.terminating);
            (!is_attached(name), terminating)
        })?;
        self.identity(owner)
    }
}

/// The same of one that is described, or need not be.
fn see(
    name: &Name,
    pod: Option<&Pod>,
    attached: Option<&Attached>,
) -> Option<(Group, Vec<IpAddr>)> {
    match (pod, attached) {
        (Some(pod), Some(attached)) => Some((Group::of(pod), attached.addresses.clone())),
        (Some(pod), None) => {
            // Also before its address is known: its packets tell its identity where a tunnel carries that (row O-14).
            let has_own = !pod.host_network && !pod.ended;
            has_own.then(|| (Group::of(pod), pod.addresses.clone()))
        }
        (None, Some(attached)) => Some((Group::undescribed(name), attached.addresses.clone())),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn o14_a_pod_has_its_identity_before_its_address_is_known() {
        let name = Name::new("x", "late");
        let mut pod = Pod {
            name: name.clone(),
            labels: Default::default(),
            node: None,
            addresses: Vec::new(),
            ports: [].into(),
            host_network: false,
            ended: false,
            ready: true,
            terminating: false,
            address_pool: None,
            egress_dscp: None,
            rates: Default::default(),
        };
        let mut pods = Pods::new(Undescribed::AsBefore, []);
        let before = pods.update(&name, Some(&pod), None, false);
        assert!(before.appeared.is_some() && before.addresses.is_empty());
        pod.addresses.push(IpAddr::from([10, 0, 0, 9]));
        let after = pods.update(&name, Some(&pod), None, false);
        assert_eq!((after.appeared, after.gone), (None, None));
        assert_eq!(pods.identity(&name), before.appeared);
        for unseen in [
            |pod: &mut Pod| pod.host_network = true,
            |pod: &mut Pod| pod.ended = true,
        ] {
            let mut pod = pod.clone();
            unseen(&mut pod);
            pods.update(&name, Some(&pod), None, false);
            assert_eq!(pods.identity(&name), None);
        }
    }
}
