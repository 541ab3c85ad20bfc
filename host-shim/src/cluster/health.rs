//! Says on a Service's health check port whether this node has endpoints of it (row S-19): load balancers of
//! `externalTrafficPolicy: Local` ask each node there.
//!
//! One thread, which nobody can hold up: connections are few, requests are short, and both have a deadline.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_model::object::Name;

/// Connections at once; more wait in the kernel.
const CONNECTIONS: usize = 64;
const REQUEST_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts at a port that another program has.
const AGAIN: Duration = Duration::from_secs(5);

/// A Service that is asked for, and how many ready endpoints it has here.
type Checks = BTreeMap<u16, (Name, usize)>;

/// The ports that are served.
#[derive(Debug)]
pub(super) struct Health(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    wake: EventFd,
}

#[derive(Debug, Default)]
struct State {
    checks: Checks,
    stop: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Health {
    /// Nothing is served yet. `is_healthy`: the appliance has what it should have.
    pub(super) fn start(is_healthy: impl Fn() -> bool + Send + 'static) -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: EventFd::from_value_and_flags(0, flags)?,
        });
        let server = Server {
            shared: shared.clone(),
            is_healthy: Box::new(is_healthy),
            listeners: BTreeMap::new(),
            refused: BTreeMap::new(),
            connections: Vec::new(),
        };
        std::thread::Builder::new()
            .name("health".into())
            .spawn(move || server.run())?;
        Ok(Self(shared))
    }

    /// Serves these and no others.
    pub(super) fn serve(&self, checks: impl IntoIterator<Item = (u16, Name, usize)>) {
        let checks: Checks = checks
            .into_iter()
            .map(|(port, name, count)| (port, (name, count)))
            .collect();
        let mut state = self.0.lock();
        if state.checks != checks {
            state.checks = checks;
            drop(state);
            let _ = self.0.wake.write(1); // only fails when the thread is awake
        }
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.0.lock().stop = true;
        let _ = self.0.wake.write(1); // only fails when the thread is awake
    }
}

/// Somebody who asks.
struct Connection {
    stream: TcpStream,
    port: u16,
    request: Vec<u8>,
    until: Instant,
}

struct Server {
    shared: Arc<Shared>,
    is_healthy: Box<dyn Fn() -> bool + Send>,
    listeners: BTreeMap<u16, TcpListener>,
    /// Ports that could not be had, and when that was.
    refused: BTreeMap<u16, Instant>,
    connections: Vec<Connection>,
}

impl Server {
    fn run(mut self) {
        loop {
            let checks = {
                let state = self.shared.lock();
                if state.stop {
                    return;
                }
                state.checks.clone()
            };
            self.listen(&checks);
            if !self.wait() {
                return;
            }
            let _ = self.shared.wake.read(); // not an event of ours is no error
            self.accept();
            let now = Instant::now();
            let is_healthy = &self.is_healthy;
            self.connections
                .retain_mut(|it| it.goes_on(&checks, is_healthy, now));
        }
    }

    fn listen(&mut self, checks: &Checks) {
        self.listeners.retain(|port, _| checks.contains_key(port));
        self.refused.retain(|port, _| checks.contains_key(port));
        let now = Instant::now();
        for (port, (name, _)) in checks {
            let waits = self.refused.get(port).is_some_and(|at| now < *at + AGAIN);
            if waits || self.listeners.contains_key(port) {
                continue;
            }
            match open(*port) {
                Ok(listener) => {
                    self.refused.remove(port);
                    self.listeners.insert(*port, listener);
                }
                Err(error) => {
                    if self.refused.insert(*port, now).is_none() {
                        tracing::warn!(port, service = %name, %error, "the health check port cannot be served");
                    }
                }
            }
        }
    }

    /// Waits until something happens; `false` if that cannot be.
    fn wait(&self) -> bool {
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = vec![read(self.shared.wake.as_fd())];
        if self.connections.len() < CONNECTIONS {
            fds.extend(self.listeners.values().map(|it| read(it.as_fd())));
        }
        fds.extend(self.connections.iter().map(|it| read(it.fd())));
        let deadline = (self.connections.iter().map(|it| it.until))
            .chain(self.refused.values().map(|at| *at + AGAIN))
            .min();
        let timeout = deadline.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => true,
            Err(error) => {
                tracing::error!(%error, "health checks are no longer answered");
                false
            }
        }
    }

    fn accept(&mut self) {
        for (port, listener) in &self.listeners {
            while self.connections.len() < CONNECTIONS {
                let Ok((stream, _)) = listener.accept() else {
                    break;
                };
                if stream.set_nonblocking(true).is_ok() {
                    self.connections.push(Connection {
                        stream,
                        port: *port,
                        request: Vec::new(),
                        until: Instant::now() + PATIENCE,
                    });
                }
            }
        }
    }
}

