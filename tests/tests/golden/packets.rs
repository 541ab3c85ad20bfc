//! The packets whose frames are compared, complete with every header and checksum: no kernel on the way has anything to fill in.

use anyhow::{Context as _, Result};
use etherparse::{
    IpDscp, IpEcn, IpHeaders, Ipv4Header, Ipv6FlowLabel, Ipv6Header, PacketBuilder,
    TcpOptionElement,
};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, sendto,
    socket,
};
use sluice_tests::netns::Netns;
use std::fs::File;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::AsRawFd as _;

const FROM4: [u8; 4] = [10, 244, 1, 2];
const TO4: [u8; 4] = [10, 244, 9, 2];
const FROM6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 1, 0, 0, 0, 2);
const TO6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x244, 0, 9, 0, 0, 0, 2);
/// Congestion was experienced.
pub(crate) const CE: u8 = 3;

/// A packet of the pod here to the pod there.
#[derive(Debug)]
pub(crate) struct Sample {
    pub(crate) name: &'static str,
    /// DSCP and ECN.
    pub(crate) class: u8,
    /// From the IP header on.
    pub(crate) packet: Vec<u8>,
    /// Bytes of the IP header.
    header: usize,
}

impl Sample {
    /// Whether the frame carries it: what routers leave as it is ends the frame.
    pub(crate) fn is_in(&self, frame: &[u8]) -> bool {
        let upper = self.packet.get(self.header..).unwrap_or_default();
        // Two classes of one datagram differ in nothing else.
        let at = frame.len().checked_sub(self.packet.len());
        let inner = at.and_then(|at| frame.get(at..)).unwrap_or_default();
        frame.ends_with(upper) && class_of(inner) == Some(self.class)
    }

    /// Sends it as it is.
    pub(crate) fn send(&self, pod: &Netns) -> Result<()> {
        let netns = File::open(pod.path())?;
        let packet = &self.packet;
        let six = self.header == Ipv6Header::LEN;
        // A thread of its own, for it does not come back from that namespace.
        let sent = std::thread::scope(|scope| {
            let sending = scope.spawn(move || -> nix::Result<usize> {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                let family = if six {
                    AddressFamily::Inet6
                } else {
                    AddressFamily::Inet
                };
                let raw = socket(
                    family,
                    SockType::Raw,
                    SockFlag::SOCK_CLOEXEC,
                    SockProtocol::Raw,
                )?;
                let raw = raw.as_raw_fd();
                if six {
                    let to = SockaddrIn6::from(SocketAddrV6::new(TO6, 0, 0, 0));
                    sendto(raw, packet, &to, MsgFlags::empty())
                } else {
                    let to = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::from(TO4), 0));
                    sendto(raw, packet, &to, MsgFlags::empty())
                }
            });
            sending.join()
        });
        sent.ok().context("the sending thread broke")??;
        Ok(())
    }
}

/// The traffic class of a packet.
fn class_of(packet: &[u8]) -> Option<u8> {
    match (packet.first()? >> 4, packet) {
        (4, [_, class, ..]) => Some(*class),
        (6, [high, low, ..]) => Some(high << 4 | low >> 4),
        _ => None,
    }
}

fn header4(class: u8, whole: bool) -> Result<IpHeaders> {
    let header = Ipv4Header {
        dscp: IpDscp::try_new(class >> 2)?,
        ecn: IpEcn::try_new(class & 3)?,
        identification: 0x1234,
        dont_fragment: whole,
        time_to_live: 64,
        source: FROM4,
        destination: TO4,
        ..Ipv4Header::default()
    };
    Ok(IpHeaders::Ipv4(header, Default::default()))
}

fn header6(class: u8) -> Result<IpHeaders> {
    let header = Ipv6Header {
        traffic_class: class,
        flow_label: Ipv6FlowLabel::try_new(0x4_2aa5)?,
        hop_limit: 64,
        source: FROM6.octets(),
        destination: TO6.octets(),
        ..Ipv6Header::default()
    };
    Ok(IpHeaders::Ipv6(header, Default::default()))
}

/// A datagram, an echo request or a SYN behind that header, with that payload.
fn made(
    name: &'static str,
    class: u8,
    ip: IpHeaders,
    kind: Kind,
    payload: &[u8],
) -> Result<Sample> {
    let header = match &ip {
        IpHeaders::Ipv4(..) => Ipv4Header::MIN_LEN,
        IpHeaders::Ipv6(..) => Ipv6Header::LEN,
    };
    let six = header == Ipv6Header::LEN;
    let mut packet = Vec::new();
    let begun = PacketBuilder::ip(ip);
    match kind {
        Kind::Datagram(port) => begun.udp(port, 7000).write(&mut packet, payload)?,
        Kind::Echo if six => begun
            .icmpv6_echo_request(77, 1)
            .write(&mut packet, payload)?,
        Kind::Echo => begun
            .icmpv4_echo_request(77, 1)
            .write(&mut packet, payload)?,
        Kind::Syn => begun
            .tcp(41_000, 7000, 0x0102_0304, 64_000)
            .syn()
            .options(&[
                // Below what the tunnel leaves, so nobody lowers it.
                TcpOptionElement::MaximumSegmentSize(1200),
                TcpOptionElement::SelectiveAcknowledgementPermitted,
            ])?
            .write(&mut packet, &[])?,
    }
    Ok(Sample {
        name,
        class,
        packet,
        header,
    })
}

#[derive(Clone, Copy)]
enum Kind {
    /// From that port.
    Datagram(u16),
    Echo,
    Syn,
}

/// All of them, for pods of that MTU.
pub(crate) fn samples(mtu: u16) -> Result<Vec<Sample>> {
    let full: Vec<u8> = (0..mtu).map(|n| (n % 251) as u8).collect();
    let full = |headers: usize| full.get(headers..).unwrap_or_default();
    let ect0 = 0x0a << 2 | 2;
    Ok(vec![
        made(
            "an odd datagram",
            0,
            header4(0, true)?,
            Kind::Datagram(40_001),
            b"odd",
        )?,
        made(
            "one that may be cut",
            0,
            header4(0, false)?,
            Kind::Datagram(40_002),
            b"",
        )?,
        made(
            "DSCP and ECT(0)",
            ect0,
            header4(ect0, true)?,
            Kind::Datagram(40_003),
            b"class",
        )?,
        made(
            "congestion",
            CE,
            header4(CE, true)?,
            Kind::Datagram(40_004),
            b"congestion",
        )?,
        made(
            "an echo request",
            0,
            header4(0, true)?,
            Kind::Echo,
            b"echo request",
        )?,
        made("a SYN", 0, header4(0, true)?, Kind::Syn, b"")?,
        made(
            "a full packet",
            0,
            header4(0, true)?,
            Kind::Datagram(40_005),
            full(28),
        )?,
        made(
            "an odd datagram, IPv6",
            0,
            header6(0)?,
            Kind::Datagram(40_001),
            b"odd six",
        )?,
        made(
            "DSCP and ECT(0), IPv6",
            ect0,
            header6(ect0)?,
            Kind::Datagram(40_003),
            b"class six",
        )?,
        made(
            "congestion, IPv6",
            CE,
            header6(CE)?,
            Kind::Datagram(40_004),
            b"congestion six",
        )?,
        made(
            "an echo request, IPv6",
            0,
            header6(0)?,
            Kind::Echo,
            b"echo request six",
        )?,
        made("a SYN, IPv6", 0, header6(0)?, Kind::Syn, b"")?,
        made(
            "a full packet, IPv6",
            0,
            header6(0)?,
            Kind::Datagram(40_005),
            full(48),
        )?,
    ])
}
