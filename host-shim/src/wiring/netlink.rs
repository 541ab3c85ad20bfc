//! Interfaces, addresses, routes and redirects by rtnetlink: the few requests that wiring needs, each acknowledged.
//!
//! A netlink socket belongs to the network namespace it was opened in, whichever thread uses it later.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use sluice_contract::Mac;

use super::netns::Netns;

/// What an interface looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Interface {
    /// Its index in its namespace.
    pub index: u32,
    /// `veth`, `tun`, … or empty.
    pub kind: String,
    pub mac: Mac,
    pub mtu: u16,
    pub up: bool,
    /// There is somebody at the other end.
    pub carrier: bool,
    /// The interface it is a part of: a bond, a bridge.
    pub master: Option<u32>,
}

/// A route by a gateway.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GatewayRoute {
    /// The range: its first address and the length of its prefix.
    pub to: (IpAddr, u8),
    pub gateway: IpAddr,
    /// The source of what the host itself sends there.
    pub source: IpAddr,
    /// The table it is in; the main one unless given.
    pub table: Option<u32>,
}

/// A filter that sends frames elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Redirect {
    pub priority: u16,
    /// The interface that they go out on.
    pub to: u32,
}

impl Redirect {
    /// Which set of [`Netlink::redirect_matching`] it belongs to.
    pub fn set(self) -> Option<usize> {
        MATCHING.iter().position(|set| set.contains(&self.priority))
    }
}

/// What to change of an interface.
#[derive(Debug, Default)]
pub struct Change<'a> {
    pub up: bool,
    pub name: Option<&'a str>,
    pub mac: Option<Mac>,
    pub mtu: Option<u16>,
    pub netns: Option<&'a Netns>,
}

/// A socket to one namespace's rtnetlink.
#[derive(Debug)]
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;
/// How often a list is asked for that changes while it is told. The last one counts as it is: who needs it looks again.
const LISTINGS: usize = 8;
/// `ETH_P_ALL`, in network byte order as `tcm_info` wants it.
const ALL_PROTOCOLS: u16 = 3u16.to_be();
/// The priority of the filter for every frame, on interfaces that are ours.
const EVERYTHING: u16 = 1;
/// Where filters of what comes in hang.
const INGRESS: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};
/// Priorities of the filters on interfaces that are not ours, by set and family: by these they are found again. One set can be
/// made before another goes, and the third is for a life that finds two, of which one was being made.
pub(super) const MATCHING: [[u16; 2]; 3] = [[0x534c, 0x534d], [0x534e, 0x534f], [0x5350, 0x5351]];
/// How many sets there are.
pub const SETS: usize = MATCHING.len();
/// The families' EtherTypes.
pub(super) const ETHERTYPES: [u16; 2] = [0x0800, 0x86dd];

