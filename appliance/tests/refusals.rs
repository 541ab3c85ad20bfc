//! What becomes of a change of which the appliance cannot take every row: the rest is in force, and nothing is more open.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use sluice_appliance::session::{Facts, Session};
use sluice_appliance::testing::node::{self, Svc, V4, ip, known, packet, service};
use sluice_appliance::testing::{Bench, pod_row};
use sluice_appliance::wire::tcp;
use sluice_appliance::{Address, Capacity, Verdict, policy};
use sluice_contract::message::Envelope;
use sluice_contract::overlay::{NextHopId, NextHopRow, OverlayKey, OverlayRow, PeerId, PeerRow};
use sluice_contract::policy::{
    Action, BindingRow, ClassRow, Direction, Established, IdentityRow, Layer, LayerId, PolicyRow,
    RuleId, RulesetId, RulesetRow, SettingsRow, SpanEntry, SpanId, SpanRow, Target,
};
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::row::RouteRow;
use sluice_contract::service::{
    AddressRole, AddressRow, BackendRow, FrontendKind, FrontendRow, PortId, ServiceKey, ServiceRow,
    SetId,
};
use sluice_contract::{
    Family, Generation, Identity, Key, LinkId, Mac, Prefix, Protocol, Row, ToGuest, ToHost,
    VERSION, limits,
};

fn puts(rows: impl IntoIterator<Item = Row>) -> Vec<ToGuest> {
    rows.into_iter().map(ToGuest::Put).collect()
}

fn frontend(address: &str, port: u16) -> Row {
    service(ServiceRow::Frontend(FrontendRow {
        address: ip(address),
        protocol: Protocol::Tcp,
        port,
        kind: FrontendKind::ExternalIp,
        service: PortId(0),
    }))
}

/// Whether the Service of [`Svc`] gets a new connection to its pod.
fn serves(bench: &mut Bench) -> bool {
    let sent = packet(16, V4.pods[0], V4.cluster_ip);
    let end = bench.send(16, &sent.tcp(1, 80, tcp::SYN).build());
    end.verdict == Verdict::Forward(LinkId::new(17).unwrap())
}

#[test]
fn ten_thousand_refused_rows_are_named_in_one_session_and_the_others_are_in_force() {
    let mut bench = Bench::empty(Capacity::default());
    let mut session = Session::new(Facts::default());
    let generation = Generation(1);
    let fresh = true;
    let mut messages = vec![
        ToGuest::Hello { version: VERSION },
        ToGuest::Begin { generation, fresh },
    ];
    messages.extend(puts([Row::Link(pod_row(16, 1)), Row::Link(pod_row(17, 2))]));
    // Another node's address, of which Services have no use here.
    messages.extend(puts([known("192.0.2.7", AddressRole::Peer)]));
    messages.extend(puts((1..=10_000).map(|port| frontend("192.0.2.7", port))));
    messages.extend(puts([Row::Link(pod_row(18, 3))]));
    messages.push(ToGuest::Commit { generation });
    let begun = std::time::Instant::now();
    let (mut named, mut answers) = (Vec::new(), Vec::new());
    for (sequence, message) in (0..).zip(messages) {
        let envelope = Envelope {
            session: 5,
            sequence,
            message,
        };
        loop {
            while let Some(said) = session.poll(&mut bench.pipeline) {
                match said.message {
                    ToHost::Refused { rows, .. } => named.extend(rows),
                    other => answers.push(other),
                }
            }
            if session.is_ready(&bench.pipeline) {
                break;
            }
            bench.pipeline.work(64);
        }
        session.receive(&envelope, &mut bench.pipeline, 0);
    }
    while let Some(said) = session.poll(&mut bench.pipeline) {
        match said.message {
            ToHost::Refused { rows, .. } => named.extend(rows),
            other => answers.push(other),
        }
    }
    println!("10 000 refused rows: {:?}", begun.elapsed());
    let ack = ToHost::Ack {
        generation,
        refused: 10_000,
    };
    assert!(matches!(answers[..], [ToHost::Hello(_), _]), "{answers:?}");
    assert_eq!(answers[1], ack);
    assert_eq!(named.len(), 10_000);
    let mut keys: Vec<_> = named.iter().map(|reject| reject.object).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 10_000);
    assert!(
        bench
            .pipeline
            .tables()
            .link(LinkId::new(18).unwrap())
            .is_some()
    );
}

