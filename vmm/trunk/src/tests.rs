//! What the trunk promises, shown with a fake guest and sockets instead of taps.

use super::engine::{RECEIVE, TRANSMIT, Wait};
use super::memory::{GuestMemory, MemoryError, RegionSpec};
use super::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor, Ring, RingError, RingSpec};
use super::testing::{
    BASE, BUFFERS, FakeGuest, LEN, USER, buffer, encode, engine_for, socket_link,
};
use super::vnet;
use sluice_ports::drops::HostDrop;

/// A tap frame: vnet header, MAC addresses, EtherType and a payload that counts.
fn tap_frame(payload: usize) -> Vec<u8> {
    let mut frame = vec![0; vnet::HEADER];
    frame.extend([0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2, 0x08, 0x00]);
    frame.extend((0..payload).map(|i| (i % 251) as u8));
    frame
}

/// The same frame as it stands on the trunk.
fn trunk_frame(link: u16, tap: &[u8], buffers: u16) -> Vec<u8> {
    let mut frame = tap[..24].to_vec();
    frame[10..12].copy_from_slice(&buffers.to_le_bytes());
    frame.extend(vnet::tag(link));
    frame.extend(&tap[24..]);
    frame
}

#[test]
fn frame_from_a_tap_arrives_tagged_in_one_buffer() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 20, 4096);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, counters) = socket_link(&mut engine, 16).unwrap();
    let frame = tap_frame(100);
    pod.send(&frame).unwrap();

    assert_eq!(engine.step().to_guest, 1);

    let expected = trunk_frame(16, &frame, 1);
    assert_eq!(guest.used(RECEIVE), [(0, expected.len() as u32)]);
    assert_eq!(guest.read(buffer(0, 4096), expected.len()), expected);
    assert_eq!(counters.to_guest.frames.value(), 1);
    assert_eq!(counters.to_guest.bytes.value(), 114);
    assert_eq!(
        (
            trunk.drops.total(),
            counters.drops.total(),
            trunk.calls.value()
        ),
        (0, 0, 0)
    );
}

#[test]
fn w12_gso_frame_is_spread_over_buffers_and_offsets_move_by_the_tag() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, counters) = socket_link(&mut engine, 17).unwrap();
    let mut frame = tap_frame(65000);
    // NEEDS_CSUM, TCPv4, hdr_len 54, gso_size 1448, csum_start 34, csum_offset 16.
    frame[..12].copy_from_slice(&[1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0]);
    pod.send(&frame).unwrap();

    assert_eq!(engine.step().to_guest, 1);

    let mut expected = trunk_frame(17, &frame, 16);
    expected[2] = 58;
    expected[6] = 38;
    let used = guest.used(RECEIVE);
    assert_eq!(used.len(), 16);
    let got: Vec<u8> = used
        .iter()
        .flat_map(|(id, len)| guest.read(buffer(*id as u16, 4096), *len as usize))
        .collect();
    assert_eq!(got, expected);
    assert_eq!(counters.to_guest.gso.value(), 1);
}

#[test]
fn frames_of_one_phase_use_buffers_in_order_and_keep_their_bytes() {
    let mut guest = FakeGuest::new(128, true).unwrap();
    guest.offer_buffers(0, 100, 2048);
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    let sizes = [0, 1, 1500, 5000, 60, 2010, 2006, 2005, 9000, 64];
    for size in sizes {
        pod.send(&tap_frame(size)).unwrap();
    }

    assert_eq!(engine.step().to_guest, 10);

    let mut used = guest.used(RECEIVE).into_iter();
    for size in sizes {
        let buffers = (size + 30).div_ceil(2048) as u16;
        let mut got = Vec::new();
        for (id, len) in used.by_ref().take(usize::from(buffers)) {
            got.extend(guest.read(buffer(id as u16, 2048), len as usize));
        }
        assert_eq!(
            got,
            trunk_frame(16, &tap_frame(size), buffers),
            "payload of {size}"
        );
    }
    assert_eq!(used.next(), None);
}

