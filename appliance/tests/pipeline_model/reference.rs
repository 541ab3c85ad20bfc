//! The slow and obvious node: a list of connections that is searched from end to end, Services asked one after the other, and
//! kube-proxy's rules written out case by case.

use crate::world::{Ingress, PODS, Sender, TARGET, World, link_of};
use sluice_appliance::testing::address;
use sluice_appliance::{Address, Direction, Flow};
use sluice_contract::{DropReason, LinkId, Protocol};

pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;

/// How far a connection has come, as far as time is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// One side has spoken.
    Asked,
    Answered,
    /// The handshake is over, or the asker went on after an answer.
    Lasting,
}

#[derive(Clone, Debug)]
pub(crate) struct Connection {
    pub(crate) original: Flow,
    pub(crate) reply: Flow,
    /// Where it comes from and where it goes.
    pub(crate) links: [LinkId; 2],
    pub(crate) service: Option<usize>,
    pub(crate) stage: Stage,
    /// In seconds.
    pub(crate) seen: u64,
    /// The tables under which it was last found good.
    pub(crate) epoch: u64,
    /// Incarnations of the pods at both ends; 0: no pod.
    pub(crate) incarnations: [u32; 2],
}

/// What must happen to a packet.
#[derive(Clone, Debug)]
pub(crate) enum Expect {
    Drop(DropReason),
    /// Dropped for this reason, or its sender is told.
    Refuse(DropReason),
    /// An echo is answered by the appliance, if it has not been asked too often.
    Pong,
    /// It is handed to the node as it is, and nothing is remembered.
    ToNode,
    /// It goes on as this flow by that link, as part of this connection.
    Continue(usize, Direction),
    /// It begins a connection.
    Begin(Beginning),
}

#[derive(Clone, Debug)]
pub(crate) struct Beginning {
    /// Of these, one.
    pub(crate) backends: Vec<(Address, u16)>,
    pub(crate) service: Option<usize>,
    pub(crate) masquerade: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Pod(usize),
    Node,
    OtherNode,
    ClusterIp,
    LoadBalancer,
    Unallocated,
    Elsewhere,
}

pub(crate) struct Reference {
    pub(crate) world: World,
    pub(crate) connections: Vec<Connection>,
    /// Which backend a client of a Service got, until when.
    pub(crate) affinities: Vec<(usize, Address, Address, u64)>,
    pub(crate) epoch: u64,
    pub(crate) now: u64,
}

impl Reference {
    pub(crate) fn place(&self, at: Address) -> Place {
        let a = self.world.addresses();
        let is = |text: &str| address(text) == at;
        if let Some(pod) = (0..PODS).find(|pod| is(a.pods[*pod])) {
            Place::Pod(pod)
        } else if is(a.node) {
            Place::Node
        } else if is(a.other_node) {
            Place::OtherNode
        } else if is(a.cluster_ip) {
            Place::ClusterIp
        } else if is(a.load_balancer) {
            Place::LoadBalancer
        } else if is(a.unallocated) {
            Place::Unallocated
        } else {
            Place::Elsewhere
        }
    }

    fn incarnation(&self, at: Address) -> u32 {
        match self.place(at) {
            Place::Pod(pod) => self.world.incarnations[pod],
            // The fixture's host and uplink are in their first.
            Place::Node => 1,
            _ => 0,
        }
    }

    /// How long it lives without a packet, in seconds.
    pub(crate) fn lifetime(connection: &Connection) -> u64 {
        match (connection.original.protocol(), connection.stage) {
            (TCP, Stage::Lasting) => 7440,
            (TCP, _) => 240,
            (UDP, Stage::Lasting) => 300,
            (UDP, _) => 120,
            _ => 60,
        }
    }

    pub(crate) fn is_over(&self, connection: &Connection) -> bool {
        self.now - connection.seen >= Self::lifetime(connection)
    }

    /// Whether something ends about now: the dataplane counts time in coarser steps.
    pub(crate) fn is_on_the_edge(&self) -> bool {
        let edge = |since: u64, lifetime: u64| (self.now - since).abs_diff(lifetime) < 4;
        self.connections
            .iter()
            .any(|c| edge(c.seen, Self::lifetime(c)))
            || self
                .affinities
                .iter()
                .any(|entry| entry.3.abs_diff(self.now) < 4)
    }

    pub(crate) fn find(&self, flow: &Flow) -> Option<(usize, Direction)> {
        self.connections.iter().enumerate().find_map(|(at, c)| {
            if self.is_over(c) {
                None
            } else if c.original == *flow {
                Some((at, Direction::Original))
            } else {
                (c.reply == *flow).then_some((at, Direction::Reply))
            }
        })
    }