#[test]
fn who_does_not_read_what_was_refused_is_given_no_more_messages() {
    let mut bench = Bench::empty(Capacity::TINY);
    let mut session = Session::new(Facts::default());
    let give = |session: &mut Session, bench: &mut Bench, sequence, message| {
        while !session.is_ready(&bench.pipeline) && bench.pipeline.is_applying() {
            bench.pipeline.work(64);
        }
        let envelope = Envelope {
            session: 5,
            sequence,
            message,
        };
        session.receive(&envelope, &mut bench.pipeline, 0);
    };
    give(
        &mut session,
        &mut bench,
        0,
        ToGuest::Hello { version: VERSION },
    );
    let begin = ToGuest::Begin {
        generation: Generation(1),
        fresh: true,
    };
    give(&mut session, &mut bench, 1, begin);
    let mut taken = 0;
    for (sequence, port) in (2..).zip(1..1000) {
        while bench.pipeline.is_applying() {
            bench.pipeline.work(64);
        }
        if !session.is_ready(&bench.pipeline) {
            break;
        }
        let row = ToGuest::Put(frontend("192.0.2.7", port));
        give(&mut session, &mut bench, sequence, row);
        taken += 1;
    }
    assert_eq!(taken, limits::REFUSED_BATCH);
}

#[test]
fn a_refused_put_ends_the_former_row_of_its_key() {
    let mut bench = node::node();
    let key = |row: &Row| Some(row.key());
    // A link that wants another pod's address.
    let mut row = pod_row(30, 30);
    bench.commit(&[Row::Link(row.clone())]);
    row.addresses[0] = ip(V4.pods[0]);
    let row = Row::Link(row);
    let outcome = bench.change(&puts([row.clone(), Row::Link(pod_row(31, 31))]));
    assert!(matches!(
        outcome,
        sluice_appliance::apply::Outcome::Committed { refused: 1, .. }
    ));
    assert_eq!(bench.refused[0].object, key(&row));
    let tables = bench.pipeline.tables();
    assert!(tables.link(LinkId::new(30).unwrap()).is_none());
    assert!(tables.link(LinkId::new(31).unwrap()).is_some());
    for address in ["10.0.0.30", "fd00::1e"] {
        let place = tables.place(Address::from(ip(address)));
        assert_eq!(place, sluice_appliance::tables::Place::Elsewhere);
    }
    // A route by a neighbor that is not there.
    let prefix = Prefix::new(ip("203.0.113.0"), 24).unwrap();
    let route = |next_hop| Row::Route(RouteRow { prefix, next_hop });
    bench.commit(&[route(None)]);
    bench.change(&puts([route(Some(NextHopId(900)))]));
    assert_eq!(bench.refused.len(), 1);
    let gone = bench.pipeline.tables().route(ip("203.0.113.9").into());
    let others = bench.pipeline.tables().route(ip("203.0.114.9").into());
    assert_eq!(gone, others, "only the default is left");
}

#[test]
fn an_address_that_does_not_fit_leaves_nothing_of_its_link() {
    let mut capacity = Capacity::TINY;
    (capacity.pods, capacity.addresses) = (1, 0);
    let mut bench = Bench::empty(capacity);
    // Room for three links of four addresses: two each are used, and the seventh link gets one of its two.
    let mut rows: Vec<Row> = (0..5).map(|n| Row::Link(pod_row(16 + n, 1 + n))).collect();
    let mut odd = pod_row(40, 40);
    odd.addresses.truncate(1);
    rows.push(Row::Link(odd));
    bench.commit(&rows);
    bench.change(&puts([Row::Link(pod_row(41, 41))]));
    let reason = RejectReason::Full(12);
    assert_eq!(bench.refused[0].reason, reason);
    let tables = bench.pipeline.tables();
    assert_eq!(
        tables.place(ip("10.0.0.41").into()),
        sluice_appliance::tables::Place::Elsewhere
    );
    // So the address is free for somebody else.
    let mut other = pod_row(42, 41);
    other.addresses.truncate(1);
    bench.commit(&[Row::Link(other)]);
}

