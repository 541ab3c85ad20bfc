//! Objects of kinds that came before ClusterNetworkPolicy.

use serde_json::json;
use sluice_model::store::Store;

use crate::api::Api;
use crate::{brisk, follow_with};

const ADMIN: &str = "/apis/policy.networking.k8s.io/v1alpha1/adminnetworkpolicies";
const BASELINE: &str = "/apis/policy.networking.k8s.io/v1alpha1/baselineadminnetworkpolicies";

#[test]
fn n11_objects_of_older_kinds_are_named_as_not_followed() {
    let api = Api::start();
    api.put(ADMIN, &json!({"metadata": {"name": "isolate"}}));
    api.put(BASELINE, &json!({"metadata": {"name": "default"}}));
    let mut follower = follow_with(&api, brisk());
    let objects = |it: &Store| -> Vec<String> {
        let mut objects: Vec<_> = it.findings().map(|it| it.object.clone()).collect();
        objects.sort();
        objects
    };
    let wanted = [
        "AdminNetworkPolicy isolate",
        "BaselineAdminNetworkPolicy default",
    ];
    follower.until("the findings", |it| objects(it) == wanted);
    follower.until("what was there", Store::is_in_sync);
    let finding = follower.store.findings().next().unwrap();
    assert!(
        finding.reason.contains("Is not followed")
            && finding.reason.contains("ClusterNetworkPolicy")
    );
    assert_eq!(follower.store.lost(), None);
}

#[test]
fn n11_many_objects_of_older_kinds_are_not_all_named() {
    let api = Api::start();
    for name in 0..30 {
        api.put(ADMIN, &json!({"metadata": {"name": format!("p{name}")}}));
    }
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", Store::is_in_sync);
    follower.until("the findings", |it| it.findings().count() > 1);
    let more = |it: &Store| {
        it.findings()
            .any(|it| it.object.starts_with("More objects"))
    };
    assert!(more(&follower.store) && follower.store.findings().count() <= 11);
}

#[test]
fn n11_older_kinds_that_are_not_there_or_forbidden_are_no_matter() {
    let api = Api::start();
    api.put(ADMIN, &json!({"metadata": {"name": "isolate"}}));
    api.forbid(ADMIN, true);
    api.lacks(BASELINE);
    let mut follower = follow_with(&api, brisk());
    follower.until("what was there", Store::is_in_sync);
    let asked = || {
        let all = api.requests();
        [ADMIN, BASELINE].map(|path| all.iter().filter(|it| it.starts_with(path)).count())
    };
    while asked() != [1, 1] {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    follower.hear(4 * brisk().lasting);
    assert_eq!(asked(), [1, 1], "not asked again and again");
    assert_eq!(
        (follower.store.findings().count(), follower.store.lost()),
        (0, None)
    );
}
