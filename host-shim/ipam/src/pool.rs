//! The allocator of one network on one node: round robin with a cooldown, safe between threads and processes, and across
//! power cuts; and the collection of what was leaked.

use crate::IpamError;
use crate::disk::{Directory, Disk};
use crate::range::{Address, Plan, RangeSet};
use crate::store::{Lease, Listing, Owner, Store};
use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Two observations this far apart free an address whose holder only seems to be gone (row I-06).
pub const BETWEEN_OBSERVATIONS: Duration = Duration::from_secs(60);

/// What an attachment wants.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    pub owner: &'a Owner,
    pub plan: &'a Plan,
    /// Addresses that it must have and no others.
    pub fixed: &'a [IpAddr],
    /// All that the node may use, if that is so: nothing is given while something outside of it is held (row I-01).
    pub confined: &'a [Plan],
    /// For how long a freed address is avoided.
    pub cooldown: Duration,
    /// Seconds since 1970.
    pub now: u64,
}

/// What an observer says of the holder of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Live,
    /// It cannot be seen; that may be the observer's fault.
    Unseen,
    /// It is certainly gone.
    Gone,
}

/// How full a plan is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    pub total: u128,
    pub used: usize,
}

impl Usage {
    /// Whether nothing is left.
    pub fn is_full(&self) -> bool {
        u128::try_from(self.used).is_ok_and(|used| used >= self.total)
    }
}

/// The addresses of one network on this node.
#[derive(Debug)]
pub struct Pool<D = Directory> {
    state: Mutex<State<D>>,
}

#[derive(Debug)]
struct State<D> {
    store: Store<D>,
    /// Since when a lease is unseen.
    unseen: HashMap<Lease, Instant>,
}

/// The store while nobody else can touch it, and what is in it.
struct Held<'a, D: Disk> {
    // Given back in this order.
    _lock: D::Lock,
    listing: Listing,
    state: MutexGuard<'a, State<D>>,
}

/// Cooldowns that are over are forgotten this many at a time.
const FORGOTTEN: usize = 16;

fn disk(what: &'static str) -> impl FnOnce(io::Error) -> IpamError {
    move |source| IpamError::Disk { what, source }
}

impl Pool {
    /// The pool in `dir` (`/var/lib/cni/networks/<name>`), made if it is not there.
    ///
    /// # Errors
    /// As the disk says.
    pub fn open(dir: impl Into<PathBuf>) -> Result<Self, IpamError> {
        Directory::open(dir)
            .map(Self::on)
            .map_err(disk("open the address store"))
    }
}

impl<D: Disk> Pool<D> {
    /// The pool on `disk`.
    pub fn on(disk: D) -> Self {
        Self {
            state: Mutex::new(State {
                store: Store::new(disk),
                unseen: HashMap::new(),
            }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State<D>> {
        // Every change is whole on the disk at every moment; what a panicking thread left is as good as any.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self) -> Result<Held<'_, D>, IpamError> {
        let mut state = self.state();
        let lock = state.store.disk.lock();
        let lock = lock.map_err(disk("lock the address store"))?;
        let listing = state.store.listing();
        let listing = listing.map_err(disk("read the address store"))?;
        Ok(Held {
            _lock: lock,
            listing,
            state,
        })
    }

    /// One address of every set for `ask.owner`. When this returns they survive a power cut. `live` tells whether a holder
    /// lives, for the message when nothing is left.
    ///
    /// # Errors
    /// If the owner has addresses, a set is exhausted, a fixed address cannot be had, or the disk refuses. Nothing is
    /// held then that was not held before.
    pub fn allocate(
        &self,
        ask: &Ask<'_>,
        live: &dyn Fn(&Lease) -> bool,
    ) -> Result<Vec<Address>, IpamError> {
        let Held {
            _lock,
            listing,
            state,
        } = self.hold()?;
        if let Some(lease) = listing.leases.iter().find(|lease| lease.is_of(ask.owner)) {
            return Err(IpamError::Duplicate {
                container_id: ask.owner.container_id.clone(),
                ifname: ask.owner.ifname.clone(),
                address: lease.ip,
            });
        }
        check_fixed(ask)?;
        check_confined(ask, &listing)?;
        forget_cooled(&state.store, ask, &listing);
        state
            .store
            .stage(ask.owner)
            .map_err(disk("write an allocation"))?;
        let mut taken = Vec::new();
        let outcome = take_all(&state.store, ask, &listing, live, &mut taken);
        let unstaged = state.store.unstage().map_err(disk("write an allocation"));
        let synced = outcome
            .and(unstaged)
            .and_then(|()| state.store.disk.sync().map_err(disk("sync an allocation")));
        if let Err(error) = synced {
            for address in &taken {
                // The disk refused already; what cannot be freed now is collected later.
                let _left_to_collection = state.store.disk.remove(&address.ip.to_string());
            }
            return Err(error);
        }
        Ok(taken)
    }

    /// Frees whatever `owner` holds; they cool down from `now` on. Freeing nothing is no error.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn release(&self, owner: &Owner, now: u64) -> Result<Vec<IpAddr>, IpamError> {
        self.release_if(Some(now), |lease| lease.is_of(owner))
    }

    fn release_if(
        &self,
        cooling_from: Option<u64>,
        which: impl Fn(&Lease) -> bool,
    ) -> Result<Vec<IpAddr>, IpamError> {
        let Held {
            _lock,
            listing,
            state,
        } = self.hold()?;
        let mut freed = Vec::new();
        for lease in listing.leases.iter().filter(|lease| which(lease)) {
            if state
                .store
                .free(lease, cooling_from)
                .map_err(disk("free an address"))?
            {
                freed.push(lease.ip);
            }
        }
        if !freed.is_empty() {
            state
                .store
                .disk
                .sync()
                .map_err(disk("sync the address store"))?;
        }
        Ok(freed)
    }

    /// All that are held.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn leases(&self) -> Result<Vec<Lease>, IpamError> {
        Ok(self.hold()?.listing.leases)
    }

    /// How full the fullest set of `plan` is.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn usage(&self, plan: &Plan) -> Result<Usage, IpamError> {
        let leases = self.leases()?;
        let of_set = |set: &RangeSet| Usage {
            total: set.size(),
            used: leases.iter().filter(|lease| set.contains(lease.ip)).count(),
        };
        let left = |usage: &Usage| usage.total.saturating_sub(usage.used as u128);
        Ok(plan
            .sets()
            .iter()
            .map(of_set)
            .min_by_key(left)
            .unwrap_or(Usage { total: 0, used: 0 }))
    }