#[test]
fn frames_keep_in_the_tap_while_the_guest_has_no_tables() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 40, 4096);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, counters) = socket_link(&mut engine, 16).unwrap();
    engine.hold(true);
    pod.send(&tap_frame(100)).unwrap();
    assert!(!engine.step().any());
    assert_eq!(
        engine.arm(),
        Wait::Kicks,
        "a tap that may not be read must not end the sleep"
    );
    assert_eq!((counters.drops.total(), trunk.starved.value()), (0, 0));
    // What the guest says of itself still goes out.
    guest.send(0, &trunk_frame(16, &tap_frame(10), 0), 4096);
    assert_eq!(engine.step().from_guest, 1);

    engine.hold(false);
    assert_eq!(engine.arm(), Wait::Work);
    assert_eq!(engine.step().to_guest, 1);
}

#[test]
fn frames_wait_in_the_tap_until_the_guest_has_room_for_any_frame() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 16, 4096);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    pod.send(&tap_frame(100)).unwrap();

    assert!(!engine.step().any());
    assert_eq!(engine.arm(), Wait::Kicks);
    assert_eq!(guest.kick_wanted_at(RECEIVE), 16);
    assert_eq!(trunk.starved.value(), 1);
    guest.offer_buffers(16, 4, 4096);
    assert_eq!(engine.arm(), Wait::Work);
    engine.disarm();

    assert_eq!(engine.step().to_guest, 1);
    assert_eq!(engine.arm(), Wait::TapsAndKicks);
}

#[test]
fn w01_frame_from_the_guest_leaves_by_the_link_its_tag_names_and_no_other() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, counters) = socket_link(&mut engine, 16).unwrap();
    let (other, _) = socket_link(&mut engine, 17).unwrap();
    for (i, cut) in [1, 7, 12, 24, 28, 29, 100, 4096].into_iter().enumerate() {
        let frame = tap_frame((cut * 40).min(3000) - 20);
        guest.send(0, &trunk_frame(16, &frame, 0), cut);
        assert_eq!(engine.step().from_guest, 1);
        let mut got = vec![0; 4000];
        let n = pod.recv(&mut got).unwrap();
        assert_eq!(&got[..n], &frame[..], "cut into {cut}");
        assert_eq!(guest.used(TRANSMIT), [(0, 0)]);
        assert_eq!(counters.from_guest.frames.value(), i as u64 + 1);
    }
    assert!(other.recv(&mut [0; 10]).is_err());
    assert_eq!((trunk.drops.total(), counters.drops.total()), (0, 0));
}

/// A chain that must be refused, and the reason it must be refused with.
fn bad_frame(frame: &[u8]) -> HostDrop {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, link) = socket_link(&mut engine, 16).unwrap();
    guest.send(0, frame, 4096);
    engine.step();
    assert_eq!(guest.used(TRANSMIT), [(0, 0)]);
    assert!(pod.recv(&mut [0; 10]).is_err());
    assert_eq!(trunk.drops.total() + link.drops.total(), 1);
    let (reason, _) = trunk.drops.seen().chain(link.drops.seen()).next().unwrap();
    reason
}

#[test]
fn frames_that_no_link_can_carry_are_returned_and_counted_by_reason() {
    let good = trunk_frame(16, &tap_frame(10), 0);
    let with = |at: usize, value: u8| {
        let mut frame = good.clone();
        frame[at] = value;
        frame
    };
    assert_eq!(bad_frame(&good[..29]), HostDrop::ShortHeader);
    assert_eq!(bad_frame(&good[..1]), HostDrop::ShortHeader);
    assert_eq!(bad_frame(&with(24, 0x08)), HostDrop::MissingTag);
    assert_eq!(bad_frame(&with(27, 99)), HostDrop::UnknownLink);
    assert_eq!(bad_frame(&with(27, 0)), HostDrop::UnknownLink);
    // NEEDS_CSUM with csum_start 0.
    assert_eq!(bad_frame(&with(0, 1)), HostDrop::BadOffload);
}

