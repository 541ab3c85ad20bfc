//! Which cores the trunk's thread and the guest take where cores are scarce.
//!
//! Frames one by one want the two apart, each polling on a core of its own: a scheduler that puts two pollers on one core lets
//! each wait a time slice for the other. Frames by the dozen want them together: they take turns in any case, a turn that is
//! handed over on the same core wakes no other, and the pods keep the rest. So the guest has a home, and the load decides where
//! this thread goes. With more cores than [`SCARCE`] everybody finds one, and the scheduler is left alone.

use std::fs;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// The guest's thread, by the name that the VMM gives it.
const GUEST_THREAD: &str = "vcpu0";
const SCARCE: usize = 3;
/// Between two decisions.
const REVIEW: Duration = Duration::from_millis(2);
/// Frames a step, on average, from which the two go together, and below which they part.
const JOIN: f32 = 6.0;
const PART: f32 = 2.5;
/// What one step counts for in the average.
const WEIGHT: f32 = 1.0 / 64.0;

const THIS_THREAD: Pid = Pid::from_raw(0);

/// The cores of the trunk's thread, in a word.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Seat {
    /// Whatever the scheduler chooses.
    #[default]
    Free,
    /// Every core but the guest's.
    Apart,
    /// The guest's core.
    Shared,
}

/// Where the thread is, and why.
#[derive(Debug)]
pub(super) struct Place {
    /// Cores that this thread was given at its start.
    given: Vec<usize>,
    vmm: Option<i32>,
    /// The guest's core, while it has one of its own.
    home: Option<usize>,
    frames_a_step: f32,
    together: bool,
    decided: Option<Instant>,
}

impl Place {
    /// For the calling thread.
    pub(super) fn here() -> Self {
        let set = sched_getaffinity(THIS_THREAD).ok();
        let is_given = |core: &usize| set.as_ref().is_some_and(|s| s.is_set(*core) == Ok(true));
        Self {
            given: (0..CpuSet::count()).filter(is_given).collect(),
            vmm: None,
            home: None,
            frames_a_step: 0.0,
            together: false,
            decided: None,
        }
    }

    /// This process runs the guest from now on, or none does.
    pub(super) fn belongs_to(&mut self, vmm: Option<i32>) {
        self.vmm = vmm;
        self.leave();
    }

    /// The guest runs: it has started a ring.
    pub(super) fn settle(&mut self) {
        let [_, .., last] = self.given[..] else {
            return;
        };
        let guest = self.vmm.and_then(guest_thread);
        let Some(guest) = guest.filter(|_| self.given.len() <= SCARCE) else {
            return self.leave();
        };
        if !go(guest, &[last]) {
            return self.leave();
        }
        self.home = Some(last);
        self.take();
    }

    /// A step moved frames. True when that made the thread change its seat.
    pub(super) fn moved(&mut self, frames: u32, now: Instant) -> bool {
        self.frames_a_step += (frames as f32 - self.frames_a_step) * WEIGHT;
        let is_fresh = |at| now.duration_since(at) < REVIEW;
        if self.home.is_none() || self.decided.is_some_and(is_fresh) {
            return false;
        }
        self.decided = Some(now);
        let limit = if self.together { PART } else { JOIN };
        let together = self.frames_a_step >= limit;
        let changes = together != self.together;
        if changes {
            self.together = together;
            self.take();
        }
        changes
    }

    /// On [`Seat::Shared`] the guest can only go on when this thread sleeps.
    pub(super) fn seat(&self) -> Seat {
        match (self.home, self.together) {
            (None, _) => Seat::Free,
            (Some(_), false) => Seat::Apart,
            (Some(_), true) => Seat::Shared,
        }
    }

    fn take(&mut self) {
        let Some(home) = self.home else { return };
        let wanted = |core: &usize| (*core == home) == self.together;
        let cores: Vec<usize> = self.given.iter().copied().filter(wanted).collect();
        if !go(THIS_THREAD, &cores) {
            self.leave();
        }
    }

