//! What two nodes put on the wire between them, as dissectors that nobody here wrote take it apart: every field that the tunnel's
//! format leaves no choice about, and every checksum.

use crate::capture::Capture;
use crate::cluster::{Cluster, Mode};
use crate::cluster_claims::Claim;
use crate::lab::Lab;
use crate::traffic::{PORT, at, datagrams, ping_marked, serve, stream};
use crate::underlay::vtep;
use anyhow::{Result, ensure};
use std::collections::BTreeSet;

/// The claim, by what it says. The cards of the nodes are slower afterwards.
pub const CLAIM: (&str, Claim) = (
    "frames are what the format says",
    frames_are_what_the_format_says,
);

/// Enough for segments of full length, and few enough for a look at each.
const BULK: u64 = 200_000;
/// ECT(0), which shows on the outer packet (RFC 6040).
const ECN: &str = "2";
/// Pings in each family.
const PINGS: u8 = 3;
/// Seconds of datagrams.
const A_FEW: &str = "0.005";
/// What no frame may be. Where the kernel completes a checksum and it is zero, it writes the other zero, for TCP as for UDP.
const WRONG: &str = "(_ws.malformed || _ws.expert.severity == error || ip.checksum.status == 0 || udp.checksum.status == 0 \
                     || tcp.checksum.status == 0 || icmp.checksum.status == 0 || icmpv6.checksum.status == 0) \
                     && !(tcp.checksum == 0xffff)";

