//! From a tentative connection on the stack to one in the table, and out of it again: the only places where rows, index
//! entries, lists and counts change together.

use sluice_contract::LinkId;

use crate::conntrack::index::Places;
use crate::conntrack::region::{Owner, Row, TRANSLATED, V6, pack, unpack};
use crate::conntrack::row::{Tracking, reply_of};
use crate::conntrack::state::{EXTENSION, Standing, State};
use crate::conntrack::{
    Attached, ConnId, Conntrack, Hit, Invalid, Signal, handshake, index, region::Detail, sctp,
    sources,
};
use crate::flow::{Direction, Flow, FlowHash};
use crate::time::Instant;
use crate::wire::protocol;

/// A connection that nobody but its maker knows of. Dropping it leaves no trace.
#[derive(Clone, Copy, Debug)]
pub struct NewConnection {
    original: Flow,
    hash: FlowHash,
    owner: LinkId,
    state: State,
    tracking: Tracking,
    /// The flow of the answers as they will arrive: the reversed original, unless a stage translates.
    pub reply: Flow,
    /// What the stages want to find at each hit.
    pub attached: Attached,
}

impl NewConnection {
    /// The flow of the packet that opened it.
    pub const fn original(&self) -> &Flow {
        &self.original
    }

    /// The link the packet came from.
    pub const fn owner(&self) -> LinkId {
        self.owner
    }

    /// Its answers will go another way. `false` for a protocol of which both directions have to be seen.
    pub const fn expect_no_answers(&mut self) -> bool {
        match self.state.one_way() {
            Some(state) => {
                self.state = state;
                true
            }
            None => false,
        }
    }

    /// The flow of the packet once it is translated.
    #[must_use]
    pub const fn outgoing(&self) -> Flow {
        self.reply.reversed()
    }
}

/// Why a connection was not taken in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommitError {
    /// The flow has a connection already, and this packet belongs to it.
    Conflict(Hit),
    /// Another connection has answers of the same flow; the translation cannot be told from it.
    ReplyTaken(Hit),
    /// Everything in the table is established.
    Full,
    /// The owner has its share.
    Quota,
    /// The translation is to another protocol or family.
    Family,
}

impl<'r> Conntrack<'r> {
    /// The connection that a packet nobody knows would open.
    ///
    /// # Errors
    /// [`Invalid`] if a packet like this cannot begin anything.
    pub fn open(
        &mut self,
        flow: &Flow,
        hash: FlowHash,
        owner: LinkId,
        signal: &Signal,
        now: Instant,
    ) -> Result<NewConnection, Invalid> {
        let midflow = now < self.midflow_until;
        let opened = match (flow.protocol(), signal) {
            (protocol::TCP, Signal::Tcp(segment)) => {
                handshake::open(segment, midflow).map(|(state, tcp)| (state, Tracking::Tcp(tcp)))
            }
            (protocol::SCTP, Signal::Sctp(chunks)) => {
                sctp::open(chunks, midflow).map(|(state, tags)| (state, Tracking::Sctp(tags)))
            }
            (protocol::ICMP | protocol::ICMP6, Signal::Query) => {
                Ok((State::EchoUnreplied, Tracking::None))
            }
            (protocol::ICMP | protocol::ICMP6, Signal::Answer) => Err(Invalid::Unsolicited),
            (protocol::TCP | protocol::SCTP | protocol::ICMP | protocol::ICMP6, _) => {
                Err(Invalid::Protocol)
            }
            (_, Signal::Datagram) => Ok((State::unreplied(flow), Tracking::None)),
            _ => Err(Invalid::Protocol),
        };
        match opened {
            Ok((state, tracking)) => Ok(NewConnection {
                original: *flow,
                hash,
                owner,
                state,
                tracking,
                reply: flow.reversed(),
                attached: Attached::default(),
            }),
            Err(invalid) => Err(self.counters.count_invalid(invalid)),
        }
    }

