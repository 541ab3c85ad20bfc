//! Says on a Service's health check port whether this node has endpoints of it (row S-19): load balancers of
//! `externalTrafficPolicy: Local` ask each node there. And on the node's own port whether it takes traffic at all (row S-20), for those
//! of `Cluster`: `/healthz` not while the node is about to be removed, `/livez` whatever becomes of it.
//!
//! One thread, which nobody can hold up: connections are few, requests are short, and both have a deadline. Where connections
//! run out a new one takes the place of the oldest of the source that has the most: strangers who
//! connect and ask nothing cost each other their places and load balancers none.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use sluice_model::object::Name;

/// Connections at once.
const CONNECTIONS: usize = 64;
/// Connections taken from a port before those that are there are looked at again.
const ACCEPTED: usize = 16;
const REQUEST_MAX: usize = 4096;
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two attempts at a port that another program has.
const AGAIN: Duration = Duration::from_secs(5);

/// What is asked for at a port.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Check {
    /// How many ready endpoints the Service has here.
    Service(Name, usize),
    /// The node, and whether it is about to be removed.
    Node { leaving: bool },
}

type Checks = BTreeMap<u16, Check>;

/// The ports that are served.
#[derive(Debug)]
pub(super) struct Health {
    shared: Arc<Shared>,
    /// The node's own port; 0: none.
    port: u16,
}

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
    /// Nothing but the node's own `port` is served yet (0: not even that). `is_healthy`: the appliance has what it should have.
    pub(super) fn start(
        port: u16,
        is_healthy: impl Fn() -> bool + Send + 'static,
    ) -> io::Result<Self> {
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
        let health = Self { shared, port };
        health.serve([], false);
        Ok(health)
    }

    /// Serves these and no others, besides the node's own port.
    pub(super) fn serve(
        &self,
        checks: impl IntoIterator<Item = (u16, Name, usize)>,
        leaving: bool,
    ) {
        let services = checks.into_iter();
        let mut checks: Checks = services
            .map(|(port, name, count)| (port, Check::Service(name, count)))
            .collect();
        if self.port != 0 {
            checks.insert(self.port, Check::Node { leaving });
        }
        let mut state = self.shared.lock();
        if state.checks != checks {
            state.checks = checks;
            drop(state);
            let _ = self.shared.wake.write(1); // only fails when the thread is awake
        }
    }
}

impl Drop for Health {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        let _ = self.shared.wake.write(1); // only fails when the thread is awake
    }
}

/// Somebody who asks.
struct Connection {
    stream: TcpStream,
    source: Source,
    port: u16,
    request: Vec<u8>,
    until: Instant,
}

/// Who counts as one: an IPv4 address, or the range that one IPv6 host may have to itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    V4(Ipv4Addr),
    V6([u16; 4]),
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(v4) => Self::V4(v4),
            IpAddr::V6(v6) => {
                let [a, b, c, d, ..] = v6.segments();
                Self::V6([a, b, c, d])
            }
        }
    }
}

