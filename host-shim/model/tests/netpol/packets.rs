//! Real packets through the pipeline that the guest runs: the first one of a connection, from one pod's link.

use std::net::IpAddr;

use sluice_appliance::Verdict;
use sluice_appliance::tables::Capacity;
use sluice_appliance::testing::{Bench, Builder};
use sluice_contract::row::LinkRow;
use sluice_contract::{DropReason, Mac, Protocol, Row};
use sluice_model::compile::Model;

use crate::ground::{LIMITS, link};
use crate::reference::World;

/// A chunk INIT (RFC 9260 §3.3.2) with initiate tag 1.
const INIT: [u8; 20] = [1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1];

/// A node with all pods of a world.
pub(crate) struct Node {
    bench: Bench,
    addresses: Vec<IpAddr>,
    /// The last source port: every question is another connection.
    port: u16,
}

impl Node {
    pub(crate) fn new(world: &World, model: &mut Model) -> Self {
        let capacity = Capacity {
            policy: LIMITS,
            ..Capacity::TINY
        };
        let mut bench = Bench::empty(capacity);
        let links = world.pods.iter().enumerate().map(|(n, pod)| {
            Row::Link(LinkRow {
                id: link(n),
                mac: Mac::of_pod(link(n)),
                addresses: [pod.ip].into_iter().collect(),
                mtu: 1500,
                identity: model.identity(link(n)).unwrap(),
                incarnation: 1,
                tenant: sluice_contract::Tenant::NONE,
            })
        });
        let links: Vec<Row> = links.collect();
        // One test gives a node the address of a pod, which the guest refuses: a node's addresses are not of interest here.
        let rows = model.tables().all();
        let rows = rows.filter(|it| matches!(it, Row::Policy(_)));
        bench.commit(&links.into_iter().chain(rows).collect::<Vec<_>>());
        let addresses = world.pods.iter().map(|it| it.ip).collect();
        Self {
            bench,
            addresses,
            port: 1024,
        }
    }

    /// Whether a connection's first packet arrives.
    pub(crate) fn allows(
        &mut self,
        from: IpAddr,
        to: IpAddr,
        protocol: Protocol,
        port: u16,
    ) -> bool {
        let place = |it| {
            self.addresses
                .iter()
                .position(|other| *other == it)
                .unwrap()
        };
        let (from, to) = (place(from), place(to));
        self.port += 1;
        let [source, destination] = [from, to].map(|n| self.addresses[n].to_string());
        let builder = Builder::from(link(from).raw(), &source, &destination);
        let packet = match protocol {
            Protocol::Tcp => builder.tcp(self.port, port, 0x02),
            Protocol::Udp => builder.udp(self.port, port),
            Protocol::Sctp => builder.sctp(self.port, port).payload(&INIT),
        };
        match self.bench.send(link(from).raw(), &packet.build()).verdict {
            Verdict::Forward(it) if it == link(to) => true,
            Verdict::Drop(DropReason::PolicyEgress | DropReason::PolicyIngress) => false,
            other => panic!("{source} → {destination}:{port}: {other:?}"),
        }
    }
}
