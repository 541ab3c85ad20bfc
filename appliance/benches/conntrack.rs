//! Nanoseconds per operation of the connection table. `cargo bench -p sluice-appliance --bench conntrack -- 1000 100000`; the
//! numbers of flows may be left out.
//!
//! Flows are visited in another order than they were committed in, so that nothing is where the last one was.

use std::hint::black_box;
use std::time::Instant as Wall;

use sluice_appliance::conntrack::{Segment, Settings, Signal, Visit, flag};
use sluice_appliance::hash::Hasher;
use sluice_appliance::{Address, Conntrack, Flow, Instant};
use sluice_contract::LinkId;

const BATCH: usize = 64;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// Small random numbers, the same at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, (self.next() % (i as u64 + 1)) as usize);
        }
    }
}

fn flow(n: u32, protocol: u8, v6: bool) -> Flow {
    let service = n % 1_000;
    let address = |high: u8, n: u32| {
        let [a, b, c, d] = n.to_be_bytes();
        if v6 {
            Address([0xfd, high, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, c, d])
        } else {
            Address::v4([high, b, c, d])
        }
    };
    Flow::new(
        address(10, n / 7),
        address(172, service),
        protocol,
        n as u16,
        80,
    )
}

fn at(micros: u64) -> Instant {
    Instant::from_micros(micros)
}

/// A region at a cache line; in huge pages if the system gives them to large allocations.
struct Memory(Vec<u8>);

impl Memory {
    fn new(capacity: u32) -> Self {
        let bytes = Conntrack::region_bytes(capacity).expect("a capacity");
        Self(vec![1; bytes + 64])
    }

    fn table(&mut self, capacity: u32) -> Conntrack<'_> {
        let pad = self.0.as_ptr().align_offset(64);
        let hasher = Hasher::new([11; 16]);
        let settings = Settings::default();
        Conntrack::new(&mut self.0[pad..], capacity, settings, hasher, at(0)).expect("a table")
    }
}

/// The median over all slices of work of what one operation took, in nanoseconds. A slice is so short that the
/// scheduler interrupts few, and the median does not see those.
fn median<T>(passes: usize, work: &[T], mut operate: impl FnMut(&[T])) -> f64 {
    let mut times = Vec::with_capacity(passes * work.len() / BATCH);
    for _ in 0..passes {
        for slice in work.chunks_exact(BATCH) {
            let start = Wall::now();
            operate(slice);
            times.push(start.elapsed().as_nanos() as u64);
        }
    }
    times.sort_unstable();
    times[times.len() / 2] as f64 / BATCH as f64
}

fn segment(sequence: u32, acknowledgment: u32, flags: u8) -> Signal {
    Signal::Tcp(Segment {
        sequence,
        acknowledgment,
        flags,
        window: 60_000,
        length: 0,
        scale: Some(7),
    })
}

fn begin(table: &mut Conntrack<'_>, flow: &Flow, translate: bool) {
    let first = match flow.protocol() {
        TCP => segment(999, 0, flag::SYN),
        _ => Signal::Datagram,
    };
    let hash = table.hash(flow);
    let mut new = table
        .open(flow, hash, LinkId::UPLINK, &first, at(1))
        .expect("a first packet");
    if translate {
        let Address(mut octets) = flow.destination();
        octets[15] ^= 0xff;
        octets[13] = 77;
        new.reply = flow.with_destination(Address(octets), 8_080).reversed();
    }
    black_box(table.commit(&new, at(1)).expect("room"));
}

/// Lets a TCP connection finish its handshake.
fn establish(table: &mut Conntrack<'_>, flow: &Flow) {
    if flow.protocol() != TCP {
        return;
    }
    let hit = table.lookup(flow, table.hash(flow), at(1)).expect("it");
    let back = table.reply(hit.id).expect("it");
    let hit_back = table.lookup(&back, table.hash(&back), at(1)).expect("it");
    let syn_ack = segment(1_999, 1_000, flag::SYN | flag::ACK);
    table.track(hit_back, &syn_ack, at(1)).expect("valid");
    let ack = segment(1_000, 2_000, flag::ACK);
    table.track(hit, &ack, at(1)).expect("valid");
}

