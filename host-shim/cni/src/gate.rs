//! A gate that so many may be behind at once; the others wait in front of it.

use std::sync::{Condvar, Mutex, PoisonError};

/// The gate.
#[derive(Debug)]
pub struct Gate {
    most: usize,
    inside: Mutex<usize>,
    left: Condvar,
}

/// Somebody behind the gate; leaves when this goes.
#[derive(Debug)]
pub struct Inside<G: AsRef<Gate>>(G);

impl AsRef<Self> for Gate {
    fn as_ref(&self) -> &Self {
        self
    }
}

impl Gate {
    /// A gate for `most`, at least one.
    pub fn new(most: usize) -> Self {
        Self {
            most: most.max(1),
            inside: Mutex::default(),
            left: Condvar::new(),
        }
    }

    /// Waits until there is room, and enters.
    pub fn enter<G: AsRef<Self>>(gate: G) -> Inside<G> {
        {
            let this = gate.as_ref();
            let inside = this.inside.lock().unwrap_or_else(PoisonError::into_inner);
            let is_full = |inside: &mut usize| *inside >= this.most;
            let room = this.left.wait_while(inside, is_full);
            *room.unwrap_or_else(PoisonError::into_inner) += 1;
        }
        Inside(gate)
    }

    /// Waits until nobody is behind it.
    pub fn wait_empty(&self) {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let empty = self.left.wait_while(inside, |inside| *inside > 0);
        drop(empty.unwrap_or_else(PoisonError::into_inner));
    }
}

impl<G: AsRef<Gate>> Drop for Inside<G> {
    fn drop(&mut self) {
        let gate = self.0.as_ref();
        *gate.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        gate.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    #[test]
    fn never_more_than_so_many_are_inside_and_all_get_in() {
        let (gate, inside) = (Arc::new(Gate::new(2)), AtomicUsize::new(0));
        let (highest, entered) = (AtomicUsize::new(0), AtomicUsize::new(0));
        thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    let _inside = Gate::enter(&*gate);
                    let now = inside.fetch_add(1, Ordering::SeqCst) + 1;
                    highest.fetch_max(now, Ordering::SeqCst);
                    thread::yield_now();
                    inside.fetch_sub(1, Ordering::SeqCst);
                    entered.fetch_add(1, Ordering::SeqCst);
                });
            }
        });
        gate.wait_empty();
        assert_eq!(entered.into_inner(), 16);
        assert!(highest.into_inner() <= 2);
    }
}
