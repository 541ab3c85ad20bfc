//! TCP: request/response, connection rate, bulk, and a stream whose every byte is checked.
//!
//! The first byte of a connection says what it wants: `E` echo, `B` sink that is answered with the count of bytes, `S` sink
//! of a patterned stream that is answered with the count of good bytes.

use super::{Latency, Outcome};
use anyhow::{Context as _, Result, ensure};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, SockaddrStorage, sockopt};
use std::ffi::OsString;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

/// A connection that does not move for this long is broken.
const STALLED: Duration = Duration::from_secs(10);

/// Bytes of one read or write of a bulk stream: what iperf3 uses.
const BULK: usize = 128 << 10;

/// Serves connections, each in a thread, for ever.
///
/// # Errors
/// If the listener breaks.
pub fn serve(listener: &TcpListener) -> Result<()> {
    for connection in listener.incoming() {
        let mut connection = connection?;
        std::thread::spawn(move || {
            // A client that goes away ends its own connection and nothing else.
            let _ended = answer(&mut connection);
        });
    }
    Ok(())
}

fn answer(connection: &mut TcpStream) -> Result<()> {
    connection.set_nodelay(true)?;
    let mut wish = [0u8];
    connection.read_exact(&mut wish)?;
    match wish[0] {
        b'S' => checked_sink(connection),
        b'B' => sink(connection),
        _ => echo(connection),
    }
}

fn echo(connection: &mut TcpStream) -> Result<()> {
    let mut buffer = [0u8; 4096];
    loop {
        let n = connection.read(&mut buffer)?;
        if n == 0 {
            return Ok(());
        }
        connection.write_all(&buffer[..n])?;
    }
}

fn pattern(position: u64) -> u8 {
    // Not periodic in any power of two, so that a segment at the wrong place is seen.
    (position % 251) as u8
}

fn sink(connection: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0u8; BULK];
    let mut bytes = 0u64;
    loop {
        match connection.read(&mut buffer)? {
            0 => break,
            n => bytes += n as u64,
        }
    }
    connection.write_all(&bytes.to_be_bytes())?;
    Ok(())
}

fn checked_sink(connection: &mut TcpStream) -> Result<()> {
    let mut buffer = vec![0u8; 1 << 18];
    let (mut position, mut good) = (0u64, 0u64);
    loop {
        let n = connection.read(&mut buffer)?;
        if n == 0 {
            break;
        }
        for byte in &buffer[..n] {
            good += u64::from(*byte == pattern(position));
            position += 1;
        }
    }
    connection.write_all(&good.to_be_bytes())?;
    Ok(())
}

fn connect(server: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&server, STALLED)
        .with_context(|| format!("cannot connect to {server}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALLED))?;
    stream.set_write_timeout(Some(STALLED))?;
    Ok(stream)
}

/// Sends as fast as it can for `time`, under the named congestion control. It is chosen before connecting: a socket that begins
/// with one that paces (BBR) goes on pacing under any other.
///
/// # Errors
/// If the congestion control is not there, or the connection breaks.
pub fn bulk(server: SocketAddr, time: Duration, congestion: &str) -> Result<Outcome> {
    let address = SockaddrStorage::from(server);
    let family = match server {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let fd = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    socket::setsockopt(&fd, sockopt::TcpCongestion, &OsString::from(congestion))
        .with_context(|| format!("congestion control {congestion} cannot be used"))?;
    socket::connect(fd.as_raw_fd(), &address)
        .with_context(|| format!("cannot connect to {server}"))?;
    let mut stream = TcpStream::from(fd);
    stream.set_read_timeout(Some(STALLED))?;
    stream.set_write_timeout(Some(STALLED))?;
    stream.write_all(b"B")?;
    let chunk = vec![0x5au8; BULK];
    let start = Instant::now();
    while start.elapsed() < time {
        stream.write_all(&chunk).context("while sending")?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0u8; 8];
    stream
        .read_exact(&mut answer)
        .context("no answer after the last byte")?;
    Ok(Outcome {
        done: u64::from_be_bytes(answer),
        lost: 0,
        seconds: start.elapsed().as_secs_f64(),
        latency: Latency::default(),
    })
}

/// Sends `bytes` patterned bytes; every one of them must arrive at its place.
///
/// # Errors
/// If the connection breaks or a byte is wrong.
pub fn checked(server: SocketAddr, bytes: u64) -> Result<Outcome> {
    let mut stream = connect(server)?;
    let start = Instant::now();
    stream.write_all(b"S")?;
    let mut position = 0u64;
    while position < bytes {
        let n = (bytes - position).min(251 * 512);
        let chunk: Vec<u8> = (position..position + n).map(pattern).collect();
        stream.write_all(&chunk).context("while sending")?;
        position += n;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = [0u8; 8];
    stream
        .read_exact(&mut answer)
        .context("no answer after the last byte")?;
    let good = u64::from_be_bytes(answer);
    ensure!(
        good == bytes,
        "{good} of {bytes} bytes arrived as they were sent"
    );
    let seconds = start.elapsed().as_secs_f64();
    Ok(Outcome {
        done: good,
        lost: 0,
        seconds,
        latency: Latency::default(),
    })
}

/// One byte there and back over one connection, for `time`.
///
/// # Errors
/// If the connection breaks.
pub fn round_trips(server: SocketAddr, time: Duration) -> Result<Outcome> {
    let mut stream = connect(server)?;
    stream.write_all(b"E")?;
    let start = Instant::now();
    let mut samples = Vec::new();
    while start.elapsed() < time {
        let sent = Instant::now();
        let mut byte = [7u8];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        samples.push(sent.elapsed());
    }
    Ok(outcome(samples, start))
}

/// Connect, one byte there and back, close; for `time`.
///
/// # Errors
/// If a connection fails.
pub fn connections(server: SocketAddr, time: Duration) -> Result<Outcome> {
    let start = Instant::now();
    let mut samples = Vec::new();
    while start.elapsed() < time {
        let begun = Instant::now();
        let mut stream = connect(server)?;
        stream.write_all(b"E7")?;
        let mut byte = [0u8];
        stream.read_exact(&mut byte)?;
        drop(stream);
        samples.push(begun.elapsed());
    }
    Ok(outcome(samples, start))
}

fn outcome(samples: Vec<Duration>, start: Instant) -> Outcome {
    Outcome {
        done: samples.len() as u64,
        lost: 0,
        seconds: start.elapsed().as_secs_f64(),
        latency: Latency::of(samples),
    }
}