#[test]
fn a_service_port_that_others_refer_to_stays_as_one_without_endpoints() {
    let mut bench = node::node();
    let svc = Svc::new(&[(V4.pods[1], 8080)], &[]);
    bench.commit(&svc.rows(&V4));
    assert!(serves(&mut bench));
    let mut row = svc.port_row(&V4);
    row.cluster = Some(SetId(77));
    bench.change(&puts([
        service(ServiceRow::Port(row)),
        Row::Link(pod_row(30, 30)),
    ]));
    let reject = bench.refused[0];
    assert_eq!(
        (reject.field, reject.reason),
        (Field::Set, RejectReason::Missing)
    );
    assert!(!serves(&mut bench));
    assert!(
        bench
            .pipeline
            .tables()
            .link(LinkId::new(30).unwrap())
            .is_some()
    );
    // Its set is no longer referred to, it is by its frontends.
    let gone = |key| ToGuest::Remove(Key::Service(key));
    bench.change(&[gone(ServiceKey::Port(PortId(0)))]);
    assert!(matches!(bench.refused[0].reason, RejectReason::InUse(_)));
    // Once it is put as it should be, it serves again.
    bench.commit(&[service(ServiceRow::Port(svc.port_row(&V4)))]);
    assert!(serves(&mut bench));
}

#[test]
fn a_set_of_which_parts_are_missing_is_named_and_not_used_until_it_is_complete() {
    let mut bench = node::node();
    let svc = Svc::new(&[(V4.pods[1], 8080)], &[]);
    bench.commit(&svc.rows(&V4));
    let backend = |address: &str| {
        service(ServiceRow::Backend(BackendRow {
            set: SetId(0),
            index: 0,
            address: ip(address),
            port: 8080,
        }))
    };
    // Refused, so that the set has none.
    bench.change(&puts([backend("224.0.0.1"), Row::Link(pod_row(30, 30))]));
    let reasons: Vec<_> = bench.refused.iter().map(|it| it.reason).collect();
    assert_eq!(
        reasons,
        [RejectReason::Invalid, RejectReason::Incomplete(1)]
    );
    assert!(
        !serves(&mut bench),
        "neither the new backend nor the former"
    );
    assert!(
        bench
            .pipeline
            .tables()
            .link(LinkId::new(30).unwrap())
            .is_some()
    );
    // It is said with each change.
    bench.change(&puts([Row::Link(pod_row(31, 31))]));
    assert_eq!(bench.refused.len(), 1);
    bench.commit(&[backend(V4.pods[1])]);
    assert!(serves(&mut bench));
}

#[test]
fn more_incomplete_sets_than_a_message_holds_are_all_named() {
    let mut bench = Bench::empty(Capacity::TINY);
    let set = |id| {
        service(ServiceRow::Set(sluice_contract::service::SetRow {
            id: SetId(id),
            family: Family::V4,
            count: 1,
            slots: 0,
        }))
    };
    let outcome = bench.change(&puts((0..200).map(set)));
    assert_eq!(bench.refused.len(), 200);
    assert_eq!(
        outcome,
        sluice_appliance::apply::Outcome::Committed {
            generation: Generation(1),
            refused: 200
        }
    );
}