fn bad_chain(queue: usize, descriptors: &[Descriptor]) -> HostDrop {
    let mut guest = FakeGuest::new(64, true).unwrap();
    for (i, d) in descriptors.iter().enumerate() {
        guest.describe(queue, i as u16, *d);
    }
    guest.offer(queue, 0);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    pod.send(&tap_frame(1)).unwrap();
    engine.step();
    assert_eq!(guest.used(queue), [(0, 0)]);
    assert_eq!(trunk.drops.total(), 1);
    let (reason, _) = trunk.drops.seen().next().unwrap();
    reason
}

#[test]
fn hostile_chains_are_returned_with_length_zero_and_counted_by_reason() {
    let d = |addr, len, flags, next| Descriptor {
        addr,
        len,
        flags,
        next,
    };
    let ok = |flags, next| d(BUFFERS, 100, flags, next);
    let t = TRANSMIT;
    assert_eq!(
        bad_chain(t, &[ok(DESC_NEXT, 1), ok(DESC_NEXT, 0)]),
        HostDrop::ChainLoop
    );
    assert_eq!(
        bad_chain(t, &[ok(DESC_NEXT, 64)]),
        HostDrop::ChainOutOfRange
    );
    assert_eq!(
        bad_chain(t, &[d(BASE + LEN, 1, 0, 0)]),
        HostDrop::ChainOutOfRange
    );
    assert_eq!(
        bad_chain(t, &[d(BASE + LEN - 4, 5, 0, 0)]),
        HostDrop::ChainOutOfRange
    );
    assert_eq!(
        bad_chain(t, &[d(u64::MAX, 5, 0, 0)]),
        HostDrop::ChainOutOfRange
    );
    assert_eq!(bad_chain(t, &[d(0, 5, 0, 0)]), HostDrop::ChainOutOfRange);
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, 0, 0, 0)]),
        HostDrop::ChainZeroLength
    );
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, 70_000, 0, 0)]),
        HostDrop::ChainOversized
    );
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, u32::MAX, 0, 0)]),
        HostDrop::ChainOversized
    );
    assert_eq!(bad_chain(t, &[ok(DESC_WRITE, 0)]), HostDrop::ChainDirection);
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, 15, DESC_INDIRECT, 0)]),
        HostDrop::ChainIndirect
    );
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, 0, DESC_INDIRECT, 0)]),
        HostDrop::ChainIndirect
    );
    assert_eq!(
        bad_chain(t, &[d(0, 16, DESC_INDIRECT, 0)]),
        HostDrop::ChainOutOfRange
    );
    let both = DESC_INDIRECT | DESC_NEXT;
    assert_eq!(
        bad_chain(t, &[d(BUFFERS, 16, both, 0)]),
        HostDrop::ChainIndirect
    );
    assert_eq!(bad_chain(RECEIVE, &[ok(0, 0)]), HostDrop::ChainDirection);
    assert_eq!(
        bad_chain(RECEIVE, &[d(BUFFERS, 27, DESC_WRITE, 0)]),
        HostDrop::ShortBuffer
    );
}

#[test]
fn indirect_chain_carries_a_frame() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    let frame = trunk_frame(16, &tap_frame(50), 0);
    guest.write(BUFFERS + 0x1000, &frame);
    let head = Descriptor {
        addr: BUFFERS + 0x1000,
        len: 30,
        flags: DESC_NEXT,
        next: 1,
    };
    let rest = Descriptor {
        addr: BUFFERS + 0x101e,
        len: 50,
        flags: 0,
        next: 0,
    };
    guest.write(BUFFERS, &[encode(head), encode(rest)].concat());
    let table = Descriptor {
        addr: BUFFERS,
        len: 32,
        flags: DESC_INDIRECT,
        next: 0,
    };
    guest.describe(TRANSMIT, 0, table);
    guest.offer(TRANSMIT, 0);
    engine.step();
    let mut got = [0; 200];
    let n = pod.recv(&mut got).unwrap();
    assert_eq!(got[..n], tap_frame(50));
}