    /// Frees what is leaked: at once where the holder is certainly gone, and where it is merely unseen if it was unseen
    /// [`BETWEEN_OBSERVATIONS`] ago and whenever it was looked for since. One bad lease does not stop the rest.
    ///
    /// # Errors
    /// The first refusal of the disk, after all others were done.
    pub fn collect(
        &self,
        observe: &dyn Fn(&Lease) -> Standing,
        monotonic: Instant,
        now: u64,
    ) -> Result<Vec<Lease>, IpamError> {
        let Held {
            _lock,
            listing,
            mut state,
        } = self.hold()?;
        let mut unseen = HashMap::new();
        let (mut freed, mut first_error) = (Vec::new(), None);
        for lease in listing.leases {
            let since = state.unseen.get(&lease).copied().unwrap_or(monotonic);
            match observe(&lease) {
                Standing::Live => continue,
                Standing::Unseen
                    if monotonic.saturating_duration_since(since) < BETWEEN_OBSERVATIONS =>
                {
                    unseen.insert(lease, since);
                    continue;
                }
                Standing::Unseen | Standing::Gone => {}
            }
            match state.store.free(&lease, Some(now)) {
                Ok(true) => freed.push(lease),
                Ok(false) => {}
                Err(error) => {
                    first_error.get_or_insert(error);
                    unseen.insert(lease, since);
                }
            }
        }
        state.unseen = unseen;
        let synced = state.store.disk.sync();
        match first_error.map_or(synced, Err) {
            Ok(()) => Ok(freed),
            Err(error) => Err(disk("free leaked addresses")(error)),
        }
    }

    /// Tells the pool which boot of the machine this is. No namespace outlives a boot: all that was held in an earlier one
    /// is freed. A store that never heard of boots (`host-local`'s) is taken as it is.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn enter_boot(&self, id: &str) -> Result<Vec<IpAddr>, IpamError> {
        let last = self
            .state()
            .store
            .boot()
            .map_err(disk("read the last boot"))?;
        let freed = match last {
            Some(last) if last != id => self.release_if(None, |_| true)?,
            _ => Vec::new(),
        };
        let state = self.state();
        let _lock = state
            .store
            .disk
            .lock()
            .map_err(disk("lock the address store"))?;
        state.store.set_boot(id).map_err(disk("write the boot"))?;
        Ok(freed)
    }
}

/// Every fixed address must lie in some set, and no two in the same.
fn check_fixed(ask: &Ask<'_>) -> Result<(), IpamError> {
    for address in ask.fixed.iter().copied() {
        let not_allowed = |why: &str| IpamError::NotAllowed {
            address,
            why: why.into(),
        };
        let Some(set) = ask.plan.sets().iter().find(|set| set.contains(address)) else {
            return Err(not_allowed("is in none of the ranges"));
        };
        if ask
            .fixed
            .iter()
            .filter(|other| set.contains(**other))
            .count()
            > 1
        {
            return Err(not_allowed("is not the only one asked of its range set"));
        }
    }
    Ok(())
}

