//! A successor reads what its predecessor left, whole, cut, flipped or strange.

use super::*;
use crate::conntrack::region::VERSION;
use proptest::prelude::*;

/// Bytes of a table with connections of all kinds, as they lie after its end.
fn region() -> Vec<u8> {
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let attached = |n: u32| Attached {
        stamp: Stamp {
            originator: n,
            responder: n + 1,
            policy: 7,
        },
        words: [n, 2, 3, 4],
    };
    for n in 0..12 {
        let (client, service, backend) = if n % 2 == 0 {
            (v4(n), v4(100), v4(200))
        } else {
            (v6(n), v6(100), v6(200))
        };
        let flow = Flow::new(client, service, protocol::TCP, 4_000, 80);
        let reply = if n % 3 == 0 {
            flow.reversed()
        } else {
            flow.with_destination(backend, 8_080).reversed()
        };
        let segment = |flags, sequence, acknowledgment| {
            Signal::Tcp(Segment {
                sequence,
                acknowledgment,
                flags,
                window: 1_000,
                scale: Some(5),
                length: 0,
            })
        };
        let hit = table
            .begin(flow, reply, &segment(flag::SYN, 10, 0), at(10))
            .unwrap();
        table.attach(hit.id, attached(n));
        if n < 10 {
            let syn_ack = segment(flag::SYN | flag::ACK, 20, 11);
            assert!(table.packet(&reply, &syn_ack, at(11)).is_some());
            assert!(
                table
                    .packet(&flow, &segment(flag::ACK, 11, 21), at(11))
                    .is_some()
            );
        }
        let other = Flow::new(client, service, protocol::UDP, 4_000, 53);
        let hit = table
            .begin(other, other.reversed(), &Signal::Datagram, at(12))
            .unwrap();
        table.attach(hit.id, attached(1_000 + n));
    }
    table.sweep(at(20), 1_000);
    memory.bytes().to_vec()
}

fn entries(table: &mut Conntrack<'_>, now: Instant) -> Vec<(Flow, Flow, State, u16, Attached)> {
    let mut entries = Vec::new();
    table.visit(0, u32::MAX, now, |entry| {
        entries.push((
            entry.original,
            entry.reply,
            entry.state,
            entry.owner,
            entry.attached,
        ));
        Visit::Keep
    });
    entries.sort_unstable_by_key(|entry| (entry.0, entry.1));
    entries
}

fn whole(old: &[u8], table: &mut Conntrack<'_>, now: Instant) -> Result<Adopted, AdoptError> {
    let mut adoption = Adoption::begin(old)?;
    loop {
        if let Some(adopted) = adoption.step(table, now, 5) {
            table.audit().unwrap();
            return Ok(adopted);
        }
        table.audit().unwrap();
    }
}

#[test]
fn k08_a_copy_is_adopted_whole_by_a_table_of_another_size_key_and_time() {
    let old = region();
    let mut memory = Memory::new(100);
    let hasher = Hasher::new([77; 16]);
    let now = at(3);
    let mut table =
        Conntrack::new(memory.bytes(), 100, Settings::default(), hasher, at(2)).unwrap();
    let adopted = whole(&old, &mut table, now).unwrap();
    let expected = Adopted {
        adopted: 24,
        ..Adopted::default()
    };
    assert_eq!(adopted, expected);
    let ours = entries(&mut table, now);
    assert_eq!(ours.len(), 24);
    assert_eq!(
        ours.iter()
            .filter(|entry| entry.2 == State::TcpEstablished)
            .count(),
        10
    );
    assert!(
        ours.iter()
            .all(|entry| entry.4.words[1..] == [2, 3, 4] && entry.3 == 1)
    );
    // Windows are still known: a wild segment is refused, the next one is not.
    let flow = Flow::new(v4(4), v4(100), protocol::TCP, 4_000, 80);
    let reply = flow.with_destination(v4(200), 8_080).reversed();
    let segment = |sequence| {
        Signal::Tcp(Segment {
            sequence,
            acknowledgment: 11,
            flags: flag::ACK,
            window: 1_000,
            length: 100,
            scale: None,
        })
    };
    assert!(table.packet(&reply, &segment(1 << 30), now).is_none());
    assert!(table.packet(&reply, &segment(21), now).is_some());
    // Ages go on where they were: the UDP flows were 8 s old and have 112 s left.
    let later = now + Duration::from_secs(50);
    table.sweep(later, 1_000);
    table.sweep(later + Duration::from_secs(61), 1_000);
    assert_eq!(
        entries(&mut table, later + Duration::from_secs(61)).len(),
        24
    );
    table.sweep(later + Duration::from_secs(63), 1_000);
    assert_eq!(
        entries(&mut table, later + Duration::from_secs(63)).len(),
        12
    );
    table.audit().unwrap();
}

