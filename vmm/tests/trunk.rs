//! The trunk against a real vhost-user backend (the `vhost-user-backend` crate): negotiation, kick, call, reset, reconnect.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod common;

use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering;
use std::time::Duration;

use common::BASE;
use common::Code;
use common::DEVICE;
use common::Vmm;
use common::driver::Ring;
use common::kvm_works;
use common::wait_for;
use sluice_vmm::event;
use sluice_vmm::memory::GuestRam;
use sluice_vmm::virtio::Device;
use sluice_vmm::virtio::FEATURE_EVENT_INDEX;
use sluice_vmm::virtio::FEATURE_VERSION_1;
use sluice_vmm::virtio::backend::RingEvents;
use sluice_vmm::virtio::net::Net;
use sluice_vmm::virtio::net::Server;
use sluice_vmm::virtio::trunk::Trunk;
use vhost::vhost_user::Listener;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost_user_backend::ShutdownHandle;
use vhost_user_backend::VhostUserBackendMut;
use vhost_user_backend::VhostUserDaemon;
use vhost_user_backend::VringMutex;
use vhost_user_backend::VringState;
use vhost_user_backend::VringT;
use virtio_queue::DescriptorChain;
use virtio_queue::QueueOwnedT;
use virtio_queue::QueueT;
use vm_memory::Bytes;
use vm_memory::GuestAddress;
use vm_memory::GuestAddressSpace;
use vm_memory::GuestMemoryAtomic;
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::EventConsumer;
use vmm_sys_util::event::EventFlag;
use vmm_sys_util::event::EventNotifier;
use vmm_sys_util::event::new_event_consumer_and_notifier;

const PROTOCOL: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
const OFFER: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | 1 << 15 | PROTOCOL;
const MAC: u64 = 1 << 5;

/// What the test sees of a backend.
#[derive(Debug, Default)]
struct Notes {
    /// Served frames.
    echoed: AtomicUsize,
    features: AtomicU64,
    /// Takes kicks, serves nothing.
    deaf: AtomicBool,
    memory: Mutex<Option<GuestMemoryAtomic<GuestMemoryMmap>>>,
}

/// Sends every transmitted frame back.
struct Echo {
    notes: Arc<Notes>,
    offer: u64,
}

impl VhostUserBackendMut for Echo {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        2
    }
    fn max_queue_size(&self) -> usize {
        1024
    }
    fn features(&self) -> u64 {
        self.offer
    }
    fn acked_features(&mut self, features: u64) {
        self.notes.features.store(features, Ordering::SeqCst);
    }
    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::REPLY_ACK
    }
    fn set_event_idx(&mut self, _enabled: bool) {}
    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> std::io::Result<()> {
        *self.notes.memory.lock().unwrap() = Some(memory);
        Ok(())
    }
    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(
        &mut self,
        _event: u16,
        _set: EventSet,
        vrings: &[VringMutex],
        _thread: usize,
    ) -> std::io::Result<()> {
        if self.notes.deaf.load(Ordering::SeqCst) {
            return Ok(());
        }
        let memory = self.notes.memory.lock().unwrap().clone().unwrap();
        let memory = memory.memory();
        let memory: &GuestMemoryMmap = &memory;
        let [receive, transmit] = vrings else {
            panic!("two rings")
        };
        loop {
            let mut to = receive.get_mut();
            let mut from = transmit.get_mut();
            let Some(source) = next(&mut from, memory) else {
                break;
            };
            let Some(target) = next(&mut to, memory) else {
                from.get_queue_mut().go_to_previous_position();
                break;
            };
            let (source_head, target_head) = (source.head_index(), target.head_index());
            let mut reader = source.reader(memory).unwrap();
            let mut writer = target.writer(memory).unwrap();
            let length = std::io::copy(&mut reader, &mut writer).unwrap();
            // Before the driver can see it, so that a test that saw it sees the count.
            self.notes.echoed.fetch_add(1, Ordering::SeqCst);
            to.get_queue_mut()
                .add_used(memory, target_head, length as u32)
                .unwrap();
            from.get_queue_mut()
                .add_used(memory, source_head, 0)
                .unwrap();
            to.signal_used_queue().unwrap();
            from.signal_used_queue().unwrap();
        }
        Ok(())
    }
}

