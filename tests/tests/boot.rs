//! The image under QEMU: the boot protocol, the self-test in ring 3, and real traffic without `/dev/kvm`.

use sluice_tests::claims;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::qemu::{Boot, ORDERLY, REFUSED};

const QEMU: sluice_tests::need::Need = Tool("qemu-system-x86_64");

fn self_test_passes(accelerator: &str) {
    let boot = Boot::run(accelerator, "sluice.selftest", 64).expect("a finished machine");
    let bad: Vec<_> = boot
        .lines_of("selftest")
        .filter(|line| line["ok"] != true)
        .collect();
    assert!(bad.is_empty(), "{bad:#?}");
    for promise in [
        "text_is_not_writable",
        "data_is_not_executable",
        "page_zero_is_not_mapped",
        "stack_overflow_is_caught",
        "firmware_data_is_closed",
        "cli_is_privileged",
    ] {
        assert!(
            boot.lines_of("selftest")
                .any(|line| line["check"] == promise),
            "{promise} was not checked"
        );
    }
    assert_eq!(boot.status, Some(ORDERLY));
}

#[test]
fn z07_self_test_in_ring_3_passes_under_tcg() {
    need!("z07_self_test_in_ring_3_passes_under_tcg", QEMU);
    self_test_passes("tcg");
}

#[test]
fn z07_self_test_in_ring_3_passes_under_kvm() {
    need!("z07_self_test_in_ring_3_passes_under_kvm", QEMU, Kvm);
    self_test_passes("kvm");
}

#[test]
fn boot_line_is_machine_readable() {
    need!("boot_line_is_machine_readable", QEMU);
    let boot = Boot::run("tcg", "sluice.selftest nonsense=1", 96).expect("a finished machine");
    let line = boot.lines_of("boot").next().expect("a boot line");
    assert_eq!(line["ram_mib"], 96);
    assert_eq!(line["unknown_tokens"], 1);
    assert!(
        line["tsc_khz"].as_u64().is_some_and(|khz| khz > 100_000),
        "{line}"
    );
}

#[test]
fn too_little_memory_is_refused_with_a_reason() {
    need!("too_little_memory_is_refused_with_a_reason", QEMU);
    let boot = Boot::run("tcg", "", 8).expect("a finished machine");
    assert_eq!(boot.status, Some(REFUSED), "{:?}", boot.lines);
    assert!(
        boot.lines
            .iter()
            .any(|line| line.to_string().contains("memory")),
        "{:?}",
        boot.lines
    );
}

/// P-10, the TCG half: the same image and the same claims where no KVM is.
#[test]
fn p10_pods_talk_through_the_image_under_tcg() {
    need!(
        "p10_pods_talk_through_the_image_under_tcg",
        Root,
        QEMU,
        Tool("ip"),
        Tool("ping")
    );
    let plan = Plan {
        isolation: "tcg".into(),
        ..Plan::default()
    };
    let lab = Lab::start(&plan).expect("a node under TCG");
    assert_eq!(
        lab.status().expect("a status")["machine"]["isolation"],
        "tcg"
    );
    claims::pods_ping_each_other(&lab).expect("ping");
    claims::gateway_answers(&lab).expect("gateway");
    claims::tcp_is_intact(&lab, 10_000_000).expect("10 MB of TCP");
    claims::udp_passes(&lab).expect("UDP");
}
