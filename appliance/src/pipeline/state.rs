//! What the packets of the past have left: connections, clients' backends, fragments, how often was
//! spoken, and what routers said.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::bandwidth::Meters;
use crate::conntrack::{Conntrack, Groups, Settings, Sources, State as ConnectionState};
use crate::fragments::Fragments;
use crate::hash::Hasher;
use crate::limiter::Limiter;
use crate::mtu::Learned;
use crate::names;
use crate::recent::Recent;
use crate::service::Affinities;
use crate::tables::Capacity;
use crate::time::{Duration, Instant};
use sluice_contract::policy::WouldDeny;
use sluice_contract::service::ConnectionsRow;

/// All of it.
#[derive(Debug)]
pub(super) struct State<'m> {
    pub(super) conntrack: Conntrack<'m>,
    pub(super) affinities: Affinities<'m>,
    pub(super) fragments: Fragments<'m>,
    pub(super) limiter: Limiter<'m>,
    pub(super) meters: Meters<'m>,
    /// What routers said about the paths to other nodes.
    pub(super) learned: Learned<'m>,
    /// What pods were told about names.
    pub(super) names: names::Learned<'m>,
    /// Neighbors of whom nothing is known.
    pub(super) wanted: Recent<Address>,
    /// What passed although a rule denies it, and how often that was.
    pub(super) audited: Recent<WouldDeny>,
    pub(super) would_deny: u64,
    pub(super) hasher: Hasher,
    /// The packet that was just refused as too large may be cut to this length.
    pub(super) cut: Option<u16>,
}

impl<'m> State<'m> {
    pub(super) fn new(
        arena: &mut Arena<'m>,
        capacity: &Capacity,
        hasher: Hasher,
    ) -> Result<Self, OutOfMemory> {
        let left = arena.left();
        let short = |wanted| OutOfMemory { wanted, left };
        let bytes = Conntrack::region_bytes(capacity.connections).map_err(|_| short(usize::MAX))?;
        let region = arena.slice::<u8>(bytes)?;
        let settings = settings(&ConnectionsRow::default());
        // The region was asked for in the right size and begins at a cache line.
        let conntrack = Conntrack::new(
            region,
            capacity.connections,
            settings,
            hasher,
            Instant::ZERO,
        )
        .map_err(|_| short(bytes))?
        .with_sources(Sources::new(arena, capacity.connections)?)
        .with_groups(Groups::new(arena)?);
        Ok(Self {
            conntrack,
            affinities: Affinities::new(arena, capacity.services.affinities, hasher)?,
            fragments: Fragments::new(arena, capacity.fragments, hasher)?,
            limiter: Limiter::new(arena, hasher)?,
            meters: Meters::new(arena)?,
            learned: Learned::new(arena, usize::from(capacity.overlay.peers))?,
            names: names::Learned::new(arena, &capacity.learned, hasher)?,
            wanted: Recent::default(),
            audited: Recent::default(),
            would_deny: 0,
            hasher,
            cut: None,
        })
    }
}

/// The row in conntrack's own words.
pub(super) fn settings(row: &ConnectionsRow) -> Settings {
    let mut settings = Settings {
        pod_share: row.pod_share,
        tenant_share: row.tenant_share,
        ..Settings::default()
    };
    let groups: [(u32, &[ConnectionState]); 13] = {
        use ConnectionState as S;
        [
            (
                row.tcp_opening,
                &[
                    S::TcpSynSent,
                    S::TcpSynCrossed,
                    S::TcpSynReceived,
                    S::TcpMidflow,
                    S::TcpOneWayOpening,
                ],
            ),
            (row.tcp_established, &[S::TcpEstablished, S::TcpOneWay]),
            (row.tcp_half_closed, &[S::TcpHalfClosed]),
            (row.tcp_closing, &[S::TcpClosing, S::TcpOneWayClosing]),
            (row.tcp_time_wait, &[S::TcpTimeWait]),
            (row.tcp_closed, &[S::TcpClosed, S::TcpResetPending]),
            (row.udp, &[S::UdpUnreplied, S::UdpReplied, S::UdpOneWay]),
            (row.udp_stream, &[S::UdpStream, S::UdpOneWayStream]),
            (row.icmp, &[S::EchoUnreplied, S::EchoReplied]),
            (
                row.sctp_opening,
                &[S::SctpInitSent, S::SctpInitAcked, S::SctpCookieEchoed],
            ),
            (row.sctp_established, &[S::SctpEstablished]),
            (
                row.sctp_closing,
                &[S::SctpShutdown, S::SctpShutdownAcked, S::SctpClosed],
            ),
            (row.other, &[S::OtherUnreplied, S::OtherReplied]),
        ]
    };
    for (seconds, states) in groups {
        for state in states {
            settings
                .timeouts
                .set(*state, Duration::from_secs(u64::from(seconds)));
        }
    }
    settings
}
