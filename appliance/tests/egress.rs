//! What pods may not send out of the cluster.

use sluice_appliance::testing::node::{self, UPLINK, V4, ends, ip, packet};
use sluice_appliance::wire::tcp;
use sluice_contract::policy::{
    Action, BindingRow, Established, Layer, LayerId, PolicyRow, RuleId, RulesetId, RulesetRow,
    SettingsRow, SpanEntry, SpanId, SpanRow, Target, port_key,
};
use sluice_contract::{DropReason, LinkId, Protocol, Row};

#[test]
fn e05_the_egress_deny_list_is_asked_before_the_source_is_rewritten() {
    let span = |id, entries: &[SpanEntry]| {
        Row::Policy(PolicyRow::Span(SpanRow {
            id: SpanId(id),
            entries: heapless::Vec::from_slice(entries).unwrap(),
        }))
    };
    let entry = |start, target| SpanEntry { start, target };
    let deny = |rule| Target::Rule {
        action: Action::Deny,
        order: 1,
        rule: RuleId(rule),
    };
    // 203.0.113.0/24 is forbidden altogether, of 198.18.0.0/15 only TCP 25.
    let v4 = |a, b, c| u32::from_be_bytes([a, b, c, 0]);
    let smtp = port_key(Some(Protocol::Tcp), 25);
    let layer = Layer {
        id: LayerId(1),
        classes: false,
        pods: SpanId::NOTHING,
        others: SpanId::NOTHING,
        v4: SpanId(1),
        v6: SpanId::NOTHING,
        miss: Action::Accept,
        miss_rule: RuleId(90),
    };
    let mut bench = node::node();
    bench.commit(&[
        Row::Policy(PolicyRow::Settings(SettingsRow {
            unbound: Action::Accept,
            host_reaches_pods: true,
            established: Established::Judged,
        })),
        span(
            2,
            &[
                entry(0, Target::Nothing),
                entry(smtp, deny(21)),
                entry(smtp + 1, Target::Nothing),
            ],
        ),
        span(3, &[entry(0, deny(20))]),
        span(
            1,
            &[
                entry(0, Target::Nothing),
                entry(v4(198, 18, 0), Target::Ports(SpanId(2))),
                entry(v4(198, 20, 0), Target::Nothing),
                entry(v4(203, 0, 113), Target::Ports(SpanId(3))),
                entry(v4(203, 0, 114), Target::Nothing),
            ],
        ),
        Row::Policy(PolicyRow::Ruleset(RulesetRow {
            id: RulesetId(5),
            layers: heapless::Vec::from_slice(&[layer]).unwrap(),
        })),
        Row::Policy(PolicyRow::Binding(BindingRow {
            link: LinkId::new(16).unwrap(),
            ingress: RulesetId::NONE,
            egress: RulesetId(5),
        })),
    ]);
    let sent = |to: &str, port| packet(16, V4.pods[0], to).tcp(4000, port, tcp::SYN).build();
    for (to, port) in [
        ("203.0.113.5", 443),
        ("203.0.113.9", 25),
        ("198.18.4.4", 25),
    ] {
        let end = bench.send(16, &sent(to, port));
        assert_eq!(end.dropped(), DropReason::PolicyEgress, "{to}:{port}");
    }
    // Nothing was translated for what was denied.
    assert_eq!(bench.pipeline.conntrack().used(), 0);
    for (to, port) in [("198.18.4.4", 443), ("203.0.114.5", 25)] {
        let end = bench.send(16, &sent(to, port));
        assert_eq!(ends(end.forwarded(UPLINK)).0, ip(V4.node), "{to}:{port}");
    }
    // The list is the pod's own.
    let other = packet(17, V4.pods[1], "203.0.113.5").tcp(4000, 443, tcp::SYN);
    bench.send(17, &other.build()).forwarded(UPLINK);
}