impl Netlink {
    /// Opens a socket to the calling thread's namespace.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// The interface of that name, if there is one.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn interface(&mut self, name: &str) -> io::Result<Option<Interface>> {
        let mut ask = LinkMessage::default();
        ask.attributes.push(LinkAttribute::IfName(name.into()));
        let mut found = None;
        let outcome = self.request(RouteNetlinkMessage::GetLink(ask), 0, |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                found = Some(Interface {
                    index: link.header.index,
                    kind: kind_of(&link),
                    mac: mac_of(&link),
                    mtu: mtu_of(&link),
                    up: link.header.flags.contains(LinkFlags::Up),
                    carrier: link.header.flags.contains(LinkFlags::LowerUp),
                    master: master_of(&link),
                });
            }
        });
        match outcome {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            outcome => outcome.map(|()| found),
        }
    }

    /// The index of an interface that must be there.
    ///
    /// # Errors
    /// `NotFound` when it is not.
    pub fn index(&mut self, name: &str) -> io::Result<u32> {
        self.interface(name)?
            .map(|i| i.index)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// Creates a veth pair, its other end in another namespace at once.
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when either name is taken.
    pub fn add_veth(&mut self, name: &str, mtu: u16, peer: (&str, &Netns, Mac)) -> io::Result<()> {
        let (peer_name, peer_netns, peer_mac) = peer;
        let mtu = LinkAttribute::Mtu(u32::from(mtu));
        // One queue is what a pair uses unless told otherwise. Unsaid, the kernel makes one for every processor and gives the others
        // up again, and waits twice for all processors while nobody else can change an interface.
        let queues = [LinkAttribute::NumTxQueues(1), LinkAttribute::NumRxQueues(1)];
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer_name.into()),
            mtu.clone(),
            LinkAttribute::Address(peer_mac.0.to_vec()),
            LinkAttribute::NetNsFd(peer_netns.file().as_raw_fd()),
        ];
        other.attributes.extend(queues.clone());
        let mut link = LinkMessage::default();
        link.attributes = vec![
            LinkAttribute::IfName(name.into()),
            mtu,
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        link.attributes.extend(queues);
        self.order(RouteNetlinkMessage::NewLink(link), CREATE)
    }

    /// Changes an interface.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn change(&mut self, index: u32, change: &Change<'_>) -> io::Result<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        if change.up {
            link.header.flags = LinkFlags::Up;
            link.header.change_mask = LinkFlags::Up;
        }
        let attributes = [
            change.name.map(|n| LinkAttribute::IfName(n.into())),
            change.mac.map(|m| LinkAttribute::Address(m.0.to_vec())),
            change.mtu.map(|m| LinkAttribute::Mtu(u32::from(m))),
            change
                .netns
                .map(|n| LinkAttribute::NetNsFd(n.file().as_raw_fd())),
        ];
        link.attributes = attributes.into_iter().flatten().collect();
        self.order(RouteNetlinkMessage::SetLink(link), 0)
    }

    /// Gives an interface an address of its own: /32 or /128, no prefix route, no duplicate detection.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_address(&mut self, index: u32, address: IpAddr) -> io::Result<()> {
        self.add_address_in(index, address, AddressScope::Universe)
    }

    /// The same for an address that counts only so far.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_address_in(
        &mut self,
        index: u32,
        address: IpAddr,
        scope: AddressScope,
    ) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.family = family(address);
        message.header.prefix_len = host_prefix(address);
        message.header.scope = scope;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![
            AddressAttribute::Local(address),
            AddressAttribute::Address(address),
            AddressAttribute::Flags(AddressFlags::Nodad | AddressFlags::Noprefixroute),
        ];
        self.order(RouteNetlinkMessage::NewAddress(message), CREATE)
    }

    /// Adds a route to one neighbour on the link itself.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_link_route(&mut self, index: u32, to: IpAddr) -> io::Result<()> {
        let mut route = self.route(index, family(to));
        route.header.destination_prefix_length = host_prefix(to);
        route.header.scope = RouteScope::Link;
        route
            .attributes
            .push(RouteAttribute::Destination(to.into()));
        self.order(
            RouteNetlinkMessage::NewRoute(route),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Adds the default route of a family.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_default_route(&mut self, index: u32, gateway: IpAddr) -> io::Result<()> {
        let mut route = self.route(index, family(gateway));
        route.header.flags = RouteFlags::Onlink;
        route
            .attributes
            .push(RouteAttribute::Gateway(gateway.into()));
        self.order(
            RouteNetlinkMessage::NewRoute(route),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Adds or replaces a route by a gateway that is on the link itself.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_gateway_route(&mut self, index: u32, route: &GatewayRoute) -> io::Result<()> {
        let (to, length) = route.to;
        let mut message = self.route(index, family(to));
        message.header.destination_prefix_length = length;
        message.header.flags = RouteFlags::Onlink;
        message.attributes.extend([
            RouteAttribute::Destination(to.into()),
            RouteAttribute::Gateway(route.gateway.into()),
            RouteAttribute::PrefSource(route.source.into()),
        ]);
        message
            .attributes
            .extend(route.table.map(RouteAttribute::Table));
        self.order(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Names the MAC behind an address for good.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn add_neighbor(&mut self, index: u32, address: IpAddr, mac: Mac) -> io::Result<()> {
        let mut row = NeighbourMessage::default();
        row.header.family = family(address);
        row.header.ifindex = index;
        row.header.state = NeighbourState::Permanent;
        row.attributes = vec![
            NeighbourAttribute::Destination(match address {
                IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
                IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
            }),
            NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()),
        ];
        self.order(
            RouteNetlinkMessage::NewNeighbour(row),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    fn route(&self, index: u32, family: AddressFamily) -> RouteMessage {
        let mut route = RouteMessage::default();
        route.header.address_family = family;
        route.header.table = RouteHeader::RT_TABLE_MAIN;
        route.header.protocol = RouteProtocol::Static;
        route.header.scope = RouteScope::Universe;
        route.header.kind = RouteType::Unicast;
        route.attributes.push(RouteAttribute::Oif(index));
        route
    }

    /// Sends every frame that comes in on `from` out on `to`, before any protocol sees it.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        self.order(
            RouteNetlinkMessage::NewQueueDiscipline(clsact(from)),
            CREATE,
        )?;
        self.add_filter(from, to, (EVERYTHING, ALL_PROTOCOLS), everything())
    }

    /// The same for an interface that may have it already: then it stays, and no frame meets a moment without.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn keep_redirect(&mut self, from: u32, to: u32) -> io::Result<()> {
        let wanted = Redirect {
            priority: EVERYTHING,
            to,
        };
        if self.redirects(from)?.contains(&wanted) {
            return Ok(());
        }
        self.remove_redirect(from)?;
        self.redirect(from, to)
    }

    /// The redirects of what comes in on an interface; none where it has no queue discipline for them.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn redirects(&mut self, from: u32) -> io::Result<Vec<Redirect>> {
        let mut ask = TcMessage::with_index(from.cast_signed());
        ask.header.parent = INGRESS;
        let mut found = Vec::new();
        let ask = RouteNetlinkMessage::GetTrafficFilter(ask);
        self.request(ask, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewTrafficFilter(filter) = answer {
                let priority = TcHandle::from(filter.header.info).major;
                found.extend(target(&filter).map(|to| Redirect { priority, to }));
            }
        })?;
        Ok(found)
    }

    /// The indices of all interfaces.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn indices(&mut self) -> io::Result<Vec<u32>> {
        let mut found = Vec::new();
        let ask = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.request(ask, NLM_F_DUMP, |answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                found.push(link.header.index);
            }
        })?;
        Ok(found)
    }

    /// Sends what matches and comes in on `from` out on `to`, before any protocol sees it. An interface that is not ours
    /// alone: what else hangs there stays. `place`: the set of filters and the EtherType.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn redirect_matching(
        &mut self,
        from: u32,
        to: u32,
        (set, ethertype): (usize, u16),
        selector: TcU32Selector,
    ) -> io::Result<()> {
        match self.order(
            RouteNetlinkMessage::NewQueueDiscipline(clsact(from)),
            CREATE,
        ) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            _ => {}
        }
        let family = usize::from(ethertype != ETHERTYPES[0]);
        let priority = MATCHING[set % MATCHING.len()][family];
        self.add_filter(from, to, (priority, ethertype.to_be()), selector)
    }

    fn add_filter(
        &mut self,
        from: u32,
        to: u32,
        place: (u16, u16),
        selector: TcU32Selector,
    ) -> io::Result<()> {
        let mut filter = filter_at(from, place);
        filter
            .attributes
            .push(TcAttribute::Kind(TcFilterU32::KIND.into()));
        let options = [TcFilterU32Option::Selector(selector), redirect_action(to)];
        let options = options.into_iter().map(TcOption::U32).collect();
        filter.attributes.push(TcAttribute::Options(options));
        self.order(RouteNetlinkMessage::NewTrafficFilter(filter), CREATE)
    }

    pub(crate) fn order(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, flags, |_| ())
    }

    /// Sends a request, passes every answer to `each`, and returns at its acknowledgement.
    pub(crate) fn request(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<()> {
        for _ in 1..LISTINGS {
            let mut answers = Vec::new();
            if self.exchange(message.clone(), flags, |answer| answers.push(answer))? {
                answers.into_iter().for_each(each);
                return Ok(());
            }
        }
        self.exchange(message, flags, each).map(drop)
    }

    /// The same once. False if the list has changed while the kernel told it: it may lack what was there all the time.
    fn exchange(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        mut each: impl FnMut(RouteNetlinkMessage),
    ) -> io::Result<bool> {
        let mut whole = true;
        self.sequence = self.sequence.wrapping_add(1);
        let mut packet = NetlinkMessage::from(message);
        packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        packet.header.sequence_number = self.sequence;
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        loop {
            let (received, _) = self.socket.recv_from_full()?;
            let mut rest = received.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
                let length = answer.header.length as usize;
                rest = rest
                    .get(length.next_multiple_of(4).max(16)..)
                    .unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                whole &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(whole), |_| Err(error.to_io()));
                    }
                    NetlinkPayload::InnerMessage(inner) => each(inner),
                    // The end of a dump, which has no acknowledgement.
                    NetlinkPayload::Done(_) => return Ok(whole),
                    _ => {}
                }
            }
        }
    }
}