    /// Takes a connection in. Both directions are found from now on, or neither.
    ///
    /// # Errors
    /// [`CommitError`]; the table is then as before, except that connections whose time was over may be gone.
    ///
    /// # Cost
    /// Constant. At most two evictions (one, unless it is a translated connection of IPv6).
    pub fn commit(&mut self, new: &NewConnection, now: Instant) -> Result<Hit, CommitError> {
        let tick = self.advance_clock(now);
        let committed = self.try_commit(new, tick);
        match committed {
            Ok(_) => self.counters.committed += 1,
            Err(CommitError::Conflict(_)) => self.counters.conflicts += 1,
            Err(CommitError::ReplyTaken(_) | CommitError::Family) => self.counters.reply_taken += 1,
            Err(error) => self.count_refused(new.owner, error),
        }
        committed
    }

    fn try_commit(&mut self, new: &NewConnection, tick: u64) -> Result<Hit, CommitError> {
        let translated = new.reply != new.original.reversed();
        let wide = translated && new.original.is_v6();
        let slots = 1 + u32::from(wide);
        self.make_way(&new.original, new.hash, tick)
            .map_err(CommitError::Conflict)?;
        if new.reply.is_v6() != new.original.is_v6()
            || new.reply.protocol() != new.original.protocol()
        {
            return Err(CommitError::Family);
        }
        self.admit(new.owner, slots)?;
        let mut hashes = [new.hash; 2];
        if translated {
            hashes[1] = self.hash(&new.reply);
        }
        // Not only if it is translated: the answers may be what another translated connection began with.
        self.make_way(&new.reply, hashes[1], tick)
            .map_err(CommitError::ReplyTaken)?;
        while self.region.free() < slots {
            if !self.evict(new.owner) {
                return Err(CommitError::Full);
            }
        }
        let hashes = if translated {
            &hashes[..]
        } else {
            &hashes[..1]
        };
        self.place(new, hashes, tick).ok_or(CommitError::Full)
    }

    /// Whether `owner` may have so many more slots, as far as shares go.
    fn admit(&self, owner: LinkId, slots: u32) -> Result<(), CommitError> {
        if self.region.owners[owner.index()].slots + slots > self.quota(owner) {
            return Err(CommitError::Quota);
        }
        self.admit_group(owner, slots)
    }

    /// Whether the share of `owner` is used up: then nothing need be searched for its connection.
    ///
    /// # Errors
    /// [`CommitError::Quota`].
    pub fn has_share(&self, owner: LinkId) -> Result<(), CommitError> {
        self.admit(owner, 1)
    }

    /// Counts a connection that was refused to `owner`.
    pub fn count_refused(&mut self, owner: LinkId, error: CommitError) {
        match error {
            CommitError::Full => self.counters.refused_full += 1,
            CommitError::Quota => self.counters.refused_quota += 1,
            _ => return,
        }
        let owner = self.owner_mut(owner.raw());
        owner.refused = owner.refused.saturating_add(1);
    }

    /// Makes sure that `flow` is nobody's: ends a connection whose time is over, and returns one that lives.
    fn make_way(&mut self, flow: &Flow, hash: FlowHash, tick: u64) -> Result<(), Hit> {
        match self.find(flow, hash) {
            None => Ok(()),
            Some(hit) if self.is_over(hit, tick) => {
                self.discard(hit.id.0);
                self.counters.expired += 1;
                Ok(())
            }
            Some(hit) => Err(hit),
        }
    }

    /// Slots that an owner may have.
    pub(crate) fn quota(&self, owner: LinkId) -> u32 {
        let share = if owner.is_pod() {
            self.settings.pod_share
        } else {
            self.settings.other_share
        };
        if share >= 100 {
            // All of it: then the table being full is the limit, and not this.
            return u32::MAX;
        }
        let slots = u64::from(self.capacity()) * u64::from(share) / 100;
        (slots as u32).max(1)
    }