    /// Back to whatever the scheduler chooses.
    fn leave(&mut self) {
        self.together = false;
        if self.home.take().is_some() {
            go(THIS_THREAD, &self.given);
        }
    }
}

fn go(thread: Pid, cores: &[usize]) -> bool {
    let mut set = CpuSet::new();
    for core in cores {
        // Each was in a set of this size.
        let _ = set.set(*core);
    }
    match sched_setaffinity(thread, &set) {
        Ok(()) => true,
        Err(error) => {
            tracing::debug!(%thread, %error, "a thread keeps its cores");
            false
        }
    }
}

fn guest_thread(vmm: i32) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{vmm}/task")).ok()?;
    let is_guest = |task: &fs::DirEntry| {
        fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.trim() == GUEST_THREAD)
    };
    let task = tasks.flatten().find(is_guest)?;
    task.file_name().to_str()?.parse().ok().map(Pid::from_raw)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn cores_of(thread: Pid) -> Vec<usize> {
        let set = sched_getaffinity(thread).unwrap();
        let is_set = |core: &usize| set.is_set(*core) == Ok(true);
        (0..CpuSet::count()).filter(is_set).collect()
    }

    /// A thread of this process that is called as a VMM calls its guest; it ends with the sender.
    fn guest() -> (Pid, mpsc::Sender<()>) {
        let (end, ended) = mpsc::channel();
        let (say, said) = mpsc::channel();
        thread::Builder::new()
            .name(GUEST_THREAD.into())
            .spawn(move || {
                say.send(nix::unistd::gettid()).unwrap();
                let _ = ended.recv();
            })
            .unwrap();
        (said.recv().unwrap(), end)
    }

    fn busy(place: &mut Place, now: &mut Instant, frames: u32) {
        for _ in 0..1000 {
            *now += Duration::from_micros(100);
            place.moved(frames, *now);
        }
    }

    #[test]
    fn the_load_decides_whether_the_trunk_shares_the_guests_core() {
        let cores = cores_of(THIS_THREAD);
        let [first, second, ..] = cores[..] else {
            println!("skipped: there is one core");
            return;
        };
        assert!(go(THIS_THREAD, &[first, second]));
        let (guest, _end) = guest();
        let mut place = Place::here();
        let mut now = Instant::now();
        busy(&mut place, &mut now, 30);
        assert_eq!(place.seat(), Seat::Free, "nobody to share with");
        assert_eq!(cores_of(THIS_THREAD), [first, second]);

        place.belongs_to(Some(std::process::id().cast_signed()));
        place.settle();
        assert_eq!(cores_of(guest), [second]);
        assert_eq!(cores_of(THIS_THREAD), [first]);
        busy(&mut place, &mut now, 30);
        assert_eq!(place.seat(), Seat::Shared);
        assert_eq!(cores_of(THIS_THREAD), [second]);
        busy(&mut place, &mut now, 4);
        assert_eq!(place.seat(), Seat::Shared, "neither many nor few");
        busy(&mut place, &mut now, 1);
        assert_eq!(place.seat(), Seat::Apart);
        assert_eq!(cores_of(THIS_THREAD), [first]);
        busy(&mut place, &mut now, 4);
        assert_eq!(place.seat(), Seat::Apart, "neither few nor many");

        place.belongs_to(None);
        assert_eq!(cores_of(THIS_THREAD), [first, second]);
    }

    #[test]
    fn a_vmm_without_such_a_thread_moves_nobody() {
        let cores = cores_of(THIS_THREAD);
        let mut place = Place::here();
        place.belongs_to(Some(std::process::id().cast_signed()));
        place.settle();
        busy(&mut place, &mut Instant::now(), 30);
        assert_eq!(place.seat(), Seat::Free);
        assert_eq!(cores_of(THIS_THREAD), cores);
    }
}
