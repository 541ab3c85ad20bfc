//! The ports protocol in front of a real guest: whichever thread moves the frames, they arrive, and daemons come and go.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step here is a failed test"
)]

mod common;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::BASE;
use common::Code;
use common::DEVICE;
use common::Vmm;
use common::kvm_works;
use common::wait_for;
use rustix::net::RecvFlags;
use rustix::net::SendFlags;
use rustix::net::recv;
use rustix::net::send;
use sluice_ports::client::ClientError;
use sluice_ports::client::Connection;
use sluice_ports::message::Drive;
use sluice_ports::message::PortKind;
use sluice_ports::message::Reason;
use sluice_ports::message::Refusal;
use sluice_ports::wire;

const LINK: u16 = 16;
/// Room for the largest frame: the engine reads none that might not fit.
const LARGEST: u32 = 0x1_1000;
/// Vnet header, MAC addresses, tag, EtherType.
const HEADERS: u32 = 12 + 12 + 4 + 2;

/// Waits for one frame, answers by one to the link, and ends when that is taken: 0 if the first said "ping".
fn guest() -> Code {
    let ring = |index: u32| BASE + 0x1_0000 * (index + 1);
    let (receive, transmit) = (ring(0), ring(1));
    let (request, answer) = (BASE + 0x3_0000, BASE + 0x4_0000);
    let mut code = Code::default()
        .store(DEVICE + 0x070, 0)
        .store(DEVICE + 0x070, 3)
        // MRG_RXBUF and VERSION_1.
        .store(DEVICE + 0x024, 0)
        .store(DEVICE + 0x020, 1 << 15)
        .store(DEVICE + 0x024, 1)
        .store(DEVICE + 0x020, 1)
        .store(DEVICE + 0x070, 11);
    for index in 0..2 {
        code = code
            .store(DEVICE + 0x030, index)
            .store(DEVICE + 0x038, 16)
            .store(DEVICE + 0x080, ring(index))
            .store(DEVICE + 0x090, ring(index) + 0x1000)
            .store(DEVICE + 0x0a0, ring(index) + 0x2000)
            .store(DEVICE + 0x044, 1);
    }
    code = code.store(DEVICE + 0x070, 15);
    let descriptor = |code: Code, at: u32, buffer: u32, length: u32, flags: u32| {
        code.store(at, buffer)
            .store(at + 4, 0)
            .store(at + 8, length)
            .store(at + 12, flags)
    };
    let tag = u32::from_le_bytes([0x81, 0, 0, LINK as u8]);
    code = code
        .store(request + 24, tag)
        .store(request + 28, u32::from_le_bytes([0x88, 0xb5, b'p', b'o']))
        .store(request + 32, u32::from_le_bytes(*b"ng\0\0"));
    code = descriptor(code, receive, answer, LARGEST, 2);
    code = descriptor(code, transmit, request, HEADERS + 4, 0);
    code.store(receive + 0x1000, 1 << 16)
        .store(DEVICE + 0x050, 0)
        .park_until(receive + 0x2002, 1)
        .store(transmit + 0x1000, 1 << 16)
        .store(DEVICE + 0x050, 1)
        .park_until(transmit + 0x2002, 1)
        .exit_if(answer + HEADERS, u32::from_le_bytes(*b"ping"), 0x10, 0x11)
}

fn start(arguments: &[&str]) -> Vmm {
    let folder = tempfile::tempdir().unwrap();
    let listener = wire::listen(&folder.path().join("ports")).unwrap();
    let number = listener.as_raw_fd();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"));
    command.args(["--ports", &number.to_string(), "--build", "0123ab"]);
    command.args(["--contract", "7"]);
    // SAFETY: between fork and exec one system call, on a descriptor that both processes have.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(move || {
            let given = std::os::fd::BorrowedFd::borrow_raw(number);
            rustix::io::fcntl_setfd(given, rustix::io::FdFlags::empty())?;
            Ok(())
        });
    }
    let mut image = guest().image();
    image.extra_memory = 0x6_0000;
    let vmm = Vmm::start_as(command, folder, &image, arguments);
    drop(listener);
    vmm
}

fn daemon(folder: &Path, take_over: bool) -> Connection {
    wait_for("the ports", || {
        let opened = Connection::open(&folder.join("ports"), "a daemon", take_over);
        opened.ok().map(|(connection, _)| connection)
    })
}

/// Sends the frame that the guest waits for into the other end of its port.
fn ask(port: &OwnedFd) {
    let mut frame = [0; 30];
    frame[24..].copy_from_slice(b"\x88\xb5ping");
    send(port, &frame, SendFlags::empty()).unwrap();
}