/// A frame's fields as tshark names them, and what they have to be. Where a field is there twice, outside and inside, both
/// values stand with a comma between.
type Fields = Vec<(&'static str, String)>;

/// Frames from pod 1 to pod 2 are what the format says, by tshark and by tcpdump: full-size pings with ECN, streams and datagrams
/// of both families.
///
/// # Errors
/// If a field is another, a checksum is wrong, or a packet is lost.
pub fn frames_are_what_the_format_says(cluster: &Cluster) -> Result<String> {
    let (a, b) = (cluster.pod(1)?, cluster.pod(2)?);
    for lab in &cluster.nodes {
        // As on a wire: nobody behind the card completes checksums or cuts.
        lab.host.run(&["ethtool", "-K", "eth0", "tx", "off"])?;
    }
    let [near4, near6] = Cluster::near();
    // Whoever is outside leaves its checksums to a card.
    let nodes = format!("(ip or ip6) and not host {near4} and not host {near6}");
    let capture = Capture::whole(&cluster.underlay.netns, "wire", &nodes)?;
    let _there = serve(&b.netns)?;
    for (address, header) in b.addresses().iter().zip([28, 48]) {
        ping_marked(&a.netns, address, PINGS, cluster.mtu - header, ECN)?;
        stream(&a.netns, &at(address, PORT), BULK)?;
        datagrams(&a.netns, &at(address, PORT), A_FEW)?;
    }
    let mut seen = 0;
    for (six, echo, flow, source) in [
        (false, "icmp.type == 8", "icmp.ident", "ip.src"),
        (
            true,
            "icmpv6.type == 128",
            "icmpv6.echo.identifier",
            "ipv6.src",
        ),
    ] {
        let (from, to) = (
            &a.addresses()[usize::from(six)],
            &b.addresses()[usize::from(six)],
        );
        // The length excludes the first ping, which looked for an answer; the source excludes the nodes' own probes.
        let shown = format!("{echo} && frame.len == 1514 && {source} == {from}");
        let wanted = expected(cluster, six, [from, to])?;
        let mut names: Vec<&str> = wanted.iter().map(|(name, _)| *name).collect();
        names.extend([flow, "udp.srcport"]);
        let lines = capture.until_fields(&shown, &names, PINGS.into())?;
        let ports = lines.iter().map(|line| compare(&wanted, line));
        one_port_each(cluster.mode, &ports.collect::<Result<_>>()?)?;
        seen += lines.len();
    }
    let wrong = capture.fields(
        WRONG,
        &["frame.number", "frame.protocols", "_ws.expert.message"],
    )?;
    ensure!(wrong.is_empty(), "tshark finds wrong: {wrong:?}");
    let frames = as_tcpdump_prints_it(cluster.mode, &capture)?;
    Ok(format!(
        "{seen} full-size echo requests field by field, {frames} frames with every checksum right"
    ))
}

/// A MAC address of a node's card.
fn card(lab: &Lab) -> Result<String> {
    let shown = lab.host.run(&["cat", "/sys/class/net/eth0/address"])?;
    Ok(shown.trim().to_owned())
}

/// The fields of an echo request from one pod to the other.
fn expected(cluster: &Cluster, six: bool, [from, to]: [&str; 2]) -> Result<Fields> {
    let (here, there) = (Cluster::own(1), Cluster::own(2));
    let underlay = usize::from(cluster.six);
    let outer = [here[underlay].as_str(), there[underlay].as_str()];
    let mode = cluster.mode;
    // Which IP headers there are, outermost first: the family, its ends, its hops.
    let mut headers = vec![(six, [from, to], "63")];
    if mode != Mode::Direct {
        headers.insert(0, (cluster.six, outer, "64"));
    }
    let of = |six: bool, what: fn(&[&str; 2], &str) -> String| {
        let all = headers.iter().filter(|(it, ..)| *it == six);
        let all: Vec<String> = all.map(|(_, ends, hops)| what(ends, hops)).collect();
        all.join(",")
    };
    let mut fields: Fields = Vec::new();
    for (v6, names) in [
        (false, ["ip.src", "ip.dst", "ip.ttl", "ip.dsfield"]),
        (true, ["ipv6.src", "ipv6.dst", "ipv6.hlim", "ipv6.tclass"]),
    ] {
        let class = if v6 { "0x00000002" } else { "0x02" };
        fields.push((names[0], of(v6, |ends, _| ends[0].to_owned())));
        fields.push((names[1], of(v6, |ends, _| ends[1].to_owned())));
        fields.push((names[2], of(v6, |_, hops| hops.to_owned())));
        fields.push((names[3], of(v6, |_, _| String::new()).replace(',', "")));
        let count = headers.iter().filter(|(it, ..)| *it == v6).count();
        if let Some((_, classes)) = fields.last_mut() {
            *classes = vec![class; count].join(",");
        }
    }
    // Never to be fragmented: the ping asked for it, and the outer packet is anyway.
    let four = headers.iter().filter(|(it, ..)| !it).count();
    fields.push(("ip.flags.df", vec!["1"; four].join(",")));
    let (mut source, mut destination) = (card(cluster.lab(1)?)?, card(cluster.lab(2)?)?);
    if matches!(mode, Mode::Vxlan | Mode::VxlanGbp | Mode::Geneve) {
        source = format!("{source},{}", vtep(1));
        destination = format!("{destination},{}", vtep(2));
    }
    fields.extend([("eth.src", source), ("eth.dst", destination)]);
    fields.extend(of_the_format(mode, six));
    if matches!(mode, Mode::Ipip | Mode::Direct) {
        fields.push(("udp.dstport", String::new()));
    } else {
        fields.push(("udp.dstport", mode.port().to_string()));
        // Over IPv4 there is none; over IPv6 it is right, which is asked of all frames.
        let checksum = if cluster.six { "1" } else { "3" };
        fields.push(("udp.checksum.status", checksum.into()));
    }
    Ok(fields)
}

/// The fields that only this format has.
fn of_the_format(mode: Mode, six: bool) -> Fields {
    let inner = if six { "0x86dd" } else { "0x0800" };
    let all: &[(&'static str, &str)] = match mode {
        Mode::Vxlan => &[("vxlan.flags", "0x0800"), ("vxlan.vni", "1")],
        // The identity of a first pod without a cluster.
        Mode::VxlanGbp => &[
            ("vxlan.flags", "0x8800"),
            ("vxlan.vni", "1"),
            ("vxlan.gbp", "272"),
        ],
        Mode::Geneve | Mode::GeneveIp => &[
            ("geneve.version", "0"),
            ("geneve.vni", "0x000001"),
            ("geneve.option.class", "0xff53"),
            ("geneve.option.type", "0x01"),
            (
                "geneve.proto_type",
                match mode {
                    Mode::Geneve => "0x6558",
                    _ => inner,
                },
            ),
        ],
        Mode::Ipip | Mode::Direct => &[("vxlan.vni", ""), ("geneve.vni", "")],
    };
    all.iter()
        .map(|(name, value)| (*name, (*value).to_owned()))
        .collect()
}

/// Compares all fields; what follows them is the flow and its outer source port.
fn compare(wanted: &Fields, line: &str) -> Result<[String; 2]> {
    let mut seen: Vec<&str> = line.split(' ').collect();
    let port = seen.pop().unwrap_or_default().to_owned();
    let flow = seen.pop().unwrap_or_default().to_owned();
    ensure!(seen.len() == wanted.len(), "fields without number: {line}");
    for ((name, wanted), seen) in wanted.iter().zip(seen) {
        let seen = seen.replace("True", "1");
        ensure!(seen == *wanted, "{name} is {seen:?}, not {wanted:?}");
    }
    Ok([flow, port])
}

/// A flow keeps its outer source port, which is of the range of RFC 7348 §5.
fn one_port_each(mode: Mode, seen: &BTreeSet<[String; 2]>) -> Result<()> {
    let flows: BTreeSet<&String> = seen.iter().map(|[flow, _]| flow).collect();
    ensure!(flows.len() == seen.len(), "flows and their ports: {seen:?}");
    for [_, port] in seen {
        let entropy = port.parse::<u16>().is_ok_and(|port| port >= 49152);
        let has_none = matches!(mode, Mode::Ipip | Mode::Direct) && port.is_empty();
        ensure!(entropy || has_none, "the outer source port is {port:?}");
    }
    Ok(())
}

/// tcpdump knows every frame's format and finds no checksum wrong; how many frames there are.
fn as_tcpdump_prints_it(mode: Mode, capture: &Capture) -> Result<usize> {
    let word = match mode {
        // It takes the port for another protocol's, which has VXLAN's header.
        Mode::Vxlan => "OTV, flags [I] (0x08), overlay 0, instance 1",
        Mode::VxlanGbp => "OTV, flags [I] (0x88), overlay",
        Mode::Geneve | Mode::GeneveIp => "vni 0x1, options [class Unknown (0xff53) type 0x1 len 8]",
        Mode::Ipip => "IPIP (4)",
        Mode::Direct => "Flags [",
    };
    let text = capture.read("")?;
    let frames = text.matches(word).count();
    ensure!(
        frames > 100,
        "tcpdump finds {frames} frames of {mode:?} in {text:.1500}"
    );
    for wrong in ["[bad ", " bad cksum", "incorrect", "(wrong "] {
        let line = text.lines().find(|line| line.contains(wrong));
        ensure!(line.is_none(), "tcpdump says {line:?}");
    }
    Ok(frames)
}