/// The next chain; none while the ring is not started.
fn next<'a>(
    ring: &mut VringState,
    memory: &'a GuestMemoryMmap,
) -> Option<DescriptorChain<&'a GuestMemoryMmap>> {
    ring.get_queue_mut().iter(memory).ok()?.next()
}

/// A backend process in miniature: listens at a path until dropped.
struct Served {
    notes: Arc<Notes>,
    shutdown: Option<ShutdownHandle>,
    thread: Option<std::thread::JoinHandle<()>>,
    handles: std::sync::mpsc::Receiver<ShutdownHandle>,
}

impl Served {
    fn at(path: &Path, offer: u64, deaf: bool) -> Served {
        let notes = Arc::new(Notes::default());
        notes.deaf.store(deaf, Ordering::SeqCst);
        let backend = Arc::new(Mutex::new(Echo {
            notes: Arc::clone(&notes),
            offer,
        }));
        let mut listener = Listener::new(path, true).unwrap();
        let (send, handles) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("echo".into(), backend, memory).unwrap();
            daemon.start(&mut listener).unwrap();
            drop(listener);
            send.send(daemon.shutdown_handle().unwrap()).unwrap();
            // However the connection ended.
            let _ = daemon.wait();
            for handler in daemon.get_epoll_handlers() {
                handler.send_exit_event();
            }
        });
        Served {
            notes,
            shutdown: None,
            thread: Some(thread),
            handles,
        }
    }

    /// Waits until the frontend has connected.
    fn connected(&mut self) {
        if self.shutdown.is_none() {
            self.shutdown = Some(self.handles.recv_timeout(Duration::from_secs(30)).unwrap());
        }
    }

    fn echoed(&self) -> usize {
        self.notes.echoed.load(Ordering::SeqCst)
    }

    /// Dies: the connection breaks, nothing is handed back.
    fn die(mut self) {
        self.connected();
        self.shutdown.take().unwrap().shutdown();
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The device and a driver's two rings, without KVM.
struct Bench {
    net: Net,
    events: Vec<RingEvents>,
    receive: Ring,
    transmit: Ring,
    ram: Arc<GuestRam>,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Bench {
    fn new(offer: u64) -> (Bench, Served) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trunk.sock");
        let served = Served::at(&path, offer, false);
        let ram = Arc::new(GuestRam::create(8 << 20, false).unwrap());
        let events: Vec<RingEvents> = (0..2)
            .map(|_| RingEvents {
                kick: Arc::new(event::eventfd().unwrap()),
                call: Arc::new(event::eventfd().unwrap()),
            })
            .collect();
        let patience = Duration::from_secs(30);
        let trunk =
            Trunk::connect(path.clone(), patience, Arc::clone(&ram), events.clone()).unwrap();
        let receive = Ring::new(ram.memory(), 0x20_0000, 256);
        let transmit = Ring::new(ram.memory(), 0x21_0000, 256);
        let net = Net::new(Server::Backend(trunk));
        (
            Bench {
                net,
                events,
                receive,
                transmit,
                ram,
                path,
                _folder: folder,
            },
            served,
        )
    }

    fn activate(&mut self) {
        self.net.activate(
            FEATURE_VERSION_1,
            &[self.receive.layout, self.transmit.layout],
        );
    }

    /// Sends a frame and gives a buffer for its echo; does not wait.
    fn send(&mut self, byte: u8) {
        let at = 0x30_0000 + u64::from(self.transmit.available) * 0x1000;
        self.ram
            .memory()
            .write_slice(&[byte; 100], GuestAddress(at))
            .unwrap();
        self.receive.add(&[(at + 0x800, 0x800, true)]);
        self.transmit.add(&[(at, 60, false), (at + 60, 40, false)]);
        event::signal(&self.events[1].kick);
    }

    /// Waits for echo number `index` and checks it.
    fn echo(&self, index: u16, byte: u8) {
        wait_for("an echo", || {
            (self.receive.used() == index + 1).then_some(())
        });
        let (_, length) = self.receive.used_element(index);
        assert_eq!(length, 100);
        let at = 0x30_0800 + u64::from(index) * 0x1000;
        let mut bytes = [0; 100];
        self.ram
            .memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        assert_eq!(bytes, [byte; 100]);
    }
}

#[test]
fn the_offer_is_what_the_backend_has_and_the_contract_carries() {
    let (bench, _served) = Bench::new(OFFER | MAC);
    assert_eq!(bench.net.features(), OFFER & !PROTOCOL);
    let (bench, _served) = Bench::new(FEATURE_VERSION_1);
    assert_eq!(bench.net.features(), FEATURE_VERSION_1);
}

#[test]
fn a_kick_reaches_the_backend_and_a_call_comes_back() {
    let (mut bench, served) = Bench::new(OFFER);
    bench.activate();
    bench.send(7);
    bench.echo(0, 7);
    wait_for("the call", || {
        event::drain(&bench.events[0].call).then_some(())
    });
    assert_eq!(
        served.notes.features.load(Ordering::SeqCst),
        FEATURE_VERSION_1 | PROTOCOL
    );
}

#[test]
fn a_backend_without_protocol_features_works_too() {
    let (mut bench, _served) = Bench::new(FEATURE_VERSION_1);
    bench.activate();
    bench.send(8);
    bench.echo(0, 8);
}

#[test]
fn after_a_reset_the_backend_touches_the_rings_no_more_and_a_new_start_works() {
    let (mut bench, served) = Bench::new(OFFER);
    bench.activate();
    bench.send(1);
    bench.echo(0, 1);
    bench.net.reset();
    bench.send(2);
    assert_eq!(served.echoed(), 1);
    assert_eq!(bench.receive.used(), 1);
    bench.activate();
    bench.echo(1, 2);
}

#[test]
fn a_backend_that_dies_is_replaced_and_the_rings_go_on_at_the_used_index() {
    let (mut bench, served) = Bench::new(OFFER);
    bench.activate();
    for index in 0..3 {
        bench.send(index);
        bench.echo(index.into(), index);
    }
    served.die();
    // Sent into the void: no backend is there, the chains wait in the rings.
    bench.send(3);
    bench.send(4);
    let served = Served::at(&bench.path, OFFER, false);
    bench.echo_after_reconnect(5);
    bench.send(5);
    bench.echo(5, 5);
    assert_eq!(served.echoed(), 3);
    wait_for("a call after the reconnect", || {
        event::drain(&bench.events[0].call).then_some(())
    });
}

impl Bench {
    fn echo_after_reconnect(&self, used: u16) {
        wait_for("echoes of a new backend", || {
            (self.receive.used() == used).then_some(())
        });
    }
}

#[test]
fn a_kick_that_a_dying_backend_swallowed_is_repeated_for_the_next() {
    let (mut bench, served) = Bench::new(OFFER);
    served.notes.deaf.store(true, Ordering::SeqCst);
    bench.activate();
    bench.send(9);
    served.die();
    let _served = Served::at(&bench.path, OFFER, false);
    bench.echo(0, 9);
}

#[test]
fn a_new_backend_that_lacks_a_feature_in_use_is_not_used() {
    let (mut bench, served) = Bench::new(OFFER);
    bench.net.activate(
        OFFER & !PROTOCOL,
        &[bench.receive.layout, bench.transmit.layout],
    );
    served.die();
    let mut poor = Served::at(&bench.path, FEATURE_VERSION_1 | PROTOCOL, false);
    poor.connected();
    bench.send(1);
    let poor_notes = Arc::clone(&poor.notes);
    // It is dropped by the trunk itself, without having been started.
    poor.thread.take().unwrap().join().unwrap();
    assert_eq!(poor_notes.features.load(Ordering::SeqCst), 0);
    let _good = Served::at(&bench.path, OFFER, false);
    bench.echo(0, 1);
}

#[test]
fn something_that_does_not_speak_vhost_user_is_an_error_in_bounded_time() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trunk.sock");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let ram = Arc::new(GuestRam::create(8 << 20, false).unwrap());
    let error = Trunk::connect(path, Duration::from_millis(50), ram, Vec::new()).unwrap_err();
    assert!(
        error.to_string().contains("no vhost-user backend answers"),
        "{error}"
    );
    drop(listener);
}