    /// Ends a connection that may be ended for a new one of `owner`.
    fn evict(&mut self, owner: LinkId) -> bool {
        let Some((slot, standing)) = self.victim(owner) else {
            return false;
        };
        let count = match standing {
            Standing::Unreplied => &mut self.counters.evicted_unreplied,
            Standing::Spent => &mut self.counters.evicted_spent,
            Standing::Established => &mut self.counters.evicted_established,
        };
        *count += 1;
        let owner = self.region.rows[slot as usize].owner;
        let owner = self.owner_mut(owner);
        owner.evicted = owner.evicted.saturating_add(1);
        self.discard(slot);
        true
    }

    /// Writes the rows, the index entries, the lists and the counts. `None`, and no change, if a bucket is full.
    pub(crate) fn place(
        &mut self,
        new: &NewConnection,
        hashes: &[FlowHash],
        tick: u64,
    ) -> Option<Hit> {
        let slot = self.region.acquire()?;
        let mut entered = 0;
        for hash in hashes {
            if !self.enter(*hash, slot) {
                break;
            }
            entered += 1;
        }
        let translated = hashes.len() == 2;
        let wide = translated && new.original.is_v6();
        let extension = if wide && entered == 2 {
            self.region.acquire()
        } else {
            Some(0)
        };
        let (Some(extension), true) = (extension, entered == hashes.len()) else {
            for hash in hashes.iter().take(entered) {
                index::remove(self.region.buckets, *hash, slot);
            }
            self.region.release(slot);
            return None;
        };
        self.write(slot, extension, new, translated, tick);
        self.region.list_push(slot, new.state.standing());
        self.arm(
            slot,
            tick + u64::from(self.settings.timeouts.ticks(new.state)),
        );
        self.groups.count(new.owner.index(), 1 + i32::from(wide));
        let owner = self.owner_mut(new.owner.raw());
        owner.slots += 1 + u32::from(wide);
        owner.unreplied += u32::from(new.state.standing() == Standing::Unreplied);
        if translated && sources::is_hidden(&new.original, &new.reply) {
            let remote = self.remote(&new.reply);
            self.sources
                .take(remote, new.owner, new.reply.destination_port());
        }
        Some(Hit {
            id: ConnId(slot),
            direction: Direction::Original,
            state: new.state,
        })
    }

    /// Adds an index entry, moving another one if need be.
    fn enter(&mut self, hash: FlowHash, slot: u32) -> bool {
        if index::insert(self.region.buckets, hash, slot) {
            return true;
        }
        self.counters.crowded += 1;
        let (region, hasher) = (&mut self.region, &self.hasher);
        let (rows, count) = (&*region.rows, region.buckets.len());
        let places_of = |entry: u32| {
            // The slot being entered has no row yet; its other entry stays.
            if entry == slot {
                return [None; 2];
            }
            let row = &rows[entry as usize];
            let places = |flow: Flow| Places::of(flow.hash(hasher), count);
            [
                Some(places(row.original())),
                row.is_translated().then(|| places(reply_of(rows, row))),
            ]
        };
        index::make_room(region.buckets, hash, places_of)
            && index::insert(region.buckets, hash, slot)
    }