#[test]
fn a_neighbor_and_a_peer_that_others_refer_to_stay_and_lead_nowhere() {
    let hop = |id: u16, address: &str| {
        Row::Overlay(OverlayRow::NextHop(NextHopRow {
            id: NextHopId(id),
            address: ip(address),
            mac: Some(Mac([2, 0, 0, 0, 9, id as u8])),
        }))
    };
    let peer = |id: u16, address: &str, next_hop: u16| {
        Row::Overlay(OverlayRow::Peer(PeerRow {
            id: PeerId(id),
            address: ip(address),
            mac: Mac([2, 0, 0, 0, 8, id as u8]),
            next_hop: NextHopId(next_hop),
            mtu: 1500,
            direct: true,
        }))
    };
    let remote = Row::Overlay(OverlayRow::Remote(sluice_contract::overlay::RemoteRow {
        prefix: Prefix::new(ip("10.9.0.0"), 16).unwrap(),
        peer: PeerId(1),
    }));
    let mut bench = Bench::pods();
    bench.commit(&[
        hop(1, "192.0.2.1"),
        hop(2, "192.0.2.2"),
        peer(1, "192.0.2.1", 1),
        peer(2, "192.0.2.2", 2),
        remote,
    ]);
    let answers = |bench: &Bench, id| bench.pipeline.tables().overlay().neighbor(NextHopId(id));
    let at = |bench: &Bench, address: &str| {
        bench
            .pipeline
            .tables()
            .overlay()
            .peer_at(ip(address).into())
    };
    // Both want what the others have.
    bench.change(&puts([hop(1, "192.0.2.2"), peer(1, "192.0.2.2", 1)]));
    assert_eq!(bench.refused.len(), 2);
    assert_eq!(
        (answers(&bench, 1), answers(&bench, 2).is_some()),
        (None, true)
    );
    assert_eq!(at(&bench, "192.0.2.1"), None);
    assert_eq!(at(&bench, "192.0.2.2"), Some(PeerId(2)));
    // The address that they had is free, and those who keep theirs are not hurt by what comes next.
    bench.commit(&[
        hop(3, "192.0.2.1"),
        hop(1, "192.0.2.3"),
        peer(1, "192.0.2.3", 1),
    ]);
    assert!(answers(&bench, 1).is_some() && answers(&bench, 3).is_some());
    let neighbor = |bench: &Bench, address: &str| {
        bench
            .pipeline
            .tables()
            .overlay()
            .neighbor_at(ip(address).into())
    };
    assert_eq!(neighbor(&bench, "192.0.2.1"), Some(NextHopId(3)));
    assert_eq!(at(&bench, "192.0.2.3"), Some(PeerId(1)));
    // Nothing is counted twice: what nobody refers to can go.
    let gone = |key| ToGuest::Remove(Key::Overlay(key));
    let prefix = Prefix::new(ip("10.9.0.0"), 16).unwrap();
    let all = [
        gone(OverlayKey::Remote(prefix)),
        gone(OverlayKey::Peer(PeerId(1))),
        gone(OverlayKey::Peer(PeerId(2))),
        gone(OverlayKey::NextHop(NextHopId(1))),
        gone(OverlayKey::NextHop(NextHopId(2))),
        gone(OverlayKey::NextHop(NextHopId(3))),
    ];
    assert!(bench.change(&all).is_whole(), "{:?}", bench.refused);
}

#[test]
fn an_address_that_a_pod_has_is_left_out_and_its_pod_keeps_it() {
    let mut bench = node::node();
    let row = AddressRow {
        address: ip(V4.pods[1]),
        role: AddressRole::Cluster,
    };
    bench.change(&puts([service(ServiceRow::Address(row))]));
    assert_eq!(bench.refused[0].reason, RejectReason::Taken);
    let sent = packet(16, V4.pods[0], V4.pods[1]).tcp(1, 80, tcp::SYN);
    bench.send(16, &sent.build()).forwarded(17);
}

/// Policy of link 16: an Admin layer that denies pods of identity 300, and a layer that accepts by default.
fn denying(miss: Action) -> Vec<Row> {
    let rule = |action, rule| SpanEntry {
        start: 0,
        target: Target::Rule {
            action,
            order: 0,
            rule: RuleId(rule),
        },
    };
    let span = |id, entry| {
        PolicyRow::Span(SpanRow {
            id: SpanId(id),
            entries: [entry].into_iter().collect(),
        })
    };
    let layer = Layer {
        id: LayerId(4),
        classes: true,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId::NOTHING,
        v6: SpanId::NOTHING,
        miss,
        miss_rule: RuleId::NONE,
    };
    let rows = [
        PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
            audit: false,
            audit_node: false,
            unlisted_pods: false,
        }),
        PolicyRow::Binding(BindingRow {
            link: LinkId::new(16).unwrap(),
            ingress: RulesetId(4),
            egress: RulesetId::NONE,
        }),
        PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(4),
            layers: [layer].into_iter().collect(),
        }),
        span(1, rule(Action::Deny, 16)),
        span(2, rule(Action::Accept, 17)),
    ];
    rows.into_iter().map(Row::Policy).collect()
}

