//! TCP: request/response, connection rate, and a bulk stream whose every byte is checked.
//!
//! The first byte of a connection says what it wants: `E` echo, `S` sink of a patterned stream that is answered with the
//! count of good bytes.

use super::{Latency, Outcome};
use anyhow::{Context as _, Result, ensure};
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// A connection that does not move for this long is broken.
const STALLED: Duration = Duration::from_secs(10);

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
        b'S' => sink(connection),
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
