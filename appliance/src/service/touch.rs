//! What new connections of a batch will read of the tables, brought into the cache: a choice is a chain of rows, each found by
//! what the one before says, and with many Services each of them lies in memory. So the chains of a batch are walked abreast,
//! one link at a time: a batch then waits once per link, and not each packet.
//!
//! Nothing is decided here: what a walk finds is only where to read next, and a walk that goes astray costs time alone.

use super::tables::FrontendKey;
use super::{Spread, place_in};
use crate::address::Address;
use crate::flow::Flow;
use crate::tables::{Known, Tables};
use heapless::Vec;
use sluice_contract::service::SetId;

/// Flows that are walked together.
pub(crate) const ABREAST: usize = 32;

/// A flow on its walk.
struct Walk<'f, K> {
    flow: &'f Flow,
    key: K,
    start: usize,
}

/// Walks for these flows, at most [`ABREAST`] of them; yields each with the backend to which it probably will go.
#[inline]
pub(crate) fn touch<'f>(
    tables: &Tables<'_>,
    flows: &[&'f Flow],
) -> Vec<(&'f Flow, Address, u16), ABREAST> {
    let services = tables.services();
    let mut sum = 0;
    let mut places: Vec<Walk<'_, Address>, ABREAST> = Vec::new();
    for flow in flows {
        let key = flow.destination();
        let start = tables.known.start(key);
        // A walk beyond the last that is abreast is not made.
        let _ = places.push(Walk { flow, key, start });
    }
    for walk in &places {
        sum ^= tables.known.touch(walk.start);
    }
    let mut frontends: Vec<Walk<'_, FrontendKey>, ABREAST> = Vec::new();
    for Walk { flow, key, start } in places {
        let place = tables.known.find_from(start, key).map(Known::place);
        if let Some(key) = place.and_then(|place| FrontendKey::of(flow, place)) {
            let start = services.frontends.start(key);
            let _ = frontends.push(Walk { flow, key, start });
        }
    }
    for walk in &frontends {
        sum ^= services.frontends.touch(walk.start);
    }
    let mut ports: Vec<Walk<'_, u32>, ABREAST> = Vec::new();
    for Walk { flow, key, start } in frontends {
        if let Some(frontend) = services.frontends.find_from(start, key) {
            let key = frontend.service().0;
            let start = services.ports.start(key);
            let _ = ports.push(Walk { flow, key, start });
        }
    }
    if ports.is_empty() {
        core::hint::black_box(sum);
        return Vec::new();
    }
    for walk in &ports {
        sum ^= services.ports.touch(walk.start);
    }
    let mut sets: Vec<Walk<'_, SetId>, ABREAST> = Vec::new();
    for Walk { flow, key, start } in ports {
        let port = services.ports.find_from(start, key);
        if let Some(key) = port.and_then(|port| port.cluster().or(port.local())) {
            let start = services.sets.start(key.0);
            let _ = sets.push(Walk { flow, key, start });
        }
    }
    for walk in &sets {
        sum ^= services.sets.touch(walk.start);
    }
    let mut backends: Vec<Walk<'_, (u32, u16)>, ABREAST> = Vec::new();
    for Walk { flow, key, start } in sets {
        let row = services.sets.find_from(start, key.0);
        let index = match row.and_then(|row| place_in(tables, row, flow)) {
            Some(Spread::Backend(index)) => index,
            Some(Spread::Slot { chunk, slot }) => {
                let chunk = services.chunks.find((key.0, chunk));
                match chunk.and_then(|chunk| chunk.slot(slot)) {
                    Some(index) => index,
                    None => continue,
                }
            }
            None => continue,
        };
        let key = (key.0, index);
        let start = services.backends.start(key);
        let _ = backends.push(Walk { flow, key, start });
    }
    for walk in &backends {
        sum ^= services.backends.touch(walk.start);
    }
    let mut found = Vec::new();
    for Walk { flow, key, start } in backends {
        if let Some(backend) = services.backends.find_from(start, key) {
            sum ^= tables.known.touch(tables.known.start(backend.address));
            let _ = found.push((flow, backend.address, backend.port));
        }
    }
    core::hint::black_box(sum);
    found
}
