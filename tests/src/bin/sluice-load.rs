//! The traffic generator as a program, so that it can run inside a pod's namespace.

use anyhow::Result;
use clap::{Parser, Subcommand};
use sluice_tests::load::{tcp, udp};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::time::Duration;

/// Bounded traffic between two pods; every client prints one JSON object
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// Serve TCP and UDP on one port until ended
    Serve {
        /// Address and port to listen on
        #[arg(default_value = "[::]:7000")]
        listen: SocketAddr,
    },
    /// Windowed, acknowledged UDP
    Udp {
        server: SocketAddr,
        /// Seconds
        #[arg(long, default_value_t = 2.0)]
        time: f64,
        /// Payload bytes
        #[arg(long, default_value_t = 64)]
        size: usize,
        /// Datagrams in flight
        #[arg(long, default_value_t = 256)]
        window: usize,
    },
    /// TCP request/response of one byte
    Rr {
        server: SocketAddr,
        #[arg(long, default_value_t = 2.0)]
        time: f64,
    },
    /// TCP connections: open, one byte there and back, close
    Connect {
        server: SocketAddr,
        #[arg(long, default_value_t = 2.0)]
        time: f64,
    },
    /// TCP as fast as it goes
    Bulk {
        server: SocketAddr,
        #[arg(long, default_value_t = 2.0)]
        time: f64,
        /// Congestion control, chosen before connecting
        #[arg(long, default_value = "cubic")]
        congestion: String,
    },
    /// A TCP stream whose every byte is checked at the far end
    Checked {
        server: SocketAddr,
        #[arg(long, default_value_t = 10_000_000)]
        bytes: u64,
    },
}

fn main() -> Result<()> {
    let outcome = match Arguments::parse().role {
        Role::Serve { listen } => return serve(listen),
        Role::Udp {
            server,
            time,
            size,
            window,
        } => udp::window(server, size, window, Duration::from_secs_f64(time))?,
        Role::Rr { server, time } => tcp::round_trips(server, Duration::from_secs_f64(time))?,
        Role::Connect { server, time } => tcp::connections(server, Duration::from_secs_f64(time))?,
        Role::Bulk {
            server,
            time,
            congestion,
        } => tcp::bulk(server, Duration::from_secs_f64(time), &congestion)?,
        Role::Checked { server, bytes } => tcp::checked(server, bytes)?,
    };
    println!("{}", serde_json::to_string(&outcome)?);
    Ok(())
}

fn serve(listen: SocketAddr) -> Result<()> {
    let datagrams = UdpSocket::bind(listen)?;
    let listener = TcpListener::bind(listen)?;
    println!("listening on {listen}");
    std::thread::spawn(move || {
        if let Err(error) = udp::serve(&datagrams) {
            eprintln!("udp: {error:#}");
        }
    });
    tcp::serve(&listener)
}
