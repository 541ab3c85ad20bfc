//! The congestion control of everything in a namespace, before anything connects: the machine's default may pace, and a socket that
//! began with one that paces goes on pacing under any other.

use super::words;
use crate::netns::Netns;
use anyhow::{Context as _, Result, ensure};

const WANTED: &str = "cubic";

/// Makes it cubic: by the namespace's default, or by its IPv4 routes where only the machine's own namespace may choose this default
/// (cubic is not in `net.ipv4.tcp_allowed_congestion_control`). That list is the whole machine's and stays as it is.
///
/// # Errors
/// If neither can be changed.
pub(super) fn cubic(netns: &Netns) -> Result<()> {
    let default = words(
        netns,
        &format!("sysctl -qw net.ipv4.tcp_congestion_control={WANTED}"),
    );
    let Err(refused) = default else {
        return Ok(());
    };
    by_routes(netns).with_context(|| format!("{refused:#}; and not by routes"))
}

fn by_routes(netns: &Netns) -> Result<()> {
    let routes = words(netns, "ip -4 route show")?;
    ensure!(!routes.trim().is_empty(), "there are none");
    for route in routes.lines() {
        // Of the state, not of the route.
        let route = route.replace(" linkdown", "");
        words(
            netns,
            &format!("ip -4 route change {} congctl {WANTED}", route.trim()),
        )?;
    }
    Ok(())
}