fn hits(count: u32, protocol: u8, v6: bool, translate: bool) {
    // Translated IPv6 takes two slots.
    let slots = if v6 && translate { 2 * count } else { count };
    let capacity = slots + slots / 8 + 16;
    let mut memory = Memory::new(capacity);
    let mut table = memory.table(capacity);
    let mut flows: Vec<Flow> = (0..count).map(|n| flow(n, protocol, v6)).collect();
    for flow in &flows {
        begin(&mut table, flow, translate);
        establish(&mut table, flow);
    }
    Random(88).shuffle(&mut flows);
    let signal = match protocol {
        TCP => segment(1_000, 2_000, flag::ACK),
        _ => Signal::Datagram,
    };
    let passes = (2_000_000 / count as usize).max(2);
    let hash = median(passes, &flows, |batch| {
        for flow in batch {
            black_box(table.hash(flow));
        }
    });
    let single = median(passes, &flows, |batch| {
        for flow in batch {
            black_box(table.lookup(flow, table.hash(flow), at(2)));
        }
    });
    let mut hashes = Vec::with_capacity(BATCH);
    let lookup = median(passes, &flows, |batch| {
        hashes.clear();
        hashes.extend(batch.iter().map(|flow| table.hash(flow)));
        table.touch(&hashes);
        for (flow, hash) in batch.iter().zip(&hashes) {
            black_box(table.lookup(flow, *hash, at(2)));
        }
    });
    let mut all = |touch: bool| {
        median(passes, &flows, |batch| {
            hashes.clear();
            hashes.extend(batch.iter().map(|flow| table.hash(flow)));
            if touch {
                table.touch(&hashes);
            }
            for (flow, hash) in batch.iter().zip(&hashes) {
                let hit = table.lookup(flow, *hash, at(2)).expect("a hit");
                black_box(table.track(hit, &signal, at(2))).expect("valid");
                black_box(table.attached(hit.id));
                if table.is_translated(hit.id) {
                    black_box(table.outgoing(hit));
                }
            }
        })
    };
    let (touched, untouched) = (all(true), all(false));
    println!(
        "hit {count:>8} {} {} {}: hash {hash:5.1}, one by one {single:6.1}, touch + lookup {lookup:6.1}, and track {touched:6.1} (untouched {untouched:6.1})",
        if protocol == TCP { "tcp" } else { "udp" },
        if v6 { "v6" } else { "v4" },
        if translate { "nat" } else { "   " },
    );
}

fn misses(count: u32, translate: bool) {
    let mut memory = Memory::new(count);
    let mut table = memory.table(count);
    let flows: Vec<Flow> = (0..count).map(|n| flow(n, UDP, false)).collect();
    let miss = median(1, &flows, |batch| {
        for flow in batch {
            black_box(table.lookup(flow, table.hash(flow), at(1)));
            begin(&mut table, flow, translate);
        }
    });
    let mut cursor = Some(0);
    let parts: Vec<u32> = (0..count / BATCH as u32 * BATCH as u32).collect();
    let remove = median(1, &parts, |_| {
        let from = cursor.unwrap_or(0);
        cursor = table.visit(from, BATCH as u32, at(1), |_| Visit::Remove);
    });
    for flow in &flows {
        if table.used() < count && table.lookup(flow, table.hash(flow), at(1)).is_none() {
            begin(&mut table, flow, translate);
        }
    }
    let others: Vec<Flow> = (0..count).map(|n| flow(n + count, UDP, false)).collect();
    let evict = median(1, &others, |batch| {
        for flow in batch {
            begin(&mut table, flow, translate);
        }
    });
    println!(
        "new {count:>8} {}: lookup + open + commit {miss:6.1}, remove {remove:6.1}, open + evict + commit {evict:6.1}",
        if translate { "nat" } else { "   " }
    );
}

fn sweeps(count: u32) {
    let mut memory = Memory::new(count);
    let mut table = memory.table(count);
    for n in 0..count {
        let flow = flow(n, TCP, false);
        begin(&mut table, &flow, false);
        establish(&mut table, &flow);
    }
    // Time goes on in steps that the clock believes; each due row is looked at and put back, or ends.
    let (mut now, mut looks, mut ends) = (0, Vec::new(), Vec::new());
    while table.used() > 0 {
        now += 59_000_000;
        loop {
            let start = Wall::now();
            let swept = table.sweep(at(now), BATCH as u32);
            let nanos = start.elapsed().as_nanos() as f64;
            if swept.examined == BATCH as u32 {
                let times = if swept.expired == 0 {
                    &mut looks
                } else {
                    &mut ends
                };
                times.push(nanos / BATCH as f64);
            }
            if !swept.behind {
                break;
            }
        }
    }
    let nothing = median(1_000, &[0; 1_000], |batch| {
        for _ in batch {
            black_box(table.sweep(at(now), BATCH as u32));
        }
    });
    let middle = |mut times: Vec<f64>| {
        times.sort_unstable_by(f64::total_cmp);
        times[times.len() / 2]
    };
    println!(
        "sweep {count:>6}: nothing due {nothing:5.1}, looked at and put back {:6.1}, ended {:6.1}",
        middle(looks),
        middle(ends)
    );
}

fn main() {
    let asked: Vec<u32> = std::env::args().filter_map(|n| n.parse().ok()).collect();
    let counts = if asked.is_empty() {
        vec![1_000, 100_000, 1_000_000]
    } else {
        asked
    };
    println!("Nanoseconds per operation, batches of {BATCH}, medians");
    for count in &counts {
        hits(*count, UDP, false, false);
        hits(*count, TCP, false, false);
        hits(*count, TCP, false, true);
        hits(*count, TCP, true, false);
        hits(*count, TCP, true, true);
    }
    for count in counts.iter().filter(|count| **count >= 10_000) {
        misses(*count, false);
        misses(*count, true);
        sweeps(*count);
    }
}
