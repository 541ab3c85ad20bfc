//! A step ends in time whatever the guest does to its rings, and whatever the VMM did to the descriptors it passed.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::engine::RECEIVE;
use super::ring::{DESC_WRITE, Descriptor};
use super::testing::{BASE, BUFFERS, FakeGuest, LEN, engine_for, socket_link};

const SIZE: u16 = 1024;

/// Head of a used entry that the device has not written yet.
const UNTOUCHED: u32 = u32::MAX;

/// Keeps the receive ring full of empty buffers: as soon as half of it was returned, that half is made available again.
fn refill(memory: &GuestMemoryMmap, [_, available, used]: [u64; 3], stop: &AtomicBool) {
    let last_of = |half: u64| GuestAddress(used + 4 + 8 * (512 * half + 511));
    let mut index = SIZE;
    for half in [0, 1].into_iter().cycle() {
        while memory
            .load::<u32>(last_of(half), Ordering::Acquire)
            .unwrap()
            == UNTOUCHED
        {
            if stop.load(Ordering::Relaxed) {
                return;
            }
            std::hint::spin_loop();
        }
        memory
            .store(UNTOUCHED, last_of(half), Ordering::Release)
            .unwrap();
        index = index.wrapping_add(512);
        memory
            .store(index, GuestAddress(available + 2), Ordering::Release)
            .unwrap();
    }
}

#[test]
fn step_takes_no_more_chains_than_the_ring_has_however_fast_a_guest_refills_it() {
    let mut guest = FakeGuest::new(SIZE, false).unwrap();
    let [_, _, used] = guest.areas(RECEIVE);
    for index in 0..SIZE {
        guest.write(used + 4 + 8 * u64::from(index), &UNTOUCHED.to_le_bytes());
        let empty = Descriptor {
            addr: BUFFERS,
            len: 0,
            flags: DESC_WRITE,
            next: 0,
        };
        guest.describe(RECEIVE, index, empty);
    }
    guest.claim(RECEIVE, SIZE);
    let file = FileOffset::new(guest.file().try_clone().unwrap(), 0);
    let ranges = [(GuestAddress(BASE), LEN as usize, Some(file))];
    let memory: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (_pod, _) = socket_link(&mut engine, 16).unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (areas, stopped) = (guest.areas(RECEIVE), stop.clone());
    let refiller = std::thread::spawn(move || refill(&memory, areas, &stopped));
    let mut most = 0;
    // A link that turned quiet would end the test early, so each step begins with a new one.
    let end = Instant::now() + Duration::from_secs(1);
    while Instant::now() < end {
        let (_pod, _) = socket_link(&mut engine, 17).unwrap();
        let before = guest.used_index(RECEIVE);
        engine.step();
        most = most.max(guest.used_index(RECEIVE).wrapping_sub(before));
    }
    stop.store(true, Ordering::Relaxed);
    refiller.join().unwrap();
    assert!((1..=SIZE).contains(&most), "{most} chains in one step");
}

#[test]
fn call_whose_counter_is_full_and_whose_file_blocks_does_not_stop_the_engine() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let blocking = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC).unwrap();
    blocking.write(u64::MAX - 1).unwrap();
    let call: OwnedFd = blocking.as_fd().try_clone_to_owned().unwrap();
    let (mut engine, counters) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        engine.set_call(RECEIVE, Some(File::from(call)));
        pod.send(&[0; 100]).unwrap();
        engine.step();
        done.send(counters.calls.value()).unwrap();
    });
    assert_eq!(ended.recv_timeout(Duration::from_secs(5)), Ok(1));
}
