//! What `sluice-replay` writes, read by a program that knows nothing of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on says where")]

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sluice_tests::lab::program;
use sluice_tests::need;
use sluice_tests::need::Need;

/// Runs a program to its good end; yields what it printed.
fn lines(command: &mut Command) -> Vec<String> {
    let output = command.output().unwrap();
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {complaint}");
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn tshark_reads_the_result_and_finds_every_verdict_and_no_wrong_checksum() {
    need!("tshark reads the result of a replay", Need::Tool("tshark"));
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/replay");
    let result = std::env::temp_dir().join(format!("sluice-tshark-{}.pcapng", std::process::id()));
    let verdicts = lines(
        Command::new(program("sluice-replay"))
            .args(["-o", "json", "--tables"])
            .arg(examples.join("tables.json"))
            .arg("--in")
            .arg(examples.join("traffic.pcapng"))
            .arg("--out")
            .arg(&result),
    );
    let frames = lines(
        Command::new("tshark")
            .arg("-r")
            .arg(&result)
            .args([
                "-o",
                "ip.check_checksum:TRUE",
                "-o",
                "tcp.check_checksum:TRUE",
            ])
            .args(["-o", "udp.check_checksum:TRUE", "-T", "fields"])
            .args(["-e", "frame.interface_name", "-e", "frame.comment"])
            .args(["-e", "ip.checksum.status", "-e", "tcp.checksum.status"])
            .args(["-e", "udp.checksum.status", "-e", "icmp.checksum.status"]),
    );
    std::fs::remove_file(&result).unwrap();
    let frames: Vec<Vec<&str>> = frames.iter().map(|f| f.split('\t').collect()).collect();
    let (mut released, mut checked) = (0, 0);
    let mut of_packets = frames.iter().filter(|frame| {
        let waited = frame[1].starts_with("released");
        released += u64::from(waited);
        !waited
    });
    for verdict in &verdicts {
        let verdict: Value = serde_json::from_str(verdict).unwrap();
        if let Some(summary) = verdict.get("summary") {
            assert_eq!(summary["balanced"], true, "{summary}");
            continue;
        }
        let frame = of_packets.next().unwrap();
        let number = &verdict["packet"];
        let says = format!(
            "packet {number} from {}: ",
            verdict["from"].as_str().unwrap()
        );
        assert!(frame[1].starts_with(&says), "{frame:?} is not {says}");
        assert_eq!(
            frame[0],
            verdict["to"].as_str().unwrap_or("not-sent"),
            "{verdict}"
        );
        assert!(
            frame[1].contains(verdict["stage"].as_str().unwrap()),
            "{frame:?}"
        );
        // 0 is wrong, 1 is right; an ICMP error quotes a packet, so there may be two.
        for status in &frame[2..] {
            assert!(status.split(',').all(|status| status != "0"), "{frame:?}");
            checked += usize::from(status.contains('1'));
        }
    }
    assert_eq!(of_packets.next(), None);
    assert_eq!(released, 1);
    assert!(checked > 20, "tshark checked only {checked} checksums");
}
