//! The node's end of the socket: a thread per call, bounded in number, in bytes and in time.

use crate::error::{CniError, Code};
use crate::gate::Gate;
use crate::peer;
use crate::rpc::{self, Body, LINE, Lines, Request};
use crate::verbs::Verbs;
use crate::verbs::node::Node;
use nix::sys::socket::{Shutdown, shutdown};
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// Calls at once; more wait in the backlog.
const CALLS: usize = 128;
/// A caller that does not say what it wants.
const REQUEST: Duration = Duration::from_secs(5);
/// How often the node's health is looked at.
const SAMPLE: Duration = Duration::from_millis(250);
/// How often DELs are looked for that were kept because this node did not hear them in time.
const KEPT: Duration = Duration::from_secs(3);

/// A running server; it stops when this goes.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    stop: Arc<AtomicBool>,
    gate: Arc<Gate>,
    calls: Arc<AtomicUsize>,
    listener: Arc<UnixListener>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on `<run_dir>/cni.sock`, for root alone.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn start<N: Node + 'static>(verbs: Arc<Verbs<N>>, run_dir: &Path) -> io::Result<Self> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(run_dir)?;
        let path = run_dir.join(rpc::SOCKET);
        // A socket that an earlier life left; a second daemon is kept out by the daemon's own lock.
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = Arc::new(UnixListener::bind(&path)?);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        let (stop, gate) = (Arc::new(AtomicBool::new(false)), Arc::new(Gate::new(CALLS)));
        let calls = Arc::new(AtomicUsize::new(0));
        let repeat = |name: &str, pause, work: fn(&Verbs<N>)| {
            let (verbs, stop) = (verbs.clone(), stop.clone());
            let repeated = move || {
                while !stop.load(Ordering::Acquire) {
                    work(&verbs);
                    thread::park_timeout(pause);
                }
            };
            thread::Builder::new().name(name.into()).spawn(repeated)
        };
        let sampler = repeat("cni-health", SAMPLE, |verbs| {
            verbs.sample_health();
        })?;
        let keeper = repeat("cni-kept", KEPT, Verbs::carry_out_deferred)?;
        let acceptor = {
            let (stop, gate, calls) = (stop.clone(), gate.clone(), calls.clone());
            let listener = listener.clone();
            let accept = move || accept(&listener, &verbs, &stop, &gate, &calls);
            thread::Builder::new().name("cni".into()).spawn(accept)?
        };
        Ok(Self {
            path,
            stop,
            gate,
            calls,
            listener,
            threads: vec![sampler, keeper, acceptor],
        })
    }

    /// How many calls were answered.
    pub fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        // Wakes the acceptor, whatever became of the socket's file.
        let _woken_or_ended = shutdown(self.listener.as_raw_fd(), Shutdown::Both);
        for thread in self.threads.drain(..) {
            thread.thread().unpark();
            // A thread that panicked has said so.
            let _ended = thread.join();
        }
        self.gate.wait_empty();
        // It may be another daemon's already.
        let _gone_already = fs::remove_file(&self.path);
    }
}

fn accept<N: Node + 'static>(
    listener: &UnixListener,
    verbs: &Arc<Verbs<N>>,
    stop: &AtomicBool,
    gate: &Arc<Gate>,
    calls: &Arc<AtomicUsize>,
) {
    for stream in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(stream) = stream else {
            // Out of descriptors: calls that end give some back.
            thread::sleep(Duration::from_millis(10));
            continue;
        };
        if !peer::is_trusted(&stream) {
            tracing::warn!("CNI: a call is refused: its process does not run as root");
            continue;
        }
        let inside = Gate::enter(gate.clone());
        let (verbs, calls) = (verbs.clone(), calls.clone());
        let call = move || {
            let _inside = inside;
            serve(&verbs, &stream);
            calls.fetch_add(1, Ordering::Relaxed);
        };
        // Without a thread the stream closes, and the caller hears that.
        let _refused = thread::Builder::new().name("cni-call".into()).spawn(call);
    }
}

fn serve<N: Node>(verbs: &Verbs<N>, stream: &UnixStream) {
    let line = match Lines::new(stream, LINE).next(Some(Instant::now() + REQUEST)) {
        Ok(line) => line,
        // Nobody is there to be answered, or nobody who speaks the protocol.
        Err(_) => return,
    };
    let request: Request = match serde_json::from_slice(&line) {
        Ok(request) => request,
        Err(error) => {
            let error = CniError::new(Code::Decode, "the call cannot be read").details(&error);
            let _gone = rpc::answer(stream, Body::Error(error));
            return;
        }
    };
    if rpc::answer(stream, Body::Accepted(true)).is_err() {
        return;
    }
    verbs.call(request, &mut |body| rpc::answer(stream, body));
}
