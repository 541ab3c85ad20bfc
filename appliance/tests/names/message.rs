//! Messages, good and bad, and what is read in them.

use proptest::prelude::*;
use sluice_appliance::names::message::{A, AAAA, CNAME, RECORDS, addresses, question};
use sluice_contract::name::NAME_TEXT;

/// A message under construction.
#[derive(Clone)]
pub(crate) struct Message(pub(crate) Vec<u8>);

fn labels(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    for label in name.split('.') {
        bytes.push(label.len() as u8);
        bytes.extend(label.bytes());
    }
    bytes.push(0);
    bytes
}

impl Message {
    pub(crate) fn question(id: u16, name: &str, kind: u16) -> Self {
        let [high, low] = id.to_be_bytes();
        let mut bytes = vec![high, low, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        bytes.extend(labels(name));
        bytes.extend(kind.to_be_bytes());
        bytes.extend([0, 1]);
        Self(bytes)
    }

    /// The answer to a question, without records.
    pub(crate) fn to(question: &Self) -> Self {
        let mut answer = question.clone();
        answer.0[2..4].copy_from_slice(&[0x81, 0x80]);
        answer
    }

    fn answer(name: &str, kind: u16) -> Self {
        Self::to(&Self::question(0x1234, name, kind))
    }

    fn raw(mut self, owner: &[u8], kind: u16, seconds: u32, data: &[u8]) -> Self {
        self.0.extend(owner);
        self.0.extend(kind.to_be_bytes());
        self.0.extend([0, 1]);
        self.0.extend(seconds.to_be_bytes());
        self.0.extend((data.len() as u16).to_be_bytes());
        self.0.extend(data);
        let count = u16::from_be_bytes([self.0[6], self.0[7]]) + 1;
        self.0[6..8].copy_from_slice(&count.to_be_bytes());
        self
    }

    pub(crate) fn record(self, owner: &str, kind: u16, seconds: u32, data: &[u8]) -> Self {
        self.raw(&labels(owner), kind, seconds, data)
    }

    pub(crate) fn cname(self, owner: &str, to: &str, seconds: u32) -> Self {
        self.record(owner, CNAME, seconds, &labels(to))
    }

    fn addresses(&self) -> Vec<(String, u32)> {
        let question = question(&self.0).expect("a question");
        let mut all = Vec::new();
        addresses(&self.0, &question, &mut { RECORDS }, |address, seconds| {
            all.push((std::net::IpAddr::from(address).to_string(), seconds));
        });
        all
    }
}

const POINTER: [u8; 2] = [0xc0, 12];

#[test]
fn d04_addresses_of_the_name_that_was_asked_for() {
    let message = Message::answer("WWW.Example.com", A)
        .raw(&POINTER, A, 300, &[192, 0, 2, 1])
        .record("www.EXAMPLE.com", A, 30, &[192, 0, 2, 2])
        .record("other.example.com", A, 30, &[192, 0, 2, 3])
        .record("www.example.com", AAAA, 30, &[1; 16])
        .record("www.example.com", A, 30, &[1; 5]);
    let seen = question(&message.0).expect("a question");
    assert_eq!((seen.id, seen.is_answer, seen.kind), (0x1234, true, A));
    assert_eq!(seen.name.text(), b"www.example.com");
    let wanted = [("192.0.2.1".into(), 300), ("192.0.2.2".into(), 30)];
    assert_eq!(message.addresses(), wanted);
    let six = Message::answer("a.b", AAAA).raw(&POINTER, AAAA, 1 << 31, &[0x20; 16]);
    assert_eq!(six.addresses()[0].1, 0, "more than 31 bits are none");
}

#[test]
fn d04_chains_of_names_are_followed_in_any_order_and_hold_as_long_as_their_weakest_part() {
    let chain = Message::answer("a.test", A)
        .record("c.test", A, 100, &[192, 0, 2, 1])
        .cname("b.test", "c.test", 7)
        .cname("a.test", "b.test", 50);
    assert_eq!(chain.addresses(), [("192.0.2.1".into(), 7)]);
    let broken = Message::answer("a.test", A)
        .cname("a.test", "b.test", 50)
        .record("c.test", A, 100, &[192, 0, 2, 1]);
    assert_eq!(broken.addresses(), []);
    // A name that stands for itself, and two for each other.
    let circle = Message::answer("a.test", A)
        .cname("a.test", "b.test", 50)
        .cname("b.test", "a.test", 50)
        .record("a.test", A, 100, &[192, 0, 2, 1]);
    assert_eq!(circle.addresses(), []);
}

#[test]
fn d06_truncated_and_large_answers_count_as_far_as_they_are_there() {
    let mut large = Message::answer("a.test", A);
    for n in 0..250u8 {
        large = large.raw(&POINTER, A, 60, &[198, 18, 0, n]);
    }
    assert!(large.0.len() > 4000);
    assert_eq!(large.addresses().len(), 250);
    let whole = large.0.clone();
    for end in 0..whole.len() {
        let Some(question) = question(&whole[..end]) else {
            assert!(end < 24);
            continue;
        };
        let mut count = 0;
        addresses(&whole[..end], &question, &mut { RECORDS }, |_, _| {
            count += 1;
        });
        assert_eq!(count, (end - 24) / 16);
    }
    // The bit that says so changes nothing about what is there.
    large.0[2] |= 2;
    assert_eq!(large.addresses().len(), 250);
}

#[test]
fn d04_what_is_no_answer_for_addresses_is_none() {
    let good = Message::answer("a.test", A).raw(&POINTER, A, 60, &[192, 0, 2, 1]);
    assert!(question(&good.0).is_some());
    for (at, byte) in [(2, 0x89), (3, 0x83), (5, 0), (5, 2), (21, 15), (23, 3)] {
        let mut other = good.0.clone();
        assert_ne!(other[at], byte);
        other[at] = byte;
        assert_eq!(question(&other), None, "byte {at} is {byte}");
    }
    // A label that looks like two, and one that rules cannot name.
    for name in [&b"\x06a.test\0"[..], b"\x01\xff\x04test\0", b"\0"] {
        let mut bytes = good.0[..12].to_vec();
        bytes.extend(name);
        bytes.extend([0, 1, 0, 1]);
        assert_eq!(question(&bytes), None);
    }
}

#[test]
fn d04_pointers_lead_back_or_nowhere() {
    for pointer in [[0xc0, 24], [0xc0, 26], [0xff, 0xff], [0xc0, 0]] {
        let message = Message::answer("a.test", A).raw(&pointer, A, 60, &[192, 0, 2, 1]);
        assert_eq!(message.addresses(), [], "{pointer:02x?}");
    }
    // Two that point at each other.
    let circle = Message::answer("a.test", A)
        .raw(&[1, b'x', 0xc0, 28], A, 60, &[0xc0, 24, 0, 0])
        .raw(&[0xc0, 26], A, 60, &[192, 0, 2, 1]);
    assert_eq!(circle.addresses(), []);
    let good = Message::answer("www.a.test", A).raw(
        &[3, b'w', b'w', b'w', 0xc0, 16],
        A,
        60,
        &[192, 0, 2, 1],
    );
    assert_eq!(good.addresses().len(), 1);
}

#[test]
fn d04_the_worst_message_costs_no_more_than_its_budget() {
    // Longer than any chain may be.
    let mut chain = Message::answer("n0.test", A);
    for n in 0..20 {
        chain = chain.cname(&format!("n{n}.test"), &format!("n{}.test", n + 1), 60);
    }
    let chain = chain.record("n20.test", A, 60, &[192, 0, 2, 1]);
    assert_eq!(chain.addresses(), []);
    // Behind more records than are looked at, all passes together.
    let other = |count: usize| {
        let mut message = Message::answer("a.test", A);
        for _ in 0..count {
            message = message.raw(&[0], A, 60, &[192, 0, 2, 9]);
        }
        message.record("a.test", A, 60, &[192, 0, 2, 1]).addresses()
    };
    assert_eq!(other(RECORDS / 2 - 1).len(), 1);
    assert_eq!(other(RECORDS / 2), []);
    // The messages of a frame share it.
    let two = Message::answer("a.test", A).record("a.test", A, 60, &[192, 0, 2, 1]);
    let question = question(&two.0).unwrap();
    let (mut budget, mut found) = (5, 0);
    for _ in 0..3 {
        addresses(&two.0, &question, &mut budget, |_, _| found += 1);
    }
    assert_eq!((budget, found), (0, 2));
}

proptest! {
    #[test]
    fn d04_any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600), good in any::<bool>()) {
        let mut message = bytes;
        if good && message.len() > 20 {
            message[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 9]);
        }
        if let Some(question) = question(&message) {
            prop_assert!(question.name.text().len() <= NAME_TEXT);
            addresses(&message, &question, &mut { RECORDS }, |_, _| ());
        }
    }
}
