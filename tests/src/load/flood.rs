//! What a hostile pod, or a stranger on the underlay, sends: bounded in rate and time. IPv4 packets through a raw socket;
//! the kernel fills in the header's checksum.

use super::{Latency, Outcome};
use anyhow::{Context as _, Result};
use nix::sys::socket::{
    self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn,
};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

/// Between two bursts.
const TICK: Duration = Duration::from_millis(2);
const HEADER: usize = 20;

/// What is sent, over and over.
#[derive(Clone, Copy, Debug)]
pub enum Kind {
    /// UDP from ever other source ports to one destination: a new connection each.
    Ports,
    /// First fragments of datagrams whose rest never comes.
    Fragments,
    /// ICMP "fragmentation needed", as a router would answer a tunnel packet from the destination to `peer`.
    TooBig { peer: SocketAddrV4, mtu: u16 },
}

/// How much of it.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Packets a second.
    pub rate: u32,
    pub time: Duration,
}

/// Sends packets of a kind from `source` to `target`.
///
/// # Errors
/// If the raw socket cannot be had (it needs root in its namespace).
pub fn send(source: Ipv4Addr, target: SocketAddrV4, kind: Kind, bounds: Bounds) -> Result<Outcome> {
    let socket = raw()?;
    let to = SockaddrIn::from(target);
    let start = Instant::now();
    let (mut done, mut lost, mut number) = (0u64, 0u64, 0u32);
    while start.elapsed() < bounds.time {
        let due = f64::from(bounds.rate) * start.elapsed().as_secs_f64();
        while f64::from(number) < due {
            let packet = packet(source, target, kind, number);
            number = number.wrapping_add(1);
            match socket::sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()) {
                Ok(_) => done += 1,
                // A full queue of the device is the device's business.
                Err(_) => lost += 1,
            }
        }
        std::thread::sleep(TICK);
    }
    Ok(Outcome {
        done,
        lost,
        seconds: start.elapsed().as_secs_f64(),
        latency: Latency::default(),
    })
}

/// Answers each datagram with itself, for ever.
///
/// # Errors
/// If the socket breaks.
pub fn echo(socket: &UdpSocket) -> Result<()> {
    let mut buffer = [0u8; 2048];
    loop {
        let (length, from) = socket.recv_from(&mut buffer).context("receiving")?;
        // A sender that is gone is no reason to stop.
        let _gone = socket.send_to(buffer.get(..length).unwrap_or_default(), from);
    }
}

fn raw() -> Result<OwnedFd> {
    socket::socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Raw,
    )
    .context("a raw socket (needs root)")
}

fn packet(source: Ipv4Addr, target: SocketAddrV4, kind: Kind, number: u32) -> Vec<u8> {
    let ports = 60_000;
    #[expect(clippy::cast_possible_truncation, reason = "below 65536")]
    let port = 1_024 + (number % ports) as u16;
    let to = *target.ip();
    match kind {
        Kind::Ports => ip(source, to, 17, 0, &udp(port, target.port(), 16)),
        Kind::Fragments => {
            let mut packet = ip(source, to, 17, 0x2000, &udp(port, target.port(), 56));
            // An identification of its own for each datagram.
            #[expect(clippy::cast_possible_truncation, reason = "16 bits on the wire")]
            packet[4..6].copy_from_slice(&(number as u16).wrapping_add(1).max(1).to_be_bytes());
            packet
        }
        Kind::TooBig { peer, mtu } => {
            let mut quoted = ip(to, *peer.ip(), 17, 0x4000, &udp(port, peer.port(), 0));
            quoted[2..4].copy_from_slice(&1500u16.to_be_bytes());
            let sum = !sum(&quoted[..HEADER]);
            quoted[10..12].copy_from_slice(&sum.to_be_bytes());
            let mut message = vec![3, 4, 0, 0, 0, 0];
            message.extend(mtu.to_be_bytes());
            message.extend(quoted);
            let sum = !self::sum(&message);
            message[2..4].copy_from_slice(&sum.to_be_bytes());
            ip(source, to, 1, 0, &message)
        }
    }
}

fn udp(from: u16, to: u16, payload: u16) -> Vec<u8> {
    let mut datagram = Vec::new();
    for field in [from, to, 8 + payload, 0] {
        datagram.extend(field.to_be_bytes());
    }
    datagram.resize(usize::from(8 + payload), 0x2a);
    datagram
}

fn ip(source: Ipv4Addr, to: Ipv4Addr, protocol: u8, fragment: u16, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(HEADER + payload.len()).unwrap_or(u16::MAX);
    let mut packet = vec![0x45, 0];
    packet.extend(length.to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0]);
    packet.extend(source.octets());
    packet.extend(to.octets());
    packet.extend(payload);
    packet
}

/// The Internet checksum's sum.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        let [high, low] = [pair[0], pair.get(1).copied().unwrap_or(0)];
        sum += u32::from(u16::from_be_bytes([high, low]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    #[expect(clippy::cast_possible_truncation, reason = "folded")]
    let folded = sum as u16;
    folded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quoted_header_and_message_of_a_too_big_have_correct_checksums() {
        let peer = SocketAddrV4::new([192, 168, 50, 3].into(), 8472);
        let target = SocketAddrV4::new([192, 168, 50, 2].into(), 0);
        let source = Ipv4Addr::new(192, 168, 50, 201);
        let packet = packet(source, target, Kind::TooBig { peer, mtu: 552 }, 7);
        assert_eq!(sum(&packet[HEADER..]), 0xffff, "the ICMP message");
        assert_eq!(sum(&packet[28..48]), 0xffff, "the quoted header");
        assert_eq!(packet.len(), HEADER + 8 + HEADER + 8);
    }
}
