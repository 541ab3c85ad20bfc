//! The messages of the control channel.
//!
//! A session begins with `Hello` in both directions and lives until one end says `Hello` again. Every message travels in
//! an [`Envelope`]: the session's number and a sequence number per direction. A message of another session, or one already
//! seen, is ignored and counted; a gap makes the guest say `Resync`, after which the host sends everything again from
//! `Begin`. So garbage, loss and replay on the channel cost a resync and nothing else.
//!
//! A configuration change is `Begin(g)`, any number of `Put`/`Remove`, `Commit(g)`. It takes effect at one moment, at the
//! commit, answered by `Ack(g)`. `Begin { fresh: true }` starts from empty tables: rows not put again are gone at the commit,
//! rows put again are the same rows as before, so no live flow is cut.
//!
//! Each row is checked when it comes. So a row follows those it refers to, is removed before them, and a row that gives
//! something unique away (a link its address) is removed before another one takes it.
//!
//! A row that cannot be taken is left out by its key, named in a `Refused`, and costs nothing but itself; the `Ack` counts
//! all of them. Only a change that breaks the order of messages, or has no generation, is answered by `Reject` and is not in
//! force at all. What is left out never opens anything:
//!
//! * A refused put also ends the row that its key had before. Where other rows refer to that one, it stays as a shell
//!   that serves nothing: a Service port without endpoints, a set that is not used, a neighbor that does not answer. So
//!   nothing depends on what was in force earlier, and a row that refers to a row that is not there is refused as well.
//! * A refused removal changes nothing: its row is not there, or rows that stay refer to it.
//! * A set of backends of which parts are missing at the commit is named as incomplete, once in each change that leaves it
//!   so, and is not used. Its rows stay; it is used from the change on that completes it.
//! * A span or ruleset that was refused denies whoever needs it. While identities or classes are missing because they did
//!   not fit, a layer that does not deny by default, and in which they could matter, denies the peers that they might be
//!   about; this lasts until a fresh change in which all fit.

use crate::limits;
use crate::name::Learnt;
use crate::policy::WouldDeny;
use crate::report::{CounterId, Reject};
use crate::row::{Key, Row};
use crate::types::{Generation, LinkId};
use core::net::IpAddr;
use heapless::{String, Vec};
use serde::{Deserialize, Serialize};

/// What every message travels in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Envelope<M> {
    /// Chosen by the host at its `Hello`, echoed by the guest.
    pub session: u64,
    /// Grows by one with each message of this direction; the `Hello` is 0.
    pub sequence: u32,
    pub message: M,
}

/// From the host to the guest.
#[expect(
    clippy::large_enum_variant,
    reason = "no_std without allocation; one row exists at a time, on the stack"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToGuest {
    /// Opens a session. The guest answers with its own `Hello`; if the versions differ it answers nothing after that.
    Hello {
        version: u16,
    },
    /// Starts a change. `fresh`: from empty tables instead of the committed ones.
    Begin {
        generation: Generation,
        fresh: bool,
    },
    Put(Row),
    Remove(Key),
    Commit {
        generation: Generation,
    },
    /// Asks for all counters that are not zero.
    ReadStats {
        token: u32,
    },
    /// Asks for an answer, nothing else.
    Ping {
        token: u32,
    },
    /// Asks the appliance to end in order.
    Shutdown,
    /// Asks which addresses a pod was told names have, also those that no longer hold; or for those of all pods that do.
    ReadNames {
        token: u32,
        link: Option<LinkId>,
    },
}

/// From the guest to the host.
#[expect(
    clippy::large_enum_variant,
    reason = "no_std without allocation; one message exists at a time, on the stack"
)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    Hello(GuestHello),
    /// Everything up to and with this generation is in force, except so many rows that [`Self::Refused`] has named before.
    Ack {
        generation: Generation,
        refused: u32,
    },
    /// This generation is not in force and never will be; the one before is.
    Reject {
        generation: Generation,
        reject: Reject,
    },
    /// A message is missing: send everything again from `Begin { fresh: true }`.
    Resync {
        expected: u32,
    },
    Pong {
        token: u32,
    },
    /// Counters that are not zero; `last` closes the answer to the `ReadStats` of that token.
    Stats {
        token: u32,
        counters: Vec<Counter, { limits::STATS_BATCH }>,
        last: bool,
    },
    Log {
        level: Level,
        text: String<{ limits::LOG_TEXT }>,
    },
    /// The appliance is about to end and says why; ring 0 reports faults on its own as well.
    Fault {
        text: String<{ limits::LOG_TEXT }>,
    },
    /// Packets wait for a neighbor on the uplink of which no row tells. Said at most once a second of an address.
    Unresolved {
        address: IpAddr,
    },
    /// Said at most once a second of the same, and of eight a second.
    WouldDeny(WouldDeny),
    /// Addresses of names; `last` closes the answer to the `ReadNames` of that token. No more than [`limits::NAMES_TOLD`] in all.
    Names {
        token: u32,
        names: Vec<Learnt, { limits::NAMES_BATCH }>,
        last: bool,
    },
    /// Rows of the change of this generation that are left out of it. It may be named before its commit.
    Refused {
        generation: Generation,
        rows: Vec<Reject, { limits::REFUSED_BATCH }>,
    },
}

/// What a guest says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestHello {
    pub version: u16,
    /// The build id of the running image (the ELF note `.note.gnu.build-id`).
    pub image: [u8; 20],
    /// The generation in force: 0 for a guest that has just booted.
    pub generation: Generation,
    /// Guest RAM in MiB, as the image found it.
    pub ram_mib: u32,
    /// From its first instruction to now, in microseconds.
    pub uptime_us: u64,
    pub room: Room,
}

/// How many rows a guest has room for, of each kind that objects of the cluster fill. The host divides it among namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// Addresses of nodes and of Services.
    pub addresses: u32,
    pub frontends: u32,
    pub ports: u32,
    pub sets: u32,
    pub backends: u32,
    /// Pieces of Maglev tables.
    pub chunks: u32,
    pub sources: u32,
    /// Addresses of pods, local and remote.
    pub identities: u32,
    pub bindings: u32,
    pub rulesets: u32,
    pub classes: u32,
    pub spans: u32,
    pub names: u32,
    pub named: u32,
}

/// One counter and its value since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counter {
    pub id: CounterId,
    pub value: u64,
}

/// How much a log line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Level {
    Error,
    Warn,
    Info,
}