#[test]
fn available_index_that_runs_away_stops_the_ring_and_nothing_else() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 20, 4096);
    guest.claim(TRANSMIT, 65);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    pod.send(&tap_frame(10)).unwrap();
    assert_eq!(engine.step().to_guest, 1);
    assert_eq!(trunk.broken.value(), 1);
    assert_eq!(engine.stop_ring(TRANSMIT), None);
    assert_eq!(engine.stop_ring(RECEIVE), Some(1));
}

#[test]
fn polling_guest_is_never_called_and_a_sleeping_one_once_per_phase() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 60, 4096);
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let call = nix::sys::eventfd::EventFd::from_flags(nix::sys::eventfd::EfdFlags::EFD_NONBLOCK);
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(call.unwrap()));
    engine.set_call(RECEIVE, Some(file));
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    let send = |n| (0..n).for_each(|_| assert!(pod.send(&tap_frame(10)).is_ok()));

    guest.ask_for_call(RECEIVE, u16::MAX);
    send(5);
    assert_eq!((engine.step().to_guest, trunk.calls.value()), (5, 0));
    guest.ask_for_call(RECEIVE, 5);
    send(5);
    assert_eq!((engine.step().to_guest, trunk.calls.value()), (5, 1));
    send(5);
    assert_eq!((engine.step().to_guest, trunk.calls.value()), (5, 1));
}

#[test]
fn guest_is_asked_for_kicks_only_while_the_engine_sleeps() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (_pod, _) = socket_link(&mut engine, 16).unwrap();
    guest.send(0, &trunk_frame(16, &tap_frame(10), 0), 4096);
    engine.step();
    assert_eq!(guest.kick_wanted_at(TRANSMIT), u16::MAX);
    // The new link may have had frames before it was watched, so the first look is owed.
    assert_eq!(engine.arm(), Wait::Kicks);
    assert_eq!(guest.kick_wanted_at(TRANSMIT), 1);
    guest.send(1, &trunk_frame(16, &tap_frame(10), 0), 4096);
    assert_eq!(engine.arm(), Wait::Work);
    engine.disarm();
    assert_eq!(guest.kick_wanted_at(TRANSMIT), 0);
}

#[test]
fn busy_link_does_not_starve_a_quiet_one() {
    let mut guest = FakeGuest::new(256, true).unwrap();
    guest.offer_buffers(0, 200, 2048);
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (busy, _) = socket_link(&mut engine, 16).unwrap();
    let (quiet, quiet_counters) = socket_link(&mut engine, 17).unwrap();
    while busy.send(&tap_frame(10)).is_ok() {}
    quiet.send(&tap_frame(10)).unwrap();
    engine.step();
    assert_eq!(quiet_counters.to_guest.frames.value(), 1);
}

#[test]
fn b10_long_frames_of_one_link_do_not_hold_back_the_short_ones_of_another() {
    let room = 66_000;
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 32, room);
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (long, _) = socket_link(&mut engine, 16).unwrap();
    let (short, _) = socket_link(&mut engine, 17).unwrap();
    for _ in 0..3 {
        long.send(&tap_frame(60_000)).unwrap();
    }
    for _ in 0..8 {
        short.send(&tap_frame(50)).unwrap();
    }

    assert_eq!(engine.step().to_guest, 11);

    let used = guest.used(RECEIVE);
    let at = |head: u32| buffer(u16::try_from(head).unwrap(), room) + 26;
    let link = |(head, _)| u16::from_be_bytes(guest.read(at(head), 2).try_into().unwrap());
    let order: Vec<u16> = used.into_iter().map(link).collect();
    // The second long frame overdraws the quantum; the third waits until the other link had its turn.
    let expected = [&[16; 2][..], &[17; 8], &[16]].concat();
    assert_eq!(order, expected);
}