/// Which connection ends for a new one: of the source that has the most, on the port that has the most of them, the oldest.
fn least_deserving(connections: &[Connection]) -> Option<usize> {
    let mut by_source = BTreeMap::<Source, usize>::new();
    let mut by_port = BTreeMap::<(Source, u16), usize>::new();
    for it in connections {
        *by_source.entry(it.source).or_default() += 1;
        *by_port.entry((it.source, it.port)).or_default() += 1;
    }
    let has = |it: &Connection| {
        let of_source = by_source.get(&it.source).copied().unwrap_or_default();
        let of_port = by_port.get(&(it.source, it.port)).copied();
        (of_source, of_port.unwrap_or_default())
    };
    // They are in order of age, and of equals the last found is the greatest.
    let oldest = connections
        .iter()
        .enumerate()
        .rev()
        .max_by_key(|(_, it)| has(it));
    oldest.map(|(index, _)| index)
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
            self.accept(&checks);
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
        for (port, check) in checks {
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
                        tracing::warn!(port, ?check, %error, "the health check port cannot be served");
                    }
                }
            }
        }
    }

    /// Waits until something happens; `false` if that cannot be.
    fn wait(&self) -> bool {
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds: Vec<PollFd<'_>> = vec![read(self.shared.wake.as_fd())];
        fds.extend(self.listeners.values().map(|it| read(it.as_fd())));
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

    fn accept(&mut self, checks: &Checks) {
        for (port, listener) in &self.listeners {
            for _ in 0..ACCEPTED {
                let Ok((stream, from)) = listener.accept() else {
                    break;
                };
                if stream.set_nonblocking(true).is_err() {
                    continue;
                }
                let now = Instant::now();
                let mut connection = Connection {
                    stream,
                    source: Source::of(from.ip()),
                    port: *port,
                    request: Vec::new(),
                    until: now + PATIENCE,
                };
                // Most requests are there already, and need no place.
                if !connection.goes_on(checks, &self.is_healthy, now) {
                    continue;
                }
                if self.connections.len() >= CONNECTIONS
                    && let Some(index) = least_deserving(&self.connections)
                {
                    self.connections.remove(index);
                }
                self.connections.push(connection);
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
            Some(check) => answer(&self.request, check, is_healthy()),
            None => return false,
        };
        // It fits into the socket's buffer, or its reader is gone.
        let _ = self.stream.write_all(answer.as_bytes());
        let _ = self.stream.shutdown(std::net::Shutdown::Write);
        false
    }
}

/// What a load balancer is told, in the form kube-proxy gives it.
fn answer(request: &[u8], check: &Check, is_healthy: bool) -> String {
    let is = |method: &[u8]| request.starts_with(method);
    if !is(b"GET ") && !is(b"HEAD ") {
        return "HTTP/1.1 405 Method Not Allowed\r\nAllow: GET, HEAD\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into();
    }
    let (is_good, weight, body) = match check {
        Check::Service(name, count) => (
            *count > 0 && is_healthy,
            format!("X-Load-Balancing-Endpoint-Weight: {count}\r\n"),
            serde_json::json!({
                "service": {"namespace": &*name.namespace, "name": &*name.name},
                "localEndpoints": count,
                "serviceProxyHealthy": is_healthy,
            }),
        ),
        Check::Node { leaving } => {
            let is_good = match path(request) {
                b"/healthz" => is_healthy && !leaving,
                b"/livez" => is_healthy,
                _ => return "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".into(),
            };
            let body = serde_json::json!({"healthy": is_healthy, "nodeEligible": !leaving});
            (is_good, String::new(), body)
        }
    };
    let status = if is_good {
        "200 OK"
    } else {
        "503 Service Unavailable"
    };
    let body = body.to_string();
    let length = body.len();
    let body = if is(b"HEAD ") { "" } else { &body };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\nX-Content-Type-Options: nosniff\r\n\
         {weight}Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

/// What is asked for, without a query.
fn path(request: &[u8]) -> &[u8] {
    let target = request.split(|it| *it == b' ').nth(1).unwrap_or_default();
    target.split(|it| *it == b'?').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A port that nobody has. Below those that the kernel gives away, so that nobody gets it meanwhile; tests that run beside
    /// this one begin to look elsewhere.
    fn free_port() -> u16 {
        free_port_behind(10_000 + u16::try_from(std::process::id() % 15_000).unwrap())
    }

    fn free_port_behind(first: u16) -> u16 {
        let is_free = |port: &u16| TcpListener::bind(("::", *port)).is_ok();
        (first + 1..30_000).find(is_free).unwrap()
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
        let health = Health::start(0, move || asked.load(Ordering::Relaxed)).unwrap();
        let port = free_port();
        let check = |count| [(port, Name::new("shop", "web"), count)];
        let has = |words: &'static [&str]| {
            move |answer: io::Result<String>| {
                answer.is_ok_and(|it| words.iter().all(|word| it.contains(word)))
            }
        };
        health.serve(check(2), false);
        let body = r#""service":{"name":"web","namespace":"shop"}"#;
        until_asked(
            port,
            has(&["200 OK", r#""localEndpoints":2"#, "Weight: 2\r\n"]),
        );
        until_asked(port, move |it| it.is_ok_and(|it| it.contains(body)));
        health.serve(check(0), false);
        until_asked(
            port,
            has(&["503 ", r#""localEndpoints":0"#, "Weight: 0\r\n"]),
        );
        health.serve(check(1), false);
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
        // One who says too much is sent away.
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * REQUEST_MAX));
        assert!(!ask(port, &long).is_ok_and(|it| it.contains("HTTP")));
        health.serve([], false);
        until_asked(port, |it| it.is_err());
    }

    /// Connections that ask for nothing, from this address.
    fn idle_from(address: &str, port: u16, count: usize) -> Vec<socket2::Socket> {
        let from = SocketAddr::new(address.parse().unwrap(), 0);
        let to = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let connect = |_| {
            let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
            let socket = socket.unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&to.into()).unwrap();
            socket
        };
        (0..count).map(connect).collect()
    }

    #[test]
    fn s19_who_connects_and_asks_nothing_keeps_nobody_from_an_answer() {
        let health = Health::start(0, || true).unwrap();
        let port = free_port();
        health.serve([(port, Name::new("shop", "web"), 1)], false);
        until_asked(port, |it| it.is_ok_and(|it| it.contains("200 OK")));
        // A load balancer's connection, which is about to ask, and strangers who come again and again.
        let mut balancer = idle_from("127.0.0.9", port, 1).remove(0);
        let mut idle = Vec::new();
        for round in 0..4 {
            idle.extend(idle_from("127.0.0.2", port, CONNECTIONS));
            idle.extend(idle_from("127.0.0.3", port, 8));
            let begin = Instant::now();
            let answer = ask(port, "GET / HTTP/1.1\r\n\r\n").unwrap();
            assert!(answer.contains("200 OK"), "{answer}");
            let took = begin.elapsed();
            assert!(took < Duration::from_secs(1), "round {round}: {took:?}");
        }
        balancer.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut answer = String::new();
        balancer.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("200 OK"), "{answer}");
    }

    #[test]
    fn an_ipv6_host_is_one_source_whatever_addresses_it_takes() {
        let of = |text: &str| Source::of(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }

    #[test]
    fn s20_the_nodes_own_port_says_whether_it_takes_traffic_and_whether_it_lives() {
        let healthy = Arc::new(AtomicBool::new(false));
        let asked = healthy.clone();
        let port = free_port();
        let other = free_port_behind(port);
        let health = Health::start(port, move || asked.load(Ordering::Relaxed)).unwrap();
        let until = |path: &str, words: &str| {
            let deadline = Instant::now() + Duration::from_secs(20);
            let request = format!("GET {path} HTTP/1.1\r\nHost: n\r\n\r\n");
            while !ask(port, &request).is_ok_and(|it| it.contains(words)) {
                assert!(Instant::now() < deadline, "{path} does not say {words}");
                std::thread::sleep(Duration::from_millis(10));
            }
        };
        until("/healthz", "503 ");
        until("/livez", "503 ");
        healthy.store(true, Ordering::Relaxed);
        until("/healthz?verbose", "200 OK");
        until("/livez", r#""nodeEligible":true"#);
        until("/", "404 ");
        health.serve([(other, Name::new("shop", "web"), 1)], true);
        until("/healthz", "503 ");
        until("/healthz", r#""nodeEligible":false"#);
        until("/livez", "200 OK");
        until_asked(other, |it| it.is_ok_and(|it| it.contains("Weight: 1\r\n")));
        // A Service that names the node's port does not get it.
        health.serve([(port, Name::new("shop", "web"), 1)], false);
        until("/healthz", r#""nodeEligible":true"#);
    }

    #[test]
    fn s19_a_port_that_another_program_has_is_served_once_it_is_free() {
        let port = free_port();
        let other = TcpListener::bind(("::", port)).unwrap();
        let health = Health::start(0, || true).unwrap();
        health.serve([(port, Name::new("shop", "web"), 1)], false);
        std::thread::sleep(Duration::from_millis(100));
        drop(other);
        until_asked(port, |it| it.is_ok_and(|it| it.contains("200 OK")));
    }
}
