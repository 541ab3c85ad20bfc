//! One session with a router, from OPEN to its end (RFC 4271 §8, without what only a listener needs).

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustbgpd_wire::notification::{NotificationCode, open_subcode};
use rustbgpd_wire::{
    Afi, Capability, DecodeError, EncodeError, Message, OpenMessage, encode_message,
};
use sluice_contract::Prefix;

use super::config::{BgpConfig, PeerConfig};
use super::inbox::{Came, Inbox};
use super::wire::{self, FAMILIES, NextHops, Terms};
use crate::Routes;

/// How long a router may take to answer OPEN, and to take what it is sent.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Ending {
    #[error("this node ends it")]
    Stopped,
    #[error("the router closed the connection")]
    Closed,
    #[error("the router says nothing any more")]
    Silent,
    #[error("the router ends it: {0}")]
    Notified(String),
    #[error("the router's {what}: {reason}")]
    Refused {
        what: &'static str,
        reason: String,
        answer: (NotificationCode, u8),
    },
    #[error("the router's message is wrong: {0}")]
    Wrong(#[from] DecodeError),
    #[error("a message cannot be made: {0}")]
    Unsayable(#[from] EncodeError),
    #[error(transparent)]
    Connection(#[from] io::Error),
}

/// What a session asks of those who have it.
pub(crate) trait Surroundings {
    /// Readable when [`routes`](Self::routes) or [`stop`](Self::stop) may say something new.
    fn news(&self) -> BorrowedFd<'_>;
    /// What is to be announced, news being read.
    fn routes(&self) -> Routes;
    /// Whether the session is to end, and whether the router is to drop the routes then.
    fn stop(&self) -> Option<Farewell>;
    /// Everything was said, and there are so many routes.
    fn told(&self, routes: usize);
}

/// How sessions end that this node ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Farewell {
    /// Routers drop the routes at once.
    Spoken,
    /// Routers keep the routes for as long as was agreed upon: this node is coming back.
    Silent,
}

/// Both sides.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sides<'a> {
    pub(crate) own: &'a BgpConfig,
    pub(crate) router_id: Ipv4Addr,
    pub(crate) next_hops: NextHops,
    pub(crate) peer: &'a PeerConfig,
    /// The router may have known this node a moment ago.
    pub(crate) restarted: bool,
}

/// Holds the session until it ends.
pub(crate) fn hold(
    stream: TcpStream,
    sides: Sides<'_>,
    surroundings: &impl Surroundings,
) -> Ending {
    let mut session = Session {
        stream,
        inbox: Inbox::new(),
    };
    let ended = session.run(sides, surroundings);
    let ending = ended.err().unwrap_or(Ending::Stopped);
    let last_word = match &ending {
        Ending::Wrong(error) => {
            let (code, subcode, _) = error.to_notification();
            Some(wire::notification(code, subcode))
        }
        Ending::Refused { answer, .. } => Some(wire::notification(answer.0, answer.1)),
        Ending::Silent => Some(wire::notification(NotificationCode::HoldTimerExpired, 0)),
        Ending::Stopped if surroundings.stop() != Some(Farewell::Silent) => Some(wire::farewell()),
        _ => None,
    };
    if let Some(message) = last_word {
        // It is over, heard or not.
        let _ = session.send(&message);
    }
    ending
}

/// What came while the session waited.
enum Heard {
    Came(Came),
    News,
    Nothing,
}

struct Session {
    stream: TcpStream,
    inbox: Inbox,
}

impl Session {
    fn run(&mut self, sides: Sides<'_>, surroundings: &impl Surroundings) -> Result<(), Ending> {
        self.stream.set_nonblocking(false)?;
        self.stream.set_write_timeout(Some(PATIENCE))?;
        self.stream.set_nodelay(true)?;
        let open = wire::open(
            sides.own,
            sides.router_id,
            sides.peer.hold_seconds,
            sides.next_hops,
            sides.restarted,
        );
        self.send(&open)?;
        let deadline = Instant::now() + PATIENCE;
        let theirs = match self.await_message(deadline, surroundings)? {
            Some(Came::Message(Message::Open(theirs))) => theirs,
            Some(other) => return Err(unexpected(&other)),
            None => return Ok(()),
        };
        check(&theirs, sides)?;
        self.send(&Message::Keepalive)?;
        match self.await_message(deadline, surroundings)? {
            Some(Came::Message(Message::Keepalive)) => {}
            Some(other) => return Err(unexpected(&other)),
            None => return Ok(()),
        }
        self.established(&theirs, sides, surroundings)
    }

