//! The node's own policy (row N-21): what may begin between the node itself and whoever reaches it, or is reached by it, through
//! the appliance. Its rules are bound to the host link, in the same tables as the pods'.

use super::{Decision, Policy, Query, accept};
use sluice_contract::LinkId;
use sluice_contract::policy::{Direction, RuleId, RulesetId};

impl Policy<'_> {
    /// May this connection begin, as far as the node at [`LinkId::HOST`] is concerned? `None`: it has no policy in that direction.
    /// `is_own_pod`: the far end is a pod of this node, which the kubelet has to reach.
    pub fn judge_node(&self, query: &Query, is_own_pod: bool) -> Option<Decision> {
        let settings = self.settings?;
        let binding = self.bindings.find(u32::from(LinkId::HOST.raw()), &[]);
        let &[ingress, egress] = binding? else {
            return None;
        };
        let ruleset = match query.direction {
            Direction::Ingress => ingress,
            Direction::Egress => egress,
        };
        if ruleset == RulesetId::NONE.0 {
            return None;
        }
        if is_own_pod && query.direction == Direction::Egress && settings.host_reaches_pods {
            return Some(accept(RuleId::HOST));
        }
        Some(self.ask(RulesetId(ruleset), query, &[]))
    }

    /// Whether what the node's own policy denies passes nevertheless, and is only told.
    pub fn is_node_audited(&self) -> bool {
        self.settings.is_some_and(|settings| settings.audit_node)
    }
}