/// On all addresses; where there is no IPv6, on those of IPv4.
fn open(port: u16) -> io::Result<TcpListener> {
    let six = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let four = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
    let listener = match TcpListener::bind(six) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => TcpListener::bind(four)?,
        other => other?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

impl Connection {
    fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// Reads on, and answers a request that is there; `false` when the connection is over.
    fn goes_on(&mut self, checks: &Checks, is_healthy: impl Fn() -> bool, now: Instant) -> bool {
        if now >= self.until {
            return false;
        }
        let mut chunk = [0; 1024];
        match self.stream.read(&mut chunk) {
            Ok(0) => return false,
            Ok(count) => self.request.extend(chunk.iter().take(count)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(_) => return false,
        }
        let is_whole = self.request.windows(4).any(|it| it == b"\r\n\r\n");
        if !is_whole {
            return self.request.len() < REQUEST_MAX;
        }
        let answer = match checks.get(&self.port) {
            Some((name, count)) => answer(&self.request, name, *count, is_healthy()),
            None => return false,
        };
        // It fits into the socket's buffer, or its reader is gone.
        let _ = self.stream.write_all(answer.as_bytes());
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        false
    }
}

/// What a load balancer is told, in the form kube-proxy gives it.
fn answer(request: &[u8], name: &Name, count: usize, is_healthy: bool) -> String {
    let is = |method: &[u8]| request.starts_with(method);
    if !is(b"GET ") && !is(b"HEAD ") {
        return "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into();
    }
    let status = if count > 0 && is_healthy {
        "200 OK"
    } else {
        "503 Service Unavailable"
    };
    let body = serde_json::json!({
        "service": {"namespace": &*name.namespace, "name": &*name.name},
        "localEndpoints": count,
        "serviceProxyHealthy": is_healthy,
    })
    .to_string();
    let length = body.len();
    let body = if is(b"HEAD ") { "" } else { &body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         X-Load-Balancing-Endpoint-Weight: {count}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A port that nobody has. Below those that the kernel gives away, so that nobody gets it meanwhile; tests that run beside
    /// this one begin to look elsewhere.
    fn free_port() -> u16 {
        let first = 10_000 + u16::try_from(std::process::id() % 15_000).unwrap();
        let mut ports = first..30_000;
        let is_free = |port: &u16| TcpListener::bind(("::", *port)).is_ok();
        ports.find(is_free).unwrap()
    }

    fn ask(port: u16, request: &str) -> io::Result<String> {
        let mut stream = TcpStream::connect(("127.0.0.1", port))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    fn until_asked(port: u16, holds: impl Fn(io::Result<String>) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !holds(ask(port, "GET / HTTP/1.1\r\nHost: n\r\n\r\n")) {
            assert!(Instant::now() < deadline, "not in time");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn s19_the_health_check_port_says_how_many_endpoints_are_here() {
        let healthy = Arc::new(AtomicBool::new(true));
        let asked = healthy.clone();
        let health = Health::start(move || asked.load(Ordering::Relaxed)).unwrap();
        let port = free_port();
        let check = |count| [(port, Name::new("shop", "web"), count)];
        let has = |words: &'static [&str]| {
            move |answer: io::Result<String>| {
                answer.is_ok_and(|it| words.iter().all(|word| it.contains(word)))
            }
        };
        health.serve(check(2));
        let body = r#""service":{"name":"web","namespace":"shop"}"#;
        until_asked(
            port,
            has(&["200 OK", r#""localEndpoints":2"#, "Weight: 2\r\n"]),
        );
        until_asked(port, move |it| it.is_ok_and(|it| it.contains(body)));
        health.serve(check(0));
        until_asked(
            port,
            has(&["503 ", r#""localEndpoints":0"#, "Weight: 0\r\n"]),
        );
        health.serve(check(1));
        until_asked(port, has(&["200 OK"]));
        healthy.store(false, Ordering::Relaxed);
        until_asked(port, has(&["503 ", r#""serviceProxyHealthy":false"#]));
        let head = ask(port, "HEAD / HTTP/1.1\r\n\r\n").unwrap();
        assert!(head.ends_with("\r\n\r\n"), "{head}");
        assert!(
            ask(port, "POST / HTTP/1.1\r\n\r\n")
                .unwrap()
                .contains("405")
        );
        // Those who ask for nothing hold nobody up, and one who says too much is sent away.
        let idle: Vec<_> = (0..CONNECTIONS * 2)
            .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
            .collect();
        until_asked(port, has(&["503 "]));
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * REQUEST_MAX));
        assert!(!ask(port, &long).is_ok_and(|it| it.contains("HTTP")));
        drop(idle);
        health.serve([]);
        until_asked(port, |it| it.is_err());
    }

    #[test]
    fn s19_a_port_that_another_program_has_is_served_once_it_is_free() {
        let port = free_port();
        let other = TcpListener::bind(("::", port)).unwrap();
        let health = Health::start(|| true).unwrap();
        health.serve([(port, Name::new("shop", "web"), 1)]);
        std::thread::sleep(Duration::from_millis(100));
        drop(other);
        until_asked(port, |it| it.is_ok_and(|it| it.contains("200 OK")));
    }
}