    /// The Service that is meant, and whether from outside the cluster's own address.
    fn meant(&self, flow: &Flow) -> Option<(usize, bool)> {
        let (place, port) = (self.place(flow.destination()), flow.destination_port());
        let services = self.world.services.iter().enumerate();
        let mut right = services.filter(|(_, svc)| {
            svc.present && Protocol::from_number(flow.protocol()) == Some(svc.protocol)
        });
        right.find_map(|(n, _)| match place {
            Place::ClusterIp if port == 80 + n as u16 => Some((n, false)),
            Place::LoadBalancer if port == 80 + n as u16 => Some((n, true)),
            Place::Node if port == 30_080 + n as u16 => Some((n, true)),
            _ => None,
        })
    }

    /// A packet of a connection: what it is worth under the tables of today. `None`: nothing, it begins anew.
    fn judge(&mut self, at: usize, direction: Direction, sender: Sender) -> Option<Expect> {
        let c = self.connections[at].clone();
        if c.epoch == self.epoch {
            return Some(Expect::Continue(at, direction));
        }
        let backend = c.reply.source();
        let same = self.link_incarnation(c.links[0]) == c.incarnations[0]
            && self.incarnation(backend) == c.incarnations[1];
        if !same || (c.service.is_none() && self.meant(&c.original).is_some()) {
            self.connections.remove(at);
            return None;
        }
        if let Some(n) = c.service {
            let svc = &self.world.services[n];
            let serves = |pod: usize| svc.endpoints[pod] || svc.terminating[pod];
            let still = svc.present
                && matches!(self.place(backend), Place::Pod(pod) if serves(pod))
                && c.reply.source_port() == TARGET;
            if !still {
                self.connections.remove(at);
                return match (direction, c.original.protocol()) {
                    (Direction::Reply, _) => Some(Expect::Drop(DropReason::SvcBackendGone)),
                    (Direction::Original, TCP) => Some(Expect::Refuse(DropReason::SvcBackendGone)),
                    (Direction::Original, _) => None,
                };
            }
        }
        let _ = sender;
        if let Err(reason) = self.policy(c.links[0], c.original.source(), backend) {
            self.connections.remove(at);
            return Some(Expect::Drop(reason));
        }
        self.connections[at].epoch = self.epoch;
        Some(Expect::Continue(at, direction))
    }

    fn link_incarnation(&self, link: LinkId) -> u32 {
        match link.raw().checked_sub(16) {
            Some(pod) => self.world.incarnations[usize::from(pod)],
            None => 1,
        }
    }

    fn policy(&self, from: LinkId, source: Address, to: Address) -> Result<(), DropReason> {
        let target = self.place(to);
        let sender = from.raw().checked_sub(16).map(usize::from);
        if let (Some(pod), Place::Pod(other)) = (sender, &target)
            && pod == *other
        {
            return Ok(());
        }
        if let Some(pod) = sender
            && !self.world.egress[pod]
        {
            return Err(DropReason::PolicyEgress);
        }
        let (guard, may) = self.world.guard;
        if from == LinkId::HOST {
            // Its own pods and itself are always reached.
            let is_own = matches!(target, Place::Pod(_) | Place::Node);
            return (may || is_own)
                .then_some(())
                .ok_or(DropReason::PolicyEgress);
        }
        let ingress = match target {
            Place::Pod(pod) => self.world.ingress[pod],
            Place::Node => guard,
            _ => return Ok(()),
        };
        let accepted = match ingress {
            Ingress::Everything => true,
            Ingress::Nothing => false,
            Ingress::FirstPod => self.place(source) == Place::Pod(0),
        };
        accepted.then_some(()).ok_or(DropReason::PolicyIngress)
    }

    /// What must happen to a packet of `flow`, which `opens` a connection or not.
    pub(crate) fn expect(&mut self, sender: Sender, flow: &Flow, opens: bool) -> Expect {
        if let Some((at, direction)) = self.find(flow)
            && let Some(expect) = self.judge(at, direction, sender)
        {
            return expect;
        }
        self.begin(sender, flow, opens)
    }

    fn begin(&self, sender: Sender, flow: &Flow, opens: bool) -> Expect {
        let place = self.place(flow.destination());
        let is_ping = !matches!(flow.protocol(), TCP | UDP);
        let outside = matches!(sender, Sender::Outside | Sender::OtherNode);
        let chosen = match (self.meant(flow), &place) {
            (Some((n, external)), _) => Some((n, external)),
            (None, Place::ClusterIp | Place::LoadBalancer) if is_ping && opens => {
                return Expect::Pong;
            }
            (None, Place::ClusterIp | Place::LoadBalancer) => {
                return Expect::Refuse(DropReason::SvcUndefinedPort);
            }
            (None, Place::Unallocated) => return Expect::Drop(DropReason::SvcUnallocated),
            (None, Place::Node) if outside => return Expect::ToNode,
            (None, _) => None,
        };
        let mut beginning = Beginning {
            backends: vec![(flow.destination(), flow.destination_port())],
            service: None,
            masquerade: false,
        };
        if let Some((n, external)) = chosen {
            match self.choose(n, external, sender, flow) {
                Ok(chosen) => beginning = chosen,
                Err(refused) => return refused,
            }
        }
        if !opens {
            return Expect::Drop(DropReason::CtNotOpening);
        }
        if chosen.is_none() {
            let leaves = matches!(sender, Sender::Pod(_)) && place == Place::Elsewhere;
            let remote = flow.destination() == address(self.world.addresses().remote);
            beginning.masquerade =
                leaves && !remote && self.world.masquerade_egress && !self.world.kept;
        }
        // Which endpoint it will be is not for the reference to say: it must be one of those, and policy must then agree.
        Expect::Begin(beginning)
    }

