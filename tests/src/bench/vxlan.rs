//! The least that a userspace process between a pod and the wire can do: it puts one VXLAN header in front of whatever the pod sends,
//! always the same but for its lengths, and takes it off what comes. There is one other node; nothing is looked up.
//!
//! Where the kernel's taps know tunnels (Linux 6.17), frames of up to 64 KiB stay whole on both sides; elsewhere the pod sends frames
//! of the MTU.

use super::forwarder::{enter, forward, pod};
use anyhow::{Context as _, Result, ensure};
use sluice_ports::offloads::Offloads;
use sluice_ports::tap::{self, HEADER, LONG_HEADER};
use std::net::Ipv4Addr;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::str::FromStr;

/// The tap that is glued to the node's card.
pub(super) const UPLINK: &str = "up0";
/// Ethernet, IPv4, UDP and VXLAN.
const OUTER: usize = 14 + 20 + 8 + 8;
/// Of the kernel's VXLAN in flannel's manner, as all contenders here.
const PORT: u16 = 8472;
const VNI: u8 = 1;

// Of `virtio_net_hdr_v1_hash_tunnel`, all numbers little-endian.
const NEEDS_CHECKSUM: u8 = 1;
const UDP_TUNNEL_IPV4: u8 = 0x20;
const GSO_TYPE: usize = 1;
const HEADER_LENGTH: usize = 2;
const CHECKSUM_START: usize = 6;
const OUTER_TRANSPORT: usize = 20;
const INNER_NETWORK: usize = 22;

/// One end of the tunnel: `MAC,address`.
#[derive(Clone, Copy, Debug)]
pub struct End {
    mac: [u8; 6],
    address: Ipv4Addr,
}

impl FromStr for End {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (mac, address) = text.split_once(',').context("MAC,address")?;
        let octets = mac.split(':').map(|it| u8::from_str_radix(it, 16));
        let octets = octets.collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            mac: octets.try_into().ok().context("six octets")?,
            address: address.parse()?,
        })
    }
}

/// Moves frames between a pod and a tap in the node's namespace until a signal ends the process.
///
/// # Errors
/// If a tap cannot be made or breaks.
pub fn run(netns: &Path, node: &Path, (from, to): (End, End)) -> Result<()> {
    enter(node)?;
    let uplink = tap::attach_for_tunnels(UPLINK).context("the uplink's tap")?;
    let long = tap::vnet_header_size(uplink.as_fd())?;
    let knows_tunnels = long == LONG_HEADER;
    if !knows_tunnels {
        let checksum = Offloads {
            checksum: true,
            ..Offloads::NONE
        };
        tap::set_offloads(uplink.as_fd(), checksum)?;
    }
    let offloads = Offloads {
        uso: false,
        tso4: knows_tunnels,
        tso6: knows_tunnels,
        checksum: true,
    };
    let pod = pod(netns, offloads)?;
    let outer = outer(from, to);
    ensure!(long >= HEADER, "a header of {long} bytes");
    // The pod's header and frame are read where the frame is when the longer header and the outer ones are in front of it.
    let offset = long + OUTER - HEADER;
    forward(
        [pod, uplink],
        offset,
        (
            move |buffer: &mut [u8], end| Some((wrap(buffer, end, (long, &outer)), end)),
            move |buffer: &mut [u8], end| unwrap(buffer, end, long).map(|start| (start, end)),
        ),
    )
}

/// The headers without lengths and checksum.
fn outer(from: End, to: End) -> [u8; OUTER] {
    let mut bytes = [0; OUTER];
    let mut at = 0;
    let mut put = |part: &[u8]| {
        bytes[at..at + part.len()].copy_from_slice(part);
        at += part.len();
    };
    put(&to.mac);
    put(&from.mac);
    put(&[0x08, 0x00]);
    // No options, not to be fragmented, 64 hops, UDP.
    put(&[0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, 17, 0, 0]);
    put(&from.address.octets());
    put(&to.address.octets());
    // Any port of the sender's, no checksum.
    put(&49_152u16.to_be_bytes());
    put(&PORT.to_be_bytes());
    put(&[0, 0, 0, 0]);
    put(&[0x08, 0, 0, 0, 0, 0, VNI, 0]);
    bytes
}