/// Writes the registers of the device through its start, with both rings inside the image's memory.
fn start_net(code: Code) -> Code {
    let ring = |index: u32| BASE + 0x1_0000 * (index + 1);
    let mut code = code
        .store(DEVICE + 0x070, 0)
        .store(DEVICE + 0x070, 3)
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
    code.store(DEVICE + 0x070, 15)
}

/// Sends "ping" as one frame, offers a buffer for the answer, notifies, parks until it is there.
fn ping() -> Code {
    let (receive, transmit) = (BASE + 0x1_0000, BASE + 0x2_0000);
    let (request, answer) = (BASE + 0x3_0000, BASE + 0x3_1000);
    let descriptor = |code: Code, at: u32, buffer: u32, length: u32, flags: u32| {
        code.store(at, buffer)
            .store(at + 4, 0)
            .store(at + 8, length)
            .store(at + 12, flags)
    };
    let code = start_net(Code::default()).store(request, u32::from_le_bytes(*b"ping"));
    let code = descriptor(code, receive, answer, 64, 2);
    let code = descriptor(code, transmit, request, 4, 0);
    code.store(receive + 0x1000, 1 << 16)
        .store(transmit + 0x1000, 1 << 16)
        .store(DEVICE + 0x050, 0)
        .store(DEVICE + 0x050, 1)
        .park_until(receive + 0x2002, 1)
        .exit_if(answer, u32::from_le_bytes(*b"ping"), 0x10, 0x11)
}

