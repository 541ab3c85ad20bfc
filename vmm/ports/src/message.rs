//! Requests and replies. The order of variants and fields is the wire format: add at the end, and raise `VERSION` for the rest.

use serde::{Deserialize, Serialize};

use crate::drops::{Drops, HostDrop};
use crate::offloads::Offloads;

/// Longest text of a message.
pub const TEXT_MAX: usize = 64;
/// Rows of one page of counters: fifteen drop reasons at their longest encoding, and still one packet.
pub const ROWS: usize = 12;
/// Drop reasons that a row has room for.
pub const REASONS: usize = 16;

/// A short text.
pub type Text = heapless::String<TEXT_MAX>;
/// One page of counters.
pub type Page = heapless::Vec<PortCounters, ROWS>;
/// Drops by reason ([`HostDrop::code`]); reasons without drops are left out.
pub type DropCounts = heapless::Vec<(u8, u64), REASONS>;

/// What a port's descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PortKind {
    /// A tap with a vnet header of 12 or 24 bytes.
    Tap,
    /// A `SOCK_SEQPACKET` unix socket: a packet is a frame with a vnet header of 12 bytes.
    Socket,
}

/// What the daemon asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// First on every connection. With `take_over` the connection of another daemon is closed; without, it keeps its place.
    Hello { daemon: Text, take_over: bool },
    /// Serves a port, whose descriptor comes with the packet. A port of that id is replaced, and counts anew.
    AddPort { id: u16, kind: PortKind },
    /// Stops serving a port and closes its descriptor.
    RemovePort { id: u16 },
    /// Leaves frames in the ports until `Release` or for this long, at most [`HOLD_MAX_MILLIS`](crate::HOLD_MAX_MILLIS).
    Hold { millis: u32 },
    /// Ends a hold.
    Release,
    /// What the taps may leave unfinished in frames to the guest, now and for ports to come.
    Offloads(Offloads),
    /// How the engine is.
    Status,
    /// Counters of the ports with ids above `after`, in ascending order, one page.
    Counters { after: u16 },
    /// Stops reading ports, sends what the guest has ready, and leaves the rings alone: the answer comes when that is so.
    Freeze,
    /// Ends a freeze.
    Thaw,
    /// Ends the appliance's process in order.
    Quit,
    /// Asks for the descriptor of a port: a daemon that starts beside a running appliance keeps a copy, as the one before did.
    Descriptor { id: u16 },
}

/// What the appliance's process answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reply {
    Welcome(Identity),
    Done,
    Refused(Refusal),
    Status(Status),
    Counters {
        rows: Box<Page>,
        more: bool,
    },
    /// The port's descriptor comes with the packet.
    Descriptor {
        kind: PortKind,
    },
}

/// Which appliance this is: repeated from what the process was started with, so that a daemon can decide whether to adopt it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Program and version, such as `sluice-vmm 0.1.0`.
    pub program: Text,
    /// Build id of the appliance's image.
    pub build: Text,
    /// Version of the control contract that the image speaks.
    pub contract: u32,
}

/// Why a request was not carried out. Nothing has changed then.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    #[error("the packet is of another version of the protocol")]
    Version,
    #[error("the packet is no request")]
    Malformed,
    #[error("a connection begins with Hello")]
    HelloFirst,
    #[error("another daemon is connected")]
    InUse,
    #[error("the id is no port's: they go from 1 to {}", crate::ID_MAX)]
    Id,
    #[error("there is no such port")]
    NoSuchPort,
    #[error("exactly one descriptor comes with AddPort, and none with any other request")]
    Descriptor,
    #[error("the descriptor is not of the kind that was named")]
    Kind,
    #[error("the engine did not answer in time")]
    Late,
    #[error("the kernel refused (errno {0})")]
    Kernel(i32),
}

/// How the engine is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Ports served.
    pub ports: u16,
    /// Frames wait in the ports.
    pub held: bool,
    /// Nothing moves.
    pub frozen: bool,
    /// Both rings of the guest are served.
    pub serving: bool,
    /// Steps that moved something, sleeps, calls of the guest.
    pub busy: u64,
    pub sleeps: u64,
    pub calls: u64,
    /// Times frames waited because the guest had too few buffers, and rings stopped because the guest broke them.
    pub starved: u64,
    pub broken: u64,
    /// Drops that no port could be blamed for.
    pub drops: DropCounts,
    /// The features that the guest accepted.
    pub features: u64,
    /// Microseconds from the process's start until the guest's first frame reached a port.
    pub first_sent_micros: Option<u64>,
    /// Which thread moves the frames, and why.
    pub drive: Drive,
    pub reason: Reason,
    /// What it costs to leave the guest and to enter it again, as measured at its start.
    pub exit_nanos: Option<u32>,
}

/// Which thread moves the frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Drive {
    /// A thread of its own, while the guest runs.
    #[default]
    Apart,
    /// The thread that runs the guest, whenever the guest has nothing to do.
    Inline,
}

/// Why that one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reason {
    /// The program has no other.
    #[default]
    OnlyOne,
    /// It was asked for.
    Asked,
    /// Leaving the guest costs little.
    CheapExit,
    /// There is one core.
    OneCore,
    /// Leaving the guest costs much, and frames come by the dozen.
    ManyFrames,
    /// Leaving the guest costs much, and frames come one by one.
    FewFrames,
    /// Leaving the guest costs much, and frames are rare.
    RareFrames,
    /// Leaving the guest costs much, but others want the cores.
    Crowded,
}

impl Reason {
    /// One sentence for a person.
    pub fn text(self) -> &'static str {
        match self {
            Self::OnlyOne => "the program has no other",
            Self::Asked => "it was asked for",
            Self::CheapExit => "leaving the guest costs little",
            Self::OneCore => "there is one core",
            Self::ManyFrames => "leaving the guest costs much, and frames come by the dozen",
            Self::FewFrames => "leaving the guest costs much, and frames come one by one",
            Self::RareFrames => "leaving the guest costs much, and frames are rare",
            Self::Crowded => "leaving the guest costs much, but others want the cores",
        }
    }
}

/// Frames and bytes of one direction of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CarriedCounts {
    pub frames: u64,
    pub bytes: u64,
    pub gso: u64,
}

/// The counters of one port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortCounters {
    pub id: u16,
    pub to_guest: CarriedCounts,
    pub from_guest: CarriedCounts,
    /// Frames from the guest that were cut here.
    pub cut: u64,
    pub drops: DropCounts,
}

/// Drops by reason.
pub fn drop_counts(drops: &Drops) -> DropCounts {
    drops.seen().map(|(reason, n)| (reason.code(), n)).collect()
}

// A row has room for every reason.
const _: () = assert!(HostDrop::ALL.len() <= REASONS);

/// A text cut to what fits.
pub fn text(from: &str) -> Text {
    let mut text = Text::new();
    for letter in from.chars() {
        if text.push(letter).is_err() {
            break;
        }
    }
    text
}
