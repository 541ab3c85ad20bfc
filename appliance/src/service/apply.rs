//! Rows of Services into the shadow tables: each is checked against the rows it refers to, and refused by field.

use super::tables::{
    Backend, CLUSTER, Chunk, DIRECT_RETURN, ENDPOINTS, EXTERNAL_LOCAL, Frontend, FrontendKey,
    INTERNAL_LOCAL, LOCAL, Member, PRESENT, Port, REFUSED, SERVING, Services, Set, Source, V6,
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
        self.incomplete.shadow = 0;
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
        self.incomplete.shadow = self.incomplete.live;
        self.frontends.sync_slice(budget)
            && self.ports.sync_slice(budget)
            && self.sets.sync_slice(budget)
            && self.backends.sync_slice(budget)
            && self.members.sync_slice(budget)
            && self.chunks.sync_slice(budget)
            && self.sources.sync_slice(budget)
    }

    pub(crate) fn exchange(&mut self) {
        core::mem::swap(&mut self.incomplete.live, &mut self.incomplete.shadow);
        self.frontends.exchange();
        self.ports.exchange();
        self.sets.exchange();
        self.backends.exchange();
        self.members.exchange();
        self.chunks.exchange();
        self.sources.exchange();
    }

    /// Whether there is a set of the shadow of which parts are missing.
    pub(crate) const fn is_incomplete(&self) -> bool {
        self.incomplete.shadow != 0
    }

    /// The next set of the shadow of which parts are missing, from the slot `from` on, at most `budget` slots further.
    pub(crate) fn incomplete_from(
        &self,
        from: &mut usize,
        budget: &mut usize,
    ) -> Option<(SetId, Fault)> {
        let sets = self.sets.shadow().get(*from..)?;
        for set in sets.iter().take(*budget) {
            *from += 1;
            *budget -= 1;
            // A set that was refused itself is known to be out of use.
            if set.flags & PRESENT == 0 || set.flags & REFUSED != 0 || set.is_complete() {
                continue;
            }
            let fault = if set.repeats > 0 {
                (Field::Address, RejectReason::Incomplete(set.repeats.into()))
            } else {
                (Field::Count, RejectReason::Incomplete(set.missing()))
            };
            return Some((set.id(), fault));
        }
        None
    }

    /// A set whose new row was refused, and to which ports refer.
    pub(crate) fn silence_set(&mut self, id: SetId) {
        if let Some(old) = self.sets.find_shadow(id.0).copied() {
            let mut set = old;
            set.flags |= REFUSED;
            // The row is there, so there is room for it.
            let _ = self.store(Some(&old), Some(set));
        }
    }

    /// A port whose new row was refused, and to which frontends refer: it has no endpoints.
    pub(crate) fn silence_port(&mut self, id: PortId) {
        let Some(old) = self.ports.find_shadow(id.0).copied() else {
            return;
        };
        let mut port = Port::empty_of(id);
        port.flags = PRESENT | old.flags & V6;
        port.references = old.references;
        // The row is there, so there is room for it.
        let _ = self.ports.put(port);
        self.refer(old.sets, false);
    }

    /// Writes a set back, and keeps count of those that are not complete.
    fn store(&mut self, old: Option<&Set>, new: Option<Set>) -> Result<(), Fault> {
        let broken = |set: Option<&Set>| u32::from(set.is_some_and(|set| !set.is_complete()));
        if let Some(new) = new {
            self.sets.put(new).map_err(full)?;
        }
        let incomplete = &mut self.incomplete.shadow;
        *incomplete = (*incomplete + broken(new.as_ref())).saturating_sub(broken(old));
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
        if used && set.family() != row.family {
            return Err((Field::Family, RejectReason::InUse(set.references)));
        }
        set.flags = flags;
        set.count = row.count;
        set.resize(row.slots);
        self.store(old.as_ref(), Some(set))
    }

    pub(crate) fn remove_set(&mut self, id: SetId) -> Result<(), Fault> {
        let set = self.shadow_set(id).map_err(|_| (Field::Id, MISSING))?;
        let pieces = u32::from(set.chunks) + u32::from(set.stale);
        let users = set.references + u32::from(set.backends) + pieces;
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
        let backend = Backend::new(row.set, row.index, address, row.port);
        let former = self.backends.put(backend).map_err(full)?;
        let mut changed = set;
        // Taken out first: then there is room.
        if let Some(former) = &former {
            self.leave(&mut changed, former);
        }
        if former.is_none() {
            changed.backends = changed.backends.saturating_add(1);
            changed.index_sum = changed.index_sum.saturating_add(u32::from(row.index));
        }
        let joined = self.join(&mut changed, &backend);
        if joined.is_err() {
            self.backends.remove((row.set.0, row.index));
            changed.backends = changed.backends.saturating_sub(1);
            changed.index_sum = changed.index_sum.saturating_sub(u32::from(row.index));
        }
        self.store(Some(&set), Some(changed))?;
        joined
    }

    pub(crate) fn remove_backend(&mut self, id: SetId, index: u16) -> Result<(), Fault> {
        let set = self.shadow_set(id)?;
        let Some(former) = self.backends.remove((id.0, index)) else {
            return Err((Field::Index, MISSING));
        };
        let mut shrunk = set;
        self.leave(&mut shrunk, &former);
        shrunk.backends = shrunk.backends.saturating_sub(1);
        shrunk.index_sum = shrunk.index_sum.saturating_sub(u32::from(index));
        self.store(Some(&set), Some(shrunk))
    }

    /// One more place of the set names that backend. When backends trade places, one is named twice until the other has moved;
    /// a set that ends so is not used.
    fn join(&mut self, set: &mut Set, backend: &Backend) -> Result<(), Fault> {
        let places = self.places(set, backend);
        self.set_places(set, backend, places.saturating_add(1))?;
        set.repeats = set.repeats.saturating_add(u16::from(places > 0));
        Ok(())
    }

    fn leave(&mut self, set: &mut Set, backend: &Backend) {
        let places = self.places(set, backend);
        if places > 1 {
            // The row is there, so there is room for it.
            let _ = self.set_places(set, backend, places - 1);
            set.repeats = set.repeats.saturating_sub(1);
        } else {
            self.members
                .remove((set.id().0, backend.address, backend.port));
        }
    }

    fn places(&self, set: &Set, backend: &Backend) -> u16 {
        let key = (set.id().0, backend.address, backend.port);
        self.members.find_shadow(key).map_or(0, |it| it.places)
    }

    fn set_places(&mut self, set: &Set, backend: &Backend, places: u16) -> Result<(), Fault> {
        let member = Member::new(set.id(), backend.address, backend.port, places);
        self.members.put(member).map(|_| ()).map_err(full)
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
            .put(Chunk::new(&set, row.chunk, &row.slots))
            .map_err(full)?;
        let mut grown = set;
        match former {
            Some(former) if former.edition == set.edition => return Ok(()),
            Some(_) => grown.stale = grown.stale.saturating_sub(1),
            None => {}
        }
        grown.chunks = grown.chunks.saturating_add(1);
        grown.chunk_sum = grown.chunk_sum.saturating_add(u32::from(row.chunk));
        self.store(Some(&set), Some(grown))
    }

    pub(crate) fn remove_slots(&mut self, id: SetId, chunk: u16) -> Result<(), Fault> {
        let set = self.shadow_set(id)?;
        let Some(former) = self.chunks.remove((id.0, chunk)) else {
            return Err((Field::Index, MISSING));
        };
        let mut shrunk = set;
        if former.edition == set.edition {
            shrunk.chunks = shrunk.chunks.saturating_sub(1);
            shrunk.chunk_sum = shrunk.chunk_sum.saturating_sub(u32::from(chunk));
        } else {
            shrunk.stale = shrunk.stale.saturating_sub(1);
        }
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
            }
            | if row.direct_return { DIRECT_RETURN } else { 0 };
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
