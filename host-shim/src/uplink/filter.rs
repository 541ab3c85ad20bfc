//! Which of the frames that arrive at the node's network card belong to the appliance: as keys of tc's u32 classifier.
//!
//! Exactly these: the tunnel's packets to the node's addresses, and routers' complaints about them; what comes as it is for the
//! node's own pods, and from pods of other nodes; what is for ports of Services, and answers to what was sent with the node's
//! address in the pods' name; what is for addresses of Services. Everything else is the host's, and never passes the appliance.

use std::collections::BTreeSet;
use std::net::IpAddr;

use netlink_packet_route::tc::{TcU32Key, TcU32Selector, TcU32SelectorFlags};
use sluice_contract::Prefix;
use sluice_contract::overlay::TunnelProtocol;

use super::ports::PortRange;

/// `ETH_P_IP` and `ETH_P_IPV6`.
const ETHERTYPE4: u16 = 0x0800;
const ETHERTYPE6: u16 = 0x86dd;

/// What one filter takes. Offsets count from the IP header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Match {
    pub(super) ethertype: u16,
    keys: Vec<Key>,
}

/// Four bytes at an offset, of which some bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Key {
    offset: u8,
    value: u32,
    mask: u32,
}

impl Match {
    /// Everything of the address' family that goes to it.
    fn to(address: IpAddr, length: u8) -> Self {
        match address {
            IpAddr::V4(v4) => Self {
                ethertype: ETHERTYPE4,
                keys: words(&v4.octets(), length, 16),
            },
            IpAddr::V6(v6) => Self {
                ethertype: ETHERTYPE6,
                keys: words(&v6.octets(), length, 24),
            },
        }
    }

    /// That comes from there.
    fn from(mut self, range: Prefix) -> Self {
        self.keys.extend(match range.address() {
            IpAddr::V4(v4) => words(&v4.octets(), range.length(), 12),
            IpAddr::V6(v6) => words(&v6.octets(), range.length(), 8),
        });
        self
    }

    fn is_v6(&self) -> bool {
        self.ethertype == ETHERTYPE6
    }

    /// Of that protocol, with its header at a known place: no options, no extension headers, no later fragment.
    fn protocol(mut self, number: u8) -> Self {
        if self.is_v6() {
            self.keys.push(Key {
                offset: 4,
                value: u32::from(number) << 8,
                mask: 0x0000_ff00,
            });
        } else {
            let header = Key {
                offset: 0,
                value: 0x4500_0000,
                mask: 0xff00_0000,
            };
            let whole = Key {
                offset: 4,
                value: 0,
                mask: 0x0000_1fff,
            };
            let protocol = Key {
                offset: 8,
                value: u32::from(number) << 16,
                mask: 0x00ff_0000,
            };
            self.keys.extend([header, whole, protocol]);
        }
        self
    }

    /// Four bytes of what follows the IP header.
    fn upper(mut self, offset: u8, value: u32, mask: u32) -> Self {
        let header = if self.is_v6() { 40 } else { 20 };
        self.keys.push(Key {
            offset: header + offset,
            value: value & mask,
            mask,
        });
        self
    }

    /// The selector for tc.
    pub(super) fn selector(&self) -> TcU32Selector {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = self.keys.len() as u8;
        selector.keys = self
            .keys
            .iter()
            .map(|key| {
                let mut one = TcU32Key::default();
                one.off = i32::from(key.offset);
                one.val = key.value;
                one.mask = key.mask;
                one
            })
            .collect();
        selector
    }
}

/// The leading `length` bits of an address, as keys from `offset` on.
fn words(octets: &[u8], length: u8, offset: u8) -> Vec<Key> {
    let (chunks, _) = octets.as_chunks::<4>();
    (0u8..)
        .zip(chunks)
        .map_while(|(n, chunk)| {
            let bits = u32::from(length.saturating_sub(n * 32).min(32));
            let mask = u32::MAX.checked_shl(32 - bits).unwrap_or(0);
            (bits > 0).then_some(Key {
                offset: offset + n * 4,
                value: u32::from_be_bytes(*chunk) & mask,
                mask,
            })
        })
        .collect()
}

const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP6: u8 = 58;
const SCTP: u8 = 132;
const IP_IN_IP: [u8; 2] = [4, 41];

/// What belongs to the appliance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) protocol: TunnelProtocol,
    pub(super) port: u16,
    /// The node's addresses.
    pub(super) node: Vec<IpAddr>,
    /// The node's own pods, if peers send to them as they are.
    pub(super) direct: Vec<Prefix>,
    /// All pods of the cluster, if some come without a tunnel.
    pub(super) cluster: Vec<Prefix>,
    /// Ports of the node that are Services', and those that stand for pods.
    pub(super) ports: Vec<PortRange>,
    pub(super) translated: Option<PortRange>,
    /// Single ports: the protocol's number and the port.
    pub(super) host_ports: BTreeSet<(u8, u16)>,
    /// Addresses of Services outside the cluster's own ranges.
    pub(super) services: Vec<Prefix>,
}

