//! Wiring against the real kernel: needs root, `/dev/net/tun` and network namespaces; says so and skips without.
//!
//! Everything happens in namespaces that belong to threads of this test and vanish with them. Between the taps stands a
//! forwarder of a few lines instead of the appliance.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail by panic")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::Duration;

use sluice_contract::{LinkId, Mac};
use sluice_host::wiring::netns::Netns;
use sluice_host::wiring::testing::{Namespace, namespaces};
use sluice_host::wiring::{LinkSpec, Mode};
use sluice_ports::offloads::Offloads;
use sluice_ports::tap;

fn spec(pod: &Namespace, id: u16, mode: Mode) -> LinkSpec {
    let id = LinkId::new(id).unwrap();
    let last = id.raw();
    LinkSpec {
        id,
        netns: pod.path.clone(),
        netns_id: None,
        interface: "eth0".into(),
        addresses: vec![
            format!("10.77.0.{last}").parse().unwrap(),
            format!("fd77::{last}").parse().unwrap(),
        ],
        mac: Mac::of_pod(id),
        mtu: 1500,
        mode,
        adopt: None,
    }
}

/// Answers for the gateway and passes everything else to the other tap.
struct Forwarder {
    stop: Arc<AtomicBool>,
    longest: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Forwarder {
    fn between(links: [(File, Mac); 2]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let longest = Arc::new(AtomicU64::new(0));
        let (stopped, length) = (stop.clone(), longest.clone());
        let thread = std::thread::spawn(move || {
            let mut frame = vec![0; 70_000];
            while !stopped.load(Ordering::Relaxed) {
                let mut idle = true;
                for (from, to) in [(0, 1), (1, 0)] {
                    let Ok(n) = (&links[from].0).read(&mut frame) else {
                        continue;
                    };
                    idle = false;
                    length.fetch_max(n as u64, Ordering::Relaxed);
                    let frame = &mut frame[..n];
                    let back = answer(frame);
                    let out = if back { from } else { to };
                    let target = links[out].1;
                    frame[12..18].copy_from_slice(&target.0);
                    frame[18..24].copy_from_slice(&Mac::GATEWAY.0);
                    // A full or closing interface loses the frame, as a wire would.
                    (&links[out].0).write_all(frame).ok();
                }
                if idle {
                    std::thread::yield_now();
                }
            }
        });
        Self {
            stop,
            longest,
            thread: Some(thread),
        }
    }
}

impl Drop for Forwarder {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().map(JoinHandle::join);
    }
}

/// Turns a question for the gateway's MAC into its answer, in place.
fn answer(frame: &mut [u8]) -> bool {
    let body = 26;
    match (frame[24], frame[25]) {
        (0x08, 0x06) if frame[body + 7] == 1 => {
            frame[body + 7] = 2;
            let (asker, asked) = (
                frame[body + 8..body + 18].to_vec(),
                frame[body + 24..body + 28].to_vec(),
            );
            frame[body + 8..body + 14].copy_from_slice(&Mac::GATEWAY.0);
            frame[body + 14..body + 18].copy_from_slice(&asked);
            frame[body + 18..body + 28].copy_from_slice(&asker);
            true
        }
        (0x86, 0xdd) if frame[body + 6] == 58 && frame.get(body + 40) == Some(&135) => {
            let asker = frame[body + 8..body + 24].to_vec();
            let target = frame[body + 48..body + 64].to_vec();
            frame[body + 8..body + 24].copy_from_slice(&target);
            frame[body + 24..body + 40].copy_from_slice(&asker);
            // Neighbour advertisement: solicited, override; option 2 is the target's link-layer address.
            frame[body + 40..body + 48].copy_from_slice(&[136, 0, 0, 0, 0x60, 0, 0, 0]);
            frame[body + 64..body + 66].copy_from_slice(&[2, 1]);
            frame[body + 66..body + 72].copy_from_slice(&Mac::GATEWAY.0);
            let sum = icmp6_checksum(&frame[body..body + 72]);
            frame[body + 42..body + 44].copy_from_slice(&sum.to_be_bytes());
            true
        }
        _ => false,
    }
}