/// Puts the outer headers in front; says where the longer header begins now.
fn wrap(buffer: &mut [u8], end: usize, (long, outer): (usize, &[u8; OUTER])) -> usize {
    let frame = long + OUTER;
    let mut header = [0; LONG_HEADER];
    header[..HEADER].copy_from_slice(&buffer[frame - HEADER..frame]);
    if header[0] & NEEDS_CHECKSUM != 0 {
        move_by(&mut header, CHECKSUM_START, OUTER as i32);
    }
    if header[GSO_TYPE] != 0 {
        header[GSO_TYPE] |= UDP_TUNNEL_IPV4;
        move_by(&mut header, HEADER_LENGTH, OUTER as i32);
        header[OUTER_TRANSPORT..INNER_NETWORK].copy_from_slice(&34u16.to_le_bytes());
        header[INNER_NETWORK..].copy_from_slice(&(OUTER as u16 + 14).to_le_bytes());
    }
    buffer[..long].copy_from_slice(&header[..long]);
    let headers = &mut buffer[long..frame];
    headers.copy_from_slice(outer);
    let length = |without: usize| u16::try_from(end - long - without).unwrap_or(u16::MAX);
    headers[16..18].copy_from_slice(&length(14).to_be_bytes());
    headers[38..40].copy_from_slice(&length(34).to_be_bytes());
    let sum: u32 = headers[14..34]
        .chunks_exact(2)
        .map(|it| u32::from(u16::from_be_bytes([it[0], it[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    headers[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    0
}

/// Takes the outer headers off; says where the pod's header begins now, if it is of the tunnel.
fn unwrap(buffer: &mut [u8], end: usize, long: usize) -> Option<usize> {
    let frame = long + OUTER;
    let is_tunnel = end > frame + 14
        && buffer[long + 12..long + 14] == [0x08, 0x00]
        && buffer[long + 36..long + 38] == PORT.to_be_bytes();
    if !is_tunnel {
        return None;
    }
    let mut header = [0; HEADER];
    header.copy_from_slice(&buffer[..HEADER]);
    header[GSO_TYPE] &= !UDP_TUNNEL_IPV4;
    if header[0] & NEEDS_CHECKSUM != 0 {
        move_by(&mut header, CHECKSUM_START, -(OUTER as i32));
    }
    if header[GSO_TYPE] != 0 {
        move_by(&mut header, HEADER_LENGTH, -(OUTER as i32));
    }
    buffer[frame - HEADER..frame].copy_from_slice(&header);
    Some(frame - HEADER)
}

fn move_by(header: &mut [u8], field: usize, bytes: i32) {
    let number = i32::from(u16::from_le_bytes([header[field], header[field + 1]]));
    let number = u16::try_from(number + bytes).unwrap_or_default();
    header[field..field + 2].copy_from_slice(&number.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrapped_comes_out_as_it_was() {
        let end: End = "02:00:00:00:00:01,192.168.50.2".parse().expect("an end");
        let outer = outer(end, end);
        let frame = LONG_HEADER + OUTER;
        let mut buffer = vec![0u8; 4096];
        let sent = [NEEDS_CHECKSUM, 1, 54, 0, 0xa0, 5, 34, 0, 16, 0, 0, 0];
        buffer[frame - HEADER..frame].copy_from_slice(&sent);
        buffer[frame..frame + 200].fill(0x5a);
        assert_eq!(wrap(&mut buffer, frame + 200, (LONG_HEADER, &outer)), 0);
        assert_eq!(buffer[GSO_TYPE], 1 | UDP_TUNNEL_IPV4);
        assert_eq!(buffer[CHECKSUM_START], 84);
        assert_eq!(buffer[LONG_HEADER + 16..LONG_HEADER + 18], [0, 236]);
        let start = unwrap(&mut buffer, frame + 200, LONG_HEADER).expect("of the tunnel");
        assert_eq!(buffer[start..start + HEADER], sent);
        assert!(
            buffer[start + HEADER..frame + 200]
                .iter()
                .all(|it| *it == 0x5a)
        );
    }
}
