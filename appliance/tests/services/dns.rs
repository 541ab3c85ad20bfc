//! DNS through a Service: a resolver asks for A and AAAA at once from one socket, so two first packets of one flow are under way
//! together (rows D-01, K-06).

use sluice_appliance::Capacity;
use sluice_appliance::Verdict;
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{self, Addresses, BOTH, Svc, ends, ip, packet};
use sluice_appliance::time::Duration;
use sluice_contract::Protocol;
use std::net::IpAddr;

/// In both families together.
const PAIRS: u32 = 1_000_000;
/// Resolvers that ask in the same batch of frames.
const AT_ONCE: usize = 16;
const DNS: u16 = 53;

/// The same in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            list.swap(at, self.below(at + 1));
        }
    }
}

/// A question on its way: the port it is from, and which of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    port: u16,
    kind: u8,
}

fn question(of: Question, from: &str, to: &str) -> Vec<u8> {
    let builder = packet(16, from, to).udp(of.port, DNS);
    builder.payload(&[of.kind; 30]).build()
}

/// The answer to a frame that reached a server: the same words back.
fn answer(link: u16, asked: &[u8]) -> (Vec<u8>, IpAddr) {
    let (client, port, server, at) = ends(asked);
    let kind = asked.last().copied().unwrap();
    let builder = packet(link, &server.to_string(), &client.to_string()).udp(at, port);
    (builder.payload(&[kind; 60]).build(), server)
}

/// One batch: resolvers with ports of their own ask twice each, all in any order, and every question is answered to whom it came from.
fn round(bench: &mut Bench, a: &Addresses, random: &mut Random) {
    let mut asked = Vec::new();
    while asked.len() < 2 * AT_ONCE {
        let port = 1024 + random.below(64_512) as u16;
        if asked.iter().all(|it: &Question| it.port != port) {
            asked.extend([1, 28].map(|kind| Question { port, kind }));
        }
    }
    random.shuffle(&mut asked);
    let frames = asked
        .iter()
        .map(|it| (16, question(*it, a.pods[0], a.cluster_ip)));
    let arrived = bench.send_batch(&frames.collect::<Vec<_>>());
    let mut chosen = std::collections::BTreeMap::new();
    let mut answers = Vec::new();
    for (question, end) in asked.iter().zip(&arrived) {
        let Verdict::Forward(link) = end.verdict else {
            panic!("{question:?}: {:?}", end.verdict);
        };
        let (frame, server) = answer(link.raw(), &end.bytes);
        // Both go the same way: else the second would be a stranger's.
        assert_eq!(*chosen.entry(question.port).or_insert(server), server);
        answers.push((link.raw(), frame));
    }
    random.shuffle(&mut answers);
    let mut back: Vec<Question> = bench
        .send_batch(&answers)
        .iter()
        .map(|end| {
            assert_eq!(
                end.verdict,
                Verdict::Forward(sluice_contract::LinkId::new(16).unwrap())
            );
            let (from, at, to, port) = ends(&end.bytes);
            assert_eq!((from, at, to), (ip(a.cluster_ip), DNS, ip(a.pods[0])));
            let kind = end.bytes.last().copied().unwrap();
            Question { port, kind }
        })
        .collect();
    back.sort();
    asked.sort();
    assert_eq!(back, asked);
}

#[test]
fn d01_k06_two_questions_at_once_from_one_socket_are_both_answered_a_million_times() {
    for a in BOTH {
        let mut random = Random(0x5eed_0001);
        let mut bench = Bench::empty(Capacity::default());
        bench.commit(&node::node_rows());
        let mut svc = Svc::new(&[(a.pods[1], 5353), (a.pods[2], 5353)], &[]);
        (svc.protocol, svc.port) = (Protocol::Udp, DNS);
        bench.commit(&svc.rows(&a));
        for _ in 0..PAIRS as usize / 2 / AT_ONCE {
            round(&mut bench, &a, &mut random);
            // A hundred names a second: the pod's share of the table is another row's matter.
            bench.wait(Duration::from_millis(160));
        }
        assert_eq!(bench.pipeline.stats().dropped_in_all(), 0);
    }
}
