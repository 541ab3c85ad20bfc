//! The machine contract on a real `/dev/kvm`, with guests of a few instructions.

mod common;

use std::time::Duration;
use std::time::Instant;

use common::Code;
use common::Vmm;
use common::kvm_works;
use common::run;
use common::wait_for;

/// Started, once its threads are there; a signal before that ends the process in the ordinary way.
fn wait_for_vcpu(vmm: &Vmm) {
    let tasks = format!("/proc/{}/task", vmm.child.id());
    wait_for("the vCPU thread", || {
        let names = std::fs::read_dir(&tasks)
            .ok()?
            .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok());
        names
            .into_iter()
            .any(|name| name.trim() == "vcpu0")
            .then_some(())
    });
}

fn code() -> Code {
    Code::default()
}

#[test]
fn a_guest_boots_reports_and_ends_with_its_own_status() {
    if !kvm_works() {
        return;
    }
    for (code_value, status) in [
        (0x10, 0),
        (0x11, 65),
        (0x12, 66),
        (0x20, 70),
        (0x21, 71),
        (7, 73),
    ] {
        let guest = code()
            .print("{\"sluice\":\"boot\",\"a\":1}\n")
            .exit(code_value)
            .spin();
        let finished = run(&guest.image(), &[]);
        assert_eq!(finished.status, status, "{}", finished.stderr);
        assert_eq!(finished.lines("sluice")[0]["a"], 1);
        assert_eq!(finished.end()["code"], code_value);
    }
}

#[test]
fn bytes_one_at_a_time_and_an_unfinished_last_line_arrive() {
    if !kvm_works() {
        return;
    }
    let guest = code()
        .print_slowly("{\"sluice\":\"log\",\"n\":1}\n{\"sluice\":")
        .print("\"log\",\"n\":2}\n{\"sluice\":\"panic\",\"n\":3}")
        .exit(0x21);
    let finished = run(&guest.image(), &[]);
    let lines = finished.lines("sluice");
    assert_eq!(
        lines
            .iter()
            .map(|line| line["n"].as_u64().unwrap())
            .collect::<Vec<_>>(),
        [1, 2, 3]
    );
}

#[test]
fn the_first_state_is_the_one_of_pvh() {
    if !kvm_works() {
        return;
    }
    // ebx points at the start info: its magic must be there.
    let guest = code().exit_if(0x6000, 0x336e_c578, 0x10, 0x12);
    assert_eq!(run(&guest.image(), &[]).status, 0);
    let mut guest = code();
    guest
        .0
        .extend_from_slice(&[0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33]); // cmp dword [ebx], magic
    guest.0.extend_from_slice(&[0x75, 11]);
    let guest = guest.exit(0x10).exit(0x12);
    assert_eq!(run(&guest.image(), &[]).status, 0);
}

#[test]
fn a_park_ends_at_its_deadline_and_not_before() {
    if !kvm_works() {
        return;
    }
    let guest = code().park(300_000).park(300_000).exit(0x10);
    let begin = Instant::now();
    let finished = run(&guest.image(), &[]);
    assert_eq!(finished.status, 0, "{}", finished.stderr);
    assert!(begin.elapsed() >= Duration::from_millis(600));
}

#[test]
fn a_silent_guest_is_ended_by_the_watchdog() {
    if !kvm_works() {
        return;
    }
    let finished = run(&code().spin().image(), &["--watchdog-ms", "100"]);
    assert_eq!(finished.status, 72, "{}", finished.stderr);
    let end = finished.end();
    assert_eq!(end["cause"], "watchdog");
    assert!(end["silent_ms"].as_u64().unwrap() >= 100);
}

/// Heartbeats for more than two seconds up to 6 GHz.
const BEATS: [u8; 7] = [120; 7];

#[test]
fn a_parked_guest_and_one_with_heartbeats_outlive_the_watchdog() {
    if !kvm_works() {
        return;
    }
    // So long that a machine that is busy with something else is not taken for a silent guest.
    let guest = code().park(3_000_000).exit(0x10);
    assert_eq!(run(&guest.image(), &["--watchdog-ms", "2000"]).status, 0);

    let guest = BEATS
        .iter()
        .fold(code(), |code, count| code.beat_for(*count));
    let begin = Instant::now();
    let finished = run(&guest.exit(0x10).image(), &["--watchdog-ms", "2000"]);
    assert_eq!(finished.status, 0, "{}", finished.stderr);
    assert!(
        begin.elapsed() > Duration::from_secs(2),
        "a TSC beyond 6 GHz?"
    );
}