#[test]
fn rings_resume_at_the_used_index_found_in_memory() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    guest.offer_buffers(0, 30, 4096);
    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    pod.send(&tap_frame(10)).unwrap();
    engine.step();
    drop(engine);

    let (mut engine, _) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    pod.send(&tap_frame(20)).unwrap();
    engine.step();
    assert_eq!(guest.used(RECEIVE), [(0, 40), (1, 50)]);
}

#[test]
fn removed_link_takes_no_more_frames() {
    let mut guest = FakeGuest::new(64, true).unwrap();
    let (mut engine, trunk) = engine_for(&guest).unwrap();
    let (pod, _) = socket_link(&mut engine, 16).unwrap();
    assert!(engine.remove_link(16));
    assert!(!engine.remove_link(16));
    guest.send(0, &trunk_frame(16, &tap_frame(10), 0), 4096);
    engine.step();
    assert_eq!(trunk.drops.value(HostDrop::UnknownLink), 1);
    assert!(pod.send(&[1]).is_err());
}

#[test]
fn memory_that_cannot_be_trusted_to_stay_is_refused() {
    let guest = FakeGuest::new(64, true).unwrap();
    let file = || guest.file().try_clone().unwrap();
    let spec = |guest, len, user, offset| RegionSpec {
        guest,
        len,
        user,
        offset,
    };
    let good = spec(BASE, LEN, USER, 0);
    assert!(GuestMemory::map(&[good], vec![file()]).is_ok());
    let unsealed = rustix::fs::memfd_create("unsealed", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let unsealed = std::fs::File::from(unsealed);
    unsealed.set_len(LEN).unwrap();
    let map = |table: &[RegionSpec], files| GuestMemory::map(table, files).unwrap_err();
    assert!(matches!(
        map(&[good], vec![unsealed]),
        MemoryError::Unsealed { guest: BASE }
    ));
    assert!(matches!(
        map(&[good], vec![]),
        MemoryError::Files {
            regions: 1,
            files: 0
        }
    ));
    assert!(matches!(
        map(&[good, good], vec![file(), file()]),
        MemoryError::Shape { .. }
    ));
    for bad in [
        spec(BASE, 0, USER, 0),
        spec(u64::MAX, LEN, USER, 0),
        spec(0, LEN, u64::MAX, 0),
    ] {
        assert!(matches!(
            map(&[bad], vec![file()]),
            MemoryError::Shape { .. }
        ));
    }
    for bad in [spec(BASE, LEN + 1, USER, 0), spec(BASE, LEN, USER, 4096)] {
        assert!(matches!(
            map(&[bad], vec![file()]),
            MemoryError::Short { .. }
        ));
    }
}

#[test]
fn rings_outside_memory_or_misaligned_are_refused() {
    let guest = FakeGuest::new(64, true).unwrap();
    let good = guest.spec(RECEIVE);
    let ring = |spec: &RingSpec| Ring::new(guest.memory().clone(), spec);
    assert!(ring(&good).is_ok());
    for size in [0, 3, 65_000] {
        assert_eq!(
            ring(&RingSpec { size, ..good }).unwrap_err(),
            RingError::Size(size)
        );
    }
    let end = USER + LEN;
    for (spec, area) in [
        (
            RingSpec {
                descriptors: end - 1008,
                ..good
            },
            "descriptor table",
        ),
        (
            RingSpec {
                descriptors: good.descriptors + 8,
                ..good
            },
            "descriptor table",
        ),
        (
            RingSpec {
                available: end - 132,
                ..good
            },
            "available ring",
        ),
        (
            RingSpec {
                available: good.available + 1,
                ..good
            },
            "available ring",
        ),
        (
            RingSpec {
                used: end - 516,
                ..good
            },
            "used ring",
        ),
        (
            RingSpec {
                used: good.used + 2,
                ..good
            },
            "used ring",
        ),
        (RingSpec { used: 0, ..good }, "used ring"),
    ] {
        match ring(&spec).unwrap_err() {
            RingError::Area { area: named, .. } => assert_eq!(named, area),
            other => panic!("{other}"),
        }
    }
}
