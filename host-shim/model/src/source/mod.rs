//! Where objects come from. Two sources, one language: [`Event`]s into a channel, from a thread of the source's own.
//!
//! A source starts with what there is, says [`Event::InSync`], and then follows. It never ends by itself: what goes wrong
//! outside is waited out (with [`Event::Lost`]) while the last known state stays in force.

pub mod announce;
pub mod dir;
pub mod kube;
mod lines;
mod tree;

use std::io;
use std::sync::mpsc::Sender;
use std::thread::JoinHandle;

use crate::store::Event;

/// Something that knows the cluster.
pub trait Source {
    /// Starts to talk into `events`, until the [`Running`] is dropped or nobody listens.
    ///
    /// # Errors
    /// What the source needs of this machine is not to be had.
    fn start(self, events: Sender<Event>) -> io::Result<Running>;
}

/// A source at work. Ends it when dropped.
pub struct Running {
    stop: Option<Box<dyn FnOnce() + Send>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    pub(crate) fn new(stop: impl FnOnce() + Send + 'static, thread: JoinHandle<()>) -> Self {
        Self {
            stop: Some(Box::new(stop)),
            thread: Some(thread),
        }
    }
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Running")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop();
        }
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("A source ended by a panic");
        }
    }
}
