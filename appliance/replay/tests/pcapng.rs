//! Captures as other programs write them: either byte order, every kind of packet block, any time resolution; and captures that
//! nobody should have written.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on says where"
)]

use proptest::prelude::*;
use sluice_replay::pcapng::{BLOCK_MAX, Fault, ReadError, Reader, Traffic, Writer};

/// A capture by hand.
#[derive(Clone, Default)]
struct Capture {
    big: bool,
    bytes: Vec<u8>,
}

impl Capture {
    fn new(big: bool) -> Self {
        let capture = Self {
            big,
            bytes: Vec::new(),
        };
        let mut body = capture.word(0x1a2b_3c4d).to_vec();
        body.extend(capture.half(1));
        body.extend(capture.half(0));
        body.extend([0xff; 8]);
        capture.block(0x0a0d_0d0a, &body)
    }

    fn word(&self, value: u32) -> [u8; 4] {
        if self.big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    }

    fn half(&self, value: u16) -> [u8; 2] {
        if self.big {
            value.to_be_bytes()
        } else {
            value.to_le_bytes()
        }
    }

    fn block(mut self, kind: u32, body: &[u8]) -> Self {
        let length = self.word((body.len().next_multiple_of(4) + 12) as u32);
        self.bytes.extend(self.word(kind));
        self.bytes.extend(length);
        self.bytes.extend(body);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self.bytes.extend(length);
        self
    }

