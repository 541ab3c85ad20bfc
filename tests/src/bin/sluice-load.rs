//! The traffic generator as a program, so that it can run inside a pod's namespace.

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use sluice_tests::load::{flood, paced, tcp, udp};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
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
    /// TCP requests at a fixed rate, each on a connection of its own
    Paced {
        server: SocketAddr,
        #[arg(long, default_value_t = 2.0)]
        time: f64,
        /// Requests a second
        #[arg(long, default_value_t = 100.0)]
        rate: f64,
    },
    /// Answer each UDP datagram with itself until ended
    Echo {
        #[arg(default_value = "[::]:7001")]
        listen: SocketAddr,
    },
    /// What a hostile pod or stranger sends, through a raw socket
    Flood {
        kind: Kind,
        source: Ipv4Addr,
        target: SocketAddrV4,
        #[arg(long, default_value_t = 2.0)]
        time: f64,
        /// Packets a second
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        /// Tunnel address that a forged ICMP message quotes as the destination
        #[arg(long, default_value = "192.0.2.1:4789")]
        peer: SocketAddrV4,
        /// MTU that a forged ICMP message claims
        #[arg(long, default_value_t = 552)]
        mtu: u16,
    },
    /// A TCP stream whose every byte is checked at the far end
    Checked {
        server: SocketAddr,
        #[arg(long, default_value_t = 10_000_000)]
        bytes: u64,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kind {
    /// UDP from ever other source ports
    Ports,
    /// First fragments without the rest
    Fragments,
    /// Forged ICMP "fragmentation needed"
    TooBig,
}

fn main() -> Result<()> {
    let outcome = match Arguments::parse().role {
        Role::Serve { listen } => return serve(listen),
        Role::Echo { listen } => return flood::echo(&UdpSocket::bind(listen)?),
        Role::Paced { server, time, rate } => {
            paced::requests(server, rate, Duration::from_secs_f64(time))?
        }
        Role::Flood {
            kind,
            source,
            target,
            time,
            rate,
            peer,
            mtu,
        } => {
            let kind = match kind {
                Kind::Ports => flood::Kind::Ports,
                Kind::Fragments => flood::Kind::Fragments,
                Kind::TooBig => flood::Kind::TooBig { peer, mtu },
            };
            let time = Duration::from_secs_f64(time);
            flood::send(source, target, kind, flood::Bounds { rate, time })?
        }
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
