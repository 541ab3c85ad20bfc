//! The control channel between a driver's rings and a real socket, without KVM.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a failed step is a failed test"
)]

mod common;

use std::io::ErrorKind;
use std::io::Read;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use common::driver::Ring;
use common::wait_for;
use sluice_vmm::event;
use sluice_vmm::event::EventThread;
use sluice_vmm::memory::GuestRam;
use sluice_vmm::virtio::Device;
use sluice_vmm::virtio::FEATURE_VERSION_1;
use sluice_vmm::virtio::backend::RingEvents;
use sluice_vmm::virtio::control::Control;
use sluice_vmm::virtio::stream::CHAIN_MAX;
use tempfile::TempDir;
use vm_memory::Bytes;
use vm_memory::GuestAddress;

const RECEIVE: u64 = 0x20_0000;
const TRANSMIT: u64 = 0x21_0000;
const BUFFERS: u64 = 0x30_0000;
const RAM: u64 = 16 << 20;

struct Bench {
    ram: Arc<GuestRam>,
    control: Control,
    events: [RingEvents; 2],
    receive: Ring,
    transmit: Ring,
    path: PathBuf,
    _thread: EventThread,
    _folder: TempDir,
}

impl Bench {
    fn new() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control.sock");
        let ram = Arc::new(GuestRam::create(RAM, false).unwrap());
        let events = [(); 2].map(|()| RingEvents {
            kick: Arc::new(event::eventfd().unwrap()),
            call: Arc::new(event::eventfd().unwrap()),
        });
        let (control, subscriber) =
            Control::new(path.clone(), ram.memory().clone(), events.clone()).unwrap();
        let thread = EventThread::start(vec![subscriber]).unwrap();
        let receive = Ring::new(ram.memory(), RECEIVE, 64);
        let transmit = Ring::new(ram.memory(), TRANSMIT, 64);
        let mut bench = Bench {
            ram,
            control,
            events,
            receive,
            transmit,
            path,
            _thread: thread,
            _folder: folder,
        };
        bench.activate();
        bench
    }

    fn activate(&mut self) {
        self.control.activate(
            FEATURE_VERSION_1,
            &[self.receive.layout, self.transmit.layout],
        );
    }

    fn listen(&self) -> UnixListener {
        UnixListener::bind(&self.path).unwrap()
    }

    /// Sends `bytes` as one chain of two parts.
    fn send(&mut self, bytes: &[u8]) {
        let at = BUFFERS + u64::from(self.transmit.available % 16) * 0x1_0000;
        self.ram
            .memory()
            .write_slice(bytes, GuestAddress(at))
            .unwrap();
        let first = bytes.len() / 2;
        let rest = (bytes.len() - first) as u32;
        self.transmit
            .add(&[(at, first as u32, false), (at + first as u64, rest, false)]);
        event::signal(&self.events[1].kick);
    }

    /// Gives the device `count` receive buffers of `length` bytes.
    fn provide(&mut self, count: u16, length: u32) {
        for _ in 0..count {
            let at = 0x80_0000 + u64::from(self.receive.available % 16) * 0x1_0000;
            self.receive.add(&[(at, length, true)]);
        }
        event::signal(&self.events[0].kick);
    }

    /// The bytes of used receive element `index`, once it is there.
    fn received(&self, index: u16) -> Vec<u8> {
        wait_for("a used receive buffer", || {
            (self.receive.used().wrapping_sub(index) as i16 > 0).then_some(())
        });
        let (_, length) = self.receive.used_element(index);
        let mut bytes = vec![0; length as usize];
        let at = 0x80_0000 + u64::from(index % 16) * 0x1_0000;
        self.ram
            .memory()
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }

    fn sent(&self, count: u16) {
        wait_for("used transmit buffers", || {
            (self.transmit.used() == count).then_some(())
        });
    }
}

fn accept(listener: &UnixListener) -> UnixStream {
    listener.accept().unwrap().0
}

fn read(stream: &mut UnixStream, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn bytes_cross_in_both_directions_and_each_is_called() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    bench.send(b"hello host");
    assert_eq!(read(&mut stream, 10), b"hello host");
    bench.sent(1);
    wait_for("the transmit call", || {
        event::drain(&bench.events[1].call).then_some(())
    });

    stream.write_all(b"hello guest").unwrap();
    bench.provide(2, 8);
    assert_eq!(bench.received(0), b"hello gu");
    assert_eq!(bench.received(1), b"est");
    wait_for("the receive call", || {
        event::drain(&bench.events[0].call).then_some(())
    });
}

#[test]
fn what_the_guest_says_while_nobody_listens_is_kept_and_delivered_in_order() {
    let mut bench = Bench::new();
    for number in 0..10_u8 {
        bench.send(&[number; 100]);
    }
    assert_eq!(
        bench.transmit.used(),
        0,
        "chains stay in the ring: that is the back-pressure"
    );
    let listener = bench.listen();
    let mut stream = accept(&listener);
    for number in 0..10 {
        assert_eq!(read(&mut stream, 100), [number; 100]);
    }
    bench.sent(10);
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    let mut chains = 0_u16;
    // Until the socket is full: the device then stops taking chains.
    loop {
        bench.send(&[chains as u8; 40_000]);
        chains += 1;
        let begin = std::time::Instant::now();
        while bench.transmit.used() != chains && begin.elapsed().as_millis() < 200 {
            std::thread::yield_now();
        }
        if bench.transmit.used() != chains {
            break;
        }
        assert!(chains < 1000, "no back-pressure");
    }
    for number in 0..chains {
        assert_eq!(read(&mut stream, 40_000), vec![number as u8; 40_000]);
    }
    bench.sent(chains);
}

