//! What a packet costs in the dataplane alone: whole frames through `process_batch`, 64 at a time, no device and no exit.
//!
//! Frames lie in buffers of two kilobytes each, as in the guest; their headers are written afresh before each batch, outside of
//! the measured time, so they are in the cache. Flows come in random order, so the tables are not, unless they fit. Each
//! figure is the median of the batches.

#![expect(
    clippy::unwrap_used,
    reason = "a benchmark that cannot go on says where"
)]

mod names;
mod refused;
mod remote;

use sluice_appliance::testing::node::{self, V4, V6, service};
use sluice_appliance::testing::{Originated, pod_row};
use sluice_appliance::time::Duration;
use sluice_appliance::{Arena, Capacity, Flow, Frame, Instant, Offload, Pipeline, Verdict};
use sluice_contract::service::{
    AddressRole, BackendRow, ConnectionsRow, FrontendKind, FrontendRow, PortId, PortRow,
    ServiceRow, SetId, SetRow,
};
use sluice_contract::{Family, Generation, LinkId, Protocol, Row, ToGuest};
use std::net::IpAddr;
use std::time::Instant as Clock;

const BATCH: usize = 64;
const BUFFER: usize = 2048;
const HEADROOM: usize = 128;

/// A pipeline and the buffers of one batch.
struct Rig {
    pipeline: Pipeline<'static>,
    buffers: Vec<Vec<u8>>,
    now: Instant,
    generation: u64,
    out: Originated,
}

/// Zeroed memory in huge pages where the system has them, as the guest's is.
fn memory(bytes: usize) -> &'static mut [u8] {
    let map = Box::leak(Box::new(memmap2::MmapMut::map_anon(bytes).unwrap()));
    // Without them it is slower, and that is all.
    let _ = map.advise(memmap2::Advice::HugePage);
    map.fill(0);
    &mut map[..]
}

/// A flow of the benchmark: what stands in the first packet.
#[derive(Clone)]
struct Packet {
    link: u16,
    bytes: Vec<u8>,
}

impl Rig {
    fn new() -> Self {
        let capacity = Capacity::LARGE;
        let pipeline = Pipeline::new(&mut Arena::new(memory(capacity.bytes())), capacity, [9; 16]);
        let pipeline = pipeline.unwrap();
        let mut rig = Self {
            pipeline,
            buffers: vec![vec![0; BUFFER]; BATCH],
            now: Instant::from_micros(1_000_000),
            generation: 0,
            out: Originated::default(),
        };
        let mut rows = node::node_rows();
        rows.extend((4..=250u16).map(|n| Row::Link(pod_row(15 + n, n))));
        rows.push(service(ServiceRow::Connections(ConnectionsRow {
            pod_share: 100,
            ..ConnectionsRow::default()
        })));
        rig.commit(rows);
        rig
    }

    fn commit(&mut self, rows: impl IntoIterator<Item = Row>) {
        self.generation += 1;
        let generation = Generation(self.generation);
        self.say(&ToGuest::Begin {
            generation,
            fresh: false,
        });
        for row in rows {
            self.say(&ToGuest::Put(row));
        }
        self.say(&ToGuest::Commit { generation });
        while !self.pipeline.work(1 << 20) {}
    }

    fn say(&mut self, message: &ToGuest) {
        while !self.pipeline.work(1 << 20) {}
        let outcome = self.pipeline.configure(message);
        use sluice_appliance::apply::Outcome;
        assert!(
            matches!(outcome, Outcome::Noted | Outcome::Committed { .. }),
            "{message:?}: {outcome:?}"
        );
    }

    /// Sends packets, a batch at a time; yields the nanoseconds per packet of each batch. All of them are forwarded.
    fn send<'p>(&mut self, packets: impl IntoIterator<Item = &'p Packet>) -> Vec<f64> {
        self.send_and(packets, |verdict| matches!(verdict, Verdict::Forward(_)))
    }

    /// The same for packets that end otherwise.
    fn send_and<'p>(
        &mut self,
        packets: impl IntoIterator<Item = &'p Packet>,
        is_expected: fn(&Verdict) -> bool,
    ) -> Vec<f64> {
        let mut times = Vec::new();
        let mut packets = packets.into_iter().peekable();
        while packets.peek().is_some() {
            let mut frames: Vec<Frame<'_>> = Vec::with_capacity(BATCH);
            for (buffer, packet) in self.buffers.iter_mut().zip(&mut packets) {
                let end = HEADROOM + packet.bytes.len();
                buffer[HEADROOM..end].copy_from_slice(&packet.bytes);
                let link = LinkId::new(packet.link).unwrap();
                let frame = Frame::new(buffer, HEADROOM, end, 0, link, Offload::default());
                frames.push(frame.unwrap());
            }
            let mut verdicts = [Verdict::Held; BATCH];
            let start = Clock::now();
            self.pipeline
                .process_batch(&mut frames, &mut verdicts, self.now, &mut self.out);
            let spent = start.elapsed();
            times.push(spent.as_nanos() as f64 / frames.len() as f64);
            let count = frames.len();
            for verdict in &verdicts[..count] {
                assert!(is_expected(verdict), "{verdict:?}");
            }
        }
        times
    }

    /// Ends all connections by letting their time run out.
    fn forget(&mut self) {
        for _ in 0..400 {
            self.now = self.now + Duration::from_secs(59);
            self.pipeline.sweep(self.now, usize::MAX / 2, &mut self.out);
        }
        assert_eq!(self.pipeline.conntrack().used(), 0);
    }
}

