//! Rows of Services on the wire.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use proptest::prelude::*;
use sluice_contract::message::Envelope;
use sluice_contract::service::{
    BackendRow, FrontendKind, FrontendRow, NatRow, PortId, ServiceRow, SetId, SlotsRow,
};
use sluice_contract::{Prefix, Protocol, Row, ToGuest, frame};
use std::net::IpAddr;

fn through(row: ServiceRow) -> usize {
    let envelope = Envelope {
        session: 1,
        sequence: 2,
        message: ToGuest::Put(Row::Service(row)),
    };
    let mut buffer = [0; frame::FRAME_MAX];
    let bytes = frame::encode(&envelope, &mut buffer).unwrap();
    let back = frame::decode(&bytes[frame::HEADER..]);
    assert_eq!(back, Some(envelope.clone()));
    bytes.len()
}

#[test]
fn rows_survive_the_channel_and_are_small() {
    let address = IpAddr::from([0xfd00, 1, 2, 3, 4, 5, 6, 7]);
    let backend = BackendRow {
        set: SetId(99_999),
        index: 4_000,
        address,
        port: 65_535,
    };
    assert!(through(ServiceRow::Backend(backend)) <= 48);
    let frontend = FrontendRow {
        address,
        protocol: Protocol::Sctp,
        port: 65_535,
        service: PortId(99_999),
        kind: FrontendKind::LoadBalancer,
    };
    assert!(through(ServiceRow::Frontend(frontend)) <= 48);
    let slots = heapless::Vec::from_slice(&[u16::MAX; 240]).unwrap();
    let slots = SlotsRow {
        set: SetId(1),
        chunk: 68,
        slots,
    };
    assert!(through(ServiceRow::Slots(slots)) < frame::FRAME_MAX);
    through(ServiceRow::Nat(NatRow::default()));
}

proptest! {
    #[test]
    fn a_prefix_contains_exactly_the_addresses_that_share_its_bits(bits: u32, length in 0u8..=32, other: u32) {
        let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
        let prefix = Prefix::new((bits & mask).to_be_bytes().into(), length).unwrap();
        prop_assert_eq!(prefix.contains(other.to_be_bytes().into()), other & mask == bits & mask);
        prop_assert!(prefix.contains(bits.to_be_bytes().into()));
        prop_assert!(!prefix.contains(IpAddr::from([0u8; 16])));
        let clean = bits & mask == bits;
        prop_assert_eq!(Prefix::new(bits.to_be_bytes().into(), length).is_some(), clean);
        prop_assert!(Prefix::new(bits.to_be_bytes().into(), 33).is_none());
    }
}