impl Claims {
    /// All of it as filters.
    pub(super) fn matches(&self) -> Vec<Match> {
        let mut all = Vec::new();
        for address in &self.node {
            self.tunnel(*address, &mut all);
            self.ports(*address, &mut all);
            let same = |range: &&Prefix| range.address().is_ipv4() == address.is_ipv4();
            let from = |range: &Prefix| Match::to(*address, 128).from(*range);
            all.extend(self.cluster.iter().filter(same).map(from));
        }
        let ranges = self.direct.iter().chain(&self.services);
        all.extend(ranges.map(|range| Match::to(range.address(), range.length())));
        all
    }

    fn tunnel(&self, address: IpAddr, all: &mut Vec<Match>) {
        let to = || Match::to(address, 128);
        let (icmp, kind) = match address {
            IpAddr::V4(_) => (ICMP, (0x0304_0000, 0xffff_0000)),
            IpAddr::V6(_) => (ICMP6, (0x0200_0000, 0xff00_0000)),
        };
        let complaint = || to().protocol(icmp).upper(0, kind.0, kind.1);
        if self.protocol == TunnelProtocol::IpIp {
            all.extend(IP_IN_IP.map(|number| to().protocol(number)));
            for number in IP_IN_IP {
                let (at, value, mask) = match address {
                    IpAddr::V4(_) => (8 + 8, u32::from(number) << 16, 0x00ff_0000),
                    IpAddr::V6(_) => (8 + 4, u32::from(number) << 8, 0x0000_ff00),
                };
                all.push(complaint().upper(at, value, mask));
            }
        } else {
            let port = u32::from(self.port);
            all.push(to().protocol(UDP).upper(0, port, 0x0000_ffff));
            all.push(complaint().upper(quoted_ports(address), port, 0x0000_ffff));
        }
    }

    fn ports(&self, address: IpAddr, all: &mut Vec<Match>) {
        let to = || Match::to(address, 128);
        for range in self.ports.iter().chain(&self.translated) {
            for (value, mask) in range.masks() {
                let (value, mask) = (u32::from(value), u32::from(mask));
                all.extend(
                    [TCP, UDP, SCTP].map(|number| to().protocol(number).upper(0, value, mask)),
                );
                all.push(error(address).upper(quoted_ports(address), value << 16, mask << 16));
            }
        }
        for (value, mask) in self.translated.iter().flat_map(|range| range.masks()) {
            let (value, mask) = (u32::from(value) << 16, u32::from(mask) << 16);
            let (icmp, answer) = match address {
                IpAddr::V4(_) => (ICMP, 0),
                IpAddr::V6(_) => (ICMP6, 129 << 24),
            };
            let answer = to().protocol(icmp).upper(0, answer, 0xff00_0000);
            all.push(answer.upper(4, value, mask));
            // An error about an echo request quotes its id.
            all.push(error(address).upper(quoted_ports(address) + 4, value, mask));
        }
        for (number, port) in &self.host_ports {
            let port = u32::from(*port);
            all.push(to().protocol(*number).upper(0, port, 0x0000_ffff));
            let quoted = error(address).upper(quoted_ports(address), port << 16, 0xffff_0000);
            all.push(quoted);
        }
    }
}

/// Errors of routers and hosts: ICMP types 3 and 11, ICMPv6 types 1 to 3.
fn error(address: IpAddr) -> Match {
    let to = Match::to(address, 128);
    match address {
        IpAddr::V4(_) => to.protocol(ICMP).upper(0, 3 << 24, 0xf7 << 24),
        IpAddr::V6(_) => to.protocol(ICMP6).upper(0, 0, 0xfc << 24),
    }
}