/// Reproducible and good enough to shuffle with.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn report(what: &str, mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    let median = times[times.len() / 2];
    println!("{what:<58} {median:>7.1} ns {:>7.2} Mpps", 1000.0 / median);
    median
}

/// Flows between 250 pods of the node: UDP, so that one packet each way makes them a connection.
fn pod_flows(count: usize, family: Family) -> Vec<Packet> {
    (0..count)
        .map(|n| {
            let from = u16::try_from(1 + n % 250).unwrap();
            let to = u16::try_from(1 + (n / 250) % 250).unwrap();
            let to = if to == from { to % 250 + 1 } else { to };
            let port = u16::try_from(1000 + n / 62_500).unwrap();
            let source = pod_address(from, family);
            let destination = pod_address(to, family);
            let builder = node::packet(15 + from, &source, &destination);
            Packet {
                link: 15 + from,
                bytes: builder.udp(port, 53).payload(&[1; 18]).build(),
            }
        })
        .collect()
}

fn pod_address(n: u16, family: Family) -> String {
    match family {
        Family::V4 => format!("10.0.0.{n}"),
        Family::V6 => format!("fd00::{n:x}"),
    }
}

/// Packets in random order, at least so many.
fn shuffled<'p>(flows: &'p [Packet], count: usize, random: &mut Random) -> Vec<&'p Packet> {
    (0..count)
        .map(|_| &flows[random.below(flows.len())])
        .collect()
}

fn hits_and_misses(random: &mut Random) {
    for (count, name) in [(1_000, "10^3"), (100_000, "10^5"), (1_000_000, "10^6")] {
        let mut rig = Rig::new();
        let flows = pod_flows(count, Family::V4);
        let new = rig.send(&flows);
        report(&format!("miss+commit, pod to pod, up to {name} flows"), new);
        let hits = shuffled(&flows, 1 << 20, random);
        report(&format!("hit, pod to pod, {name} flows"), rig.send(hits));
    }
    let mut rig = Rig::new();
    let flows = pod_flows(100_000, Family::V6);
    report(
        "miss+commit, pod to pod, IPv6, up to 10^5 flows",
        rig.send(&flows),
    );
    let hits = shuffled(&flows, 1 << 20, random);
    report("hit, pod to pod, IPv6, 10^5 flows", rig.send(hits));
}

fn cluster_ip(n: usize) -> IpAddr {
    let [_, a, b, c] = u32::try_from(n).unwrap().to_be_bytes();
    IpAddr::from([172, 32 + a, b, c])
}

/// So many Services, each with two endpoints.
fn services(count: usize) -> impl Iterator<Item = Row> {
    (0..count).flat_map(|n| {
        let id = u32::try_from(n).unwrap();
        let set = SetRow {
            id: SetId(id),
            family: Family::V4,
            count: 2,
            slots: 0,
        };
        let backend = |index: u16| {
            let pod = u8::try_from(2 + (n * 2 + usize::from(index)) % 249).unwrap();
            ServiceRow::Backend(BackendRow {
                set: SetId(id),
                index,
                address: IpAddr::from([10, 0, 0, pod]),
                port: 8080,
            })
        };
        let port = PortRow {
            id: PortId(id),
            family: Family::V4,
            cluster: Some(SetId(id)),
            local: None,
            serving: Some(SetId(id)),
            endpoints: true,
            internal_local: false,
            external_local: false,
            direct_return: false,
            affinity: 0,
            source_lengths: heapless::Vec::new(),
        };
        let address = cluster_ip(n);
        let frontend = FrontendRow {
            address,
            protocol: Protocol::Udp,
            port: 53,
            service: PortId(id),
            kind: FrontendKind::ClusterIp,
        };
        [
            service(ServiceRow::Set(set)),
            service(backend(0)),
            service(backend(1)),
            service(ServiceRow::Port(port)),
            node::known(&address.to_string(), AddressRole::Cluster),
            service(ServiceRow::Frontend(frontend)),
        ]
    })
}

