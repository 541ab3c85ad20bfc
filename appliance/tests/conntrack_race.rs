//! K-06: two queues, one table. Whatever the order in which two first packets of one flow come to the table, both leave
//! for the same backend, and none is dropped.

use std::sync::{Barrier, Mutex};

use sluice_appliance::address::Address;
use sluice_appliance::conntrack::{CommitError, Conntrack, Settings, Signal, Track};
use sluice_appliance::flow::Flow;
use sluice_appliance::hash::Hasher;
use sluice_appliance::time::Instant;
use sluice_contract::LinkId;

const FLOWS: u32 = 200_000;
const NOW: Instant = Instant::from_micros(1);

fn flow(n: u32) -> Flow {
    let [_, b, c, d] = n.to_be_bytes();
    let service = Address::v4([10, 96, 0, 10]);
    Flow::new(Address::v4([10, b, c, d]), service, 17, 5_000, 53)
}

/// A queue's way with a first packet: miss, choose a backend, commit, and on conflict join. The table is only locked per
/// call, so the other queue may come in between any two of them.
fn first_packet(table: &Mutex<Conntrack<'_>>, n: u32, own_choice: u8) -> Address {
    let flow = flow(n);
    let lock = || table.lock().expect("nobody panics with the table");
    let hash = lock().hash(&flow);
    let known = lock().lookup(&flow, hash, NOW);
    let hit = known.unwrap_or_else(|| {
        let opened = lock().open(&flow, hash, LinkId::UPLINK, &Signal::Datagram, NOW);
        let mut new = opened.expect("UDP opens");
        let backend = Address::v4([10, 244, 0, own_choice]);
        new.reply = flow.with_destination(backend, 53).reversed();
        let committed = lock().commit(&new, NOW);
        match committed {
            Ok(hit) | Err(CommitError::Conflict(hit)) => hit,
            Err(_) => unreachable!("there is room"),
        }
    });
    let mut table = lock();
    assert_eq!(table.track(hit, &Signal::Datagram, NOW), Ok(Track::Belongs));
    table.outgoing(hit).expect("it is there").destination()
}

#[test]
fn k06_both_first_packets_leave_for_the_same_backend() {
    let bytes = Conntrack::region_bytes(FLOWS).expect("a capacity");
    let mut memory = vec![0; bytes + 64];
    let pad = memory.as_ptr().align_offset(64);
    let hasher = Hasher::new([5; 16]);
    let table = Conntrack::new(&mut memory[pad..], FLOWS, Settings::default(), hasher, NOW);
    let table = Mutex::new(table.expect("a table"));
    let start = Barrier::new(2);
    let queue = |choice: u8| {
        start.wait();
        (0..FLOWS)
            .map(|n| first_packet(&table, n, choice))
            .collect::<Vec<_>>()
    };
    let (one, two) = std::thread::scope(|scope| {
        let one = scope.spawn(|| queue(1));
        let two = scope.spawn(|| queue(2));
        (one.join().expect("no panic"), two.join().expect("no panic"))
    });
    assert!(one == two);
    let table = table.into_inner().expect("not poisoned");
    assert_eq!(table.used(), FLOWS);
    let counters = table.counters();
    assert_eq!(counters.committed, u64::from(FLOWS));
    println!("{} of {FLOWS} commits were races", counters.conflicts);
    table.audit().expect("all invariants");
}