fn class(identity: u32, ports: u64) -> Row {
    Row::Policy(PolicyRow::Class(ClassRow {
        layer: LayerId(4),
        identity: Identity(identity),
        ports: SpanId(ports),
    }))
}

fn identity(n: u32) -> Row {
    Row::Policy(PolicyRow::Identity(IdentityRow {
        address: core::net::Ipv4Addr::from_bits(0x0a01_0000 + n).into(),
        identity: Identity(300 + n),
    }))
}

fn verdict(bench: &Bench, peer: Identity) -> (bool, RuleId) {
    let decision = bench.pipeline.tables().policy().judge(&policy::Query {
        link: LinkId::new(16).unwrap(),
        direction: Direction::Ingress,
        peer,
        peer_address: ip("10.1.0.1"),
        protocol: Some(Protocol::Tcp),
        port: 80,
    });
    (decision.accepted, decision.rule)
}

#[test]
fn denials_by_identity_that_do_not_fit_deny_all_whom_they_might_be_about() {
    let mut bench = Bench::pods();
    bench.commit(&denying(Action::Pass));
    let classes: Vec<Row> = (300..30_000).map(|n| class(n, 1)).collect();
    let outcome = bench.change(&puts(classes));
    assert!(matches!(
        outcome,
        sluice_appliance::apply::Outcome::Committed { refused: 1.., .. }
    ));
    let unknown = bench.refused.last().unwrap().object;
    let Some(Key::Policy(sluice_contract::policy::PolicyKey::Class(_, unknown))) = unknown else {
        panic!("{unknown:?}")
    };
    assert_eq!(verdict(&bench, Identity(300)), (false, RuleId(16)));
    assert_eq!(verdict(&bench, unknown), (false, RuleId::BROKEN));
    assert!(verdict(&bench, Identity::WORLD).0, "no class is about it");
    // It lasts through other changes, and until all fit again.
    bench.change(&puts([Row::Link(pod_row(30, 30))]));
    assert_eq!(verdict(&bench, unknown), (false, RuleId::BROKEN));
    let mut all = denying(Action::Pass);
    all.extend((300..310).map(|n| class(n, 1)));
    assert!(bench.change_from(true, &puts(all)).is_whole());
    assert!(verdict(&bench, unknown).0, "no rule is about it");
}

#[test]
fn what_is_only_accepted_is_not_hurt_by_other_rows_that_do_not_fit() {
    let mut bench = Bench::pods();
    bench.commit(&denying(Action::Deny));
    bench.commit(&[class(300, 2)]);
    bench.change(&puts((301..30_000).map(|n| class(n, 2))));
    assert!(!bench.refused.is_empty());
    assert_eq!(verdict(&bench, Identity(300)), (true, RuleId(17)));
    assert_eq!(verdict(&bench, Identity(29_999)), (false, RuleId::NONE));
}

#[test]
fn addresses_whose_identity_did_not_fit_are_denied_where_identities_are_denied() {
    for (miss, expected) in [
        (Action::Pass, (false, RuleId::BROKEN)),
        (Action::Deny, (false, RuleId::NONE)),
    ] {
        let mut bench = Bench::pods();
        bench.commit(&denying(miss));
        bench.commit(&[class(300, 1)]);
        bench.change(&puts((1..30_000).map(identity)));
        assert!(!bench.refused.is_empty());
        assert_eq!(verdict(&bench, Identity::WORLD), expected);
        assert_eq!(verdict(&bench, Identity(300)), (false, RuleId(16)));
    }
}

#[test]
fn a_ruleset_without_its_spans_denies() {
    let mut bench = Bench::pods();
    let mut rows = denying(Action::Pass);
    rows.retain(|row| !matches!(row, Row::Policy(PolicyRow::Span(_))));
    bench.commit(&rows);
    bench.commit(&[class(300, 1)]);
    assert_eq!(verdict(&bench, Identity(300)), (false, RuleId::BROKEN));
    bench.change(&[ToGuest::Remove(Key::Policy(
        sluice_contract::policy::PolicyKey::Ruleset(RulesetId(4)),
    ))]);
    assert_eq!(verdict(&bench, Identity::WORLD), (false, RuleId::BROKEN));
}