#[test]
fn a_guest_notifies_through_an_ioeventfd_and_is_woken_by_the_call() {
    if !kvm_works() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let served = Served::at(&folder.path().join("trunk.sock"), OFFER, false);
    let mut image = ping().image();
    image.extra_memory = 0x4_0000;
    let finished = Vmm::start_in(folder, &image, &["--trunk", "vhost-user=trunk.sock"]).finish();
    assert_eq!(finished.status, 0, "{}", finished.stderr);
    assert_eq!(served.echoed(), 1);
}

#[test]
fn a_parked_guest_outlives_its_backend_and_hears_from_the_next() {
    if !kvm_works() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trunk.sock");
    let deaf = Served::at(&path, OFFER, true);
    let mut image = ping().image();
    image.extra_memory = 0x4_0000;
    let vmm = Vmm::start_in(folder, &image, &["--trunk", "vhost-user=trunk.sock"]);
    wait_for("the rings", || {
        deaf.notes.memory.lock().unwrap().is_some().then_some(())
    });
    deaf.die();
    let served = Served::at(&path, OFFER, false);
    let finished = vmm.finish();
    assert_eq!(finished.status, 0, "{}", finished.stderr);
    assert_eq!(served.echoed(), 1);
    assert!(
        finished.stderr.contains("trunk backend connected"),
        "{}",
        finished.stderr
    );
}

#[test]
fn nobody_reading_standard_error_ends_nothing() {
    if !kvm_works() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("trunk.sock");
    let deaf = Served::at(&path, OFFER, true);
    let mut image = ping().image();
    image.extra_memory = 0x4_0000;
    let mut vmm = Vmm::start_in(folder, &image, &["--trunk", "vhost-user=trunk.sock"]);
    wait_for("the rings", || {
        deaf.notes.memory.lock().unwrap().is_some().then_some(())
    });
    // As after a kill of whoever started the VMM: every line from now on meets a broken pipe.
    drop(vmm.child.stderr.take());
    deaf.die();
    let served = Served::at(&path, OFFER, false);
    assert_eq!(vmm.child.wait().unwrap().code(), Some(0));
    assert_eq!(served.echoed(), 1);
}