pub(super) fn clsact(index: u32) -> TcMessage {
    let mut qdisc = TcMessage::with_index(index.cast_signed());
    qdisc.header.parent = TcHandle::CLSACT;
    qdisc.header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    qdisc.attributes.push(TcAttribute::Kind("clsact".into()));
    qdisc
}

/// The place of filters: priority, and protocol in network byte order.
pub(super) fn filter_at(index: u32, (priority, protocol): (u16, u16)) -> TcMessage {
    let mut filter = TcMessage::with_index(index.cast_signed());
    filter.header.parent = INGRESS;
    filter.header.info = u32::from(TcHandle {
        major: priority,
        minor: protocol,
    });
    filter
}

/// A u32 selector that matches every frame: one key whose mask is zero.
fn everything() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

fn redirect_action(to: u32) -> TcFilterU32Option {
    let mut mirror = TcMirror::default();
    mirror.generic.action = TcActionType::Stolen;
    mirror.eaction = TcMirrorActionType::EgressRedir;
    mirror.ifindex = to;
    let mut action = TcAction::default();
    let parameters = TcActionMirrorOption::Parms(mirror);
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(parameters)]),
    ];
    TcFilterU32Option::Action(vec![action])
}

/// Where a filter sends what it matches.
fn target(filter: &TcMessage) -> Option<u32> {
    let options = filter.attributes.iter().find_map(|it| match it {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let actions = options.into_iter().flatten().filter_map(|it| match it {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    });
    let attributes = actions.flatten().flat_map(|action| &action.attributes);
    let options = attributes.filter_map(|it| match it {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().find_map(|it| match it {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}

fn kind_of(link: &LinkMessage) -> String {
    let infos = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::LinkInfo(infos) => Some(infos),
        _ => None,
    });
    let kind = infos.into_iter().flatten().find_map(|i| match i {
        LinkInfo::Kind(kind) => Some(kind.to_string()),
        _ => None,
    });
    kind.unwrap_or_default()
}

fn master_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Controller(index) => Some(*index),
        _ => None,
    })
}

fn mtu_of(link: &LinkMessage) -> u16 {
    let mtu = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    mtu.map_or(0, |mtu| u16::try_from(mtu).unwrap_or(u16::MAX))
}

fn mac_of(link: &LinkMessage) -> Mac {
    let bytes = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok(),
        _ => None,
    });
    Mac(bytes.unwrap_or_default())
}

pub(crate) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

pub(crate) fn host_prefix(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}
