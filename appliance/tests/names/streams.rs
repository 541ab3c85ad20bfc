//! Answers over TCP, in the pieces in which they come.

use crate::learning::{Asker, DENIED, REACHED, RESOLVER, asker, bench, counter};
use crate::message::Message;
use sluice_appliance::names::message::A;
use sluice_appliance::testing::Bench;
use sluice_appliance::testing::node::{UPLINK, V4, ends, packet};
use sluice_appliance::wire::tcp;
use sluice_contract::report::CounterId;

/// A pod's connection to its resolver.
struct Stream {
    pod: Asker,
    port: u16,
    /// The port as the resolver sees it.
    seen: u16,
    sent: u32,
    told: u32,
}

/// A message behind its length.
fn framed(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u16).to_be_bytes()[..], message].concat()
}

impl Stream {
    fn open(bench: &mut Bench, pod: Asker, port: u16) -> Self {
        let syn = packet(16, pod.own(), RESOLVER[0]).tcp(port, 53, tcp::SYN);
        let opened = bench.send(16, &syn.numbers(100, 0).build());
        let (_, seen, ..) = ends(opened.forwarded(UPLINK));
        // Where numbers begin anew while an answer is on its way.
        let first = u32::MAX - 60;
        let answer = packet(UPLINK, RESOLVER[0], V4.node).tcp(53, seen, tcp::SYN | tcp::ACK);
        let answer = answer.numbers(first, 101).build();
        bench.send(UPLINK, &answer).forwarded(16);
        Self {
            pod,
            port,
            seen,
            sent: 101,
            told: first.wrapping_add(1),
        }
    }

    fn ask(&mut self, bench: &mut Bench, question: &Message) {
        let bytes = framed(&question.0);
        let segment = packet(16, self.pod.own(), RESOLVER[0]).tcp(self.port, 53, tcp::ACK);
        let segment = segment.numbers(self.sent, self.told).payload(&bytes);
        bench.send(16, &segment.build()).forwarded(UPLINK);
        self.sent += bytes.len() as u32;
    }

    /// A segment of answers, so many bytes further than what was told before.
    fn tell_at(&self, bench: &mut Bench, further: u32, bytes: &[u8]) {
        let back = packet(UPLINK, RESOLVER[0], V4.node).tcp(53, self.seen, tcp::ACK);
        let back = back.numbers(self.told.wrapping_add(further), self.sent);
        bench
            .send(UPLINK, &back.payload(bytes).build())
            .forwarded(16);
    }

    fn tell(&mut self, bench: &mut Bench, bytes: &[u8]) {
        self.tell_at(bench, 0, bytes);
        self.told = self.told.wrapping_add(bytes.len() as u32);
    }
}

/// The answer to a question with so many addresses from 198.51.100.`first` on.
fn answer(question: &Message, first: u8, count: u8) -> Message {
    (first..first + count).fold(Message::to(question), |answer, last| {
        answer.record("example.com", A, 60, &[198, 51, 100, last])
    })
}

fn reached(bench: &mut Bench, pod: &Asker, last: u8) -> bool {
    let to = format!("198.51.100.{last}");
    let end = pod.connect(bench, &to, 443);
    assert!(end == REACHED || end == DENIED);
    end == REACHED
}

#[test]
fn d06_an_answer_in_several_segments_counts_by_its_first_piece_and_is_told() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    let mut stream = Stream::open(&mut bench, pod, 6000);
    let questions = [1, 2, 3].map(|id| Message::question(id, "example.com", A));
    for question in &questions {
        stream.ask(&mut bench, question);
    }
    // Four addresses, of which two and a half come at once.
    let first = framed(&answer(&questions[0], 10, 4).0);
    let record = (first.len() - 2 - questions[0].0.len()) / 4;
    let cut = first.len() - record - record / 2;
    stream.tell(&mut bench, &first[..cut]);
    assert_eq!(counter(&bench, CounterId::NamesCut), 1);
    // The rest, and behind it in the same segment the next answer.
    let second = framed(&answer(&questions[1], 20, 1).0);
    stream.tell(&mut bench, &[&first[cut..], &second].concat());
    // The length by itself.
    let third = framed(&answer(&questions[2], 30, 1).0);
    stream.tell(&mut bench, &third[..2]);
    stream.tell(&mut bench, &third[2..]);
    let known = [10, 11, 12, 13, 20, 30].map(|last| reached(&mut bench, &pod, last));
    assert_eq!(known, [true, true, false, false, true, true]);
    assert_eq!(counter(&bench, CounterId::NamesCut), 1);
}

#[test]
fn d04_the_middle_of_an_answer_is_never_taken_for_another_one() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    let question = Message::question(1, "example.com", A);
    // Whoever wrote this record made it look like the answer to the pod's other question; the pod helps.
    let forged = framed(&answer(&question, 66, 1).0);
    let text = Message::to(&Message::question(9, "evil.test", 16));
    let text = framed(&text.record("evil.test", 16, 60, &forged).0);
    let begin = text.len() - forged.len();
    for (port, cut) in (6000..).zip([begin, begin + 2, begin - 1, 1]) {
        let mut stream = Stream::open(&mut bench, pod, port);
        stream.ask(&mut bench, &question);
        stream.tell(&mut bench, &text[..cut]);
        stream.tell(&mut bench, &text[cut..]);
        assert!(!reached(&mut bench, &pod, 66), "cut at {cut}");
    }
    // The beginning comes after its end.
    let mut stream = Stream::open(&mut bench, pod, 6010);
    stream.ask(&mut bench, &question);
    stream.tell_at(&mut bench, begin as u32, &text[begin..]);
    stream.tell_at(&mut bench, 0, &text[..begin]);
    assert!(!reached(&mut bench, &pod, 66));
    // What is behind it is read again.
    stream.told = stream.told.wrapping_add(text.len() as u32);
    stream.tell(&mut bench, &framed(&answer(&question, 77, 1).0));
    assert!(reached(&mut bench, &pod, 77));
}

#[test]
fn d04_a_stream_whose_beginning_was_not_seen_teaches_nothing() {
    let mut bench = bench(&["example.com"]);
    let pod = asker(16, 0);
    let question = Message::question(1, "example.com", A);
    let mut stream = Stream::open(&mut bench, pod, 6000);
    stream.ask(&mut bench, &question);
    // Four other streams of this pod begin meanwhile.
    for port in 6001..6005 {
        Stream::open(&mut bench, pod, port);
    }
    stream.tell(&mut bench, &framed(&answer(&question, 10, 1).0));
    assert!(!reached(&mut bench, &pod, 10));
}
