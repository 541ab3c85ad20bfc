//! §3.6: CHECK.

use crate::fixture::Fixture;
use serde_json::{Value, json};
use std::time::Duration;

fn checked(f: &Fixture, previous: &Value) -> crate::fixture::Said {
    f.call(
        "CHECK",
        "a",
        &f.config("1.1.0", json!({"prevResult": previous})),
    )
}

#[test]
fn cni35_check_needs_the_previous_result_and_compares_it() {
    let f = Fixture::new();
    let added = f.add("a").result();
    f.call("CHECK", "a", &f.config("1.1.0", json!({}))).error(7);
    f.call("CHECK", "a", &f.config("1.1.0", json!({"prevResult": {}})))
        .error(7);
    let mut other = added.clone();
    other["ips"][0]["address"] = json!("10.1.0.99/32");
    assert!(checked(&f, &other).error(106).contains("10.1.0.2"));
    let mut other = added.clone();
    other["interfaces"][0]["name"] = json!("eth7");
    assert!(checked(&f, &other).error(106).contains("eth0"));
    checked(&f, &added).silent();
}

#[test]
fn cni36_what_plugins_after_us_changed_is_allowed() {
    let f = Fixture::new();
    let mut added = f.add("a").result();
    added["interfaces"][0]["mac"] = json!("02:00:00:00:99:99");
    added["routes"] = json!([{"dst": "198.51.100.0/24"}]);
    added["theirs"] = json!("word");
    checked(&f, &added).silent();
}

#[test]
fn cni37_c06_what_is_missing_is_named() {
    let f = Fixture::new();
    let added = f.add("a").result();
    for missing in [
        "the pod's address 10.1.0.2",
        "the appliance's link and policy",
        "slv1",
    ] {
        {
            let mut state = f.node.state();
            (state.missing, state.missing_looks) = (vec![missing.into()], usize::MAX);
        }
        assert!(checked(&f, &added).error(106).contains(missing));
        f.node.state().missing_looks = 0;
        checked(&f, &added).silent();
    }
    std::fs::remove_file(f.path("data/net/10.1.0.2")).unwrap();
    assert!(
        checked(&f, &added)
            .error(106)
            .contains("reservation of address 10.1.0.2")
    );
}

#[test]
fn cni37_a_dead_node_fails_check() {
    let mut f = Fixture::new();
    let added = f.add("a").result();
    f.stop();
    checked(&f, &added).error(11);
}

#[test]
fn cni38_check_waits_a_bounded_time_for_convergence() {
    let f = Fixture::new();
    let added = f.add("a").result();
    {
        let mut state = f.node.state();
        (state.missing, state.missing_looks) = (vec!["the carrier".into()], 3);
    }
    checked(&f, &added).silent();
    f.node.state().missing_looks = usize::MAX;
    let said = checked(&f, &added);
    said.error(106);
    assert!(said.took >= Duration::from_secs(1), "{:?}", said.took);
    // It came back at all: without a bound there is no end, for the carrier never comes.
}

#[test]
fn cni39_the_delegates_check_counts() {
    let f = Fixture::new();
    let script = "#!/bin/sh\ncat > /dev/null\n[ $CNI_COMMAND = ADD ] && \
                  echo '{\"cniVersion\": \"1.1.0\", \"ips\": [{\"address\": \"10.5.0.9/24\"}]}'\n\
                  [ $CNI_COMMAND != CHECK ] && exit 0\n\
                  echo '{\"code\": 141, \"msg\": \"lease expired\"}'\nexit 1\n";
    let path = crate::ipam::plugin(&f, "forgetful", script);
    let netns = f.netns("a");
    let variables = [("CNI_NETNS", netns.as_str()), ("CNI_PATH", path.as_str())];
    let ipam = json!({"ipam": {"type": "forgetful"}});
    let added = f
        .call_with("ADD", "a", &f.config("1.1.0", ipam.clone()), &variables)
        .result();
    let mut config = f.config("1.1.0", ipam);
    config["prevResult"] = added;
    assert!(
        f.call_with("CHECK", "a", &config, &variables)
            .error(141)
            .contains("lease expired")
    );
}

#[test]
fn cni40_check_before_add_and_after_del_names_the_attachment() {
    let f = Fixture::new();
    let added = f.add("b").result();
    assert!(
        checked(&f, &added)
            .error(106)
            .contains("the attachment of a")
    );
    let added = f.add("a").result();
    f.del("a").silent();
    assert!(
        checked(&f, &added)
            .error(106)
            .contains("the attachment of a")
    );
}
