//! The protocol over real sockets, in front of a real engine whose guest is a fake.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::driver::{Command, Driver, DriverCounters, Polling};
use crate::engine::{Engine, RECEIVE, TRANSMIT, TrunkCounters};
use crate::pair::Driving;
use crate::ports::EnginePorts;
use crate::testing::FakeGuest;
use crate::vnet;
use sluice_ports::client::{ClientError, Connection};
use sluice_ports::message::{Drive, PortKind, Refusal};
use sluice_ports::offloads::Offloads;
use sluice_ports::server::Server;
use sluice_ports::testing::identity;
use sluice_ports::{VERSION, serve, wire};

/// An appliance's process in this one: engine, server and the thread between.
struct Process {
    path: PathBuf,
    driver: Driver,
    quit: Arc<AtomicBool>,
    stop: OwnedFd,
    thread: Option<JoinHandle<io::Result<()>>>,
}

fn process(name: &str) -> Process {
    let path = std::env::temp_dir().join(format!("sluice-ports-{name}-{}", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = wire::listen(&path).unwrap();
    let trunk = Arc::new(TrunkCounters::default());
    let counters = Arc::new(DriverCounters::default());
    let polling = Polling {
        longest: Duration::from_micros(20),
    };
    let engine = Engine::new(trunk.clone()).unwrap();
    let driver = Driver::start(engine, polling, counters.clone()).unwrap();
    let quit = Arc::new(AtomicBool::new(false));
    let asked = quit.clone();
    let quitting = Box::new(move || asked.store(true, Ordering::Release));
    let ports = EnginePorts::new(
        driver.mailbox().clone(),
        trunk,
        counters,
        Driving::only(Drive::Apart),
        quitting,
    );
    let (stop, stopped) = wire::pair().unwrap();
    let thread = std::thread::spawn(move || {
        let mut server = Server::new(identity(), ports);
        serve::serve(&listener, &stopped, &mut server)
    });
    Process {
        path,
        driver,
        quit,
        stop,
        thread: Some(thread),
    }
}

impl Process {
    fn open(&self) -> Connection {
        let (connection, whose) = Connection::open(&self.path, "test", false).unwrap();
        assert_eq!(whose, identity());
        connection
    }

    fn guest(&self) -> FakeGuest {
        let mut guest = FakeGuest::new(64, true).unwrap();
        guest.offer_buffers(0, 40, 4096);
        for queue in [RECEIVE, TRANSMIT] {
            let start = Command::StartRing {
                queue,
                ring: Box::new(guest.ring(queue).unwrap()),
                call: None,
                kick: None,
            };
            self.driver.mailbox().send(start).unwrap();
        }
        guest
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        send(&self.stop, &[0], SendFlags::empty()).unwrap();
        self.thread.take().unwrap().join().unwrap().unwrap();
        self.driver.stop();
        std::fs::remove_file(&self.path).unwrap();
    }
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn frame(payload: u8) -> Vec<u8> {
    let mut frame = vec![0; vnet::HEADER + vnet::MACS];
    frame.extend([8, 0, payload]);
    frame
}

fn received(port: &OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = [0; 200];
    let (length, _) = recv(port, &mut bytes[..], RecvFlags::DONTWAIT).ok()?;
    Some(bytes[..length].to_vec())
}

fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> Refusal {
    match result.unwrap_err() {
        ClientError::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    }
}

#[test]
fn frames_pass_through_a_socket_port_and_are_counted() {
    let process = process("frames");
    let mut daemon = process.open();
    let mut guest = process.guest();
    let (port, far) = wire::pair().unwrap();
    daemon.add_port(16, PortKind::Socket, far.as_fd()).unwrap();
    send(&port, &frame(1), SendFlags::empty()).unwrap();
    let used = eventually("frame to the guest", || {
        guest.used(RECEIVE).first().copied()
    });
    assert_eq!(used.1 as usize, frame(0).len() + 4);
    let mut on_trunk = frame(2);
    on_trunk.splice(24..24, vnet::tag(16));
    guest.send(0, &on_trunk, 4096);
    // Without a kick descriptor a hold and its end wake the engine.
    daemon.hold(Some(Duration::from_secs(1))).unwrap();
    daemon.hold(None).unwrap();
    assert_eq!(
        eventually("frame from the guest", || received(&port)),
        frame(2)
    );
    let rows = daemon.counters().unwrap();
    let [row] = &rows[..] else { panic!("{rows:?}") };
    let bytes = frame(0).len() as u64 - 12;
    assert_eq!(
        (row.id, row.to_guest.frames, row.to_guest.bytes),
        (16, 1, bytes)
    );
    assert_eq!((row.from_guest.frames, row.from_guest.bytes), (1, bytes));
    let status = daemon.status().unwrap();
    assert!(status.serving && !status.held && !status.frozen && status.ports == 1);
    daemon.remove_port(16).unwrap();
    assert_eq!(refusal(daemon.remove_port(16)), Refusal::NoSuchPort);
    assert_eq!(daemon.counters().unwrap(), []);
}

#[test]
fn daemon_that_dies_leaves_its_ports_and_the_next_one_finds_them() {
    let process = process("next");
    let mut guest = process.guest();
    let (port, far) = wire::pair().unwrap();
    let mut first = process.open();
    first.add_port(20, PortKind::Socket, far.as_fd()).unwrap();
    drop((first, far));
    send(&port, &frame(1), SendFlags::empty()).unwrap();
    eventually("frame without a daemon", || {
        guest.used(RECEIVE).first().copied()
    });
    let mut second = eventually("the place of the first", || {
        let opened = Connection::open(&process.path, "second", false);
        opened.ok().map(|(connection, _)| connection)
    });
    let ids: Vec<u16> = second
        .counters()
        .unwrap()
        .iter()
        .map(|row| row.id)
        .collect();
    assert_eq!(ids, [20]);
    assert_eq!(second.peer_pid(), Some(std::process::id().cast_signed()));
}

#[test]
fn second_daemon_waits_or_takes_over() {
    let process = process("two");
    let mut first = process.open();
    let refused = Connection::open(&process.path, "second", false);
    assert_eq!(refusal(refused), Refusal::InUse);
    first.status().unwrap();
    let (mut second, _) = Connection::open(&process.path, "second", true).unwrap();
    second.status().unwrap();
    assert!(matches!(first.status(), Err(ClientError::Broken(_))));
}

#[test]
fn hold_ends_by_itself_and_status_shows_it() {
    let process = process("hold");
    let mut daemon = process.open();
    daemon.hold(Some(Duration::from_secs(1))).unwrap();
    assert!(daemon.status().unwrap().held);
    eventually("end of the hold", || {
        (!daemon.status().unwrap().held).then_some(())
    });
}

#[test]
fn frozen_engine_moves_nothing_and_a_thawed_one_all_that_waited() {
    let process = process("freeze");
    let mut daemon = process.open();
    let mut guest = process.guest();
    let (port, far) = wire::pair().unwrap();
    daemon.add_port(16, PortKind::Socket, far.as_fd()).unwrap();
    // What the guest has ready when the freeze comes is sent before it is confirmed.
    let mut on_trunk = frame(7);
    on_trunk.splice(24..24, vnet::tag(16));
    guest.send(0, &on_trunk, 4096);
    daemon.freeze(true).unwrap();
    assert_eq!(received(&port), Some(frame(7)));
    assert!(daemon.status().unwrap().frozen);
    send(&port, &frame(1), SendFlags::empty()).unwrap();
    on_trunk[30] = 8;
    guest.send(1, &on_trunk, 4096);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!((guest.used(RECEIVE), received(&port)), (vec![], None));
    daemon.freeze(false).unwrap();
    eventually("frame that waited", || guest.used(RECEIVE).first().copied());
    eventually("frame of the guest that waited", || received(&port));
}

#[test]
fn closed_far_end_of_a_socket_port_costs_nothing() {
    let process = process("closed");
    let mut daemon = process.open();
    let _guest = process.guest();
    let (port, far) = wire::pair().unwrap();
    daemon.add_port(16, PortKind::Socket, far.as_fd()).unwrap();
    drop((port, far));
    let sleeps = || process.driver.counters().sleeps.value();
    // A question wakes it; an engine that took the closed end for frames would not sleep again.
    eventually("sleep of the engine", || {
        let before = sleeps();
        daemon.status().unwrap();
        std::thread::sleep(Duration::from_millis(5));
        (sleeps() > before).then_some(())
    });
    let counted = daemon.counters().unwrap();
    assert_eq!(counted[0].to_guest.frames, 0);
    assert!(counted[0].drops.iter().all(|(_, n)| *n <= 4), "{counted:?}");
}

#[test]
fn descriptors_of_the_wrong_kind_are_refused() {
    let process = process("kind");
    let mut daemon = process.open();
    let file = File::open("/dev/null").unwrap();
    let (stream, _far) = std::os::unix::net::UnixStream::pair().unwrap();
    for kind in [PortKind::Tap, PortKind::Socket] {
        for descriptor in [file.as_fd(), stream.as_fd()] {
            let added = daemon.add_port(16, kind, descriptor);
            assert_eq!(refusal(added), Refusal::Kind);
        }
    }
    assert_eq!(daemon.status().unwrap().ports, 0);
}

#[test]
fn machine_tap_becomes_a_port_and_takes_the_offloads_that_are_allowed() {
    let process = process("tap");
    let mut daemon = process.open();
    let attach = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET)?;
        sluice_ports::tap::attach("port0")
    };
    let tap = std::thread::spawn(attach).join().unwrap().unwrap();
    daemon.offloads(Offloads::NONE).unwrap();
    daemon.add_port(16, PortKind::Tap, tap.as_fd()).unwrap();
    assert_eq!(daemon.status().unwrap().ports, 1);
    let added = daemon.add_port(17, PortKind::Socket, tap.as_fd());
    assert_eq!(refusal(added), Refusal::Kind);
    daemon.remove_port(16).unwrap();
}

#[test]
fn quit_reaches_the_process_after_its_answer() {
    let process = process("quit");
    process.open().quit().unwrap();
    assert!(process.quit.load(Ordering::Acquire));
}

#[test]
fn only_root_may_speak() {
    use std::os::unix::fs::PermissionsExt;
    let process = process("root");
    std::fs::set_permissions(&process.path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let path = process.path.clone();
    let as_another = move || {
        let nobody = rustix::fs::Uid::from_raw(65534);
        // Of this thread alone.
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        Connection::open(&path, "not root", true).map(|_| ())
    };
    let refused = std::thread::spawn(as_another).join().unwrap();
    assert!(
        matches!(refused, Err(ClientError::Broken(_))),
        "{refused:?}"
    );
    process.open().status().unwrap();
}

#[test]
fn packets_of_another_version_or_of_none_are_answered_or_end_the_connection() {
    let process = process("version");
    let socket = wire::connect(&process.path).unwrap();
    let other = [&(VERSION + 1).to_le_bytes()[..], &[9, 0, 0, 0], &[1, 2, 3]].concat();
    send(&socket, &other, SendFlags::empty()).unwrap();
    let answer = eventually("answer", || received(&socket));
    assert_eq!(answer[..6], [2, 0, 9, 0, 0, 0]);
    assert_eq!(answer[6..], [2, 0], "Refused(Version)");
    send(&socket, &[0; 5], SendFlags::empty()).unwrap();
    let ended = eventually("end of the connection", || received(&socket));
    assert!(ended.is_empty());
    process.open().status().unwrap();
}

#[test]
fn flood_that_reads_no_answers_loses_its_connection_and_nobody_else_notices() {
    let process = process("flood");
    let socket = wire::connect(&process.path).unwrap();
    let hello = [2, 0, 1, 0, 0, 0, 0, 1, b'x', 0];
    eventually("end of the flood", || {
        let sent = send(&socket, &hello, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        sent.is_err_and(|e| e == rustix::io::Errno::PIPE || e == rustix::io::Errno::CONNRESET)
            .then_some(())
    });
    process.open().status().unwrap();
}
