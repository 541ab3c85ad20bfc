//! Whether the cluster may give this node pods: when it has forwarded a frame of its own, and until it has been without its
//! appliance for ten seconds.
//!
//! A daemon that has just started says nothing: the taint is as its former life, or the node's registration, left it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sluice_model::taint::NodeTaint;

use super::Node;

/// A guest that is gone for longer is not merely being replaced.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two tests of a node that does not forward.
const AGAIN: Duration = Duration::from_secs(2);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// How long the end waits for the cluster to hear of it.
const FAREWELL: Duration = Duration::from_secs(2);

/// What was seen, and what follows.
#[derive(Debug, Default)]
struct Judgment {
    ready: Option<bool>,
    down_since: Option<Instant>,
    tested: Option<Instant>,
}

impl Judgment {
    /// A look. `forwards` is asked only while it would change anything.
    fn look(
        &mut self,
        now: Instant,
        is_down: bool,
        forwards: impl FnOnce() -> bool,
    ) -> Option<bool> {
        if is_down {
            let since = *self.down_since.get_or_insert(now);
            if now.saturating_duration_since(since) > PATIENCE {
                self.ready = Some(false);
            }
            return self.ready;
        }
        self.down_since = None;
        let is_late = |tested| now.saturating_duration_since(tested) >= AGAIN;
        if self.ready != Some(true) && self.tested.is_none_or(is_late) {
            self.tested = Some(now);
            if forwards() {
                self.ready = Some(true);
            }
        }
        self.ready
    }
}

/// Looks after the node's taint until it goes; then the node takes no pods, if it tears down its links.
#[derive(Debug)]
pub struct Readiness {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Readiness {
    /// Of a node that follows the Kubernetes API and has a taint; else there is nothing to look after.
    ///
    /// # Errors
    /// When the kernel gives no thread.
    pub fn start(node: &Arc<Node>) -> io::Result<Option<Self>> {
        let config = node.config();
        let source = config.source.as_ref();
        let Some(kubernetes) = source.and_then(|it| it.kubernetes.as_ref()) else {
            return Ok(None);
        };
        if kubernetes.taint.is_empty() {
            return Ok(None);
        }
        let taint = NodeTaint::start(kubernetes.api(), &config.node_name, &kubernetes.taint)?;
        // Set once: there is one daemon, and it looks after one taint.
        let _ = node.taint.set(taint.observer());
        let end = Arc::new(AtomicBool::new(false));
        let (node, ending) = (node.clone(), end.clone());
        let thread = std::thread::Builder::new()
            .name("readiness".into())
            .spawn(move || follow(&node, &taint, &ending))?;
        Ok(Some(Self {
            end,
            thread: Some(thread),
        }))
    }
}

fn follow(node: &Node, taint: &NodeTaint, ending: &AtomicBool) {
    let mut judgment = Judgment::default();
    let mut said = None;
    while !ending.load(Ordering::Acquire) {
        let is_down = node.appliance_problem().is_some();
        let forwards = || match node.self_test() {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(%error, "the node does not forward yet");
                false
            }
        };
        let ready = judgment.look(Instant::now(), is_down, forwards);
        if let Some(ready) = ready.filter(|_| ready != said) {
            tracing::info!(ready, "the node takes pods, or takes none");
            taint.want(!ready);
        }
        said = ready;
        std::thread::park_timeout(LOOK);
    }
    if node.tears_down() {
        taint.want(true);
        let asked = Instant::now();
        while taint.state().tainted != Some(true) && asked.elapsed() < FAREWELL {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Readiness {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            if thread.join().is_err() {
                tracing::error!("the look at the node's readiness ended by a panic");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p13_a_node_is_ready_when_it_forwards_and_until_it_is_down_for_ten_seconds() {
        let start = Instant::now();
        let at = |seconds: f64| start + Duration::from_secs_f64(seconds);
        let mut judgment = Judgment::default();
        let never = || -> bool { unreachable!("nothing to be tested") };
        // Nothing is said before anything is known.
        assert_eq!(judgment.look(at(0.0), true, never), None);
        assert_eq!(judgment.look(at(1.0), false, || false), None);
        assert_eq!(judgment.look(at(1.5), false, never), None);
        assert_eq!(judgment.look(at(3.0), false, || true), Some(true));
        assert_eq!(judgment.look(at(9.0), false, never), Some(true));
        // A guest that comes back in time changes nothing, and its time begins anew.
        assert_eq!(judgment.look(at(10.0), true, never), Some(true));
        assert_eq!(judgment.look(at(19.9), true, never), Some(true));
        assert_eq!(judgment.look(at(20.0), false, never), Some(true));
        assert_eq!(judgment.look(at(21.0), true, never), Some(true));
        assert_eq!(judgment.look(at(31.0), true, never), Some(true));
        assert_eq!(judgment.look(at(31.1), true, never), Some(false));
        // It is ready again when it forwards, not when it runs.
        assert_eq!(judgment.look(at(40.0), false, || false), Some(false));
        assert_eq!(judgment.look(at(42.0), false, || true), Some(true));
    }
}
