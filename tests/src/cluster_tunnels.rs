//! A pod writes what only nodes may: a packet of the tunnel, in which another pod speaks. No Service takes it to the other node.

use crate::capture::Capture;
use crate::cluster::Cluster;
use crate::cluster_claims::Claim;
use crate::cluster_objects::{AT_NODE_IP, PROGRAM_PORT, TO_PROGRAM, TO_TUNNEL};
use crate::cluster_services::dropped;
use crate::command;
use crate::netns::Netns;
use crate::underlay::{node4, vtep};
use anyhow::{Context as _, Result, ensure};
use std::time::Duration;

/// In VXLAN, with or without a tunnel between the nodes: without one, a node's port hides the pod behind the node's own address.
pub const CLAIM: (&str, Claim) = (
    "no Service leads a pod into a tunnel",
    no_service_leads_a_pod_into_a_tunnel,
);

/// For what is to be in force, and for captures.
const PATIENCE: Duration = Duration::from_secs(20);
/// Pods of node 1, as a forger says.
const BY_NODE: [u8; 4] = [10, 244, 1, 77];
const BY_POD: [u8; 4] = [10, 244, 1, 78];
const VICTIM: [u8; 4] = [10, 244, 2, 2];

fn no_service_leads_a_pod_into_a_tunnel(cluster: &Cluster) -> Result<String> {
    let tunnel = cluster.mode.port();
    cluster.objects.serve_at_node(tunnel)?;
    let (here, there) = (cluster.lab(1)?, cluster.lab(2)?);
    let (pod, victim) = (&cluster.pod(1)?.netns, &cluster.pod(2)?.netns);
    let capture = Capture::start(victim, "eth0", "udp and src net 10.244.1.64/26")?;
    let from = |[a, b, c, d]: [u8; 4]| format!("{a}.{b}.{c}.{d}");
    let seen = |source: [u8; 4]| -> Result<usize> {
        let text = capture.read("")?;
        let source = format!("{}.4000 > ", from(source));
        Ok(text.lines().filter(|line| line.contains(&source)).count())
    };
    // The node itself may: so the packet is one that the other node unwraps.
    command::until("what a node sends", PATIENCE, || {
        send(&here.host, &node4(2), tunnel, &wrapped(BY_NODE)?)?;
        ensure!(seen(BY_NODE)? > 0, "the other node unwraps nothing");
        Ok(())
    })?;
    // Through the tunnel or beside it.
    let filter = format!("udp and dst port {PROGRAM_PORT}");
    let program = Capture::start(&there.host, "any", &filter)?;
    let own = node4(1);
    for (at, address) in [AT_NODE_IP, &own].into_iter().enumerate() {
        // The Service leads to the other node's address by this very way.
        let before = program.frames()?.len();
        command::until("what goes to the node's program", PATIENCE, || {
            send(pod, address, TO_PROGRAM[at], b"good")?;
            ensure!(program.frames()?.len() > before, "nothing by {address}");
            Ok(())
        })?;
        let before = dropped(here, "encap_from_pod")?;
        command::until("a drop", PATIENCE, || {
            send(pod, address, TO_TUNNEL[at], &wrapped(BY_POD)?)?;
            let now = dropped(here, "encap_from_pod")?;
            ensure!(now > before, "nothing was dropped by {address}");
            Ok(())
        })?;
    }
    // Whatever the pod wrote would have arrived before this.
    let before = seen(BY_NODE)?;
    command::until("what a node sends", PATIENCE, || {
        send(&here.host, &node4(2), tunnel, &wrapped(BY_NODE)?)?;
        ensure!(seen(BY_NODE)? > before, "the other node unwraps nothing");
        Ok(())
    })?;
    let forged = seen(BY_POD)?;
    ensure!(forged == 0, "{forged} packets that the pod wrote arrived");
    Ok(format!(
        "by its ClusterIP and by a node's port, to UDP {tunnel} of the other node: dropped where the pod is"
    ))
}

/// One datagram with exactly these bytes.
fn send(client: &Netns, address: &str, port: u16, payload: &[u8]) -> Result<()> {
    use std::fmt::Write as _;
    let mut escaped = String::new();
    for byte in payload {
        write!(escaped, "\\x{byte:02x}")?;
    }
    // The shell's own output would be sent line by line.
    let words = format!(
        "printf '{escaped}' | dd bs=1500 count=1 iflag=fullblock status=none >/dev/udp/{address}/{port}"
    );
    client.run(&["bash", "-c", &words]).map(drop)
}

/// A VXLAN packet from node 1 to node 2, in which a pod speaks to the second node's.
fn wrapped(source: [u8; 4]) -> Result<Vec<u8>> {
    let mut packet = vec![0x08, 0, 0, 0, 0, 0, 1, 0];
    for mac in [vtep(2), vtep(1)] {
        for octet in mac.split(':') {
            packet.push(u8::from_str_radix(octet, 16).context("a MAC")?);
        }
    }
    packet.extend([0x08, 0x00]);
    let mut header = [
        0x45, 0, 0, 32, 0, 0, 0x40, 0, 64, 17, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    header[12..16].copy_from_slice(&source);
    header[16..].copy_from_slice(&VICTIM);
    let words = header
        .chunks(2)
        .map(|it| u32::from(it[0]) << 8 | u32::from(it[1]));
    let sum: u32 = words.sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(header);
    // UDP to the discard port, without a checksum.
    packet.extend([0x0f, 0xa0, 0, 9, 0, 12, 0, 0]);
    packet.extend(b"evil");
    Ok(packet)
}
