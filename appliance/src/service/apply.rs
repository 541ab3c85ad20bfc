//! Rows of Services into the shadow tables: each is checked against the rows it refers to, and refused by field.

use super::tables::{
    Backend, CLUSTER, Chunk, ENDPOINTS, EXTERNAL_LOCAL, Frontend, FrontendKey, INTERNAL_LOCAL,
    LOCAL, Member, PRESENT, Port, SERVING, Services, Set, Source, V6,
};
use crate::address::Address;
use crate::apply::Fault;
use crate::twin::Full;
use sluice_contract::report::{Field, RejectReason};
use sluice_contract::service::{
    BackendRow, FrontendRow, PortId, PortRow, SetId, SetRow, SlotsRow, SourceRow,
};
use sluice_contract::{Family, Prefix, Protocol, limits};

const fn full(full: Full) -> Fault {
    (Field::Whole, RejectReason::Full(full.capacity))
}

const INVALID: RejectReason = RejectReason::Invalid;
const MISSING: RejectReason = RejectReason::Missing;

impl Services<'_> {
    pub(crate) fn clear(&mut self) {
        self.frontends.clear();
        self.ports.clear();
        self.sets.clear();
        self.backends.clear();
        self.members.clear();
        self.chunks.clear();
        self.sources.clear();
        self.incomplete = 0;
    }

    pub(crate) fn clear_slice(&mut self, budget: &mut usize) -> bool {
        self.frontends.clear_slice(budget)
            && self.ports.clear_slice(budget)
            && self.sets.clear_slice(budget)
            && self.backends.clear_slice(budget)
            && self.members.clear_slice(budget)
            && self.chunks.clear_slice(budget)
            && self.sources.clear_slice(budget)
    }

    pub(crate) fn sync_slice(&mut self, budget: &mut usize) -> bool {
        // What is in force is complete.
        self.incomplete = 0;
        self.frontends.sync_slice(budget)
            && self.ports.sync_slice(budget)
            && self.sets.sync_slice(budget)
            && self.backends.sync_slice(budget)
            && self.members.sync_slice(budget)
            && self.chunks.sync_slice(budget)
            && self.sources.sync_slice(budget)
    }

    pub(crate) fn exchange(&mut self) {
        self.frontends.exchange();
        self.ports.exchange();
        self.sets.exchange();
        self.backends.exchange();
        self.members.exchange();
        self.chunks.exchange();
        self.sources.exchange();
    }

    /// A set of the shadow of which parts are missing, if there is one.
    ///
    /// # Cost
    /// A comparison, unless there is one: then the whole table of sets.
    pub(crate) fn incomplete(&self) -> Option<(SetId, Fault)> {
        if self.incomplete == 0 {
            return None;
        }
        let mut sets = self.sets.shadow().iter();
        let set = sets.find(|set| set.flags & PRESENT != 0 && !set.is_complete())?;
        Some((
            set.id(),
            (Field::Count, RejectReason::Incomplete(set.missing())),
        ))
    }

    /// Writes a set back, and keeps count of those that are not complete.
    fn store(&mut self, old: Option<&Set>, new: Option<Set>) -> Result<(), Fault> {
        let broken = |set: Option<&Set>| u32::from(set.is_some_and(|set| !set.is_complete()));
        if let Some(new) = new {
            self.sets.put(new).map_err(full)?;
        }
        self.incomplete = (self.incomplete + broken(new.as_ref())).saturating_sub(broken(old));
        Ok(())
    }

    fn shadow_set(&self, id: SetId) -> Result<Set, Fault> {
        let set = self.sets.find_shadow(id.0).copied();
        set.ok_or((Field::Set, MISSING))
    }

    pub(crate) fn put_set(&mut self, row: &SetRow) -> Result<(), Fault> {
        let old = self.sets.find_shadow(row.id.0).copied();
        let mut set = old.unwrap_or_else(|| Set::empty_of(row.id));
        let flags = PRESENT | if row.family == Family::V6 { V6 } else { 0 };
        let used = set.backends > 0 || set.references > 0;
        if used && set.flags != flags {
            return Err((Field::Family, RejectReason::InUse(set.references)));
        }
        if set.chunks > 0 && set.slots != row.slots {
            return Err((Field::Slots, RejectReason::InUse(u32::from(set.chunks))));
        }
        set.flags = flags;
        set.count = row.count;
        set.slots = row.slots;
        self.store(old.as_ref(), Some(set))
    }

    pub(crate) fn remove_set(&mut self, id: SetId) -> Result<(), Fault> {
        let set = self.shadow_set(id).map_err(|_| (Field::Id, MISSING))?;
        let users = set.references + u32::from(set.backends) + u32::from(set.chunks);
        if users > 0 {
            return Err((Field::Id, RejectReason::InUse(users)));
        }
        self.sets.remove(id.0);
        self.store(Some(&set), None)
    }

    pub(crate) fn put_backend(&mut self, row: &BackendRow) -> Result<(), Fault> {
        let set = self.shadow_set(row.set)?;
        let address = Address::from(row.address);
        let family = Family::of(&row.address);
        if address.is_martian_in(family) || address.is_multicast() || address.is_broadcast4() {
            return Err((Field::Address, INVALID));
        }
        if family != set.family() {
            return Err((Field::Family, INVALID));
        }
        if row.port == 0 {
            return Err((Field::Port, INVALID));
        }
        let former = self.backends.find_shadow((row.set.0, row.index)).copied();
        let same = former.is_some_and(|b| b.address == address && b.port == row.port);
        if !same
            && self
                .members
                .find_shadow((row.set.0, address, row.port))
                .is_some()
        {
            return Err((Field::Address, RejectReason::Taken));
        }
        if let Some(former) = former {
            self.members
                .remove((row.set.0, former.address, former.port));
        }
        let backend = Backend::new(row.set, row.index, address, row.port);
        self.backends.put(backend).map_err(full)?;
        self.members
            .put(Member::new(row.set, address, row.port))
            .map_err(full)?;
        if former.is_some() {
            return Ok(());
        }
        let mut grown = set;
        grown.backends = grown.backends.saturating_add(1);
        grown.index_sum = grown.index_sum.saturating_add(u32::from(row.index));
        self.store(Some(&set), Some(grown))
    }

    pub(crate) fn remove_backend(&mut self, id: SetId, index: u16) -> Result<(), Fault> {
        let set = self.shadow_set(id)?;
        let Some(former) = self.backends.remove((id.0, index)) else {
            return Err((Field::Index, MISSING));
        };
        self.members.remove((id.0, former.address, former.port));
        let mut shrunk = set;
        shrunk.backends = shrunk.backends.saturating_sub(1);
        shrunk.index_sum = shrunk.index_sum.saturating_sub(u32::from(index));
        self.store(Some(&set), Some(shrunk))
    }

    pub(crate) fn put_slots(&mut self, row: &SlotsRow) -> Result<(), Fault> {
        let set = self.shadow_set(row.set)?;
        let first = usize::from(row.chunk) * limits::SLOT_CHUNK;
        let expected = usize::from(set.slots)
            .saturating_sub(first)
            .min(limits::SLOT_CHUNK);
        if expected == 0 {
            return Err((Field::Index, INVALID));
        }
        if row.slots.len() != expected || row.slots.iter().any(|slot| *slot >= set.count) {
            return Err((Field::Slots, INVALID));
        }
        let former = self
            .chunks
            .put(Chunk::new(row.set, row.chunk, &row.slots))
            .map_err(full)?;
        if former.is_some() {
            return Ok(());
        }
        let mut grown = set;
        grown.chunks = grown.chunks.saturating_add(1);
        grown.chunk_sum = grown.chunk_sum.saturating_add(u32::from(row.chunk));
        self.store(Some(&set), Some(grown))
    }

    pub(crate) fn remove_slots(&mut self, id: SetId, chunk: u16) -> Result<(), Fault> {
        let set = self.shadow_set(id)?;
        if self.chunks.remove((id.0, chunk)).is_none() {
            return Err((Field::Index, MISSING));
        }
        let mut shrunk = set;
        shrunk.chunks = shrunk.chunks.saturating_sub(1);
        shrunk.chunk_sum = shrunk.chunk_sum.saturating_sub(u32::from(chunk));
        self.store(Some(&set), Some(shrunk))
    }

    fn refer(&mut self, sets: [u32; 3], more: bool) {
        for id in sets.into_iter().filter_map(|raw| raw.checked_sub(1)) {
            let Some(mut set) = self.sets.find_shadow(id).copied() else {
                continue;
            };
            set.references = if more {
                set.references.saturating_add(1)
            } else {
                set.references.saturating_sub(1)
            };
            // The row is there, so there is room for it.
            let _ = self.sets.put(set);
        }
    }

    pub(crate) fn put_port(&mut self, row: &PortRow) -> Result<(), Fault> {
        let old = self.ports.find_shadow(row.id.0).copied();
        let mut port = Port::empty_of(row.id);
        for (place, set) in [
            (CLUSTER, row.cluster),
            (LOCAL, row.local),
            (SERVING, row.serving),
        ] {
            let Some(id) = set else { continue };
            if self.shadow_set(id)?.family() != row.family || id.0 == u32::MAX {
                return Err((Field::Set, INVALID));
            }
            if let Some(slot) = port.sets.get_mut(place) {
                *slot = id.0 + 1;
            }
        }
        let bits = if row.family == Family::V6 { 128 } else { 32 };
        if row.source_lengths.iter().any(|length| *length > bits) {
            return Err((Field::Prefix, INVALID));
        }
        port.affinity = row.affinity;
        port.flags = PRESENT
            | if row.family == Family::V6 { V6 } else { 0 }
            | if row.endpoints { ENDPOINTS } else { 0 }
            | if row.internal_local {
                INTERNAL_LOCAL
            } else {
                0
            }
            | if row.external_local {
                EXTERNAL_LOCAL
            } else {
                0
            };
        port.lengths = u8::try_from(row.source_lengths.len()).unwrap_or(0);
        let lengths = port.source_lengths.iter_mut().zip(&row.source_lengths);
        lengths.for_each(|(to, from)| *to = *from);
        if let Some(old) = old {
            if old.references > 0 && old.family() != row.family {
                return Err((Field::Family, RejectReason::InUse(old.references)));
            }
            port.references = old.references;
        }
        self.ports.put(port).map_err(full)?;
        self.refer(port.sets, true);
        if let Some(old) = old {
            self.refer(old.sets, false);
        }
        Ok(())
    }

    pub(crate) fn remove_port(&mut self, id: PortId) -> Result<(), Fault> {
        let port = self
            .ports
            .find_shadow(id.0)
            .copied()
            .ok_or((Field::Id, MISSING))?;
        if port.references > 0 {
            return Err((Field::Id, RejectReason::InUse(port.references)));
        }
        self.ports.remove(id.0);
        self.refer(port.sets, false);
        Ok(())
    }

    fn refer_port(&mut self, id: PortId, more: bool) {
        let Some(mut port) = self.ports.find_shadow(id.0).copied() else {
            return;
        };
        port.references = if more {
            port.references.saturating_add(1)
        } else {
            port.references.saturating_sub(1)
        };
        // The row is there, so there is room for it.
        let _ = self.ports.put(port);
    }

    pub(crate) fn put_source(&mut self, row: &SourceRow) -> Result<(), Fault> {
        let port = self.ports.find_shadow(row.port.0).copied();
        let port = port.ok_or((Field::Service, MISSING))?;
        if Family::of(&row.prefix.address()) != port.family() {
            return Err((Field::Family, INVALID));
        }
        if !port
            .source_lengths()
            .any(|length| length == row.prefix.length())
        {
            return Err((Field::Prefix, INVALID));
        }
        let former = self
            .sources
            .put(Source::new(row.port, row.prefix))
            .map_err(full)?;
        if former.is_none() {
            self.refer_port(row.port, true);
        }
        Ok(())
    }

    pub(crate) fn remove_source(&mut self, id: PortId, prefix: Prefix) -> Result<(), Fault> {
        let key = (id.0, prefix.length(), prefix.address().into());
        if self.sources.remove(key).is_none() {
            return Err((Field::Prefix, MISSING));
        }
        self.refer_port(id, false);
        Ok(())
    }

    pub(crate) fn put_frontend(&mut self, row: &FrontendRow) -> Result<(), Fault> {
        let port = self.ports.find_shadow(row.service.0).copied();
        let port = port.ok_or((Field::Service, MISSING))?;
        if port.family() != Family::of(&row.address) {
            return Err((Field::Family, INVALID));
        }
        if row.port == 0 {
            return Err((Field::Port, INVALID));
        }
        let key = frontend_key(row.address.into(), row.protocol, row.port);
        let frontend = Frontend::new(key, row.kind, row.service);
        let former = self.frontends.put(frontend).map_err(full)?;
        self.refer_port(row.service, true);
        if let Some(former) = former {
            self.refer_port(former.service(), false);
        }
        Ok(())
    }

    pub(crate) fn remove_frontend(
        &mut self,
        address: Address,
        protocol: Protocol,
        port: u16,
    ) -> Result<(), Fault> {
        match self.frontends.remove(frontend_key(address, protocol, port)) {
            Some(former) => {
                self.refer_port(former.service(), false);
                Ok(())
            }
            None => Err((Field::Id, MISSING)),
        }
    }
}

const fn frontend_key(address: Address, protocol: Protocol, port: u16) -> FrontendKey {
    FrontendKey {
        address,
        port,
        protocol: protocol.number(),
    }
}
