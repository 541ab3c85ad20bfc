//! Two threads take turns with one engine, and no frame is lost between them.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use sluice_ports::message::Drive;
use sluice_ports::wire;

use crate::driver::{Command, DriverCounters};
use crate::engine::{Engine, RECEIVE, TRANSMIT, TrunkCounters};
use crate::links::LinkCounters;
use crate::pair::{Inline, Pair, Rest};
use crate::policy::Wish;
use crate::testing::{FakeGuest, buffer};
use crate::vnet;

const LINK: u16 = 16;
const BUFFERS: u16 = 64;
const BUFFER: u32 = 0x4000;

/// A guest that sends back every frame, on a thread that moves frames while it rests.
struct Guest {
    _pair: Pair,
    port: OwnedFd,
    changes: Arc<AtomicU32>,
    carried: Arc<LinkCounters>,
    trunk: Arc<TrunkCounters>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Guest {
    fn start(wish: Wish, exit: Duration) -> io::Result<Self> {
        let trunk = Arc::new(TrunkCounters::default());
        let engine = Engine::new(trunk.clone())?;
        let changes = Arc::new(AtomicU32::new(0));
        let counted = changes.clone();
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?);
        let woken = wake.clone();
        let tell = Box::new(move |_: Drive| {
            counted.fetch_add(1, Ordering::Relaxed);
            woken.write(1).unwrap();
        });
        let counters = Arc::new(DriverCounters::default());
        let poll = Duration::from_micros(50);
        let (pair, inline) = Pair::start(engine, wish, poll, counters, tell)?;
        inline.watch(wake.as_fd())?;
        inline.exit_costs(exit);
        let mut guest = FakeGuest::new(256, true)?;
        guest.offer_buffers(0, BUFFERS, BUFFER);
        let kick = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?);
        for queue in [RECEIVE, TRANSMIT] {
            let kick = File::from(kick.as_fd().try_clone_to_owned()?);
            let start = Command::StartRing {
                queue,
                ring: Box::new(guest.ring(queue)?),
                call: None,
                kick: Some(kick),
            };
            pair.mailbox().send(start).unwrap();
        }
        let (port, given) = wire::pair()?;
        let carried = Arc::new(LinkCounters::default());
        let added = pair.mailbox().ask(|reply| Command::AddLink {
            id: LINK,
            tap: given,
            counters: carried.clone(),
            reply,
        });
        added.unwrap()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || echo(guest, inline, [&wake, &kick], &stopped));
        Ok(Self {
            _pair: pair,
            port,
            changes,
            carried,
            trunk,
            stop,
            thread: Some(thread),
        })
    }

    fn send(&self, number: u32) {
        let mut frame = vec![0; vnet::HEADER + vnet::MACS];
        frame.extend([0x88, 0xb5]);
        frame.extend(number.to_le_bytes());
        let deadline = Instant::now() + Duration::from_secs(20);
        while send(&self.port, &frame, SendFlags::DONTWAIT).is_err() {
            assert!(Instant::now() < deadline, "frame {number} is not taken");
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn expect(&self, number: u32) {
        let mut frame = [0; 100];
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Ok((length, _)) = recv(&self.port, &mut frame[..], RecvFlags::DONTWAIT) {
                assert_eq!(frame[length - 4..length], number.to_le_bytes());
                return;
            }
            assert!(
                Instant::now() < deadline,
                "frame {number} is lost: {:?} {:?}",
                self.carried,
                self.trunk
            );
            std::hint::spin_loop();
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let ended = self.thread.take().unwrap().join();
        assert!(ended.is_ok());
    }
}

fn echo(mut guest: FakeGuest, mut inline: Inline, [wake, kick]: [&EventFd; 2], stop: &AtomicBool) {
    let mut slot = 0;
    while !stop.load(Ordering::Acquire) {
        if inline.rest(Some(Duration::from_millis(5))) == Rest::Apart {
            std::thread::sleep(Duration::from_micros(20));
        }
        let _ = wake.read();
        for (head, length) in guest.used(RECEIVE) {
            let index = u16::try_from(head).unwrap();
            let mut frame = guest.read(buffer(index, BUFFER), length as usize);
            // It asks for nothing of its own on the way out.
            frame[..vnet::HEADER].fill(0);
            guest.send(slot, &frame, 4096);
            slot = (slot + 1) % 256;
            kick.write(1).unwrap();
            guest.offer_buffers(index, 1, BUFFER);
        }
    }
}

const DEAR: Duration = Duration::from_micros(24);

#[test]
fn no_frame_is_lost_while_the_threads_take_turns() {
    for wish in [
        Wish::Always(Drive::Inline),
        Wish::Always(Drive::Apart),
        Wish::Auto,
    ] {
        let guest = Guest::start(wish, DEAR).unwrap();
        let mut number = 0;
        for _ in 0..6 {
            // One by one, which asks for a thread apart where cores are free; then by the dozen, which ends that.
            for _ in 0..400 {
                guest.send(number);
                guest.expect(number);
                number += 1;
            }
            for _ in 0..30 {
                let first = number;
                for _ in 0..40 {
                    guest.send(number);
                    number += 1;
                }
                (first..number).for_each(|number| guest.expect(number));
            }
        }
        println!(
            "{wish:?}: the guest was informed {} times",
            guest.changes.load(Ordering::Relaxed)
        );
    }
}

#[test]
fn commands_are_carried_out_while_the_guest_neither_rests_nor_ends() {
    let engine = Engine::new(Arc::new(TrunkCounters::default())).unwrap();
    let counters = Arc::new(DriverCounters::default());
    let wish = Wish::Always(Drive::Inline);
    let (pair, _never_rests) =
        Pair::start(engine, wish, Duration::ZERO, counters, Box::new(|_| {})).unwrap();
    for _ in 0..20 {
        let report = pair.mailbox().ask(|reply| Command::Report { reply });
        assert!(!report.unwrap().serving);
    }
}

#[test]
fn a_rest_ends_with_its_time_with_a_command_and_with_another_descriptor() {
    let engine = Engine::new(Arc::new(TrunkCounters::default())).unwrap();
    let counters = Arc::new(DriverCounters::default());
    let wish = Wish::Always(Drive::Inline);
    let (pair, mut inline) =
        Pair::start(engine, wish, Duration::ZERO, counters, Box::new(|_| {})).unwrap();
    let other = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap());
    inline.watch(other.as_fd()).unwrap();
    assert_eq!(inline.rest(Some(Duration::from_millis(2))), Rest::Other);
    let (say, rested) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        // Without a limit of its own.
        say.send(inline.rest(None)).unwrap();
    });
    pair.mailbox()
        .ask(|reply| Command::Report { reply })
        .unwrap();
    other.write(1).unwrap();
    assert_eq!(
        rested.recv_timeout(Duration::from_secs(20)),
        Ok(Rest::Other)
    );
    thread.join().unwrap();
}
