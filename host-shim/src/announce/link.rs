//! Neighbors on the node's link: which addresses this node answers for, of those that several could.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use sluice_announce::elect::elected;
use sluice_announce::l2::{Mac, Responder};
use sluice_model::compile::Served;

use super::AnnounceReport;
use crate::uplink::{Other, Sight};
use crate::wiring::netlink::Netlink;

/// So long after the start a node that nothing was heard of may be about to answer: nothing is taken from it.
const HESITATION: Duration = Duration::from_secs(10);

pub(super) struct Link {
    node: String,
    interface: String,
    began: Instant,
    responder: Option<Responder>,
    /// The card that the responder answers at.
    card: Option<(u32, Mac)>,
}

impl Link {
    pub(super) fn new(node: &str, interface: &str) -> Self {
        Self {
            node: node.to_owned(),
            interface: interface.to_owned(),
            began: Instant::now(),
            responder: None,
            card: None,
        }
    }

    /// Answers for what is this node's to answer for.
    pub(super) fn answer(
        &mut self,
        served: &[&Served],
        is_there: bool,
        sight: &Sight,
        report: &mut AnnounceReport,
    ) {
        let hesitates = self.began.elapsed() < HESITATION;
        let others: Vec<&str> = (sight.others.iter())
            .filter(|it| match it {
                Other::Reached(_) => true,
                Other::NeverHeard(_) => hesitates,
            })
            .map(Other::name)
            .collect();
        if is_there {
            report.answered = own_share(&self.node, &others, served);
        }
        if let Err(error) = self.serve(&report.answered) {
            let problem = format!(
                "Nobody answers for addresses of Services on {}: {error}",
                self.interface
            );
            report.problems.insert(problem);
        }
    }

    fn serve(&mut self, addresses: &BTreeSet<IpAddr>) -> io::Result<()> {
        let card = Netlink::open()?.interface(&self.interface)?;
        let card = card.ok_or(io::ErrorKind::NotFound)?;
        let card = (card.index, card.mac.0);
        if self.card != Some(card) {
            self.responder = None;
            self.card = Some(card);
        }
        let responder = match self.responder.take() {
            Some(responder) => responder,
            None => Responder::start(card.0, card.1)?,
        };
        responder.serve(addresses.clone());
        self.responder = Some(responder);
        Ok(())
    }
}

/// The addresses that fall to `node` when the `others` answer as well.
fn own_share(node: &str, others: &[&str], served: &[&Served]) -> BTreeSet<IpAddr> {
    let is_own = |it: &&&Served| {
        let may = |name: &&str| it.on.as_ref().is_none_or(|nodes| nodes.contains(*name));
        let candidates = others.iter().copied().chain([node]).filter(may);
        elected(it.address, candidates) == Some(node)
    };
    served.iter().filter(is_own).map(|it| it.address).collect()
}
