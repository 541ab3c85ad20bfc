//! The whole loop on a host: real rings, real tables, a machine with a clock set by hand.

use super::*;
use crate::console::tests::{Host, console};
use crate::net::tests::{Backend, Wire, trunk};
use sluice_appliance::session::Facts;
use sluice_appliance::testing::{Builder, pod_row};
use sluice_appliance::{Arena, Capacity};
use sluice_contract::frame::{Decoder, FRAME_MAX, decode, encode};
use sluice_contract::message::Envelope;
use sluice_contract::{Generation, Row, ToGuest, ToHost, VERSION};
use std::boxed::Box;
use std::cell::RefCell;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

#[derive(Default)]
struct World {
    now: u64,
    sleeps: Vec<u64>,
    heartbeats: usize,
    notified: Vec<(Device, u16)>,
    /// What happens at the last moment before a sleep.
    at_the_last_moment: Option<Box<dyn FnOnce()>>,
}

/// Each look at the clock takes a microsecond; a sleep takes as long as it may.
struct Fake(Rc<RefCell<World>>);

impl Machine for Fake {
    fn now(&self) -> u64 {
        let mut world = self.0.borrow_mut();
        world.now += 1000;
        world.now
    }

    fn notify(&mut self, device: Device, queue: u16) {
        self.0.borrow_mut().notified.push((device, queue));
    }

    fn clear_interrupts(&mut self) {
        let event = self.0.borrow_mut().at_the_last_moment.take();
        if let Some(event) = event {
            event();
        }
    }

    fn sleep(&mut self, nanoseconds: u64) {
        let mut world = self.0.borrow_mut();
        world.sleeps.push(nanoseconds);
        world.now += nanoseconds;
    }

    fn moves_meanwhile(&self) -> bool {
        true
    }

    fn heartbeat(&mut self) {
        self.0.borrow_mut().heartbeats += 1;
    }
}

struct Node {
    appliance: Loop<'static, Fake>,
    world: Rc<RefCell<World>>,
    backend: Rc<RefCell<Backend>>,
    host: Host,
    decoder: Decoder,
    sequence: u32,
}

const FACTS: Facts = Facts {
    image: [9; 20],
    ram_mib: 64,
};

impl Node {
    fn new() -> Self {
        let ((trunk, backend), (console, host)) = (trunk(), console());
        let mut arena = Arena::new(Vec::leak(vec![0; 96 << 20]));
        let pipeline = Pipeline::new(&mut arena, Capacity::default(), [1; 16]).unwrap();
        let world = Rc::new(RefCell::new(World::default()));
        let control = Control::new(console, FACTS);
        let fake = Fake(Rc::clone(&world));
        let appliance = Loop::new(fake, Some(trunk), Some(control), pipeline);
        let (backend, decoder) = (Rc::new(RefCell::new(backend)), Decoder::default());
        Self {
            appliance,
            world,
            backend,
            host,
            decoder,
            sequence: 0,
        }
    }

    /// A node that knows pods 16 and 17.
    fn with_pods() -> Self {
        let mut node = Self::new();
        node.say(ToGuest::Hello { version: VERSION });
        let generation = Generation(1);
        node.say(ToGuest::Begin {
            generation,
            fresh: true,
        });
        node.say(ToGuest::Put(Row::Link(pod_row(16, 1))));
        node.say(ToGuest::Put(Row::Link(pod_row(17, 2))));
        node.say(ToGuest::Commit { generation });
        let heard = node.until_quiet();
        assert!(
            matches!(&heard[..], [ToHost::Hello(_), ToHost::Ack { .. }]),
            "{heard:?}"
        );
        node
    }

    fn say(&mut self, message: ToGuest) {
        let envelope = Envelope {
            session: 7,
            sequence: self.sequence,
            message,
        };
        self.sequence += 1;
        let mut buffer = [0; FRAME_MAX];
        let frame = encode(&envelope, &mut buffer).unwrap();
        assert_eq!(self.host.write(frame), frame.len());
    }

    fn hear(&mut self) -> Vec<ToHost> {
        let bytes = self.host.read();
        let mut rest = &bytes[..];
        let mut messages = Vec::new();
        while let Some(payload) = self.decoder.next(&mut rest) {
            messages.push(decode::<Envelope<ToHost>>(payload).unwrap().message);
        }
        messages
    }

    /// Turns until the machine sleeps; what was said meanwhile.
    fn until_quiet(&mut self) -> Vec<ToHost> {
        let before = self.world.borrow().sleeps.len();
        let mut heard = Vec::new();
        for _ in 0..10_000 {
            if self.world.borrow().sleeps.len() > before {
                break;
            }
            assert_eq!(self.appliance.turn(), Order::Continue);
            heard.extend(self.hear());
        }
        heard
    }

    fn put(&self, wire: &Wire) {
        assert!(self.backend.borrow_mut().put(wire));
    }

    fn take(&self) -> Option<Wire> {
        self.backend.borrow_mut().take()
    }
}

fn ping(from: u16) -> Wire {
    let (source, destination) = if from == 16 { (1, 2) } else { (2, 1) };
    let address = |n| std::format!("10.0.0.{n}");
    let frame = Builder::from(from, &address(source), &address(destination))
        .echo(1, 1)
        .build();
    Wire::plain(from, frame)
}

