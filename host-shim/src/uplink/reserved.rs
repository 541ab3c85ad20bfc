//! Ports that stand for pods are not given to programs of the host (`net.ipv4.ip_local_reserved_ports`, both families).

use std::fs;
use std::io;

use super::ports::PortRange;

const PATH: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";

/// The range that was added; nothing if it was there before.
#[derive(Debug)]
pub(super) struct Reserved(Option<PortRange>);

impl Reserved {
    /// Adds the range to those that are reserved already.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn keep(range: PortRange) -> io::Result<Self> {
        let before = fs::read_to_string(PATH)?;
        let before = before.trim();
        if before.split(',').any(|other| other == range.to_string()) {
            return Ok(Self(None));
        }
        let all = if before.is_empty() {
            range.to_string()
        } else {
            format!("{before},{range}")
        };
        fs::write(PATH, all)?;
        Ok(Self(Some(range)))
    }

    /// Takes back what was added. What the kernel has merged with others stays.
    ///
    /// # Errors
    /// As the kernel says.
    pub(super) fn give_back(&mut self) -> io::Result<()> {
        let Some(range) = self.0.take() else {
            return Ok(());
        };
        let present = fs::read_to_string(PATH)?;
        let range = range.to_string();
        let rest: Vec<&str> = present.trim().split(',').filter(|r| *r != range).collect();
        fs::write(PATH, format!("{}\n", rest.join(",")))
    }
}
