//! What the operator says of routers.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The longest time that the capability can say (RFC 4724 §3: twelve bits).
const RESTART_MAX: u16 = 4095;
/// The shortest hold time that is not "never" (RFC 4271 §4.2).
const HOLD_MIN: u16 = 3;
/// Routers of one node; each has a thread.
const PEERS_MAX: usize = 16;

/// This node's side, and its routers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BgpConfig {
    /// This node's autonomous system.
    pub asn: u32,
    /// Its identifier; its first IPv4 address unless given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router_id: Option<Ipv4Addr>,
    /// How long routers keep the routes when the session ends without a word (RFC 4724); 0: they drop them at once.
    #[serde(default = "graceful_restart_seconds")]
    pub graceful_restart_seconds: u16,
    pub peers: Vec<PeerConfig>,
}

/// A router that is told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    pub address: IpAddr,
    /// Its autonomous system.
    pub asn: u32,
    #[serde(default = "port")]
    pub port: u16,
    /// The session ends when the router says nothing for so long; the shorter one of both sides' counts.
    #[serde(default = "hold_seconds")]
    pub hold_seconds: u16,
    /// Routers on the way to it, and itself. Unless given: 1 to another autonomous system, any number within one's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hops: Option<u8>,
    /// Takes packets of the router only if they came over no more than `hops` (1) hops, by their TTL (RFC 5082), so that
    /// nobody farther away can forge any. The router must do the same: it sends with a TTL of 255 then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ttl_security: bool,
    /// A file whose first line is the password of its TCP sessions (RFC 2385).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,
}

fn graceful_restart_seconds() -> u16 {
    120
}

fn port() -> u16 {
    179
}

fn hold_seconds() -> u16 {
    90
}

impl BgpConfig {
    /// Checks what can be checked without asking anybody.
    ///
    /// # Errors
    /// The field that cannot be, and why.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        // RFC 7607; RFC 6793 §9 keeps 23456 for speakers that know only two octets.
        let is_asn = |asn| asn != 0 && asn != 23_456 && asn != u32::MAX;
        if !is_asn(self.asn) {
            return Err(("announce.bgp.asn", format!("{} is nobody's", self.asn)));
        }
        if self.router_id == Some(Ipv4Addr::UNSPECIFIED) {
            return Err(("announce.bgp.router_id", "is not 0.0.0.0".into()));
        }
        if self.graceful_restart_seconds > RESTART_MAX {
            let reason = format!("{} is over {RESTART_MAX}", self.graceful_restart_seconds);
            return Err(("announce.bgp.graceful_restart_seconds", reason));
        }
        if self.peers.is_empty() || self.peers.len() > PEERS_MAX {
            let reason = format!("{} of them; 1 to {PEERS_MAX} can be", self.peers.len());
            return Err(("announce.bgp.peers", reason));
        }
        for (index, peer) in self.peers.iter().enumerate() {
            let refuse = |field: &str, reason: String| {
                Err((
                    "announce.bgp.peers",
                    format!("{}: {field}: {reason}", peer.address),
                ))
            };
            if peer.address.is_unspecified() || peer.address.is_multicast() {
                return refuse("address", "is no router's".into());
            }
            if !is_asn(peer.asn) {
                return refuse("asn", format!("{} is nobody's", peer.asn));
            }
            if peer.port == 0 {
                return refuse("port", "is not 0".into());
            }
            if peer.hold_seconds < HOLD_MIN {
                return refuse("hold_seconds", format!("is {HOLD_MIN} at least"));
            }
            if peer.hops == Some(0) {
                return refuse("hops", "is 1 at least".into());
            }
            let same =
                |other: &PeerConfig| (other.address, other.port) == (peer.address, peer.port);
            if self.peers.iter().take(index).any(same) {
                return refuse("address", "is given twice".into());
            }
        }
        Ok(())
    }
}