#[test]
fn a_configured_node_carries_a_frame_from_pod_to_pod() {
    let mut node = Node::with_pods();
    node.put(&ping(16));
    node.appliance.turn();
    let sent = node.take().unwrap();
    assert_eq!((sent.link, sent.frame.len()), (17, ping(16).frame.len()));
    assert_eq!(sent.frame[22], 63, "one hop");
    assert!(node.appliance.pipeline.stats().is_balanced());
}

#[test]
fn a_hello_tells_what_the_image_knows_of_itself() {
    let mut node = Node::new();
    node.say(ToGuest::Hello { version: VERSION });
    let heard = node.until_quiet();
    let [ToHost::Hello(hello)] = &heard[..] else {
        panic!("{heard:?}")
    };
    assert_eq!(
        (hello.image, hello.ram_mib, hello.generation.0),
        (FACTS.image, 64, 0)
    );
    assert!(hello.uptime_us > 0);
}

#[test]
fn a_frame_of_a_link_that_is_not_configured_ends_in_its_counter() {
    let mut node = Node::new();
    node.put(&ping(16));
    node.appliance.turn();
    let stats = node.appliance.pipeline.stats();
    assert_eq!(
        (stats.dropped(DropReason::UnknownLink), stats.received()),
        (1, 1)
    );
    assert_eq!(node.take(), None);
}

#[test]
fn bursts_in_both_directions_lose_nothing() {
    let mut node = Node::with_pods();
    for round in 0..200 {
        for _ in 0..100 {
            node.put(&ping(16));
            node.put(&ping(17));
        }
        let mut seen = 0;
        for _ in 0..10 {
            node.appliance.turn();
            while node.take().is_some() {
                seen += 1;
            }
            node.backend.borrow_mut().complete();
        }
        assert_eq!(seen, 200, "round {round}");
    }
    assert!(node.appliance.pipeline.stats().is_balanced());
    assert_eq!(node.appliance.pipeline.stats().forwarded(), 40_000);
}

#[test]
fn an_idle_node_sleeps_a_second_at_a_time_and_needs_no_heartbeat() {
    let mut node = Node::new();
    for _ in 0..5 {
        node.until_quiet();
    }
    let world = node.world.borrow();
    assert!(
        world.sleeps[1..]
            .iter()
            .all(|length| *length == 1_000_000_000),
        "{:?}",
        world.sleeps
    );
    assert!(world.heartbeats <= 1);
    assert_eq!(node.appliance.pipeline.stats().machine.parks, 5);
}

#[test]
fn a_node_without_a_trunk_sleeps_too() {
    let mut node = Node::new();
    node.appliance.trunk = None;
    node.until_quiet();
    assert_eq!(node.world.borrow().sleeps, [1_000_000_000]);
}

#[test]
fn a_frame_that_comes_at_the_last_moment_is_not_slept_over() {
    let mut node = Node::with_pods();
    let backend = Rc::clone(&node.backend);
    let slept = node.world.borrow().sleeps.len();
    let event = move || assert!(backend.borrow_mut().put(&ping(16)));
    node.world.borrow_mut().at_the_last_moment = Some(Box::new(event));
    while node.world.borrow().at_the_last_moment.is_some() {
        node.appliance.turn();
    }
    node.appliance.turn();
    assert_eq!(node.world.borrow().sleeps.len(), slept);
    assert_eq!(node.take().unwrap().link, 17);
}

#[test]
fn a_busy_node_gives_a_sign_of_life_four_times_a_second() {
    let mut node = Node::with_pods();
    let start = node.world.borrow().now;
    let before = node.world.borrow().heartbeats;
    while node.world.borrow().now < start + 2_000_000_000 {
        node.put(&ping(16));
        node.appliance.turn();
        node.take();
        node.backend.borrow_mut().complete();
        node.world.borrow_mut().now += 100_000;
    }
    let beats = node.world.borrow().heartbeats - before;
    assert!((7..=9).contains(&beats), "{beats}");
}

#[test]
fn the_host_ends_the_machine_in_order() {
    let mut node = Node::with_pods();
    node.say(ToGuest::Shutdown);
    let ended = (0..100).any(|_| node.appliance.turn() == Order::Shutdown);
    assert!(ended);
}

#[test]
fn noise_on_the_control_channel_costs_frames_nothing() {
    let mut node = Node::with_pods();
    for seed in 0..50u8 {
        let noise: Vec<u8> = (0..500u16)
            .map(|i| (i as u8).wrapping_mul(seed) ^ seed)
            .collect();
        node.host.write(&noise);
        node.put(&ping(16));
        node.appliance.turn();
        assert_eq!(node.take().map(|wire| wire.link), Some(17));
        node.backend.borrow_mut().complete();
    }
    node.until_quiet();
    assert!(node.appliance.pipeline.stats().machine.control_garbage > 0);
    // Still the same session.
    node.say(ToGuest::Ping { token: 5 });
    let heard = [node.until_quiet(), node.until_quiet()].concat();
    assert_eq!(heard, [ToHost::Pong { token: 5 }]);
}
