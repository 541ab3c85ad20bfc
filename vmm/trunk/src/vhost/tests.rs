//! The backend against the frontend of the `vhost` crate, with a fake guest's rings.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

use crate::driver::{Command, Driver, DriverCounters, Polling};
use crate::engine::{Engine, RECEIVE, TRANSMIT, TrunkCounters};
use crate::links::LinkCounters;
use crate::testing::{BASE, FakeGuest, LEN, USER};
use crate::vnet;
use sluice_ports::offloads::Offloads;
use vhost::vhost_user::message::VhostUserProtocolFeatures;

use super::*;

/// A VMM as the `vhost` crate plays it, on rings of a fake guest.
struct Vmm {
    frontend: Frontend,
    kicks: [EventFd; 2],
    calls: [EventFd; 2],
}

fn connect(stream: UnixStream, guest: &FakeGuest) -> Vmm {
    let eventfd = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let frontend = Frontend::from_stream(stream, 2);
    let mut vmm = Vmm {
        frontend,
        kicks: [eventfd(), eventfd()],
        calls: [eventfd(), eventfd()],
    };
    let f = &mut vmm.frontend;
    f.set_owner().unwrap();
    let offered = f.get_features().unwrap();
    let protocol = f.get_protocol_features().unwrap();
    assert_eq!(protocol, VhostUserProtocolFeatures::REPLY_ACK);
    f.set_protocol_features(protocol).unwrap();
    f.set_features(offered).unwrap();
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: BASE,
        memory_size: LEN,
        userspace_addr: USER,
        mmap_offset: 0,
        mmap_handle: guest.file().as_raw_fd(),
    };
    f.set_mem_table(&[region]).unwrap();
    for queue in [RECEIVE, TRANSMIT] {
        let spec = guest.spec(queue);
        let config = VringConfigData {
            queue_max_size: 64,
            queue_size: spec.size,
            flags: 0,
            desc_table_addr: spec.descriptors,
            used_ring_addr: spec.used,
            avail_ring_addr: spec.available,
            log_addr: None,
        };
        f.set_vring_num(queue, spec.size).unwrap();
        f.set_vring_addr(queue, &config).unwrap();
        f.set_vring_base(queue, 0).unwrap();
        f.set_vring_call(queue, &vmm.calls[queue]).unwrap();
        f.set_vring_kick(queue, &vmm.kicks[queue]).unwrap();
        f.set_vring_enable(queue, true).unwrap();
    }
    vmm
}

struct Bench {
    driver: Driver,
    state: TrunkState,
    pod: UnixDatagram,
}

fn bench() -> Bench {
    let engine = Engine::new(Arc::new(TrunkCounters::default())).unwrap();
    let polling = Polling {
        longest: Duration::from_micros(20),
    };
    let driver = Driver::start(engine, polling, Arc::new(DriverCounters::default())).unwrap();
    let (pod, tap) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    pod.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let tap = OwnedFd::from(tap);
    let counters = Arc::new(LinkCounters::default());
    let add = |reply| Command::AddLink {
        id: 16,
        tap,
        counters,
        reply,
    };
    driver.mailbox().ask(add).unwrap().unwrap();
    Bench {
        driver,
        state: TrunkState::default(),
        pod,
    }
}

impl Bench {
    /// Serves one connection on a thread; the VMM's end is returned.
    fn accept(&self) -> (UnixStream, std::thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mailbox, state) = (self.driver.mailbox().clone(), self.state.clone());
        let offered = Features::offered(Offloads::ALL);
        let serve = move || converse(&ours, offered, &mailbox, &state);
        (theirs, std::thread::spawn(serve))
    }
}

fn frame(payload: u8) -> Vec<u8> {
    let mut frame = vec![0; vnet::HEADER + vnet::MACS];
    frame.extend([8, 0, payload]);
    frame
}

fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}");
        std::thread::yield_now();
    }
}

/// A frame each way through everything but the VMM.
fn frames_pass(bench: &Bench, vmm: &Vmm, guest: &mut FakeGuest, payload: u8) {
    bench.pod.send(&frame(payload)).unwrap();
    let used = eventually("frame to the guest", || {
        guest.used(RECEIVE).first().copied()
    });
    assert_eq!(used.1 as usize, frame(0).len() + 4);
    let mut on_trunk = frame(payload);
    on_trunk.splice(24..24, vnet::tag(16));
    guest.send(u16::from(payload), &on_trunk, 4096);
    vmm.kicks[TRANSMIT].write(1).unwrap();
    let mut got = [0; 100];
    let n = bench.pod.recv(&mut got).unwrap();
    assert_eq!(got[..n], frame(payload));
}