    /// What policy says of the backend that was chosen.
    pub(crate) fn allows(
        &self,
        sender: Sender,
        flow: &Flow,
        backend: Address,
    ) -> Result<(), DropReason> {
        self.policy(sender.link(), flow.source(), backend)
    }

    fn choose(
        &self,
        n: usize,
        external: bool,
        sender: Sender,
        flow: &Flow,
    ) -> Result<Beginning, Expect> {
        let svc = &self.world.services[n];
        let pod = matches!(sender, Sender::Pod(_));
        let node = sender == Sender::Node;
        // kube-proxy's table: only local endpoints, and masquerade.
        let (local, masquerade) = if !external {
            let strange = self.world.detect_local && !pod;
            (svc.internal_local, self.world.masquerade_all || strange)
        } else if !svc.external_local {
            (false, true)
        } else if pod && self.world.detect_local {
            (false, false)
        } else if node {
            (false, true)
        } else {
            (true, false)
        };
        let of = |pod: usize| svc.endpoints[pod] && (!local || svc.local[pod]);
        let a = self.world.addresses();
        let mut backends: Vec<(Address, u16)> = (0..PODS)
            .filter(|pod| of(*pod))
            .map(|pod| (address(a.pods[pod]), TARGET))
            .collect();
        if backends.is_empty() {
            return Err(if svc.endpoints.contains(&true) {
                Expect::Drop(DropReason::SvcNoLocalEndpoint)
            } else {
                Expect::Refuse(DropReason::SvcNoEndpoint)
            });
        }
        if svc.affinity != 0
            && let Some(kept) = self.remembered(n, flow.source())
            && backends.contains(&(kept, TARGET))
        {
            backends = vec![(kept, TARGET)];
        }
        Ok(Beginning {
            backends,
            service: Some(n),
            masquerade,
        })
    }

    fn remembered(&self, service: usize, client: Address) -> Option<Address> {
        let entry = self
            .affinities
            .iter()
            .find(|entry| entry.0 == service && entry.1 == client && entry.3 > self.now)?;
        Some(entry.2)
    }

    pub(crate) fn remember(&mut self, service: usize, client: Address, backend: Address) {
        let seconds = self.world.services[service].affinity;
        if seconds != 0 {
            self.affinities
                .retain(|entry| (entry.0, entry.1) != (service, client));
            let until = self.now + u64::from(seconds);
            self.affinities.push((service, client, backend, until));
        }
    }

    /// Where packets to `at` leave.
    pub(crate) fn way_to(&self, at: Address) -> LinkId {
        match self.place(at) {
            Place::Pod(pod) => link_of(pod),
            Place::Node => LinkId::HOST,
            _ => LinkId::UPLINK,
        }
    }

    pub(crate) fn commit(
        &mut self,
        sender: Sender,
        flow: Flow,
        reply: Flow,
        service: Option<usize>,
    ) {
        let backend = reply.source();
        // What is over makes way.
        let stale = |c: &Connection| {
            [flow, reply]
                .iter()
                .any(|f| c.original == *f || c.reply == *f)
        };
        let over: Vec<bool> = self.connections.iter().map(|c| self.is_over(c)).collect();
        let mut over = over.into_iter();
        self.connections
            .retain(|c| !(over.next().unwrap_or(false) && stale(c)));
        let connection = Connection {
            original: flow,
            reply,
            links: [sender.link(), self.way_to(backend)],
            service,
            stage: Stage::Asked,
            seen: self.now,
            epoch: self.epoch,
            incarnations: [
                self.link_incarnation(sender.link()),
                self.incarnation(backend),
            ],
        };
        self.connections.push(connection);
    }

    /// A packet of the connection came by.
    pub(crate) fn touch(&mut self, at: usize, direction: Direction) {
        let now = self.now;
        let c = &mut self.connections[at];
        let again = (c.original.protocol(), direction, c.stage);
        if again == (TCP, Direction::Reply, Stage::Answered) {
            // Nothing new was said: repeating a SYN ACK does not keep a handshake alive.
            return;
        }
        c.seen = now;
        c.stage = match (direction, c.stage) {
            (Direction::Reply, Stage::Asked) => Stage::Answered,
            (Direction::Original, Stage::Answered) => Stage::Lasting,
            (_, stage) => stage,
        };
    }
}