    fn interface(self, snap: u32, options: &[(u16, &[u8])]) -> Self {
        let mut body = self.half(1).to_vec();
        body.extend([0; 2]);
        body.extend(self.word(snap));
        for (code, value) in options {
            body.extend(self.half(*code));
            body.extend(self.half(value.len() as u16));
            body.extend(*value);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        self.block(1, &body)
    }

    fn enhanced(self, interface: u32, ticks: u64, bytes: &[u8], length: u32) -> Self {
        let mut body = self.word(interface).to_vec();
        body.extend(self.word((ticks >> 32) as u32));
        body.extend(self.word(ticks as u32));
        body.extend(self.word(bytes.len() as u32));
        body.extend(self.word(length));
        body.extend(bytes);
        self.block(6, &body)
    }

    fn simple(self, length: u32, bytes: &[u8]) -> Self {
        let mut body = self.word(length).to_vec();
        body.extend(bytes);
        self.block(3, &body)
    }

    fn read(&self) -> Result<Vec<Owned>, ReadError> {
        read(&self.bytes)
    }
}

/// Number, interface, nanoseconds, bytes.
type Owned = (u64, String, u64, Vec<u8>);

fn read(bytes: &[u8]) -> Result<Vec<Owned>, ReadError> {
    let mut reader = Reader::new(bytes)?;
    let mut all = Vec::new();
    while let Some(packet) = reader.next_packet()? {
        let name = packet.interface.name.clone();
        all.push((packet.number, name, packet.nanos, packet.bytes.to_vec()));
    }
    Ok(all)
}

#[test]
fn both_byte_orders_and_every_resolution_tell_the_same_time() {
    for big in [false, true] {
        let offset = if big {
            100i64.to_be_bytes()
        } else {
            100i64.to_le_bytes()
        };
        let capture = Capture::new(big)
            .interface(0, &[(2, b"pod:a")])
            .interface(0, &[(2, b"uplink"), (9, &[9])])
            .interface(0, &[(9, &[0x80 | 10])])
            .interface(0, &[(9, &[0]), (14, &offset)])
            .block(0x0bad, b"a block that nobody knows")
            .enhanced(0, 1_500_000, b"microseconds", 12)
            .enhanced(1, 1_500_000_000, b"nanoseconds!!", 13)
            .enhanced(2, 1536, b"parts of 1024", 13)
            .enhanced(3, 3, b"seconds", 7)
            .simple(6, b"simple");
        let packets = capture.read().unwrap();
        let names: Vec<&str> = packets.iter().map(|p| p.1.as_str()).collect();
        assert_eq!(names, ["pod:a", "uplink", "#2", "#3", "pod:a"]);
        let times: Vec<u64> = packets.iter().map(|p| p.2 / 1_000_000).collect();
        assert_eq!(times, [1_500, 1_500, 1_500, 103_000, 103_000]);
        assert_eq!(packets[4].3, b"simple");
        assert_eq!(packets[4].0, 5);
    }
}

#[test]
fn another_section_begins_anew_in_its_own_byte_order() {
    let first = Capture::new(false)
        .interface(0, &[(2, b"a")])
        .enhanced(0, 1, b"x", 1);
    let second = Capture::new(true)
        .interface(0, &[(2, b"b")])
        .enhanced(0, 2, b"y", 1);
    let both = [first.bytes.as_slice(), &second.bytes].concat();
    let packets = read(&both).unwrap();
    assert_eq!(packets[0], (1, "a".into(), 1_000, b"x".to_vec()));
    assert_eq!(packets[1], (2, "b".into(), 2_000, b"y".to_vec()));
    let forgotten = [first.bytes.as_slice(), &Capture::new(true).bytes].concat();
    let third = Capture {
        big: true,
        bytes: forgotten,
    };
    let error = third.enhanced(0, 1, b"x", 1).read().unwrap_err();
    assert_eq!(error.to_string(), "Packet 2: There is no interface 0");
}

#[test]
fn what_cannot_be_replayed_is_refused_by_packet_number_and_cause() {
    let good = || Capture::new(false).interface(64, &[(2, b"a")]);
    let after_one = || good().enhanced(0, 1, b"whole", 5);
    let cases: [(Capture, &str); 9] = [
        (
            after_one().enhanced(0, 1, b"part", 1500),
            "Packet 2: The capture kept 4 of its 1500 bytes; capture whole frames (snap length 0)",
        ),
        (
            after_one().simple(65, &[0; 64]),
            "Packet 2: The capture kept 64 of its 65 bytes; capture whole frames (snap length 0)",
        ),
        (
            after_one().enhanced(3, 1, b"", 0),
            "Packet 2: There is no interface 3",
        ),
        (
            after_one().block(2, &[0; 20]),
            "Packet 2: Packet blocks are obsolete; `editcap -F pcapng OLD NEW` writes enhanced ones",
        ),
        (
            after_one().simple(8, &[0; 4]),
            "Packet 2: It claims 8 captured bytes, which its block does not have",
        ),
        (
            after_one().block(6, &[0; 8]),
            "Packet 2: It ends before its fields do",
        ),
        (
            Capture::new(false).simple(1, b"x"),
            "Packet 1: There is no interface 0",
        ),
        (
            good()
                .interface(0, &[(9, &[200])])
                .interface(0, &[(9, &[100])]),
            "The block at byte 84, after packet 0: The time resolution 0x64 of an interface has no meaning",
        ),
        (
            good().enhanced(0, u64::MAX, b"x", 1),
            "Packet 1: Its time lies before 1970 or after 2554",
        ),
    ];
    for (capture, says) in cases {
        assert_eq!(capture.read().unwrap_err().to_string(), says);
    }
    let mut radio = Capture::new(false).bytes;
    let other = Capture::new(false).block(1, &[105, 0, 0, 0, 0, 0, 0, 0]);
    radio.extend(&other.bytes[radio.len()..]);
    let says = read(&radio).unwrap_err().to_string();
    assert!(
        says.ends_with("link type 105; only Ethernet (1) can be replayed"),
        "{says}"
    );
}

#[test]
fn what_is_no_capture_says_what_it_is() {
    for magic in [0xa1b2_c3d4u32, 0xa1b2_3c4d] {
        for bytes in [magic.to_le_bytes(), magic.to_be_bytes()] {
            let error = read(&[bytes.as_slice(), &[0; 20]].concat()).unwrap_err();
            assert!(matches!(error, ReadError::Classic), "{error}");
            assert!(error.to_string().contains("editcap -F pcapng"));
        }
    }
    for bytes in [b"".as_slice(), b"PK", b"{\"links\": []}"] {
        assert!(matches!(read(bytes), Err(ReadError::NotPcapng)));
    }
}

#[test]
fn a_capture_cut_anywhere_names_the_place_or_is_whole() {
    let capture = Capture::new(false)
        .interface(0, &[(2, b"a")])
        .enhanced(0, 1, b"one", 3)
        .enhanced(0, 2, b"two", 3);
    let whole = capture.read().unwrap();
    for end in 4..capture.bytes.len() {
        match read(&capture.bytes[..end]) {
            Ok(packets) => assert_eq!(packets, whole[..packets.len()]),
            Err(ReadError::Packet { fault, .. } | ReadError::Block { fault, .. }) => {
                assert_eq!(fault, Fault::Ends);
            }
            Err(other) => panic!("{end}: {other}"),
        }
    }
}

#[test]
fn a_block_may_not_make_us_allocate_what_it_claims() {
    let mut bytes = Capture::new(false).bytes;
    bytes.extend(6u32.to_le_bytes());
    bytes.extend((BLOCK_MAX + 4).to_le_bytes());
    let error = read(&bytes).unwrap_err();
    let says = format!(
        "Packet 1: Its length {} is more than the {BLOCK_MAX} bytes that a block may have here",
        BLOCK_MAX + 4
    );
    assert_eq!(error.to_string(), says);
}

proptest! {
    #[test]
    fn what_is_written_is_read_again(
        names in proptest::collection::vec("[a-z:0-9-]{1,20}", 1..5),
        packets in proptest::collection::vec(
            (any::<u32>(), any::<u64>(), proptest::collection::vec(any::<u8>(), 0..300), ".{0,40}"), 0..20),
    ) {
        let mut writer =
            Writer::new(Vec::new(), "a test", names.iter().map(String::as_str)).unwrap();
        let mut expected = Vec::new();
        for (n, (interface, nanos, bytes, comment)) in packets.iter().enumerate() {
            let interface = *interface as usize % names.len();
            writer.packet(interface as u32, *nanos, bytes, Traffic::Left, comment).unwrap();
            expected.push((n as u64 + 1, names[interface].clone(), *nanos, bytes.clone()));
        }
        prop_assert_eq!(read(&writer.finish().unwrap()).unwrap(), expected);
    }

    #[test]
    fn no_damage_makes_it_panic_or_read_more_than_there_is(
        big: bool,
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = Capture::new(big)
            .interface(0, &[(2, b"pod:a"), (9, &[6]), (14, &[0; 8])])
            .enhanced(0, 1, &[7; 61], 61)
            .simple(3, b"abc")
            .enhanced(0, 2, &[8; 60], 60)
            .bytes;
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(packets) = read(&bytes) {
            let total: usize = packets.iter().map(|p| p.3.len()).sum();
            prop_assert!(total <= bytes.len());
        }
    }
}