#[test]
fn flows_that_are_there_already_win_and_a_small_table_refuses_the_rest() {
    let old = region();
    let mut memory = Memory::new(20);
    let mut table = memory.table(20);
    let flow = Flow::new(v4(2), v4(100), protocol::UDP, 4_000, 53);
    table
        .begin(flow, flow.reversed(), &Signal::Datagram, at(1))
        .unwrap();
    let adopted = whole(&old, &mut table, at(1)).unwrap();
    assert_eq!(adopted.known, 1);
    assert!(adopted.refused > 0);
    assert_eq!(adopted.adopted + adopted.known + adopted.refused, 24);
    let hit = table.lookup(&flow, table.hash(&flow), at(1)).unwrap();
    assert_eq!(table.attached(hit.id), Attached::default());
}

#[test]
fn other_versions_magics_and_lengths_are_refused_by_name() {
    let old = region();
    let begin = |bytes: &[u8]| Adoption::begin(bytes).map(|_| ()).unwrap_err();
    let mut other = old.clone();
    other[8] += 1;
    assert_eq!(begin(&other), AdoptError::Version(VERSION + 1));
    other[0] ^= 1;
    assert_eq!(begin(&other), AdoptError::Magic);
    for length in [0, 1, 79, 80, 1_000, old.len() - 1] {
        assert!(
            matches!(begin(&old[..length]), AdoptError::Truncated { .. }),
            "{length}"
        );
    }
    for at in 12..56 {
        let mut flipped = old.clone();
        flipped[at] ^= 0x10;
        assert_eq!(begin(&flipped), AdoptError::Header, "byte {at}");
    }
}

#[test]
fn a_torn_tracking_part_is_learned_anew() {
    let mut old = region();
    let layout = Layout::of(64).unwrap();
    // Its end of the first connection's original side.
    old[layout.details_at + 28] ^= 0x40;
    let mut memory = Memory::new(64);
    let mut table = memory.table(64);
    let adopted = whole(&old, &mut table, at(1)).unwrap();
    assert_eq!(
        (adopted.adopted, adopted.relearning, adopted.corrupt),
        (24, 1, 0)
    );
    let flow = Flow::new(v4(0), v4(100), protocol::TCP, 4_000, 80);
    let segment = |sequence, acknowledgment| {
        Signal::Tcp(Segment {
            sequence,
            acknowledgment,
            flags: flag::ACK,
            window: 1_000,
            length: 10,
            scale: None,
        })
    };
    let hit = table.packet(&flow, &segment(11, 21), at(1)).unwrap();
    assert_eq!(hit.state, State::TcpMidflow);
    assert!(
        table
            .packet(&flow.reversed(), &segment(21, 21), at(1))
            .is_some()
    );
    let hit = table.packet(&flow, &segment(21, 31), at(1)).unwrap();
    assert_eq!(hit.state, State::TcpEstablished);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    /// Whatever is flipped, what is adopted was there, with the same flows and the same attached data.
    #[test]
    fn nothing_is_adopted_that_was_not_there(
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 1..40),
        in_rows: bool,
    ) {
        let old = region();
        let mut memory = Memory::new(64);
        let mut table = memory.table(64);
        whole(&old, &mut table, at(1)).unwrap();
        let original = entries(&mut table, at(1));
        let mut flipped = old.clone();
        let layout = Layout::of(64).unwrap();
        let from = if in_rows { layout.rows_at } else { 0 };
        for (at, bit) in flips {
            let at = from + at.index(old.len() - from);
            flipped[at] ^= 1 << bit;
        }
        let mut memory = Memory::new(64);
        let mut table = memory.table(64);
        let Ok(adopted) = whole(&flipped, &mut table, at(1)) else {
            return Ok(());
        };
        prop_assert_eq!(adopted.adopted as usize, entries(&mut table, at(1)).len());
        for entry in entries(&mut table, at(1)) {
            let same = |other: &&(Flow, Flow, State, u16, Attached)| {
                (other.0, other.1, other.3, other.4) == (entry.0, entry.1, entry.3, entry.4)
            };
            prop_assert!(original.iter().any(|other| same(&other)), "{:?}", entry);
        }
    }

    /// Noise behind a valid header is dropped and counted.
    #[test]
    fn noise_is_no_connection(noise in prop::collection::vec(any::<u8>(), 116 * 64)) {
        let mut old = region();
        let at_rows = Layout::of(64).unwrap().rows_at;
        old[at_rows..at_rows + noise.len()].copy_from_slice(&noise);
        let mut memory = Memory::new(64);
        let mut table = memory.table(64);
        let adopted = whole(&old, &mut table, at(1)).unwrap();
        prop_assert_eq!(adopted.adopted, 0);
        prop_assert!(adopted.corrupt > 20);
    }
}
