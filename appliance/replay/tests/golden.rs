//! The stored example gives the stored result, byte by byte. `SLUICE_BLESS=1` writes it anew, to be looked at in the diff.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says where"
)]

use std::path::PathBuf;
use std::process::Command;

use sluice_appliance::testing::Builder;
use sluice_appliance::wire::tcp::{ACK, FIN, PSH, SYN};
use sluice_contract::{LinkId, Mac};
use sluice_replay::pcapng::{Traffic, Writer};

const LINKS: [&str; 5] = ["uplink", "host", "pod:client", "pod:db-0", "pod:db-1"];
const UPLINK: u32 = 0;
const CLIENT: u32 = 2;
const DB: [u32; 2] = [3, 4];
/// 2026-01-01 in nanoseconds.
const EPOCH: u64 = 1_767_225_600_000_000_000;

fn example(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../examples/replay");
    root.join(name)
}

/// A frame of the pod behind that interface, which is link `interface + 14`.
fn from(interface: u32, source: &str, destination: &str) -> Builder {
    let builder = Builder::from(interface as u16 + 14, source, destination);
    if interface == UPLINK {
        builder.macs(Mac([2, 0, 0, 0, 1, 2]), Mac([2, 0, 0, 0, 1, 1]))
    } else {
        builder
    }
}

/// The traffic of the example: what a person would want to see explained.
fn traffic() -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), "sluice-replay's tests", LINKS).unwrap();
    let mut micros = 0;
    let mut add = |interface: u32, bytes: Vec<u8>, what: &str| {
        micros += 250;
        let nanos = EPOCH + micros * 1_000;
        let sent = writer.packet(interface, nanos, &bytes, Traffic::Came, what);
        sent.unwrap();
    };
    let syn = from(CLIENT, "10.0.0.1", "172.20.0.1").tcp(40_000, 5432, SYN);
    add(CLIENT, syn.numbers(1000, 0).build(), "a SYN to the Service");
    // Which replica it is, the seed decides: both answer, one of them was never asked.
    for (n, interface) in DB.into_iter().enumerate() {
        let source = format!("10.0.0.{}", n + 2);
        let answer = from(interface, &source, "10.0.0.1").tcp(5432, 40_000, SYN | ACK);
        add(interface, answer.numbers(5000, 1001).build(), "a SYN ACK");
    }
    let segment = |flags| from(CLIENT, "10.0.0.1", "172.20.0.1").tcp(40_000, 5432, flags);
    let ack = segment(ACK).numbers(1001, 5001);
    add(CLIENT, ack.build(), "the handshake ends");
    let data = segment(ACK | PSH).numbers(1001, 5001).payload(b"select 1");
    add(CLIENT, data.build(), "data");
    let blind = segment(ACK | PSH).numbers(900_001_001, 5001);
    add(
        CLIENT,
        blind.payload(b"no").build(),
        "far outside the window",
    );
    let fin = segment(FIN | ACK).numbers(1009, 5001);
    add(CLIENT, fin.build(), "the end");
    let other_port = from(CLIENT, "10.0.0.1", "10.0.0.2").tcp(40_001, 22, SYN);
    add(CLIENT, other_port.build(), "a port that policy denies");
    let nobody = from(CLIENT, "10.0.0.1", "172.20.0.2").tcp(40_002, 80, SYN);
    add(CLIENT, nobody.build(), "a Service without endpoints");
    let no_port = from(CLIENT, "10.0.0.1", "172.20.0.1").udp(40_003, 9);
    add(CLIENT, no_port.build(), "a port the Service does not have");
    let unallocated = from(CLIENT, "10.0.0.1", "172.20.0.9").udp(40_003, 53);
    add(CLIENT, unallocated.build(), "an address nobody has");
    let outside = from(CLIENT, "10.0.0.1", "203.0.113.5").udp(40_004, 53);
    add(CLIENT, outside.build(), "to the outside");
    let spoof = from(CLIENT, "10.0.0.9", "10.0.0.2").udp(1, 2);
    add(CLIENT, spoof.build(), "a source that is not the pod's");
    let echo = from(CLIENT, "10.0.0.1", "169.254.1.1").echo(7, 1);
    add(CLIENT, echo.build(), "the gateway is asked");
    let intruder = from(UPLINK, "203.0.113.66", "10.0.0.3").tcp(999, 5432, SYN);
    add(UPLINK, intruder.build(), "from outside to a pod");
    let mut last = from(CLIENT, "10.0.0.1", "203.0.113.5").udp(40_005, 53);
    last.payload = b"the second half ".to_vec();
    last.transport = sluice_appliance::testing::Segment::Raw(17);
    last.fragment = 2;
    add(CLIENT, last.build(), "the last fragment comes first");
    let mut first = from(CLIENT, "10.0.0.1", "203.0.113.5").udp(40_005, 53);
    first.payload = b"half one".to_vec();
    first.fragment = 0x2000;
    add(CLIENT, first.build(), "then the first one");
    add(CLIENT, vec![0; 9], "no frame at all");
    writer.finish().unwrap()
}

