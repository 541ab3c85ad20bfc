//! The routers, and the speaker that they have sessions with.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use sluice_announce::bgp::config::BgpConfig;
use sluice_announce::bgp::{Farewell, NextHops, Speaker};
use sluice_contract::Prefix;

use super::AnnounceReport;
use crate::uplink::Sight;

pub(super) struct Routers {
    config: BgpConfig,
    speaker: Option<Speaker>,
    next_hops: NextHops,
}

impl Routers {
    pub(super) fn new(config: BgpConfig) -> Self {
        Self {
            config,
            speaker: None,
            next_hops: NextHops::default(),
        }
    }

    /// Tells them these routes and no others.
    pub(super) fn tell(
        &mut self,
        routes: BTreeSet<Prefix>,
        sight: &Sight,
        report: &mut AnnounceReport,
    ) {
        report.routes = routes.iter().map(ToString::to_string).collect();
        let next_hops = next_hops(&sight.addresses);
        if next_hops != self.next_hops {
            // It takes back what it has said: the way it has named is none any more.
            self.speaker = None;
            self.next_hops = next_hops;
        }
        let speaker = match self.speaker.take() {
            Some(speaker) => Ok(speaker),
            None => Speaker::start(self.config.clone(), next_hops),
        };
        match speaker {
            Ok(speaker) => {
                speaker.announce(Arc::new(routes));
                report.routers = speaker.report();
                self.speaker = Some(speaker);
            }
            Err(error) => {
                let problem = format!("Routers are told nothing: {error}");
                report.problems.insert(problem);
            }
        }
    }

    pub(super) fn stop(&mut self, farewell: Farewell) {
        if let Some(speaker) = self.speaker.take() {
            speaker.stop(farewell);
        }
    }
}

fn next_hops(addresses: &[IpAddr]) -> NextHops {
    NextHops {
        v4: addresses.iter().find_map(|it| match it {
            IpAddr::V4(v4) => Some(*v4),
            IpAddr::V6(_) => None,
        }),
        v6: addresses.iter().find_map(|it| match it {
            IpAddr::V6(v6) => Some(*v6),
            IpAddr::V4(_) => None,
        }),
    }
}