#[test]
fn host_bytes_wait_in_the_socket_until_the_guest_gives_buffers() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    stream.set_nonblocking(true).unwrap();
    let mut written = Vec::new();
    loop {
        let chunk: Vec<u8> = (0..1000)
            .map(|i| (written.len() / 1000 + i) as u8)
            .collect();
        match stream.write(&chunk) {
            Ok(count) => written.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => panic!("{error}"),
        }
        assert!(written.len() < 100 << 20, "no back-pressure");
    }
    let mut got = Vec::new();
    let mut index = 0;
    while got.len() < written.len() {
        bench.provide(1, 30_000);
        got.extend(bench.received(index));
        index += 1;
    }
    assert!(got == written, "{} bytes differ", got.len());
}

#[test]
fn a_broken_socket_is_replaced_and_the_unfinished_chain_sent_again_whole() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let stream = accept(&listener);
    // Larger than a socket buffer: the first part is written, the rest waits.
    let frame: Vec<u8> = (0..50_000_u32).map(|i| (i / 7) as u8).collect();
    let mut count = 0;
    while bench.transmit.used() == count {
        bench.send(&frame);
        count += 1;
        let begin = std::time::Instant::now();
        while bench.transmit.used() != count && begin.elapsed().as_millis() < 200 {
            std::thread::yield_now();
        }
    }
    drop(stream);
    // The new reader sees whole frames from the first byte on.
    let mut stream = accept(&listener);
    assert_eq!(read(&mut stream, frame.len()), frame);
    bench.sent(count);
    bench.send(b"after");
    let mut tail = vec![0; 5];
    while tail != b"after" {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        tail.remove(0);
        tail.push(byte[0]);
    }
}

#[test]
fn the_last_words_of_a_host_that_hangs_up_arrive() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    stream.write_all(b"bye").unwrap();
    drop(stream);
    bench.provide(1, 64);
    assert_eq!(bench.received(0), b"bye");
    let mut stream = accept(&listener);
    stream.write_all(b"back").unwrap();
    bench.provide(1, 64);
    assert_eq!(bench.received(1), b"back");
}

#[test]
fn hostile_chains_are_returned_unused_and_kill_nothing() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    let huge = CHAIN_MAX as u32 + 1;
    bench.transmit.add(&[(RAM - 1, 2, false)]); // crosses the end of memory
    bench.transmit.add(&[(u64::MAX - 3, 16, false)]); // wraps
    bench.transmit.add(&[(BUFFERS, huge, false)]); // too large
    bench.transmit.add(&[]); // whatever descriptor 3 is: zero
    bench.transmit.offer(4000); // no such descriptor
    let loop_head = bench
        .transmit
        .add(&[(BUFFERS, 1, false), (BUFFERS, 1, false)]);
    let at = TRANSMIT + 16 * u64::from(loop_head + 1);
    bench
        .ram
        .memory()
        .write_obj(1_u16, GuestAddress(at + 12))
        .unwrap();
    bench
        .ram
        .memory()
        .write_obj(loop_head, GuestAddress(at + 14))
        .unwrap();
    event::signal(&bench.events[1].kick);
    bench.receive.add(&[(RAM - 1, 2, true)]);
    bench.receive.add(&[(BUFFERS, 64, false)]); // not writable
    event::signal(&bench.events[0].kick);
    stream.write_all(b"x").unwrap();
    // Chains that can be walked at all are returned; the others are skipped by the queue crate.
    wait_for("refused chains", || {
        (bench.transmit.used() >= 4).then_some(())
    });
    wait_for("refused buffers", || {
        (bench.receive.used() >= 2).then_some(())
    });

    // A reset, as the driver would do, makes everything good again.
    bench.control.reset();
    for ring in [&mut bench.transmit, &mut bench.receive] {
        *ring = {
            let fresh = Ring::new(bench.ram.memory(), ring.layout.descriptors, 64);
            fresh.set_available(0);
            fresh
        };
    }
    for base in [RECEIVE, TRANSMIT] {
        bench
            .ram
            .memory()
            .write_obj(0_u16, GuestAddress(base + 0x8002))
            .unwrap();
    }
    bench.activate();
    bench.provide(1, 64);
    assert_eq!(bench.received(0), b"x");
    bench.send(b"sane again");
    let mut tail = Vec::new();
    stream.read_exact(&mut [0; 0]).unwrap();
    while !tail.ends_with(b"sane again") {
        tail.extend(read(&mut stream, 1));
    }
}

#[test]
fn a_nonsense_available_index_does_not_spin_the_thread() {
    let mut bench = Bench::new();
    let listener = bench.listen();
    let mut stream = accept(&listener);
    bench.transmit.set_available(40_000);
    event::signal(&bench.events[1].kick);
    // The thread still serves the other direction.
    bench.provide(1, 64);
    stream.write_all(b"alive").unwrap();
    assert_eq!(bench.received(0), b"alive");
}