/// Behind the ICMP header lies the IP header that is complained about, and behind that its ports.
const fn quoted_ports(address: IpAddr) -> u8 {
    if address.is_ipv4() { 8 + 20 } else { 8 + 40 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel does it: all keys hold on the packet.
    fn takes(one: &Match, packet: &[u8]) -> bool {
        one.keys.iter().all(|key| {
            let at = usize::from(key.offset);
            let word = packet
                .get(at..at + 4)
                .and_then(|w| w.try_into().ok())
                .map(u32::from_be_bytes);
            word.is_some_and(|word| word & key.mask == key.value)
        })
    }

    fn packet4(protocol: u8, to: [u8; 4], upper: &[u8]) -> Vec<u8> {
        let mut packet = vec![
            0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 9,
        ];
        packet.extend(to);
        packet.extend(upper);
        packet.resize(packet.len() + 80, 0);
        packet
    }

    fn claims(protocol: TunnelProtocol, port: u16, node: &str) -> Claims {
        Claims {
            protocol,
            port,
            node: vec![node.parse().unwrap()],
            direct: Vec::new(),
            cluster: Vec::new(),
            ports: Vec::new(),
            translated: None,
            host_ports: BTreeSet::new(),
            services: Vec::new(),
        }
    }

    fn prefix(address: &str, length: u8) -> Prefix {
        Prefix::new(address.parse().unwrap(), length).unwrap()
    }

    #[test]
    fn the_appliance_gets_its_own_and_nothing_else() {
        let mut claims = claims(TunnelProtocol::Vxlan, 8472, "192.168.0.1");
        claims.direct = vec![prefix("10.244.1.0", 24)];
        let all = claims.matches();
        let taken = |packet: &[u8]| all.iter().any(|one| takes(one, packet));
        let vxlan = [0xc0, 0, 0x21, 0x18];
        let own = [192, 168, 0, 1];
        assert!(taken(&packet4(17, own, &vxlan)));
        assert!(!taken(&packet4(17, [192, 168, 0, 2], &vxlan)), "another's");
        assert!(!taken(&packet4(6, own, &vxlan)), "TCP");
        assert!(
            !taken(&packet4(17, own, &[0x21, 0x18, 0, 53])),
            "from the port"
        );
        let mut fragment = packet4(17, own, &vxlan);
        fragment[7] = 9;
        assert!(!taken(&fragment), "a later fragment has no ports");
        assert!(taken(&packet4(6, [10, 244, 1, 77], &[0; 4])), "for a pod");
        assert!(!taken(&packet4(6, [10, 244, 2, 77], &[0; 4])));
        let mut complaint = vec![3, 4, 0, 0, 0, 0, 5, 0];
        complaint.extend(packet4(17, [10, 0, 0, 9], &vxlan));
        assert!(taken(&packet4(1, own, &complaint)));
        complaint[1] = 3;
        assert!(!taken(&packet4(1, own, &complaint)), "port unreachable");
        complaint[1] = 4;
        complaint[31] = 53;
        assert!(!taken(&packet4(1, own, &complaint)), "about another port");
    }

    #[test]
    fn v02_the_same_over_ipv6_and_for_ip_in_ip() {
        let all = claims(TunnelProtocol::Geneve, 6081, "fd99::1").matches();
        let mut packet = vec![0x60, 0, 0, 0, 0, 60, 17, 64];
        packet.extend([0; 16]);
        packet.extend([0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xc0, 0, 0x17, 0xc1]);
        assert!(all.iter().any(|one| takes(one, &packet)));
        packet[39] = 2;
        assert!(!all.iter().any(|one| takes(one, &packet)));
        let all = claims(TunnelProtocol::IpIp, 0, "192.168.0.1").matches();
        let taken = |number| {
            let packet = packet4(number, [192, 168, 0, 1], &[]);
            all.iter().any(|one| takes(one, &packet))
        };
        assert!(taken(4) && taken(41) && !taken(17) && !taken(6));
    }
    #[test]
    fn s08_e01_ports_of_services_and_answers_to_pods_are_the_appliances() {
        let mut claims = claims(TunnelProtocol::Vxlan, 8472, "192.168.0.1");
        claims.ports = vec!["30000-32767".parse().unwrap()];
        claims.translated = Some("61440-65535".parse().unwrap());
        claims.host_ports.insert((TCP, 8080));
        claims.services = vec![prefix("203.0.113.7", 32)];
        claims.cluster = vec![prefix("10.244.0.0", 16)];
        let all = claims.matches();
        let taken = |packet: &[u8]| all.iter().any(|one| takes(one, packet));
        let own = [192, 168, 0, 1];
        let to_port = |protocol, port: u16| {
            let [high, low] = port.to_be_bytes();
            taken(&packet4(protocol, own, &[0xc0, 0, high, low]))
        };
        for port in [30000, 31234, 32767, 61440, 65535] {
            assert!(
                [TCP, UDP, SCTP]
                    .iter()
                    .all(|protocol| to_port(*protocol, port)),
                "{port}"
            );
        }
        for port in [22, 6443, 10250, 29999, 32768, 45000, 60999, 61439] {
            assert!(
                ![TCP, UDP, SCTP]
                    .iter()
                    .any(|protocol| to_port(*protocol, port)),
                "{port}"
            );
        }
        assert!(to_port(TCP, 8080) && !to_port(UDP, 8080));
        let answer = |id: [u8; 2]| taken(&packet4(ICMP, own, &[0, 0, 0, 0, id[0], id[1], 0, 1]));
        assert!(answer([0xf1, 2]) && !answer([0x12, 2]));
        assert!(
            !taken(&packet4(ICMP, own, &[8, 0, 0, 0, 0xf1, 2, 0, 1])),
            "a ping of the node"
        );
        for kind in [3, 11] {
            let about = |port: u16| {
                let [high, low] = port.to_be_bytes();
                let mut error = vec![kind, 1, 0, 0, 0, 0, 0, 0];
                error.extend(packet4(UDP, [9, 9, 9, 9], &[high, low, 0, 53]));
                taken(&packet4(ICMP, own, &error))
            };
            assert!(about(62000) && about(30080) && !about(45000), "type {kind}");
        }
        assert!(taken(&packet4(TCP, [203, 0, 113, 7], &[0; 4])));
        assert!(!taken(&packet4(TCP, [203, 0, 113, 8], &[0; 4])));
        let mut of_a_pod = packet4(TCP, own, &[0xc0, 0, 0, 22]);
        of_a_pod[12..16].copy_from_slice(&[10, 244, 7, 7]);
        assert!(taken(&of_a_pod));
    }
}
