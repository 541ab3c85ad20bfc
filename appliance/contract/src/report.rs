//! Why a packet did not go on, why a change was refused, and what is counted.

use crate::row::Key;
use crate::types::LinkId;
use serde::{Deserialize, Serialize};

/// Declares the reasons once: number, name for people and metrics, meaning.
macro_rules! drop_reasons {
    ($($(#[doc = $doc:literal])+ $variant:ident = $number:literal, $name:literal;)+) => {
        /// Why the appliance dropped a packet. Numbers are append-only: hosts of the same version print them by name.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[repr(u8)]
        pub enum DropReason { $($(#[doc = $doc])+ $variant = $number,)+ }

        impl DropReason {
            /// All reasons, in the order of their numbers.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];
            /// One more than the highest number: the size of a table indexed by reason.
            pub const COUNT: usize = { let mut n = 0; $(if $number >= n { n = $number + 1; })+ n };

            /// The stable name, as in metrics and on the command line.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// One sentence for people.
            pub const fn meaning(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),+).trim_ascii(),)+ }
            }

            /// As an index into a table of [`Self::COUNT`] entries.
            pub const fn index(self) -> usize { self as usize }
        }
    };
}

drop_reasons! {
    /// The frame is shorter than its headers say, or a header is not well-formed.
    Malformed = 0, "malformed";
    /// No link of that id is configured, or its first generation is not in force yet.
    UnknownLink = 1, "unknown_link";
    /// The source MAC or IP address is not one of the link's own.
    Spoof = 2, "spoof";
    /// The ethertype is none that the appliance speaks.
    EtherType = 3, "ethertype";
    /// Not addressed to the gateway's MAC.
    NotForUs = 4, "not_for_us";
    /// Broadcast or multicast, which pods may not send across the node.
    Multicast = 5, "mcast";
    /// The TTL or hop limit ran out here.
    TtlExpired = 6, "ttl_expired";
    /// No link, peer or route leads to the destination.
    NoRoute = 7, "no_route";
    /// ARP or neighbor discovery that is none of the appliance's business.
    NeighborIgnored = 8, "neighbor_ignored";
    /// Larger than the next link takes.
    TooBig = 9, "too_big";
    /// Addressed to the gateway itself, which answers echo and nothing else.
    GatewayNotServed = 10, "gateway_not_served";
    /// The transmit queue was full.
    TxFull = 11, "tx_full";
    /// An IPv4 header checksum that is wrong.
    BadChecksum = 12, "bad_checksum";
    /// A VLAN tag inside a link's frame: links carry untagged frames.
    VlanTag = 13, "vlan_tag";
    /// An address that may not stand on a wire: loopback, 0/8, 240/4, IPv4-mapped, or a group as source.
    Martian = 14, "martian";
    /// IPv4 options that ask for a route of the sender's choosing, or that are broken.
    SourceRoute = 15, "source_route";
    /// IPv6 extension headers: too many, out of order, or a routing header of type 0.
    ExtensionHeaders = 16, "ext_headers";
    /// A first fragment without the whole transport header.
    FragmentTiny = 17, "frag_tiny";
    /// A router advertisement or redirect from a link, which may not speak as a router.
    RogueRouter = 18, "rogue_router";
    /// It would be answered, but its link has asked too often.
    RateLimited = 19, "rate_limited";
    /// A packet that is no part of its connection: wrong sequence, flags, tag, or an answer to no question.
    CtInvalid = 20, "ct_invalid";
    /// Neither of a known connection nor the beginning of one.
    CtNotOpening = 21, "ct_not_opening";
    /// The connection table is full of established connections.
    CtFull = 22, "ct_full";
    /// The pod's share of the connection table, or its namespace's, is used up.
    CtQuota = 23, "ct_quota";
    /// The Service has no endpoint anywhere.
    SvcNoEndpoint = 24, "svc_no_ep";
    /// The Service has endpoints, but none where its traffic policy lets this traffic go.
    SvcNoLocalEndpoint = 25, "svc_no_local_ep";
    /// An address of the cluster's Services that is not allocated.
    SvcUnallocated = 26, "svc_unallocated";
    /// A port that the Service at this address does not have.
    SvcUndefinedPort = 27, "svc_undefined_port";
    /// The source is in none of the Service's source ranges.
    SvcSourceRange = 28, "svc_source_range";
    /// The connection's backend is gone.
    SvcBackendGone = 29, "svc_backend_gone";
    /// Policy of the sending pod forbids the connection.
    PolicyEgress = 30, "policy_egress";
    /// Policy of the receiving pod forbids the connection.
    PolicyIngress = 31, "policy_ingress";
    /// No port is left to translate the connection to.
    NatExhausted = 32, "nat_exhausted";
    /// It would have to be masqueraded, but the node has no address of that family.
    NatNoAddress = 33, "nat_no_address";
    /// An ICMP error about no known connection, or with a wrong checksum inside.
    IcmpUnrelated = 34, "icmp_unrelated";
    /// A tunnel packet from a pod to a node.
    EncapFromPod = 35, "encap_from_pod";
    /// A fragment that overlaps another of its datagram; all of them go.
    FragmentOverlap = 36, "frag_overlap";
    /// A fragment of a datagram whose first fragment was dropped.
    FragmentRefused = 37, "frag_refused";
    /// More fragments wait for their first one than there is room for.
    FragmentLimit = 38, "frag_limit";
    /// The first fragment did not come in time.
    FragmentTimeout = 39, "frag_timeout";
    /// A tunnel packet from an address that is none of a known node's.
    TunnelUnknownPeer = 40, "tunnel_unknown_peer";
    /// A tunnel packet whose inner source does not lie behind the node that sent it.
    TunnelSpoof = 41, "tunnel_spoof";
    /// A tunnel header that is broken, of another version, without a network, or with a payload that is not spoken here.
    TunnelHeader = 42, "tunnel_header";
    /// A tunnel packet of another network.
    TunnelVni = 43, "tunnel_vni";
    /// A Geneve option that is critical and unknown.
    TunnelOption = 44, "tunnel_option";
    /// A tunnel packet with a wrong outer checksum, or without one where it must have one.
    TunnelChecksum = 45, "tunnel_checksum";
    /// The outer packet was marked as having met congestion, and the inner one cannot carry the mark (RFC 6040).
    TunnelEcn = 46, "tunnel_ecn";
    /// A fragment of an outer packet: tunnel packets are never fragmented here and never reassembled.
    OuterFragment = 47, "outer_frag";
    /// The next hop does not answer.
    NoNeighbor = 48, "no_neighbor";
    /// The tunnel has no outer address of the peer's family, or the frame has no room for outer headers.
    TunnelUnready = 49, "tunnel_unready";
    /// From the uplink, addressed to the node, and nothing that the appliance serves.
    NotServed = 50, "not_served";
    /// A router's word on the path to another node; it was noted and is for nobody else.
    PathMtu = 51, "path_mtu";
    /// More than its link may carry from the pod.
    BandwidthEgress = 52, "bandwidth_egress";
    /// More than its link may carry to the pod.
    BandwidthIngress = 53, "bandwidth_ingress";
    /// Another node names a backend that is not behind this frontend, or not here.
    SvcDirectReturn = 54, "svc_direct_return";
    /// More packets than the pod may send.
    PacketRateEgress = 55, "packet_rate_egress";
    /// More packets than the pod may be sent.
    PacketRateIngress = 56, "packet_rate_ingress";
    /// More new connections than the pod may open.
    ConnectionRateEgress = 57, "connection_rate_egress";
    /// More new connections than may be opened to the pod.
    ConnectionRateIngress = 58, "connection_rate_ingress";
}

/// What a counter counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum CounterId {
    /// Frames taken from the trunk.
    Received,
    /// Frames sent on to a link.
    Forwarded,
    /// Frames answered by the appliance in place (ARP, echo, errors).
    Replied,
    /// Frames dropped, by reason.
    Dropped(DropReason),
    /// Frames of a link received / sent, and bytes.
    LinkReceived(LinkId),
    LinkReceivedBytes(LinkId),
    LinkSent(LinkId),
    LinkSentBytes(LinkId),
    /// GSO frames that crossed whole, and the bytes in them.
    GsoForwarded,
    GsoForwardedBytes,
    /// Control frames that were thrown away: bad length, checksum or encoding.
    ControlGarbage,
    /// Control messages of another session or already seen.
    ControlStale,
    /// Descriptors from the device that made no sense.
    RingErrors,
    /// Times the vCPU parked, and the microseconds it slept.
    Parks,
    ParkedMicros,
    /// The longest time one configuration slice held the packet path, in nanoseconds.
    LongestSliceNanos,
    /// Frames that the appliance keeps for later at this moment (fragments out of order); each is counted by its end afterwards.
    Held,
    /// Frames sent that no received frame became (probes and the like).
    Originated,
    /// Slices of configuration work, and those that held the packet path for more than 100 µs.
    Slices,
    LongSlices,
    /// Times that a rule denied what passed nevertheless, because policy is only audited.
    WouldDeny,
    /// Addresses that pods were told of names in their rules, and those that had to make room for others before their time.
    NamesLearnt,
    NamesEvicted,
    /// Answers over TCP to pods with names in their rules of which only the first piece was read, or nothing.
    NamesCut,
}

/// Why a row or a change was refused: which object, which of its fields, what is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reject {
    pub object: Option<Key>,
    pub field: Field,
    pub reason: RejectReason,
}

/// Which part of the object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Field {
    Whole,
    Generation,
    Id,
    Mac,
    Addresses,
    Mtu,
    Gateway,
    Address,
    Port,
    /// A reference: to a set, a port of a Service, a link.
    Set,
    Service,
    Link,
    Index,
    Count,
    Slots,
    Prefix,
    Timeout,
    Family,
    Protocol,
    Peer,
    NextHop,
    Rate,
    Dscp,
}

/// What is wrong with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RejectReason {
    /// The table is full; the number is its capacity.
    Full(u32),
    /// Another row already has this.
    Taken,
    /// A value that cannot be.
    Invalid,
    /// There is no such row.
    Missing,
    /// `Put`, `Remove` or `Commit` without `Begin`, or of another generation.
    OutOfOrder,
    /// Another row refers to it; the number of such rows.
    InUse(u32),
    /// Parts of it are missing, or there are too many; how many. The row is there and is not used.
    Incomplete(u32),
}
