//! The flags by which every program that runs an appliance is given its ports.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use clap::Args;

use crate::inherit;
use crate::message::{Identity, text};
use crate::offloads::Offloads;

/// Ports by descriptor, and what the daemon wants to know the process by.
#[derive(Clone, Debug, Default, Args)]
pub struct PortsArgs {
    /// Serve the ports protocol on this inherited descriptor, a listening SOCK_SEQPACKET unix socket
    #[arg(long, value_name = "FD")]
    pub ports: Option<RawFd>,

    /// Build id of the appliance's image, repeated to every daemon that connects
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    pub build: String,

    /// Version of the control contract that the image speaks, repeated likewise
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub contract: u32,

    /// What the host's taps can leave unfinished: a list of checksum, tso4, tso6 and uso, or none
    #[arg(long, value_name = "LIST", default_value_t = Offloads::NONE)]
    pub taps: Offloads,
}

impl PortsArgs {
    /// The inherited listening end, if one was named.
    ///
    /// # Errors
    /// When the descriptor is not there, or is of another kind.
    pub fn listener(&self) -> io::Result<Option<OwnedFd>> {
        self.ports.map(inherit::listener).transpose()
    }

    /// What the process says of itself.
    pub fn identity(&self, program: &str, version: &str) -> Identity {
        Identity {
            program: text(&format!("{program} {version}")),
            build: text(&self.build),
            contract: self.contract,
        }
    }
}
