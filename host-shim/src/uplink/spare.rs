//! Which ports of the node's addresses pods may have, if the operator does not say: as many as the host's own programs can
//! spare.
//!
//! A Linux host gives its programs ports out of `net.ipv4.ip_local_port_range`, 32768 to 60999 unless changed. The range
//! chosen here is reserved (see [`super::reserved`]), so what it has in common with the host's is taken from the host. Ports
//! below 30000 are those of servers and are never taken. Each range is one value under one mask.

use std::fs;

use super::ports::PortRange;

/// What may be taken, the most first: the dynamic ports of RFC 6335, and half and a quarter of them.
const CANDIDATES: [PortRange; 3] = [
    PortRange::LAST_QUARTER,
    PortRange::LAST_EIGHTH,
    PortRange::LAST_SIXTEENTH,
];
/// The fewest ports that the host's programs keep.
const KEPT: usize = 12_000;

/// What the kernel says of the host's own ports.
#[derive(Clone, Debug, Default)]
struct HostPorts {
    local: Option<PortRange>,
    reserved: Vec<PortRange>,
}

impl HostPorts {
    fn read() -> Self {
        let read = |name: &str| {
            let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}"));
            text.unwrap_or_default()
        };
        Self::parse(
            &read("ip_local_port_range"),
            &read("ip_local_reserved_ports"),
        )
    }

    fn parse(local: &str, reserved: &str) -> Self {
        let mut ends = local.split_whitespace().map(|end| end.parse().ok());
        let local = match (ends.next().flatten(), ends.next().flatten()) {
            (Some(first), Some(last)) => PortRange::new(first, last),
            _ => None,
        };
        let reserved = reserved.trim().split(',').filter_map(|text| {
            let (first, last) = text.split_once('-').unwrap_or((text, text));
            PortRange::new(first.parse().ok()?, last.parse().ok()?)
        });
        Self {
            local,
            reserved: reserved.collect(),
        }
    }

    /// The most that leaves the host enough and touches nothing that somebody else has reserved; the least, if none does.
    fn spare(&self, node_ports: PortRange) -> PortRange {
        let is_spare = |range: &PortRange| {
            // An earlier life of the daemon reserved exactly this.
            let others = self.reserved.iter().filter(|other| *other != range);
            let is_others = others.clone().any(|other| other.overlaps(*range));
            let kept = self.local.map_or(KEPT, |local| {
                let ports = local.first()..=local.last();
                let is_kept = |port: &u16| {
                    let port = PortRange::new(*port, *port);
                    port.is_some_and(|port| !range.overlaps(port))
                };
                ports.filter(is_kept).count()
            });
            !is_others && kept >= KEPT && !node_ports.overlaps(*range)
        };
        let found = CANDIDATES.into_iter().find(is_spare);
        found.unwrap_or(PortRange::LAST_SIXTEENTH)
    }
}

/// The ports that the host can spare at this moment.
pub(super) fn spare(node_ports: PortRange) -> PortRange {
    HostPorts::read().spare(node_ports)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(local: &str, reserved: &str) -> String {
        let ports = HostPorts::parse(local, reserved);
        ports.spare(PortRange::ALL_NODE_PORTS).to_string()
    }

    #[test]
    fn e03_pods_get_the_dynamic_ports_where_the_host_keeps_enough() {
        // Linux as it is.
        assert_eq!(chosen("32768\t60999\n", "\n"), "49152-65535");
        // What an earlier life of the daemon reserved is its own.
        assert_eq!(chosen("32768 60999", "49152-65535"), "49152-65535");
        assert_eq!(chosen("32768 60999", "8080,49152-65535"), "49152-65535");
        // Somebody else has reserved ports for a server.
        assert_eq!(chosen("32768 60999", "50000-50100"), "57344-65535");
        assert_eq!(chosen("32768 60999", "58000,50000"), "61440-65535");
        // A host with few ports keeps them.
        assert_eq!(chosen("49152 65535", ""), "61440-65535");
        assert_eq!(chosen("1024 65535", ""), "49152-65535");
        // Nothing is known of the host.
        assert_eq!(chosen("", ""), "49152-65535");
        let wide = PortRange::new(30_000, 50_000).unwrap();
        let ports = HostPorts::parse("32768 60999", "");
        assert_eq!(ports.spare(wide).to_string(), "57344-65535");
    }
}
