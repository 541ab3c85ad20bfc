//! Objects of kinds that came before ClusterNetworkPolicy and are not followed: AdminNetworkPolicy
//! and its baseline.
//!
//! Who has some of them believes that they are in force. So they are named, where the node may read
//! them; where it may not, or the server does not have the kinds, there is no finding. It costs
//! two short lists every ten minutes.

use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::sleep;

use super::answer::{List, parse};
use super::back_off::jittered;
use super::common::{Common, Ended};
use super::request::{Ask, collection};
use super::server::Failure;
use crate::finding::{Finding, Severity};
use crate::store::Event;

const VERSION: &str = "policy.networking.k8s.io/v1alpha1";
/// The kinds, and how the API's path names them.
const KINDS: [(&str, &str); 2] = [
    ("AdminNetworkPolicy", "adminnetworkpolicies"),
    ("BaselineAdminNetworkPolicy", "baselineadminnetworkpolicies"),
];
/// Objects that are named; of more, only that there are more.
const NAMED: usize = 10;
/// Between two looks.
const LOOK: Duration = Duration::from_secs(600);

/// Looks for them for good.
pub(super) async fn look(common: Rc<Common>) {
    let mut known: [Vec<Finding>; 2] = Default::default();
    loop {
        for ((kind, plural), known) in KINDS.into_iter().zip(&mut known) {
            let findings = look_for(&common, kind, plural).await;
            if *known == findings {
                continue;
            }
            known.clone_from(&findings);
            let place = plural.to_owned();
            if let Err(Ended) = common.send(Event::Findings { place, findings }) {
                return;
            }
        }
        sleep(jittered(LOOK)).await;
    }
}

async fn look_for(common: &Common, kind: &str, plural: &str) -> Vec<Finding> {
    loop {
        match list(common, plural).await {
            Ok(list) => return findings(kind, &list),
            Err(Failure::Unavailable(_, asked)) => common.server.wait(asked).await,
            Err(_) => return Vec::new(),
        }
    }
}

async fn list(common: &Common, plural: &str) -> Result<List, Failure> {
    let uri = format!("{}?limit={NAMED}", collection(VERSION, plural));
    let answer = common.server.send(&Ask::get_metadata(uri)).await?;
    parse(answer, common.server.patience().answer).await
}

fn findings(kind: &str, list: &List) -> Vec<Finding> {
    let finding = |object: String| Finding {
        file: None,
        line: 0,
        severity: Severity::Warning,
        object,
        field: String::new(),
        reason: format!(
            "Is not followed, and nothing of it is in force: {kind} is an older API. Write it as a ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2)"
        ),
    };
    let names = list.items.iter().take(NAMED);
    let names = names.filter_map(|it| it.pointer("/metadata/name").and_then(Value::as_str));
    let mut findings: Vec<_> = names.map(|it| finding(format!("{kind} {it}"))).collect();
    if list.metadata.next.as_ref().is_some_and(|it| !it.is_empty()) {
        findings.push(finding(format!("More objects of {kind}")));
    }
    findings
}