#[test]
fn vmm_connects_leaves_and_another_one_resumes_where_the_guest_stands() {
    let bench = bench();
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    for life in 0..3 {
        let (stream, server) = bench.accept();
        let vmm = connect(stream, &guest);
        eventually("serving", || bench.state.peer().filter(|p| p.serving));
        frames_pass(&bench, &vmm, &mut guest, life);
        drop(vmm);
        server.join().unwrap();
        assert_eq!(bench.state.peer(), None);
    }
    bench.driver.stop();
}

#[test]
fn ring_is_stopped_and_its_index_told() {
    let bench = bench();
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (stream, server) = bench.accept();
    let vmm = connect(stream, &guest);
    frames_pass(&bench, &vmm, &mut guest, 1);
    let base = vmm.frontend.get_vring_base(TRANSMIT).unwrap();
    assert_eq!(base, 1);
    let state = eventually("state", || bench.state.peer());
    assert!(!state.serving);
    drop(vmm);
    server.join().unwrap();
    bench.driver.stop();
}

#[test]
fn sleeping_driver_is_woken_by_taps_and_calls_a_guest_that_asked() {
    let bench = bench();
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (stream, server) = bench.accept();
    let vmm = connect(stream, &guest);
    eventually("serving", || bench.state.peer().filter(|p| p.serving));
    guest.ask_for_call(RECEIVE, 0);
    bench.pod.send(&frame(1)).unwrap();
    eventually("call", || vmm.calls[RECEIVE].read().ok());
    assert_eq!(guest.used(RECEIVE).len(), 1);
    drop(vmm);
    server.join().unwrap();
    bench.driver.stop();
}

#[test]
fn frames_are_held_until_released_and_never_for_ever() {
    let bench = bench();
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 60, 4096);
    let mailbox = bench.driver.mailbox();
    mailbox
        .send(Command::Hold(Duration::from_secs(3600)))
        .unwrap();
    let (stream, server) = bench.accept();
    let vmm = connect(stream, &guest);
    eventually("serving", || bench.state.peer().filter(|p| p.serving));
    bench.pod.send(&frame(1)).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.used(RECEIVE), []);
    mailbox.send(Command::Release).unwrap();
    eventually("the held frame", || guest.used(RECEIVE).first().copied());

    mailbox
        .send(Command::Hold(Duration::from_millis(100)))
        .unwrap();
    bench.pod.send(&frame(2)).unwrap();
    eventually("the second frame, nobody releasing it", || {
        guest.used(RECEIVE).first().copied()
    });
    drop(vmm);
    server.join().unwrap();
    bench.driver.stop();
}

#[test]
fn nonsense_of_a_vmm_ends_the_connection_or_is_refused_and_the_next_one_is_served() {
    let bench = bench();
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (mut stream, server) = bench.accept();
    std::io::Write::write_all(&mut stream, &[0xff; 100]).unwrap();
    server.join().unwrap();

    let (stream, server) = bench.accept();
    let mut frontend = Frontend::from_stream(stream, 2);
    let offered = frontend.get_features().unwrap();
    let protocol = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(protocol).unwrap();
    frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
    // A feature that was not offered.
    assert!(frontend.set_features(offered | 1 << 40).is_err());
    drop(frontend);
    server.join().unwrap();

    let (stream, server) = bench.accept();
    let vmm = connect(stream, &guest);
    frames_pass(&bench, &vmm, &mut guest, 3);
    drop(vmm);
    server.join().unwrap();
    bench.driver.stop();
}

#[test]
fn only_the_vmm_that_was_started_is_served() {
    let bench = bench();
    bench.state.admit_only(Some(1));
    let (mut stream, server) = bench.accept();
    server.join().unwrap();
    assert_eq!(std::io::Read::read(&mut stream, &mut [0; 1]).unwrap(), 0);
    bench
        .state
        .admit_only(Some(std::process::id().cast_signed()));
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (stream, server) = bench.accept();
    let vmm = connect(stream, &guest);
    frames_pass(&bench, &vmm, &mut guest, 1);
    drop(vmm);
    server.join().unwrap();
    bench.driver.stop();
}