    fn established(
        &mut self,
        theirs: &OpenMessage,
        sides: Sides<'_>,
        surroundings: &impl Surroundings,
    ) -> Result<(), Ending> {
        let terms = Terms {
            own_asn: sides.own.asn,
            is_internal: sides.own.asn == sides.peer.asn,
            four_octets: (theirs.capabilities.iter())
                .any(|it| matches!(it, Capability::FourOctetAs { .. })),
            next_hops: sides.next_hops,
        };
        let spoken: Vec<Afi> = FAMILIES
            .into_iter()
            .filter(|afi| sides.next_hops.has(*afi) && understands(theirs, *afi))
            .collect();
        let hold = Duration::from_secs(theirs.hold_time.min(sides.peer.hold_seconds).into());
        let pause = hold / 3;
        let mut told = BTreeSet::new();
        let mut is_first = true;
        let (mut heard_at, mut said_at) = (Instant::now(), Instant::now());
        loop {
            if surroundings.stop().is_some() {
                return Ok(());
            }
            let routes = surroundings.routes();
            let wanted: BTreeSet<Prefix> = (routes.iter())
                .filter(|it| spoken.contains(&wire::family(it)))
                .copied()
                .collect();
            if is_first || wanted != told {
                self.tell(&told, &wanted, &spoken, terms)?;
                if is_first {
                    for afi in &spoken {
                        self.send(&wire::end_of_rib(*afi, terms)?)?;
                    }
                }
                is_first = false;
                said_at = Instant::now();
                surroundings.told(wanted.len());
                told = wanted;
            }
            let until = match hold.is_zero() {
                true => None,
                false => Some((said_at + pause).min(heard_at + hold)),
            };
            match self.wait(until, surroundings.news())? {
                Heard::Came(Came::Message(Message::Notification(message))) => {
                    return Err(notified(&message));
                }
                Heard::Came(came @ Came::Message(Message::Open(_))) => {
                    return Err(unexpected(&came));
                }
                Heard::Came(Came::Message(Message::RouteRefresh(asked))) => {
                    heard_at = Instant::now();
                    let again = Afi::from_u16(asked.afi_raw);
                    told.retain(|it| Some(wire::family(it)) != again);
                }
                // What the router knows of others is nothing to this node.
                Heard::Came(_) => heard_at = Instant::now(),
                Heard::News | Heard::Nothing => {}
            }
            if hold.is_zero() {
                continue;
            }
            let now = Instant::now();
            if now >= heard_at + hold {
                return Err(Ending::Silent);
            }
            if now >= said_at + pause {
                self.send(&Message::Keepalive)?;
                said_at = now;
            }
        }
    }

    /// Says what has become other than it was told.
    fn tell(
        &mut self,
        told: &BTreeSet<Prefix>,
        wanted: &BTreeSet<Prefix>,
        spoken: &[Afi],
        terms: Terms,
    ) -> Result<(), Ending> {
        for afi in spoken {
            let of = |one: &BTreeSet<Prefix>, other: &BTreeSet<Prefix>| -> Vec<Prefix> {
                let only = one.difference(other);
                only.filter(|it| wire::family(it) == *afi)
                    .copied()
                    .collect()
            };
            let gone = wire::withdraw(*afi, &of(told, wanted), terms)?;
            let new = wire::announce(*afi, &of(wanted, told), terms)?;
            for message in gone.iter().chain(&new) {
                self.send(message)?;
            }
        }
        Ok(())
    }

    fn send(&mut self, message: &Message) -> Result<(), Ending> {
        let bytes = encode_message(message)?;
        self.stream.write_all(&bytes)?;
        Ok(())
    }

    /// The next message; nothing when the session is to end.
    fn await_message(
        &mut self,
        deadline: Instant,
        surroundings: &impl Surroundings,
    ) -> Result<Option<Came>, Ending> {
        loop {
            if surroundings.stop().is_some() {
                return Ok(None);
            }
            match self.wait(Some(deadline), surroundings.news())? {
                Heard::Came(Came::Message(Message::Notification(message))) => {
                    return Err(notified(&message));
                }
                Heard::Came(came) => return Ok(Some(came)),
                // It is read before the routes are told.
                Heard::News => {
                    surroundings.routes();
                }
                Heard::Nothing if Instant::now() >= deadline => return Err(Ending::Silent),
                Heard::Nothing => {}
            }
        }
    }

