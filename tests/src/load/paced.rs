//! Requests at a fixed rate, each on a connection of its own: what a service with steady demand sees, however slow
//! the answers are. A closed loop would hide a stall, because it asks less often while it waits.

use super::{Latency, Outcome};
use anyhow::{Result, ensure};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

/// A request that has no answer after this long is lost.
const DEADLINE: Duration = Duration::from_secs(2);
/// Requests in flight. One more than this counts as lost at once.
const IN_FLIGHT: usize = 512;

/// Sends `rate` requests a second for `time`. The latency counts from the moment at which a request was due.
///
/// # Errors
/// If `rate` is no positive number, or nothing at all is answered.
pub fn requests(server: SocketAddr, rate: f64, time: Duration) -> Result<Outcome> {
    ensure!(rate.is_finite() && rate > 0.0, "--rate must be positive");
    let period = Duration::from_secs_f64(1.0 / rate);
    let in_flight = Arc::new(AtomicUsize::new(0));
    let (done, answers) = mpsc::channel();
    let start = Instant::now();
    let mut lost = 0u64;
    for number in 0u32.. {
        let due = period * number;
        if due >= time {
            break;
        }
        std::thread::sleep(due.saturating_sub(start.elapsed()));
        if in_flight.fetch_add(1, Ordering::Relaxed) >= IN_FLIGHT {
            in_flight.fetch_sub(1, Ordering::Relaxed);
            lost += 1;
            continue;
        }
        let (done, in_flight) = (done.clone(), in_flight.clone());
        std::thread::spawn(move || {
            let answered = ask(server).is_ok();
            in_flight.fetch_sub(1, Ordering::Relaxed);
            let took = (start + due).elapsed();
            // The receiver lives until all senders are gone.
            let _received = done.send(answered.then_some(took));
        });
    }
    drop(done);
    let mut samples = Vec::new();
    for answer in answers {
        match answer {
            Some(took) => samples.push(took),
            None => lost += 1,
        }
    }
    ensure!(!samples.is_empty(), "{server} answered no request");
    Ok(Outcome {
        done: samples.len() as u64,
        lost,
        seconds: start.elapsed().as_secs_f64(),
        latency: Latency::of(samples),
    })
}

fn ask(server: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&server, DEADLINE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(DEADLINE))?;
    stream.write_all(b"E7")?;
    stream.read_exact(&mut [0u8])?;
    Ok(())
}
