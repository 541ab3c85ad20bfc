//! Death and return: a killed VMM, a killed daemon, an interrupted lab; and nothing left behind.

use nix::sys::signal::Signal;
use sluice_tests::claims;
use sluice_tests::command::{self, Running};
use sluice_tests::lab::{Lab, Plan, Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::snapshot::Snapshot;
use std::process::{Command, Stdio};
use std::time::Duration;

#[test]
fn p03_killed_vmm_is_replaced_and_traffic_goes_on() {
    need!(
        "p03_killed_vmm_is_replaced_and_traffic_goes_on",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    let mut lab = Lab::start(&Plan::default()).expect("a node");
    claims::killed_vmm_comes_back(&mut lab).expect("another VMM");
    claims::pods_ping_each_other(&lab).expect("ping afterwards");
}

#[test]
fn w11_killed_daemon_finds_its_taps_in_both_wirings() {
    need!(
        "w11_killed_daemon_finds_its_taps_in_both_wirings",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let mut lab = Lab::start(&Plan {
            wiring,
            ..Plan::default()
        })
        .expect("a node");
        claims::killed_node_finds_its_taps(&mut lab).expect("a new daemon");
    }
}

#[test]
fn p11_nothing_is_left_after_an_orderly_end() {
    need!(
        "p11_nothing_is_left_after_an_orderly_end",
        Root,
        Kvm,
        Tool("ip")
    );
    let before = Snapshot::take().expect("a look");
    drop(Lab::start(&Plan::default()).expect("a node"));
    assert_eq!(
        Snapshot::take()
            .expect("a look")
            .added_since(&before, std::process::id()),
        [""; 0]
    );
}

#[test]
fn p11_nothing_is_left_after_an_interrupted_demo() {
    need!(
        "p11_nothing_is_left_after_an_interrupted_demo",
        Root,
        Kvm,
        Tool("ip")
    );
    let before = Snapshot::take().expect("a look");
    let mut command = Command::new(program("sluice-lab"));
    command
        .arg("demo")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut demo = Running::start("sluice-lab", &mut command).expect("a demo");
    let lab = demo.pid().as_raw().cast_unsigned();
    command::until("a VMM of the demo", Duration::from_secs(60), || {
        let now = Snapshot::take()?.added_since(&before, lab);
        let has_vmm = now.iter().any(|line| line.contains("sluice-vmm "));
        anyhow::ensure!(has_vmm, "none yet");
        Ok(())
    })
    .expect("a running demo");
    demo.signal(Signal::SIGINT);
    demo.wait().expect("an end");
    assert_eq!(
        Snapshot::take().expect("a look").added_since(&before, lab),
        [""; 0]
    );
}

#[test]
fn p11_nothing_is_left_after_a_failure_in_the_middle() {
    need!(
        "p11_nothing_is_left_after_a_failure_in_the_middle",
        Root,
        Tool("ip")
    );
    let before = Snapshot::take().expect("a look");
    let plan = Plan {
        memory: 1,
        ..Plan::default()
    };
    let error = Lab::start(&plan)
        .map(drop)
        .expect_err("one MiB is not enough");
    assert!(format!("{error:#}").contains("memory"), "{error:#}");
    assert_eq!(
        Snapshot::take()
            .expect("a look")
            .added_since(&before, std::process::id()),
        [""; 0]
    );
}
