//! What a flow costs for which there is no port, beside a flow that goes nowhere for another reason.

use super::{Packet, Random, Rig, report};
use sluice_appliance::Verdict;
use sluice_appliance::testing::node::{self, V4};

/// UDP flows of one pod to one address.
fn flows(to: &str, ports: std::ops::Range<u16>) -> Vec<Packet> {
    ports
        .map(|port| Packet {
            link: 16,
            bytes: node::packet(16, V4.pods[0], to).udp(port, 53).build(),
        })
        .collect()
}

pub(super) fn by_ports(_: &mut Random) {
    let mut rig = Rig::new();
    let is_dropped = |verdict: &Verdict| !matches!(verdict, Verdict::Forward(_));
    // Half of the 16 384 ports are one pod's share.
    let opened = flows(V4.outside, 1_024..9_200);
    report("new connection, up to half of the ports", rig.send(&opened));
    rig.send_and(&flows(V4.outside, 10_000..10_200), |_| true);
    let dropped = flows(V4.unallocated, 20_000..50_000);
    let normal = report(
        "flow to an unallocated address",
        rig.send_and(&dropped, is_dropped),
    );
    let refused = flows(V4.outside, 20_000..50_000);
    let refused = report("flow without a port", rig.send_and(&refused, is_dropped));
    println!(
        "a flow without a port costs {:.2} times as much",
        refused / normal
    );
}