#[test]
fn the_watchdog_can_be_turned_off_and_signals_end_a_spinning_or_parked_guest() {
    if !kvm_works() {
        return;
    }
    for (guest, signal) in [
        (code().spin(), libc::SIGTERM),
        (code().spin(), libc::SIGINT),
        (code().park_for_ever(), libc::SIGTERM),
    ] {
        let vmm = Vmm::start(&guest.image(), &["--watchdog-ms", "0"]);
        wait_for_vcpu(&vmm);
        vmm.signal(signal);
        let finished = vmm.finish();
        assert_eq!(finished.status, 0, "{}", finished.stderr);
        assert_eq!(finished.end()["cause"], "stopped");
    }
}

#[test]
fn signals_that_the_parent_had_blocked_are_heard() {
    if !kvm_works() {
        return;
    }
    let mut command = std::process::Command::new("env");
    command.args(["--block-signal=TERM", env!("CARGO_BIN_EXE_sluice-vmm")]);
    let folder = tempfile::tempdir().unwrap();
    let vmm = Vmm::start_as(command, folder, &code().park_for_ever().image(), &[]);
    wait_for_vcpu(&vmm);
    vmm.signal(libc::SIGTERM);
    assert_eq!(vmm.finish().end()["cause"], "stopped");
}

#[test]
fn a_triple_fault_and_a_halt_are_vm_errors_with_registers() {
    if !kvm_works() {
        return;
    }
    for (guest, word) in [(code().undefined(), "triple"), (code().halt(), "halted")] {
        let finished = run(&guest.image(), &[]);
        assert_eq!(finished.status, 73, "{}", finished.stderr);
        let end = finished.end();
        assert!(end["error"].as_str().unwrap().contains(word), "{end}");
        assert!(
            end["registers"]["rip"]
                .as_str()
                .unwrap()
                .starts_with("0x2000"),
            "{end}"
        );
    }
}

#[test]
fn stray_accesses_harm_nobody() {
    if !kvm_works() {
        return;
    }
    let guest = code()
        .store(0xd000_0008, 1)
        .store(0xd000_0ffc, 1)
        .store(0xd000_1050, 1)
        .store(0xe000_0000, 1)
        .store(0xfffe_fffc, 1)
        .exit_if(0xe000_0000, u32::MAX, 0x10, 0x12);
    let finished = run(&guest.image(), &[]);
    assert_eq!(finished.status, 0, "{}", finished.stderr);
}

#[test]
fn the_command_line_names_the_devices_of_this_machine() {
    if !kvm_works() {
        return;
    }
    // "sluice.park=0xd0000000" is at the start of the line, little endian "slui".
    let guest = code().exit_if(0x8000, u32::from_le_bytes(*b"slui"), 0x10, 0x12);
    let finished = run(
        &guest.image(),
        &["--cmdline", "sluice.selftest", "--log-level", "debug"],
    );
    assert_eq!(finished.status, 0, "{}", finished.stderr);
    for token in [
        "sluice.park=0xd0000000",
        "sluice.tsc_khz=",
        "sluice.selftest",
    ] {
        assert!(
            finished.stderr.contains(token),
            "{token}: {}",
            finished.stderr
        );
    }
}

#[test]
fn timings_name_every_step() {
    if !kvm_works() {
        return;
    }
    let finished = run(
        &code().exit(0x10).image(),
        &["--timings", "--prefault", "before"],
    );
    let timings = &finished.lines("vmm")[0];
    for step in [
        "kvm", "image", "vm", "trunk", "devices", "prefault", "threads", "total",
    ] {
        assert!(timings[format!("{step}_us")].is_u64(), "{step}: {timings}");
    }
}

#[test]
fn the_vmm_itself_needs_less_than_8_mib() {
    if !kvm_works() {
        return;
    }
    let vmm = Vmm::start(
        &code().park_for_ever().image(),
        &["--control", "absent.sock"],
    );
    wait_for_vcpu(&vmm);
    let status = std::fs::read_to_string(format!("/proc/{}/status", vmm.child.id())).unwrap();
    // Guest RAM is shared memory, and counted apart.
    let kib = |name: &str| -> u64 {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let own = kib("RssAnon:") + kib("RssFile:");
    println!("own memory: {own} KiB");
    assert!(own < 8 << 10, "{own} KiB");
}
