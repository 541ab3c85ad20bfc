//! Which link is served next: deficit round robin over the links that have frames waiting (Shreedhar and Varghese, 1995).
//!
//! A turn is worth [`QUANTUM`]; each frame costs its length, a short one [`LEAST`]. The length of a frame is known only when
//! it has been read, so a link may overdraw its credit by one frame, and pays at its next turn. Thus, as long as two links
//! both have frames, neither gets more than a quantum and two frames ahead of the other, whatever the sizes of their frames, and
//! a link waits for one turn of each other link at most.
//!
//! Cost: constant per frame and per turn.

use std::collections::VecDeque;

use super::chain::MAX_FRAME;

/// What a link may send in a turn, in bytes: a frame of any length, or 17 short ones.
pub(super) const QUANTUM: i32 = 17 * LEAST;
/// The least that a frame costs: the system call and the guest's buffer of 4 KiB that it takes, whatever its length.
pub(super) const LEAST: i32 = 4096;

// Else a link that has overdrawn might have no credit in its next turn.
const _: () = assert!(QUANTUM >= MAX_FRAME as i32);

/// The links that have frames waiting, in the order of their turns.
#[derive(Debug)]
pub(super) struct Turns {
    queue: VecDeque<u16>,
    links: Vec<State>,
}

#[derive(Clone, Copy, Debug, Default)]
struct State {
    waits: bool,
    /// What it may still send; at most zero between its turns.
    credit: i32,
}

impl Turns {
    /// No link waits; ids are below `ids`.
    pub(super) fn new(ids: usize) -> Self {
        Self {
            queue: VecDeque::new(),
            links: vec![State::default(); ids],
        }
    }

    /// A link has frames: its turn comes after those that wait already.
    pub(super) fn join(&mut self, id: u16) {
        let Some(state) = self.links.get_mut(usize::from(id)) else {
            return;
        };
        if !state.waits {
            state.waits = true;
            self.queue.push_back(id);
        }
    }

    /// The link whose turn it is.
    pub(super) fn current(&mut self) -> Option<u16> {
        let id = *self.queue.front()?;
        let state = self.links.get_mut(usize::from(id))?;
        if state.credit <= 0 {
            state.credit += QUANTUM;
        }
        Some(id)
    }

    /// The link whose turn it is has sent a frame. False when that was its last one in this turn.
    pub(super) fn charge(&mut self, id: u16, bytes: usize) -> bool {
        let Some(state) = self.links.get_mut(usize::from(id)) else {
            return false;
        };
        // A frame is at most `MAX_FRAME` bytes long.
        let cost = i32::try_from(bytes).unwrap_or(QUANTUM);
        state.credit -= cost.clamp(LEAST, QUANTUM);
        if state.credit > 0 {
            return true;
        }
        if self.queue.front() == Some(&id) {
            self.queue.rotate_left(1);
        }
        false
    }

    /// A link has no more frames. What it has overdrawn it pays later; credit is not saved.
    pub(super) fn leave(&mut self, id: u16) {
        let Some(state) = self.links.get_mut(usize::from(id)) else {
            return;
        };
        state.credit = state.credit.min(0);
        if !std::mem::take(&mut state.waits) {
            return;
        }
        if self.queue.front() == Some(&id) {
            self.queue.pop_front();
        } else {
            self.queue.retain(|waiting| *waiting != id);
        }
    }

    /// A link is gone; another may get its id.
    pub(super) fn forget(&mut self, id: u16) {
        self.leave(id);
        if let Some(state) = self.links.get_mut(usize::from(id)) {
            *state = State::default();
        }
    }