/// The same, and takes the answer.
fn converse(port: &OwnedFd) {
    ask(port);
    let mut frame = [0; 100];
    let length = wait_for("the guest's frame", || {
        recv(port, &mut frame[..], RecvFlags::DONTWAIT)
            .ok()
            .map(|(length, _)| length)
    });
    assert_eq!(length, 12 + 12 + 2 + 4);
    assert_eq!(frame[24..length], *b"\x88\xb5pong");
}

fn ends_well(mut vmm: Vmm) {
    let mut said = String::new();
    let mut pipe = vmm.child.stderr.take().unwrap();
    pipe.read_to_string(&mut said).unwrap();
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0), "{said}");
}

#[test]
fn frames_pass_whichever_thread_moves_them() {
    if !kvm_works() {
        return;
    }
    for (drive, moves) in [
        ("inline", Drive::Inline),
        ("apart", Drive::Apart),
        ("auto", Drive::Inline),
    ] {
        let vmm = start(&["--drive", drive]);
        let mut daemon = daemon(vmm.folder.path(), false);
        let (port, given) = wire::pair().unwrap();
        daemon
            .add_port(LINK, PortKind::Socket, given.as_fd())
            .unwrap();
        let status = wait_for("the rings", || {
            Some(daemon.status().unwrap()).filter(|status| status.serving)
        });
        assert_eq!(status.drive, moves);
        assert_eq!(status.reason == Reason::Asked, drive != "auto");
        assert_eq!(status.features & 1 << 32, 1 << 32);
        converse(&port);
        ends_well(vmm);
    }
}

#[test]
fn next_daemon_finds_the_ports_of_the_one_before_and_copies_their_descriptors() {
    if !kvm_works() {
        return;
    }
    let vmm = start(&[]);
    let folder = vmm.folder.path().to_owned();
    let mut first = daemon(&folder, false);
    let (port, given) = wire::pair().unwrap();
    first
        .add_port(LINK, PortKind::Socket, given.as_fd())
        .unwrap();
    let (_other, unwanted) = wire::pair().unwrap();
    first
        .add_port(LINK + 1, PortKind::Socket, unwanted.as_fd())
        .unwrap();
    let refused = Connection::open(&folder.join("ports"), "second", false).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(Refusal::InUse)));
    drop((first, given, unwanted));

    let (mut next, identity) = wait_for("the next daemon's place", || {
        Connection::open(&folder.join("ports"), "next", false).ok()
    });
    assert_eq!((identity.build.as_str(), identity.contract), ("0123ab", 7));
    assert!(identity.program.starts_with("sluice-vmm "));
    assert_eq!(next.peer_pid(), Some(vmm.child.id().cast_signed()));
    let ids: Vec<u16> = next.counters().unwrap().iter().map(|p| p.id).collect();
    assert_eq!(ids, [LINK, LINK + 1]);
    let (kind, copy) = next.descriptor(LINK).unwrap();
    assert_eq!(kind, PortKind::Socket);
    let gone = next.descriptor(LINK + 2).unwrap_err();
    assert!(matches!(gone, ClientError::Refused(Refusal::NoSuchPort)));
    next.remove_port(LINK + 1).unwrap();
    // The copy is the port's other name: what the guest's process gives up is given back with it.
    next.remove_port(LINK).unwrap();
    next.add_port(LINK, PortKind::Socket, copy.as_fd()).unwrap();
    converse(&port);
    ends_well(vmm);
}

#[test]
fn frozen_it_moves_nothing_and_asked_to_it_ends_in_order() {
    if !kvm_works() {
        return;
    }
    let vmm = start(&[]);
    let mut daemon = daemon(vmm.folder.path(), false);
    let (port, given) = wire::pair().unwrap();
    daemon.freeze(true).unwrap();
    daemon
        .add_port(LINK, PortKind::Socket, given.as_fd())
        .unwrap();
    wait_for("the rings", || {
        daemon.status().unwrap().serving.then_some(())
    });
    ask(&port);
    std::thread::sleep(Duration::from_millis(50));
    let mut frame = [0; 100];
    let nothing = recv(&port, &mut frame[..], RecvFlags::DONTWAIT);
    assert_eq!(nothing.unwrap_err(), rustix::io::Errno::AGAIN);
    assert!(daemon.status().unwrap().frozen);
    daemon.freeze(false).unwrap();
    wait_for("the answer to the frame that waited", || {
        recv(&port, &mut frame[..], RecvFlags::DONTWAIT).ok()
    });
    ends_well(vmm);
    let vmm = start(&[]);
    self::daemon(vmm.folder.path(), false).quit().unwrap();
    ends_well(vmm);
}

#[test]
fn descriptor_that_is_no_listener_is_refused_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"))
        .args(["--image", "absent", "--ports", "0"])
        .current_dir(folder.path())
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success(), "{said}");
    for wanted in ["--ports 0", "cannot be used"] {
        assert!(said.contains(wanted), "{said}");
    }
}