fn icmp6_checksum(packet: &[u8]) -> u16 {
    let words = packet[8..]
        .chunks(2)
        .map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
    let sum: u32 = words.sum::<u32>() + 32 + 58;
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

/// TCP from one pod to the other, and UDP there and back.
fn talk(from: &Namespace, to: &Namespace, address: IpAddr) {
    let echo = to.run(|| UdpSocket::bind((address, 7)));
    let listener = to.run(|| TcpListener::bind((address, 9)));
    let server = std::thread::spawn(move || {
        let mut buffer = [0; 100];
        let (n, peer) = echo.recv_from(&mut buffer).unwrap();
        echo.send_to(&buffer[..n], peer).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        all
    });
    let any: IpAddr = if address.is_ipv4() {
        [0; 4].into()
    } else {
        [0u16; 8].into()
    };
    let udp = from.run(|| UdpSocket::bind((any, 0)));
    udp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    udp.send_to(b"are you there", (address, 7)).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(udp.recv(&mut buffer).unwrap(), 13);

    let sent: Vec<u8> = (0..4_000_000u32).map(|i| (i % 253) as u8).collect();
    let mut stream = from.run(|| TcpStream::connect((address, 9)));
    stream.write_all(&sent).unwrap();
    drop(stream);
    assert!(server.join().unwrap() == sent, "TCP bytes differ");
}

fn pods_talk_over(mode: Mode) {
    let Some([host, a, b]) = namespaces() else {
        return;
    };
    let before = host.picture();
    let specs = [spec(&a, 16, mode), spec(&b, 17, mode)];
    let taps = host.run(|| {
        Ok(specs.each_ref().map(|s| {
            let tap = s.create().unwrap();
            tap::set_offloads(std::os::fd::AsFd::as_fd(&tap), Offloads::ALL).unwrap();
            (tap, s.mac)
        }))
    });
    let forwarder = Forwarder::between(taps);
    for address in &specs[1].addresses {
        talk(&a, &b, *address);
    }
    let longest = forwarder.longest.load(Ordering::Relaxed);
    assert!(longest > 30_000, "no large frame crossed: {longest}");
    drop(forwarder);
    host.run(|| Ok(specs.each_ref().map(|s| s.remove().unwrap())));
    assert_eq!(host.picture(), before);
    assert_eq!(a.interfaces(), BTreeSet::from(["lo".to_owned()]));
    assert_eq!(b.interfaces(), BTreeSet::from(["lo".to_owned()]));
}

#[test]
fn w04_w12_pods_talk_through_veth_and_tap_with_offloads_and_nothing_is_left() {
    pods_talk_over(Mode::Veth);
}

#[test]
fn w04_w12_pods_talk_through_taps_with_offloads_and_nothing_is_left() {
    pods_talk_over(Mode::Tap);
}

#[test]
fn w11_taps_outlive_their_owner_and_are_attached_again_by_name() {
    for mode in [Mode::Veth, Mode::Tap] {
        let Some([host, a, b]) = namespaces() else {
            return;
        };
        let specs = [spec(&a, 16, mode), spec(&b, 17, mode)];
        host.run(|| Ok(specs.each_ref().map(|s| drop(s.create().unwrap()))));
        assert!(a.interfaces().contains("eth0"));
        let taps = host.run(|| {
            Ok(specs.each_ref().map(|s| {
                let tap = s.attach(None).unwrap();
                tap::set_offloads(std::os::fd::AsFd::as_fd(&tap), Offloads::ALL).unwrap();
                (tap, s.mac)
            }))
        });
        let forwarder = Forwarder::between(taps);
        specs[1]
            .addresses
            .iter()
            .for_each(|address| talk(&a, &b, *address));
        drop(forwarder);
        host.run(|| Ok(specs.each_ref().map(|s| s.remove().unwrap())));
        assert_eq!(host.interfaces(), BTreeSet::from(["lo".to_owned()]));
        assert_eq!(a.interfaces(), BTreeSet::from(["lo".to_owned()]));
    }
}

#[test]
fn c15_failure_at_any_step_leaves_nothing_and_touches_nothing() {
    let Some([host, a, _]) = namespaces() else {
        return;
    };
    let alone = BTreeSet::from(["lo".to_owned()]);
    for mode in [Mode::Veth, Mode::Tap] {
        let good = spec(&a, 16, mode);
        let no_namespace = LinkSpec {
            netns: "/proc/self/none".into(),
            ..good.clone()
        };
        let not_a_namespace = LinkSpec {
            netns: "/proc/self/status".into(),
            ..good.clone()
        };
        let long_name = LinkSpec {
            interface: "much-too-long-name".into(),
            ..good.clone()
        };
        let group_mac = LinkSpec {
            mac: Mac::BROADCAST,
            ..good.clone()
        };
        let tiny_mtu = LinkSpec {
            mtu: 10,
            ..good.clone()
        };
        let address = good.addresses[0];
        let twice = LinkSpec {
            addresses: vec![address, address],
            ..good.clone()
        };
        for bad in [
            no_namespace,
            not_a_namespace,
            long_name,
            group_mac,
            tiny_mtu,
            twice,
        ] {
            let error = host.run(|| Ok(bad.create().unwrap_err()));
            assert_eq!(host.interfaces(), alone, "{mode:?}: {error}");
            assert_eq!(a.interfaces(), alone, "{mode:?}: {error}");
        }
        let tap = host.run(|| Ok(good.create().unwrap()));
        let again = LinkSpec {
            id: LinkId::new(17).unwrap(),
            ..good.clone()
        };
        let error = host.run(|| Ok(again.create().unwrap_err()));
        assert!(error.to_string().contains("name that is taken"), "{error}");
        assert!(a.interfaces().contains("eth0"));
        drop(tap);
        host.run(|| good.remove().map_err(io::Error::other));
        host.run(|| good.remove().map_err(io::Error::other));
        assert_eq!(
            (host.interfaces(), a.interfaces()),
            (alone.clone(), alone.clone())
        );
    }
}

#[test]
fn a_path_that_leads_to_another_namespace_is_not_the_pods() {
    for mode in [Mode::Veth, Mode::Tap] {
        let Some([host, a, b]) = namespaces() else {
            return;
        };
        let identity = |pod: &Namespace| Netns::open(&pod.path).unwrap().identity().unwrap();
        assert_ne!(identity(&a), identity(&b));
        assert_eq!(identity(&a), identity(&a));
        let mut link = spec(&a, 16, mode);
        link.netns_id = Some(identity(&a));
        drop(host.run(|| link.create().map_err(io::Error::other)));
        // Another pod of the node, and the path that was the first one's now leads there.
        let other = spec(&b, 17, mode);
        drop(host.run(|| other.create().map_err(io::Error::other)));
        let moved = LinkSpec {
            netns: b.path.clone(),
            ..link.clone()
        };
        let error = host.run(|| Ok(moved.attach(None).unwrap_err()));
        assert_eq!(error.source.kind(), io::ErrorKind::NotFound, "{error}");
        host.run(|| moved.remove().map_err(io::Error::other));
        assert!(b.interfaces().contains("eth0"), "the other pod's is left");
        host.run(|| {
            link.attach(None).map(drop).or_else(|error| match mode {
                // Its pair went with the host's end.
                Mode::Veth => Ok(()),
                Mode::Tap => Err(io::Error::other(error)),
            })
        });
        host.run(|| link.remove().map_err(io::Error::other));
        host.run(|| other.remove().map_err(io::Error::other));
    }
}

#[test]
fn link_whose_namespace_is_gone_is_removed_all_the_same() {
    for mode in [Mode::Veth, Mode::Tap] {
        let Some([host, a, _]) = namespaces() else {
            return;
        };
        let link = spec(&a, 16, mode);
        drop(host.run(|| link.create().map_err(io::Error::other)));
        drop(a);
        host.run(|| link.remove().map_err(io::Error::other));
        assert_eq!(host.interfaces(), BTreeSet::from(["lo".to_owned()]));
        let error = host.run(|| Ok(link.attach(None).unwrap_err()));
        assert!(error.to_string().contains("namespace"), "{error}");
    }
}

/// The kernel takes the interfaces of a namespace some time after its end, and others remove the link meanwhile: whoever comes
/// second has found an interface that is not there any more when it is to be removed.
#[test]
fn c03_a_link_is_removed_while_its_namespace_ends_and_by_several_at_once() {
    const AT_ONCE: usize = 4;
    let Some([host, ..]) = namespaces() else {
        return;
    };
    for round in 0..40 {
        for mode in [Mode::Veth, Mode::Tap] {
            let pod = Namespace::new().unwrap();
            let link = spec(&pod, 16, mode);
            drop(host.run(|| link.create().map_err(io::Error::other)));
            let start = Barrier::new(AT_ONCE + 1);
            std::thread::scope(|scope| {
                let removals: [_; AT_ONCE] = std::array::from_fn(|_| {
                    scope.spawn(|| {
                        host.run(|| {
                            start.wait();
                            Ok(link.remove())
                        })
                    })
                });
                start.wait();
                drop(pod);
                for removal in removals {
                    let removed = removal.join().unwrap();
                    assert!(removed.is_ok(), "round {round}, {mode:?}: {removed:?}");
                }
            });
            assert_eq!(host.interfaces(), BTreeSet::from(["lo".to_owned()]));
        }
    }
}

#[test]
fn kernel_of_this_machine_is_probed_for_offloads() {
    if namespaces().is_none() {
        return;
    }
    let offloads = tap::probe().unwrap();
    assert!(offloads.checksum && offloads.tso4 && offloads.tso6);
}
