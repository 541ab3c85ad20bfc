//! Other nodes and the neighbors they are reached by, as rows.

use crate::ground::*;
use sluice_appliance::Family;
use sluice_appliance::testing::Bench;
use sluice_contract::overlay::{
    NextHopId, NextHopRow, OverlayKey, OverlayRow, PeerId, PeerRow, RemoteRow, TunnelProtocol,
    TunnelRow,
};
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::{DropReason, Key, Row, ToGuest};

#[test]
fn rows_that_others_refer_to_stay_and_nonsense_is_refused_naming_the_field() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let mut refused = |message: ToGuest| {
        bench.change(&[message]);
        match bench.refused[..] {
            [reject] => (reject.field, reject.reason),
            ref other => panic!("{other:?}"),
        }
    };
    let remove = |key| ToGuest::Remove(Key::Overlay(key));
    let in_use = |key| match key {
        OverlayKey::Peer(_) => (Field::Peer, RejectReason::InUse(2)),
        _ => (Field::NextHop, RejectReason::InUse(1)),
    };
    for key in [
        OverlayKey::Peer(PeerId(2)),
        OverlayKey::NextHop(NextHopId(4)),
    ] {
        assert_eq!(refused(remove(key)), in_use(key));
    }
    let put = |row| ToGuest::Put(Row::Overlay(row));
    let peer = PeerRow {
        id: PeerId(5),
        address: ip("192.168.0.2"),
        mac: mac(1),
        next_hop: NextHopId(4),
        mtu: 1500,
        direct: false,
    };
    for (row, expected) in [
        (peer, (Field::Address, RejectReason::Taken)),
        (
            PeerRow {
                address: ip("224.0.0.1"),
                ..peer
            },
            (Field::Address, RejectReason::Invalid),
        ),
        (
            PeerRow { mtu: 100, ..peer },
            (Field::Mtu, RejectReason::Invalid),
        ),
        (
            PeerRow {
                address: ip("192.168.0.3"),
                next_hop: NextHopId(9),
                ..peer
            },
            (Field::NextHop, RejectReason::Missing),
        ),
        (
            PeerRow {
                id: PeerId(60_000),
                ..peer
            },
            (Field::Id, RejectReason::Full(256)),
        ),
    ] {
        assert_eq!(refused(put(OverlayRow::Peer(row))), expected, "{row:?}");
    }
    let remote = RemoteRow {
        prefix: prefix("10.9.0.0/24"),
        peer: PeerId(9),
    };
    let row = OverlayRow::Remote(remote);
    assert_eq!(refused(put(row)), (Field::Peer, RejectReason::Missing));
    let row = OverlayRow::Tunnel(TunnelRow {
        vni: 1 << 24,
        ..TunnelRow::default()
    });
    assert_eq!(refused(put(row)), (Field::Id, RejectReason::Invalid));
}

#[test]
fn o17_a_next_hop_that_does_not_answer_is_told_and_one_that_moved_is_followed() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let hop = |mac| {
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(4),
            address: ip("192.168.0.2"),
            mac,
        }))
    };
    bench.commit(&[hop(None)]);
    let exit = |bench: &Bench| {
        bench
            .pipeline
            .tables()
            .overlay()
            .exit(PeerId(2), 1500, &nothing_learned())
    };
    assert_eq!(exit(&bench), Err(DropReason::NoNeighbor));
    bench.commit(&[hop(Some(mac(0x77)))]);
    assert_eq!(exit(&bench).unwrap().next_hop, mac(0x77));
    assert_eq!(exit(&bench).unwrap().mtu, 1450);
}

#[test]
fn o10_a_direct_peer_gets_bare_frames() {
    let mut bench = node(1, Family::V4, tunnel(1, TunnelProtocol::Vxlan));
    let row = PeerRow {
        id: PeerId(2),
        address: ip("192.168.0.2"),
        mac: mac(0x12),
        next_hop: NextHopId(4),
        mtu: 1500,
        direct: true,
    };
    bench.commit(&[Row::Overlay(OverlayRow::Peer(row))]);
    let bytes = inner(Family::V4).build();
    let (sent, _) = wrapped(&bench, &mut Buffer::new(&bytes, 16), 0).unwrap();
    assert_eq!(sent[14..], bytes[14..]);
    assert_eq!(sent[..12], [mac(2).0, mac(0xee).0].concat());
    let overlay = bench.pipeline.tables().overlay();
    assert_eq!(
        overlay
            .exit(PeerId(2), 1500, &nothing_learned())
            .unwrap()
            .mtu,
        1500
    );
}
