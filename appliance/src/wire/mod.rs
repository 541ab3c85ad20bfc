//! Headers as they lie on the wire.
//!
//! The contract of this folder: a header is taken from bytes with `ref_from_prefix`/`mut_from_prefix` (zerocopy), which checks
//! the length once; after that no accessor can fail, whatever the bytes say. A header says what stands in it, not whether it
//! makes sense: rules are [`crate::parse`]'s. Numbers are big-endian types, so no accessor forgets to swap.

pub mod arp;
pub mod checksum;
pub mod ethernet;
pub mod geneve;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod sctp;
pub mod tcp;
pub mod udp;
pub mod vxlan;

/// Numbers of the IP protocol field that the dataplane knows.
pub mod protocol {
    pub const ICMP: u8 = 1;
    pub const IPIP: u8 = 4;
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const IPV6_IN_IP: u8 = 41;
    pub const ICMP6: u8 = 58;
    pub const SCTP: u8 = 132;
}
