//! Which of the frames that arrive at the node's network card belong to the appliance: as keys of tc's u32 classifier.
//!
//! Exactly these: the tunnel's packets to the node's addresses, routers' complaints about them, and what comes as it is for
//! the node's own pods. Everything else is the host's, and never passes the appliance.

use std::net::IpAddr;

use netlink_packet_route::tc::{TcU32Key, TcU32Selector, TcU32SelectorFlags};
use sluice_contract::Prefix;
use sluice_contract::overlay::TunnelProtocol;

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
const UDP: u8 = 17;
const ICMP6: u8 = 58;
const IP_IN_IP: [u8; 2] = [4, 41];

/// All that belongs to the appliance.
///
/// `node`: the outer addresses; `direct`: the node's own pods, if peers send to them as they are.
pub(super) fn matches(
    protocol: TunnelProtocol,
    port: u16,
    node: &[IpAddr],
    direct: &[Prefix],
) -> Vec<Match> {
    let mut all = Vec::new();
    for address in node {
        let to = || Match::to(*address, 128);
        let (icmp, kind) = match address {
            IpAddr::V4(_) => (ICMP, (0x0304_0000, 0xffff_0000)),
            IpAddr::V6(_) => (ICMP6, (0x0200_0000, 0xff00_0000)),
        };
        let complaint = || to().protocol(icmp).upper(0, kind.0, kind.1);
        // Behind the ICMP header lies the IP header that is complained about, and behind that its ports.
        let quoted = if address.is_ipv4() { 8 + 20 } else { 8 + 40 };
        if protocol == TunnelProtocol::IpIp {
            all.extend(IP_IN_IP.map(|number| to().protocol(number)));
            for number in IP_IN_IP {
                let (at, value, mask) = match address {
                    IpAddr::V4(_) => (8 + 8, u32::from(number) << 16, 0x00ff_0000),
                    IpAddr::V6(_) => (8 + 4, u32::from(number) << 8, 0x0000_ff00),
                };
                all.push(complaint().upper(at, value, mask));
            }
        } else {
            let port = u32::from(port);
            all.push(to().protocol(UDP).upper(0, port, 0x0000_ffff));
            all.push(complaint().upper(quoted, port, 0x0000_ffff));
        }
    }
    all.extend(
        direct
            .iter()
            .map(|pods| Match::to(pods.address(), pods.length())),
    );
    all
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

    #[test]
    fn the_appliance_gets_its_own_and_nothing_else() {
        let node: IpAddr = "192.168.0.1".parse().unwrap();
        let pods = Prefix::new("10.244.1.0".parse().unwrap(), 24).unwrap();
        let all = matches(TunnelProtocol::Vxlan, 8472, &[node], &[pods]);
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
        let node: IpAddr = "fd99::1".parse().unwrap();
        let all = matches(TunnelProtocol::Geneve, 6081, &[node], &[]);
        let mut packet = vec![0x60, 0, 0, 0, 0, 60, 17, 64];
        packet.extend([0; 16]);
        packet.extend([0xfd, 0x99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        packet.extend([0xc0, 0, 0x17, 0xc1]);
        assert!(all.iter().any(|one| takes(one, &packet)));
        packet[39] = 2;
        assert!(!all.iter().any(|one| takes(one, &packet)));
        let node: IpAddr = "192.168.0.1".parse().unwrap();
        let all = matches(TunnelProtocol::IpIp, 0, &[node], &[]);
        let taken = |number| {
            let packet = packet4(number, [192, 168, 0, 1], &[]);
            all.iter().any(|one| takes(one, &packet))
        };
        assert!(taken(4) && taken(41) && !taken(17) && !taken(6));
    }
}