    fn write(
        &mut self,
        slot: u32,
        extension: u32,
        new: &NewConnection,
        translated: bool,
        tick: u64,
    ) {
        let v6 = new.original.is_v6();
        let mut row = Row {
            addresses: [[0; 4]; 8],
            original_ports: [new.original.source_port(), new.original.destination_port()],
            reply_ports: [new.reply.source_port(), new.reply.destination_port()],
            seen: tick as u32,
            check: 0,
            owner: new.owner.raw(),
            armed: 0,
            next: [0; 3],
            previous: [0; 3],
            extension: pack(extension),
            protocol: new.original.protocol(),
            flags: if v6 { V6 } else { 0 } | if translated { TRANSLATED } else { 0 },
            state: new.state as u8,
        };
        row.set_addresses(0, &new.original);
        if v6 && translated {
            let mut wide = row;
            wide.set_addresses(0, &new.reply);
            wide.state = EXTENSION;
            wide.extension = pack(slot);
            wide.check = wide.expected_check(&[0; 7], &self.hasher);
            self.region.rows[extension as usize] = wide;
        } else if !v6 {
            row.set_addresses(2, &new.reply);
        }
        let mut detail = Detail::EMPTY;
        detail.attached = new.attached.to_words();
        detail.store(new.state, &new.tracking);
        detail.seal = detail.expected_seal(row.state);
        row.check = row.expected_check(&detail.attached, &self.hasher);
        self.region.rows[slot as usize] = row;
        self.region.details[slot as usize] = detail;
    }

    /// Takes a connection out: index, lists, wheel, counts, rows.
    pub(crate) fn discard(&mut self, slot: u32) {
        let row = self.region.rows[slot as usize];
        let Some(state) = State::from_raw(row.state) else {
            return;
        };
        let original = self.hash(&row.original());
        index::remove(self.region.buckets, original, slot);
        let mut slots = 1;
        if row.is_translated() {
            let flow = self.region.reply_of(&row);
            self.give_port_back(&row, &flow);
            let reply = self.hash(&flow);
            if !index::remove(self.region.buckets, reply, slot) {
                // Both flows share a bucket and a tag, and the first removal took the second one's entry.
                index::remove(self.region.buckets, original, slot);
            }
            if row.is_v6() {
                self.region.release(unpack(row.extension));
                slots = 2;
            }
        }
        self.region.list_remove(slot, state.standing());
        self.region.wheel_remove(slot);
        self.region.release(slot);
        self.groups.count(usize::from(row.owner), -(slots as i32));
        let owner = self.owner_mut(row.owner);
        owner.slots -= slots;
        owner.unreplied -= u32::from(state.standing() == Standing::Unreplied);
    }

    fn give_port_back(&mut self, row: &Row, reply: &Flow) {
        if let Some(owner) = LinkId::new(row.owner)
            && sources::is_hidden(&row.original(), reply)
        {
            let remote = self.remote(reply);
            self.sources
                .give_back(remote, owner, reply.destination_port());
        }
    }

    pub(crate) fn owner_mut(&mut self, owner: u16) -> &mut Owner {
        // Rows are written from a `LinkId` only, and there is an owner for each.
        &mut self.region.owners[usize::from(owner)]
    }

    /// A tentative connection from the parts of one that was already in some table.
    pub(crate) fn revive(
        &self,
        original: Flow,
        reply: Flow,
        owner: LinkId,
        attached: Attached,
        (state, tracking): (State, Tracking),
    ) -> NewConnection {
        NewConnection {
            original,
            hash: self.hash(&original),
            owner,
            state,
            tracking,
            reply,
            attached,
        }
    }

    /// Takes in a connection from elsewhere, last seen at `seen`, whatever its owner's share.
    pub(crate) fn take_in(&mut self, new: &NewConnection, seen: u64) -> Result<Hit, CommitError> {
        let translated = new.reply != new.original.reversed();
        let slots = 1 + u32::from(translated && new.original.is_v6());
        if let Some(hit) = self.find(&new.original, new.hash) {
            return Err(CommitError::Conflict(hit));
        }
        let hashes = [new.hash, self.hash(&new.reply)];
        if let Some(hit) = self.find(&new.reply, hashes[1]) {
            return Err(CommitError::ReplyTaken(hit));
        }
        if self.region.free() < slots {
            return Err(CommitError::Full);
        }
        let hashes = &hashes[..1 + usize::from(translated)];
        self.place(new, hashes, seen).ok_or(CommitError::Full)
    }
}