/// New flows of one pod (which is nobody's endpoint) to Services in random order.
fn service_flows(flows: usize, services: usize, random: &mut Random) -> Vec<Packet> {
    (0..flows)
        .map(|n| {
            let to = cluster_ip(random.below(services)).to_string();
            let port = u16::try_from(1024 + n % 60_000).unwrap();
            let builder = node::packet(16, V4.pods[0], &to).udp(port, 53);
            Packet {
                link: 16,
                bytes: builder.payload(&[1; 18]).build(),
            }
        })
        .collect()
}

fn by_services(random: &mut Random) {
    for (count, name) in [(10, "10"), (10_000, "10^4"), (100_000, "10^5")] {
        let mut rig = Rig::new();
        rig.commit(services(count));
        let flows = service_flows(50_000, count, random);
        report(
            &format!("new connection through one of {name} services"),
            rig.send(&flows),
        );
        let hits = shuffled(&flows, 1 << 19, random);
        report(
            &format!("hit, translated, 5*10^4 flows, {name} services"),
            rig.send(hits),
        );
    }
}

fn out_of_the_cluster(random: &mut Random) {
    for (family, name) in [(V4, "IPv4"), (V6, "IPv6")] {
        let mut rig = Rig::new();
        let flows: Vec<Packet> = (0..100_000usize)
            .map(|n| {
                let from = u16::try_from(1 + n % 250).unwrap();
                let source = pod_address(from, family.family);
                let to = match family.family {
                    Family::V4 => IpAddr::from([203, 0, (n >> 8) as u8, n as u8]),
                    Family::V6 => {
                        IpAddr::from([0x2001, 0xdb8, 99, 0, 0, 0, (n >> 16) as u16, n as u16])
                    }
                };
                let builder = node::packet(15 + from, &source, &to.to_string());
                Packet {
                    link: 15 + from,
                    bytes: builder.udp(4000, 53).payload(&[1; 18]).build(),
                }
            })
            .collect();
        report(
            &format!("new connection to outside, source rewritten, {name}"),
            rig.send(&flows),
        );
        let hits = shuffled(&flows, 1 << 20, random);
        report(
            &format!("hit, source rewritten, 10^5 flows, {name}"),
            rig.send(hits),
        );
        rig.forget();
    }
}

/// Row Z-11: what flows cost that were chosen, with the secret known, to lie in 1/4096 of the buckets: far more than those
/// hold, so that all the rest lie in their second ones.
fn adversary(random: &mut Random) {
    const FLOWS: usize = 3_000;
    let mut medians = [0.0; 2];
    for (chosen, name) in [(false, "any"), (true, "chosen")] {
        let mut rig = Rig::new();
        let all = (0u32..1 << 24).map(|n| {
            let [_, a, b, c] = n.to_be_bytes();
            (IpAddr::from([203, a, b, 1]), 1024 + u16::from(c))
        });
        let pod: IpAddr = V4.pods[1].parse().unwrap();
        let ct = rig.pipeline.conntrack();
        let flows: Vec<Packet> = all
            .filter(|(from, port)| {
                let flow = Flow::new((*from).into(), pod.into(), 17, *port, 53);
                !chosen || ct.hash(&flow).get() >> 52 == 7
            })
            .take(FLOWS)
            .map(|(from, port)| {
                let builder = node::packet(1, &from.to_string(), V4.pods[1]).udp(port, 53);
                let bytes = builder.payload(&[1; 18]).build();
                Packet { link: 1, bytes }
            })
            .collect();
        report(&format!("new connection, {name} flows"), rig.send(&flows));
        let hits = shuffled(&flows, 1 << 19, random);
        let median = report(&format!("hit, {FLOWS} {name} flows"), rig.send(hits));
        medians[usize::from(chosen)] = median;
    }
    println!(
        "chosen flows cost {:.2} times as much",
        medians[1] / medians[0]
    );
}

/// A part of the benchmark.
type Part = fn(&mut Random);

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    // `cargo test` runs benchmarks too, to see that they build.
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    println!(
        "{:<58} {:>10} {:>12}",
        "one core, 60 B frames, batches of 64", "a packet", ""
    );
    let mut random = Random(0x1234_5678_9abc_def1);
    let parts: [(&str, Part); 7] = [
        ("hits", hits_and_misses),
        ("services", by_services),
        ("outside", out_of_the_cluster),
        ("adversary", adversary),
        ("refused", refused::by_ports),
        ("remote", remote::by_ranges),
        ("names", names::by_names),
    ];
    for (name, part) in parts {
        if wanted.is_empty() || wanted.iter().any(|w| w == name) {
            part(&mut random);
        }
    }
}
