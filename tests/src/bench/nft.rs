//! Services as kube-proxy's nftables mode writes them: one lookup in a verdict map, a chain for each Service that chooses an endpoint,
//! a chain for each endpoint that translates, and masquerading by a mark.

use super::objects::{PODS, PORT, RANGE, Service, services};
use crate::need::Need;
use crate::netns::Netns;
use anyhow::{Context as _, Result, bail, ensure};
use std::fmt::Write as _;

/// What does not depend on the Services, after their maps and chains.
const BASE: &str = "
	chain mark-for-masquerade { meta mark set meta mark or 0x4000; }
	chain masquerading {
		meta mark and 0x4000 == 0 return
		meta mark set meta mark xor 0x4000
		masquerade fully-random
	}
	chain services {
		ip daddr . meta l4proto . th dport vmap @service-ips
		ip daddr @nodeport-ips meta l4proto . th dport vmap @service-nodeports
	}
	chain cluster-ips-check {
		ip daddr @cluster-ips reject
		ip daddr SERVICE_RANGE drop
	}
	chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
	chain nodeport-endpoints-check { ip daddr @nodeport-ips meta l4proto . th dport vmap @no-endpoint-nodeports; }
	chain firewall-check { ip daddr . meta l4proto . th dport vmap @firewall-ips; }
	chain filter-prerouting-pre-dnat {
		type filter hook prerouting priority dstnat - 10; policy accept;
		ct state new jump firewall-check
	}
	chain filter-input {
		type filter hook input priority filter; policy accept;
		ct state new jump nodeport-endpoints-check
		ct state new jump service-endpoints-check
	}
	chain filter-forward {
		type filter hook forward priority filter; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump cluster-ips-check
	}
	chain filter-output {
		type filter hook output priority filter; policy accept;
		ct state new jump service-endpoints-check
		ct state new jump firewall-check
	}
	chain nat-prerouting { type nat hook prerouting priority dstnat; policy accept; jump services; }
	chain nat-output { type nat hook output priority -100; policy accept; jump services; }
	chain nat-postrouting { type nat hook postrouting priority srcnat; policy accept; jump masquerading; }
";

/// Serves `count` Services on a node, of which one leads to `pod`.
///
/// # Errors
/// If there is no nft, or the kernel does not have all rules afterwards.
pub(super) fn serve(node: &Netns, count: usize, pod: &str) -> Result<()> {
    if let Some(missing) = Need::Tool("nft").missing() {
        bail!(missing);
    }
    let file = std::env::temp_dir().join(format!("{}.nft", node.name()));
    std::fs::write(&file, rules(&services(count, pod)))?;
    let path = file.to_str().context("path")?;
    let done = node.run(&["nft", "-f", path]);
    std::fs::remove_file(&file)?;
    done?;
    let listed = node.run(&["nft", "list", "chains"])?;
    let chains = listed.matches("chain service-s").count();
    ensure!(chains == count, "{chains} of {count} Services have a chain");
    Ok(())
}

fn rules(services: &[Service]) -> String {
    let mut text = String::from("table ip kube-proxy {\n");
    let join = |items: Vec<String>| items.join(", ");
    let addresses = join(services.iter().map(|it| it.address.clone()).collect());
    let goals = services
        .iter()
        .map(|it| format!("{} . tcp . {PORT} : goto service-{}", it.address, it.name));
    let to_service = "type ipv4_addr . inet_proto . inet_service : verdict;";
    let to_port = "type inet_proto . inet_service : verdict;";
    let goals = join(goals.collect());
    // Writing to a string does not fail.
    let _ = write!(
        text,
        "\tset cluster-ips {{ type ipv4_addr; elements = {{ {addresses} }}; }}\n\
         \tset nodeport-ips {{ type ipv4_addr; }}\n\
         \tmap no-endpoint-services {{ {to_service} }}\n\
         \tmap no-endpoint-nodeports {{ {to_port} }}\n\
         \tmap firewall-ips {{ {to_service} }}\n\
         \tmap service-nodeports {{ {to_port} }}\n"
    );
    text += &BASE.replace("SERVICE_RANGE", RANGE);
    for service in services {
        text += &chains(service);
    }
    let _ = write!(
        text,
        "\tmap service-ips {{ {to_service} elements = {{ {goals} }}; }}\n}}\n"
    );
    text
}

fn chains(service: &Service) -> String {
    let (name, address) = (&service.name, &service.address);
    let endpoint = |index: usize| format!("endpoint-{name}-{index}");
    let mut text = String::new();
    for (index, (pod, port)) in service.endpoints.iter().enumerate() {
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "\tchain {} {{ ip saddr {pod} jump mark-for-masquerade; meta l4proto tcp dnat to {pod}:{port}; }}",
            endpoint(index)
        );
    }
    let count = service.endpoints.len();
    let choices: Vec<String> = (0..count)
        .map(|index| format!("{index} : goto {}", endpoint(index)))
        .collect();
    let _ = writeln!(
        text,
        "\tchain service-{name} {{ ip daddr {address} tcp dport {PORT} ip saddr != {PODS} jump mark-for-masquerade; \
         numgen random mod {count} vmap {{ {} }}; }}",
        choices.join(", ")
    );
    text
}