    /// Waits for a message, for news or for `until`.
    fn wait(&mut self, until: Option<Instant>, news: BorrowedFd<'_>) -> Result<Heard, Ending> {
        if let Some(came) = self.inbox.next()? {
            return Ok(Heard::Came(came));
        }
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        let read = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let mut fds = [read(self.stream.as_fd()), read(news)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => return Err(Ending::Connection(error.into())),
        }
        let [stream_ready, news_ready] = fds.map(|fd| fd.any().unwrap_or(false));
        if news_ready {
            return Ok(Heard::News);
        }
        if stream_ready {
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(Ending::Closed),
                Ok(count) => {
                    let (came, _) = chunk.split_at(count);
                    self.inbox.push(came);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(self.inbox.next()?.map_or(Heard::Nothing, Heard::Came))
    }
}

/// Whether the router can be told routes of a family.
fn understands(theirs: &OpenMessage, wanted: Afi) -> bool {
    let mut families = (theirs.capabilities.iter())
        .filter_map(|it| match it {
            Capability::MultiProtocol { afi, safi } => Some((*afi, *safi)),
            _ => None,
        })
        .peekable();
    if families.peek().is_none() {
        // Before RFC 4760 there was one family.
        return wanted == Afi::Ipv4;
    }
    families.any(|it| it == (wanted, rustbgpd_wire::Safi::Unicast))
}

fn check(theirs: &OpenMessage, sides: Sides<'_>) -> Result<(), Ending> {
    let refuse = |reason, subcode| {
        Err(Ending::Refused {
            what: "OPEN",
            reason,
            answer: (NotificationCode::OpenMessage, subcode),
        })
    };
    let asn = theirs.four_byte_as();
    if asn != sides.peer.asn {
        let reason = format!("it is of AS {asn}, not {}", sides.peer.asn);
        return refuse(reason, open_subcode::BAD_PEER_AS);
    }
    let is_own = asn == sides.own.asn && theirs.bgp_identifier == sides.router_id;
    if theirs.bgp_identifier.is_unspecified() || is_own {
        let reason = format!("its identifier is {}", theirs.bgp_identifier);
        return refuse(reason, open_subcode::BAD_BGP_IDENTIFIER);
    }
    if matches!(theirs.hold_time, 1 | 2) {
        let reason = format!("its hold time is {} s", theirs.hold_time);
        return refuse(reason, open_subcode::UNACCEPTABLE_HOLD_TIME);
    }
    Ok(())
}

fn notified(message: &rustbgpd_wire::NotificationMessage) -> Ending {
    Ending::Notified(format!("{:?}, {}", message.code, message.subcode))
}

fn unexpected(came: &Came) -> Ending {
    let kind = match came {
        Came::Update => "Update".to_owned(),
        Came::Message(message) => format!("{:?}", message.message_type()),
    };
    Ending::Refused {
        what: "message",
        reason: format!("{kind} was not to be said now"),
        answer: (NotificationCode::FsmError, 0),
    }
}

/// For fuzzing: an OPEN is judged.
#[cfg(any(test, feature = "testing"))]
pub(super) fn fuzz_open(theirs: &OpenMessage) {
    let peer = PeerConfig {
        address: Ipv4Addr::LOCALHOST.into(),
        asn: theirs.four_byte_as(),
        port: 179,
        hold_seconds: 90,
        hops: None,
        ttl_security: false,
        password_file: None,
    };
    let own = BgpConfig {
        asn: 64_512,
        router_id: None,
        graceful_restart_seconds: 0,
        peers: Vec::new(),
    };
    let sides = Sides {
        own: &own,
        router_id: Ipv4Addr::LOCALHOST,
        next_hops: NextHops { v4: None, v6: None },
        peer: &peer,
        restarted: false,
    };
    // Refused or not: it is read.
    let _ = check(theirs, sides);
    for afi in FAMILIES {
        let _ = understands(theirs, afi);
    }
}
