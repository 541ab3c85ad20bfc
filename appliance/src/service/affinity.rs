//! Which backend a client got last, for Services with session affinity.
//!
//! Sets of four places; when all four are in use the one that would end first is overwritten: that client is spread anew at
//! its next connection, which is all that is lost.

use crate::address::Address;
use crate::arena::{Arena, OutOfMemory};
use crate::hash::Hasher;
use crate::time::{Duration, Instant};
use sluice_contract::service::PortId;
use zerocopy::{FromBytes, Immutable, IntoBytes};

const WAYS: usize = 4;

#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Affinity {
    client: Address,
    backend: Address,
    /// In microseconds; 0: empty.
    expires: u64,
    service: u32,
    port: u16,
    pad: u16,
}

/// The table.
#[derive(Debug)]
pub struct Affinities<'m> {
    sets: &'m mut [[Affinity; WAYS]],
    hasher: Hasher,
}

impl<'m> Affinities<'m> {
    /// Room for at least `clients`.
    ///
    /// # Errors
    /// [`OutOfMemory`].
    pub fn new(arena: &mut Arena<'m>, clients: u32, hasher: Hasher) -> Result<Self, OutOfMemory> {
        let sets = (clients as usize).div_ceil(WAYS).max(1).next_power_of_two();
        Ok(Self {
            sets: arena.slice(sets)?,
            hasher,
        })
    }

    /// The backend of `client`, if it is still remembered.
    pub fn recall(&self, service: PortId, client: Address, now: Instant) -> Option<(Address, u16)> {
        let set = self.sets.get(self.set_of(service, client))?;
        let found = set.iter().find(|entry| entry.is_of(service, client, now))?;
        Some((found.backend, found.port))
    }

    /// Remembers the backend of `client` until `seconds` have passed without another connection.
    pub fn remember(
        &mut self,
        service: PortId,
        client: Address,
        (backend, port): (Address, u16),
        seconds: u32,
        now: Instant,
    ) {
        let at = self.set_of(service, client);
        let Some(set) = self.sets.get_mut(at) else {
            return;
        };
        let same = set
            .iter()
            .position(|entry| entry.is_of(service, client, now));
        let place = same.unwrap_or_else(|| {
            let oldest = set
                .iter()
                .enumerate()
                .min_by_key(|(_, entry)| entry.expires);
            oldest.map_or(0, |(place, _)| place)
        });
        if let Some(entry) = set.get_mut(place) {
            *entry = Affinity {
                client,
                backend,
                expires: (now + Duration::from_secs(u64::from(seconds)))
                    .micros()
                    .max(1),
                service: service.0,
                port,
                pad: 0,
            };
        }
    }

    fn set_of(&self, service: PortId, client: Address) -> usize {
        let hash = self
            .hasher
            .hash([client.high(), client.low(), u64::from(service.0)]);
        hash as usize & (self.sets.len() - 1)
    }
}

impl Affinity {
    fn is_of(&self, service: PortId, client: Address, now: Instant) -> bool {
        self.expires > now.micros() && self.service == service.0 && self.client == client
    }
}
