//! Every way a start can fail says what is wrong and what to do, with the status `--help` promises.

mod common;

use std::process::Command;

use common::Code;
use common::Finished;
use common::Image;
use common::Vmm;
use common::kvm_works;
use common::run;
use common::run_on_file;

fn fails(finished: &Finished, status: i32, words: &[&str]) {
    assert_eq!(finished.status, status, "{}", finished.stderr);
    for word in words {
        assert!(
            finished.stderr.contains(word),
            "{word:?} is missing in: {}",
            finished.stderr
        );
    }
}

#[test]
fn without_kvm_the_message_points_to_qemu() {
    let image = Image::default();
    for device in ["/does/not/exist", "/dev/null"] {
        let finished = run(&image, &["--kvm", device]);
        fails(
            &finished,
            1,
            &["cannot start", device, "QEMU", "docs/machine.md"],
        );
    }
}

#[test]
fn a_file_that_is_no_image_is_told_from_a_truncated_one() {
    if !kvm_works() {
        return;
    }
    let good = Image::default().bytes();
    fails(
        &run_on_file(b"#!/bin/sh\n"),
        1,
        &["not a 64-bit x86 ELF image", "magic"],
    );
    fails(&run_on_file(b""), 1, &["not a 64-bit x86 ELF image"]);
    fails(&run_on_file(&good[..40]), 1, &["truncated"]);
    fails(&run_on_file(&good[..100]), 1, &["truncated"]);
    fails(&run_on_file(&good[..good.len() - 1]), 1, &["truncated"]);
    let mut arm = good.clone();
    arm[18] = 183;
    fails(&run_on_file(&arm), 1, &["machine"]);
    let mut short = good;
    short[54] = 32;
    fails(&run_on_file(&short), 1, &["program headers"]);
}

#[test]
fn an_image_without_a_pvh_note_is_refused() {
    if !kvm_works() {
        return;
    }
    let image = Image {
        note: false,
        ..Image::default()
    };
    fails(&run(&image, &[]), 1, &["no PVH entry note"]);
}

#[test]
fn an_image_in_the_boot_area_is_refused() {
    if !kvm_works() {
        return;
    }
    let image = Image {
        address: 0x6000,
        ..Image::default()
    };
    fails(&run(&image, &[]), 1, &["0x6000", "below 0x100000"]);
}

#[test]
fn too_little_memory_says_how_much_is_needed() {
    if !kvm_works() {
        return;
    }
    let image = Image {
        extra_memory: 20 << 20,
        ..Image::default()
    };
    fails(
        &run(&image, &[]),
        1,
        &["too little memory", "--memory 24M or more"],
    );
}

#[test]
fn a_missing_image_is_named() {
    if !kvm_works() {
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"))
        .args(["--image", "/no/such/image"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("/no/such/image"), "{stderr}");
    assert!(stderr.contains("No such file"), "{stderr}");
}

#[test]
fn an_absent_trunk_socket_is_an_error_after_the_stated_time() {
    if !kvm_works() {
        return;
    }
    let arguments = [
        "--trunk",
        "vhost-user=absent.sock",
        "--connect-timeout",
        "100ms",
    ];
    let finished = run(&Code::default().exit(0x10).image(), &arguments);
    fails(
        &finished,
        1,
        &[
            "no vhost-user backend answers at absent.sock",
            "waited 1",
            "No such file",
        ],
    );
}

#[test]
fn an_absent_control_socket_keeps_nobody_waiting() {
    if !kvm_works() {
        return;
    }
    let finished = run(
        &Code::default().exit(0x10).image(),
        &["--control", "absent.sock"],
    );
    assert_eq!(finished.status, 0, "{}", finished.stderr);
}

#[test]
fn errors_follow_the_log_format() {
    let arguments = ["--kvm", "/does/not/exist", "--log-format", "json"];
    let finished = run(&Image::default(), &arguments);
    let line = &finished.lines("vmm")[0];
    assert_eq!(line["vmm"], "error");
    assert!(line["error"].as_str().unwrap().contains("QEMU"), "{line}");
}

#[test]
fn wrong_settings_are_named_and_have_their_own_status() {
    let image = Image::default();
    let configuration = |text: &str| {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("c.json"), text).unwrap();
        Vmm::start_in(folder, &image, &["--config", "c.json"]).finish()
    };
    fails(
        &configuration(r#"{"memmory":"64M"}"#),
        2,
        &["c.json", "`memmory`", "`memory`"],
    );
    fails(
        &configuration(r#"{"memory":"64M""#),
        2,
        &["c.json", "line 1"],
    );
    fails(&configuration(r#"{"memory":"64X"}"#), 2, &["64X", "64M"]);
    fails(
        &run(&image, &["--config", "missing.json"]),
        2,
        &["missing.json", "No such file"],
    );
    fails(&run(&image, &["--frobnicate"]), 2, &["--frobnicate"]);
    fails(
        &run(
            &image,
            &["--trunk", &format!("vhost-user={}", "x".repeat(200))],
        ),
        2,
        &["trunk cannot be the socket"],
    );
    fails(
        &run(&image, &["--cmdline", "sluice.park=0x1"]),
        2,
        &["sluice.park=0x1", "VMM"],
    );
}

#[test]
fn help_lists_every_status_and_version_is_told() {
    let ask = |flag: &str| {
        let output = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"))
            .arg(flag)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let help = ask("--help");
    for status in [
        "0  ", "1  ", "2  ", "65  ", "66  ", "70  ", "71  ", "72  ", "73  ",
    ] {
        assert!(help.contains(&format!(" {status}")), "{status:?}: {help}");
    }
    assert!(ask("--version").contains(env!("CARGO_PKG_VERSION")));
}