fn check_confined(ask: &Ask<'_>, listing: &Listing) -> Result<(), IpamError> {
    if ask.confined.is_empty() {
        return Ok(());
    }
    let sets = ask.confined.iter().flat_map(Plan::sets);
    let is_outside = |lease: &&Lease| !sets.clone().any(|s| s.contains(lease.ip));
    let outside = || listing.leases.iter().filter(is_outside);
    match outside().min() {
        Some(first) => Err(IpamError::Moved {
            ranges: ask.plan.to_string(),
            count: outside().count(),
            first: first.ip,
        }),
        None => Ok(()),
    }
}

/// A cooldown that is over is a file that nobody needs: without this there would in time be one for every address.
fn forget_cooled<D: Disk>(store: &Store<D>, ask: &Ask<'_>, listing: &Listing) {
    let is_over = |since: u64| ask.now.saturating_sub(since) >= ask.cooldown.as_secs();
    let over = listing
        .released
        .values()
        .filter(|(since, _)| is_over(*since));
    for (_, file) in over.take(FORGOTTEN) {
        // Not worth a failed ADD; the next one tries again.
        let _tried_again = store.forget_release(file);
    }
}

fn take_all<D: Disk>(
    store: &Store<D>,
    ask: &Ask<'_>,
    listing: &Listing,
    live: &dyn Fn(&Lease) -> bool,
    taken: &mut Vec<Address>,
) -> Result<(), IpamError> {
    for (index, set) in ask.plan.sets().iter().enumerate() {
        let fixed = ask.fixed.iter().find(|ip| set.contains(**ip));
        let address = match fixed {
            Some(ip) => take_fixed(store, set, *ip, listing)?,
            None => {
                let address = take_next(store, ask, (index, set), listing, live)?;
                // Only a hint for the next walk: not worth a failed ADD.
                let _hint = store.set_last_reserved(index, address.ip);
                address
            }
        };
        taken.push(address);
        if let Some((_, file)) = listing.released.get(&address.ip) {
            store.forget_release(file).map_err(disk("end a cooldown"))?;
        }
    }
    Ok(())
}

fn take_fixed<D: Disk>(
    store: &Store<D>,
    set: &RangeSet,
    ip: IpAddr,
    listing: &Listing,
) -> Result<Address, IpamError> {
    let why = || "is in none of the ranges".to_owned();
    let address = set.fixed(ip)?.ok_or_else(|| IpamError::NotAllowed {
        address: ip,
        why: why(),
    })?;
    if store.take(ip).map_err(disk("write an allocation"))? {
        return Ok(address);
    }
    let holder = listing
        .leases
        .iter()
        .find(|lease| lease.ip == ip)
        .map(Lease::holder);
    Err(IpamError::Taken {
        address: ip,
        owner: holder.unwrap_or_else(|| "nobody known".into()),
    })
}

fn take_next<D: Disk>(
    store: &Store<D>,
    ask: &Ask<'_>,
    (index, set): (usize, &RangeSet),
    listing: &Listing,
    live: &dyn Fn(&Lease) -> bool,
) -> Result<Address, IpamError> {
    let taken: std::collections::HashSet<IpAddr> =
        listing.leases.iter().map(|lease| lease.ip).collect();
    let mut cooling: Vec<(u64, Address)> = Vec::new();
    for address in set.after(store.last_reserved(index)) {
        if taken.contains(&address.ip) {
            continue;
        }
        match listing.released.get(&address.ip) {
            Some((since, _)) if ask.now.saturating_sub(*since) < ask.cooldown.as_secs() => {
                cooling.push((*since, address));
            }
            _ if store
                .take(address.ip)
                .map_err(disk("write an allocation"))? =>
            {
                return Ok(address);
            }
            _ => {}
        }
    }
    // All others are in use: the one that has cooled longest.
    cooling.sort_by_key(|(since, _)| *since);
    for (_, address) in cooling {
        if store
            .take(address.ip)
            .map_err(disk("write an allocation"))?
        {
            return Ok(address);
        }
    }
    let held: Vec<&Lease> = listing
        .leases
        .iter()
        .filter(|l| set.contains(l.ip))
        .collect();
    Err(IpamError::Exhausted {
        ranges: set.to_string(),
        total: set.size(),
        used: held.len(),
        leaked: held.iter().filter(|lease| !live(lease)).count(),
    })
}

#[cfg(test)]
#[path = "pool_tests.rs"]
mod tests;
