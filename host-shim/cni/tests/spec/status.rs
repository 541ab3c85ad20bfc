//! §3.8: STATUS.

use crate::fixture::{Fixture, Said, within};
use serde_json::json;
use sluice_cni::verbs::node::Health;
use std::time::{Duration, Instant};

fn status(f: &Fixture) -> Said {
    f.call_with(
        "STATUS",
        "",
        &f.config("1.1.0", json!({})),
        &[("CNI_IFNAME", "")],
    )
}

/// Asks until the answer is another: health is said steadily, three samples of a quarter second later.
fn changed(f: &Fixture, to: u32) -> String {
    let started = Instant::now();
    loop {
        let said = status(f);
        if said.code != Some(0) && said.json()["code"] == to {
            return said.error(to);
        }
        assert!(started.elapsed() < Duration::from_secs(60), "{said:?}");
    }
}

#[test]
fn cni46_c08_status_is_0_while_adds_can_be_served_and_50_or_51_otherwise() {
    let f = Fixture::new();
    status(&f).silent();
    f.node.state().health = Health::Unavailable("The appliance is not connected".into());
    assert!(changed(&f, 50).contains("not connected"));
    f.node.state().health = Health::Degraded("the uplink is lost".into());
    assert!(changed(&f, 51).contains("the uplink is lost"));
    let stopped = Fixture::without_node();
    status(&stopped).error(50);
}

#[test]
fn cni47_i04_exhaustion_is_50_with_the_numbers() {
    let f = Fixture::new();
    let small =
        json!({"ipam": {"type": "sluice", "dataDir": f.path("data"), "subnet": "10.9.0.0/29"}});
    let config = f.config("1.1.0", small);
    for n in 0..5 {
        f.call("STATUS", "", &config).silent();
        f.call("ADD", &format!("c{n}"), &config).result();
    }
    assert!(
        f.call("STATUS", "", &config)
            .error(50)
            .contains("5 of 5 used")
    );
    f.call("DEL", "c0", &config).silent();
    f.call("STATUS", "", &config).silent();
}

#[test]
fn cni48_other_verbs_work_without_status_and_after_it_failed() {
    let f = Fixture::new();
    f.add("a").result();
    f.node.state().health = Health::Degraded("the uplink is lost".into());
    changed(&f, 51);
    f.del("a").silent();
    f.node.state().health = Health::Ready;
    f.add("b").result();
}

#[test]
fn cni49_the_delegates_failure_is_ours_and_one_without_status_is_none() {
    let f = Fixture::new();
    let path = crate::ipam::plugin(
        &f,
        "full",
        "#!/bin/sh\necho '{\"code\": 50, \"msg\": \"pool is dry\"}'\nexit 1\n",
    );
    let old = "#!/bin/sh\necho '{\"code\": 4, \"msg\": \"unknown CNI_COMMAND: STATUS\"}'\nexit 1\n";
    crate::ipam::plugin(&f, "old", old);
    let with = |name: &str| {
        let config = f.config("1.1.0", json!({"ipam": {"type": name}}));
        f.call_with("STATUS", "", &config, &[("CNI_PATH", &path)])
    };
    assert!(with("full").error(50).contains("pool is dry"));
    with("old").silent();
}

#[test]
fn cni50_status_is_cheap() {
    let f = Fixture::new();
    for n in 0..40 {
        f.add(&format!("c{n}")).result();
    }
    within(Duration::from_millis(50), || status(&f)).silent();
}