fn replay(output: &str, result: &std::path::Path) -> Vec<u8> {
    let ran = Command::new(env!("CARGO_BIN_EXE_sluice-replay"))
        .arg("--tables")
        .arg(example("tables.json"))
        .arg("--in")
        .arg(example("traffic.pcapng"))
        .arg("--out")
        .arg(result)
        .args(["-o", output])
        .output()
        .unwrap();
    let complaint = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(ran.status.success(), "{complaint}");
    ran.stdout
}

fn same(name: &str, bytes: &[u8]) {
    let path = example(name);
    if std::env::var_os("SLUICE_BLESS").is_some() {
        std::fs::write(&path, bytes).unwrap();
    }
    let stored = std::fs::read(&path).unwrap();
    if stored != bytes {
        let (stored, is) = (
            String::from_utf8_lossy(&stored),
            String::from_utf8_lossy(bytes),
        );
        panic!("{name} is no longer what is stored; stored:\n{stored}\nnow:\n{is}");
    }
}

#[test]
fn the_example_gives_the_stored_result_byte_by_byte() {
    assert_eq!(LinkId::FIRST_POD, 16);
    same("traffic.pcapng", &traffic());
    let folder = std::env::temp_dir().join(format!("sluice-replay-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let result = folder.join("result.pcapng");
    same("verdicts.txt", &replay("text", &result));
    same("result.pcapng", &std::fs::read(&result).unwrap());
    same("verdicts.jsonl", &replay("json", &result));
    same("result.pcapng", &std::fs::read(&result).unwrap());
    std::fs::remove_dir_all(&folder).unwrap();
}

#[test]
fn what_cannot_be_used_is_named_once_by_file_and_cause() {
    let cut = std::env::temp_dir().join(format!("sluice-cut-{}.pcapng", std::process::id()));
    let whole = std::fs::read(example("traffic.pcapng")).unwrap();
    std::fs::write(&cut, &whole[..2_000]).unwrap();
    let said = |input: &std::path::Path, more: &[&str]| {
        let ran = Command::new(env!("CARGO_BIN_EXE_sluice-replay"))
            .arg("--tables")
            .arg(example("tables.json"))
            .arg("--in")
            .arg(input)
            .args(["-o", "summary"])
            .args(more)
            .output()
            .unwrap();
        assert_eq!(ran.status.code(), Some(1));
        String::from_utf8(ran.stderr).unwrap()
    };
    let says = format!(
        "sluice-replay: {}: Packet 15: The file ends within it\n",
        cut.display()
    );
    assert_eq!(said(&cut, &[]), says);
    let says = said(&example("tables.json"), &[]);
    assert!(
        says.ends_with("tables.json: This is no pcapng capture\n"),
        "{says}"
    );
    let says = said(&cut, &["--map", "eth0=pod:nobody"]);
    let wanted = "--map: there is no link \"pod:nobody\" in the tables; there are: uplink, host, pod:client, pod:db-0, pod:db-1\n";
    assert!(says.ends_with(wanted), "{says}");
    let before = std::fs::read(&cut).unwrap();
    let says = said(&cut, &["--out", cut.to_str().unwrap()]);
    assert!(says.contains("--out would overwrite --in"), "{says}");
    assert_eq!(std::fs::read(&cut).unwrap(), before);
    std::fs::remove_file(&cut).unwrap();
}
