//! Windowed UDP: the sender keeps at most a window unacknowledged; the receiver answers each batch with its running count.

use super::{Latency, Outcome};
use anyhow::{Context as _, Result};
use nix::sys::socket::{
    ControlMessage, MsgFlags, MultiHeaders, SockaddrStorage, recvmmsg, sendmmsg, setsockopt,
    sockopt::RcvBufForce,
};
use std::io::{IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

/// Datagrams taken or given in one system call.
const BATCH: usize = 64;
/// After this silence others are sent in the place of what is out.
const PATIENCE: Duration = Duration::from_millis(50);
/// After this silence at the end what is out counts as lost; before, it may only be late on a machine that is busy.
const LAST_PATIENCE: Duration = Duration::from_secs(10);
/// The same where nobody has answered yet.
const FIRST_PATIENCE: Duration = Duration::from_secs(1);
/// Of the receiver's socket: several windows of datagrams of a page each.
const ROOM: usize = 8 << 20;
const NOTHING: [ControlMessage<'static>; 0] = [];

/// Counts datagrams and answers each batch with the count since the sender's start, for ever.
///
/// A datagram whose first byte is 1 starts a new count.
///
/// # Errors
/// If the socket breaks.
pub fn serve(socket: &UdpSocket) -> Result<()> {
    // Who may not have more than others serves all the same.
    let _refused = setsockopt(socket, RcvBufForce, &ROOM);
    let mut buffers = vec![[0u8; 2048]; BATCH];
    let mut count = 0u64;
    loop {
        let (senders, restart) = receive(socket, &mut buffers)?;
        if restart {
            count = 0;
        }
        count += senders.len() as u64;
        if let Some(Some(sender)) = senders.last() {
            // A sender that is gone is no reason to stop serving others.
            let _gone = socket.send_to(&count.to_be_bytes(), sender);
        }
    }
}

type Senders = Vec<Option<SocketAddr>>;

fn receive(socket: &UdpSocket, buffers: &mut [[u8; 2048]]) -> Result<(Senders, bool)> {
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(BATCH, None);
    let mut slices: Vec<_> = buffers.iter_mut().map(|b| [IoSliceMut::new(b)]).collect();
    let received = recvmmsg(
        socket.as_raw_fd(),
        &mut headers,
        &mut slices,
        MsgFlags::MSG_WAITFORONE,
        None,
    )
    .context("receiving")?;
    let mut restart = false;
    let mut senders = Vec::with_capacity(BATCH);
    for message in received {
        restart |= message
            .iovs()
            .next()
            .is_some_and(|bytes| bytes.first() == Some(&1));
        senders.push(message.address.and_then(|a| to_std(&a)));
    }
    Ok((senders, restart))
}

fn to_std(address: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = address
        .as_sockaddr_in()
        .map(|a| SocketAddr::from((a.ip(), a.port())));
    v4.or_else(|| {
        address
            .as_sockaddr_in6()
            .map(|a| SocketAddr::from((a.ip(), a.port())))
    })
}

/// Sends datagrams of `size` bytes to `server` for `time`, at most `window` unacknowledged.
///
/// # Errors
/// If the socket cannot be made or used, or nothing at all is acknowledged.
pub fn window(server: SocketAddr, size: usize, window: usize, time: Duration) -> Result<Outcome> {
    let any: SocketAddr = if server.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    }
    .parse()?;
    let socket = UdpSocket::bind(any)?;
    socket
        .connect(server)
        .with_context(|| format!("no way to {server}"))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    let start = Instant::now();
    let (mut sent, mut acknowledged, mut lost) = (0u64, 0u64, 0u64);
    let mut first = true;
    let mut heard = start;
    loop {
        let is_sending = sent == 0 || start.elapsed() < time;
        let patience = match acknowledged {
            0 => FIRST_PATIENCE,
            _ => LAST_PATIENCE,
        };
        if !is_sending && (acknowledged == sent || heard.elapsed() >= patience) {
            lost = sent - acknowledged;
            break;
        }
        let out = (sent - acknowledged - lost) as usize;
        if out + BATCH.min(window) <= window && is_sending {
            sent += send(&socket, size, BATCH.min(window), first)? as u64;
            first = false;
            continue;
        }
        let mut answer = [0u8; 8];
        match socket.recv(&mut answer) {
            Ok(8) => {
                heard = Instant::now();
                acknowledged = acknowledged.max(u64::from_be_bytes(answer)).min(sent);
                // What was given up may have been only late.
                lost = lost.min(sent - acknowledged);
            }
            Ok(_) => {}
            Err(error) if is_timeout(&error) => lost = sent - acknowledged,
            Err(error) => return Err(error).context("no acknowledgement"),
        }
    }
    anyhow::ensure!(acknowledged > 0, "no datagram to {server} was acknowledged");
    let seconds = start.elapsed().as_secs_f64();
    Ok(Outcome {
        done: acknowledged,
        lost,
        seconds,
        latency: Latency::default(),
    })
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
    )
}

fn send(socket: &UdpSocket, size: usize, count: usize, first: bool) -> Result<usize> {
    let payload = vec![0u8; size.max(1)];
    let mut opening = payload.clone();
    opening[0] = 1;
    let slices: Vec<_> = (0..count)
        .map(|i| {
            [IoSlice::new(if first && i == 0 {
                &opening
            } else {
                &payload
            })]
        })
        .collect();
    let nowhere: Vec<Option<SockaddrStorage>> = vec![None; count];
    let mut headers = MultiHeaders::<SockaddrStorage>::preallocate(count, None);
    let sent = sendmmsg(
        socket.as_raw_fd(),
        &mut headers,
        &slices,
        &nowhere,
        NOTHING,
        MsgFlags::empty(),
    )
    .context("sending")?;
    Ok(sent.count())
}
