//! A resolver's two questions through a running node: from one socket, at once, to the ClusterIP of a DNS server.

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use sluice_tests::command;
use sluice_tests::lab::{Lab, Plan};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use sluice_tests::policy::{self, PATIENCE};
use std::fs::File;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// In each family. Linux's resolver gives up after five seconds, so a single lost datagram shows.
const PAIRS: u32 = 5_000;
const DNS: u16 = 53;
const ADDRESSES: [&str; 2] = ["10.96.0.53", "fd00:96::53"];

const SERVICE: &str = "\
apiVersion: v1
kind: Service
metadata: {name: dns, namespace: default}
spec:
  clusterIP: 10.96.0.53
  clusterIPs: [10.96.0.53, 'fd00:96::53']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {role: server}
  ports: [{port: 53, protocol: UDP, targetPort: 5353}]
";

/// A socket that lives in a namespace, whichever its thread lives in afterwards.
fn socket(within: &Netns, at: SocketAddr) -> Result<UdpSocket> {
    let file = File::open(within.path())?;
    let made = std::thread::spawn(move || -> Result<UdpSocket> {
        setns(file, CloneFlags::CLONE_NEWNET)?;
        Ok(UdpSocket::bind(at)?)
    });
    made.join().ok().context("the thread broke")?
}

/// Answers every datagram with itself until it is told to end.
fn answer_all(server: &UdpSocket, ends: &AtomicBool) -> Result<u64> {
    server.set_read_timeout(Some(Duration::from_millis(100)))?;
    let (mut datagram, mut count) = ([0; 512], 0);
    while !ends.load(Ordering::Relaxed) {
        if let Ok((length, from)) = server.recv_from(&mut datagram) {
            server.send_to(datagram.get(..length).unwrap_or_default(), from)?;
            count += 1;
        }
    }
    Ok(count)
}

/// Asks twice from a new socket and waits for both answers; how long that took.
fn resolve(
    client: &Netns,
    server: SocketAddr,
    number: u32,
    patience: Duration,
) -> Result<Duration> {
    let any = match server {
        SocketAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = socket(client, (any, 0).into())?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(patience))?;
    let question = |kind: u8| [&number.to_be_bytes()[..], &[kind; 28]].concat();
    let began = Instant::now();
    socket.send(&question(1))?;
    socket.send(&question(28))?;
    let mut missing = vec![question(1), question(28)];
    let mut answer = [0; 512];
    while !missing.is_empty() {
        let length = socket.recv(&mut answer).context("no answer")?;
        let before = missing.len();
        missing.retain(|it| Some(&it[..]) != answer.get(..length));
        ensure!(missing.len() + 1 == before, "an answer to nothing");
    }
    Ok(began.elapsed())
}

fn through(lab: &Lab) -> Result<()> {
    let (client, server) = (&lab.pods[0], &lab.pods[1]);
    let at = SocketAddr::from((Ipv6Addr::UNSPECIFIED, 5353));
    let (listening, ends) = (socket(&server.netns, at)?, AtomicBool::new(false));
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| answer_all(&listening, &ends));
        let asked = ADDRESSES.iter().try_for_each(|address| -> Result<()> {
            let to = SocketAddr::new(address.parse()?, DNS);
            command::until("a first answer", PATIENCE, || {
                resolve(&client.netns, to, 0, Duration::from_millis(200)).map(drop)
            })?;
            let mut longest = Duration::ZERO;
            for number in 1..=PAIRS {
                let took = resolve(&client.netns, to, number, Duration::from_secs(5));
                longest = longest.max(took.with_context(|| format!("pair {number} to {address}"))?);
            }
            println!("{PAIRS} pairs to {address}, the slowest took {longest:?}");
            Ok(())
        });
        ends.store(true, Ordering::Relaxed);
        let count = serving.join().ok().context("the server broke")??;
        asked?;
        ensure!(count >= u64::from(4 * PAIRS), "{count} questions arrived");
        Ok(())
    })
}

#[test]
fn d01_two_questions_at_once_from_one_socket_through_a_running_node() {
    need!(
        "d01_two_questions_at_once_from_one_socket_through_a_running_node",
        Root,
        Kvm,
        Tool("ip")
    );
    let lab = policy::start(&Plan::default()).expect("a node");
    policy::write(&lab, "dns.yaml", SERVICE).expect("a Service");
    if let Err(error) = through(&lab) {
        panic!("{error:?}\n{}", lab.sluice(&["drops"]).unwrap_or_default());
    }
}