    /// Whether any link waits.
    pub(super) fn any(&self) -> bool {
        !self.queue.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FRAME: i64 = MAX_FRAME as i64;

    /// A link of the simulation: the lengths of its frames, over and over.
    #[derive(Clone, Debug)]
    struct Link {
        lengths: Vec<usize>,
        next: usize,
        /// What its frames have cost so far.
        served: i64,
    }

    impl Link {
        fn new(lengths: &[usize]) -> Self {
            Self {
                lengths: lengths.to_vec(),
                next: 0,
                served: 0,
            }
        }

        /// Takes the next frame.
        fn frame(&mut self) -> usize {
            let length = self.lengths[self.next % self.lengths.len()];
            self.next += 1;
            self.served += i64::try_from(length).unwrap().max(i64::from(LEAST));
            length
        }
    }

    /// Serves one frame of the link whose turn it is.
    fn serve(turns: &mut Turns, links: &mut [Link]) -> u16 {
        let id = turns.current().unwrap();
        let length = links[usize::from(id)].frame();
        turns.charge(id, length);
        id
    }

    fn all_waiting(links: &[Link]) -> Turns {
        let mut turns = Turns::new(links.len());
        (0..links.len()).for_each(|id| turns.join(u16::try_from(id).unwrap()));
        turns
    }

    fn lengths() -> impl Strategy<Value = Vec<usize>> {
        let length = prop_oneof![
            Just(64usize),
            Just(1514),
            Just(MAX_FRAME as usize),
            60..65_000usize
        ];
        proptest::collection::vec(length, 1..8)
    }

    proptest! {
        #[test]
        fn b10_in_any_window_each_waiting_link_gets_its_share_within_two_frames(
            shapes in proptest::collection::vec(lengths(), 2..8),
            before in 0usize..500,
            window in 1usize..2000,
        ) {
            let mut links: Vec<Link> = shapes.iter().map(|lengths| Link::new(lengths)).collect();
            let mut turns = all_waiting(&links);
            for _ in 0..before {
                serve(&mut turns, &mut links);
            }
            let begin: Vec<i64> = links.iter().map(|link| link.served).collect();
            for _ in 0..window {
                serve(&mut turns, &mut links);
            }
            let got: Vec<i64> = links.iter().zip(&begin).map(|(link, begin)| link.served - begin).collect();
            let (least, most) = (got.iter().min().unwrap(), got.iter().max().unwrap());
            // One of them may have had a turn more than the other, and each may be a frame off.
            prop_assert!(most - least <= i64::from(QUANTUM) + 2 * FRAME, "{got:?}");
        }

        #[test]
        fn b10_between_two_turns_of_a_link_every_other_has_one_turn(
            shapes in proptest::collection::vec(lengths(), 2..8), frames in 10usize..2000,
        ) {
            let mut links: Vec<Link> = shapes.iter().map(|lengths| Link::new(lengths)).collect();
            let count = links.len();
            let mut turns = all_waiting(&links);
            let mut order: Vec<u16> = Vec::new();
            for _ in 0..frames {
                let id = serve(&mut turns, &mut links);
                if order.last() != Some(&id) {
                    order.push(id);
                }
            }
            for round in order.windows(count) {
                let mut round = round.to_vec();
                round.sort_unstable();
                round.dedup();
                prop_assert_eq!(round.len(), count);
            }
        }

        #[test]
        fn b10_a_turn_costs_a_quantum_and_at_most_one_frame_more(lengths in lengths()) {
            let mut links = vec![Link::new(&lengths), Link::new(&[64])];
            let mut turns = all_waiting(&links);
            for _ in 0..50 {
                let before = links[0].served;
                while turns.current() == Some(0) {
                    serve(&mut turns, &mut links);
                }
                let cost = links[0].served - before;
                prop_assert!(cost <= i64::from(QUANTUM) + FRAME, "{cost}");
                while turns.current() == Some(1) {
                    serve(&mut turns, &mut links);
                }
            }
        }
    }

    #[test]
    fn b10_short_frames_cost_what_they_take_and_not_what_they_weigh() {
        let mut links = vec![Link::new(&[64]), Link::new(&[64])];
        let mut turns = all_waiting(&links);
        let run = std::iter::from_fn(|| (serve(&mut turns, &mut links) == 0).then_some(()));
        assert_eq!(run.count(), 17);
    }

    #[test]
    fn b10_a_link_that_comes_and_goes_saves_no_credit_and_keeps_its_debt() {
        let mut turns = Turns::new(2);
        turns.join(0);
        turns.join(1);
        assert_eq!(turns.current(), Some(0));
        assert!(turns.charge(0, 64));
        turns.leave(0);
        turns.join(0);
        assert_eq!(turns.current(), Some(1), "it went to the back");
        turns.leave(1);
        assert_eq!(turns.current(), Some(0));
        // The second frame overdraws by most of its length: three short ones are left of the next quantum.
        assert!(turns.charge(0, 60_000));
        assert!(!turns.charge(0, MAX_FRAME as usize));
        turns.leave(0);
        turns.join(0);
        assert_eq!(turns.current(), Some(0));
        let frames = (0..).take_while(|_| turns.charge(0, 64)).count();
        assert_eq!(frames, 3, "it has paid");
        turns.forget(0);
        turns.join(0);
        assert_eq!(turns.current(), Some(0));
        let frames = (0..).take_while(|_| turns.charge(0, 64)).count();
        assert_eq!(frames, 16, "a new link owes nothing");
        assert!(turns.any());
    }
}
