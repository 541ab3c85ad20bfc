//! The states of all protocols in one enumeration, how long each lasts, and what each is worth when the table is full.

use crate::flow::Flow;
use crate::time::Duration;
use crate::wire::protocol;

/// Where a connection stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum State {
    /// One direction has been seen.
    UdpUnreplied = 2,
    /// One exchange: what most DNS is.
    UdpReplied = 3,
    /// The first side went on after an answer.
    UdpStream = 4,
    EchoUnreplied = 5,
    EchoReplied = 6,
    OtherUnreplied = 7,
    OtherReplied = 8,
    TcpSynSent = 9,
    /// Both sides have sent a SYN and none has acknowledged (RFC 9293 §3.5, figure 7).
    TcpSynCrossed = 10,
    TcpSynReceived = 11,
    TcpEstablished = 12,
    /// One side has sent its FIN; the other may go on for long.
    TcpHalfClosed = 13,
    /// Both have, not all of it acknowledged.
    TcpClosing = 14,
    TcpTimeWait = 15,
    /// Ended by a RST that the receiver accepts for certain.
    TcpClosed = 16,
    /// A RST within the window but not at its edge: the receiver answers with a challenge (RFC 5961 §3.2) or is gone.
    TcpResetPending = 17,
    /// Picked up without its handshake, not yet seen from both sides.
    TcpMidflow = 18,
    SctpInitSent = 19,
    SctpInitAcked = 20,
    SctpCookieEchoed = 21,
    SctpEstablished = 22,
    SctpShutdown = 23,
    SctpShutdownAcked = 24,
    SctpClosed = 25,
    /// Its answers never come this way (direct return): a SYN was seen, and nothing that follows a handshake.
    TcpOneWayOpening = 26,
    TcpOneWay = 27,
    /// Its sender sent a FIN or a RST; whether that was the end, the other side knows.
    TcpOneWayClosing = 28,
    /// The same without a handshake: one datagram, and more.
    UdpOneWay = 29,
    UdpOneWayStream = 30,
}

/// Row state of a slot not in use, and of a slot that holds the reply addresses of another.
pub(crate) const FREE: u8 = 0;
pub(crate) const EXTENSION: u8 = 1;
const COUNT: usize = 31;

/// What a connection is worth when the table is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Standing {
    /// Not answered, or a handshake not finished: the first to go, oldest first.
    Unreplied = 0,
    /// Has served: closed, or a single exchange. Next to go.
    Spent = 1,
    /// Never evicted.
    Established = 2,
}

impl State {
    pub(crate) const ALL: [Self; COUNT - 2] = [
        Self::UdpUnreplied,
        Self::UdpReplied,
        Self::UdpStream,
        Self::EchoUnreplied,
        Self::EchoReplied,
        Self::OtherUnreplied,
        Self::OtherReplied,
        Self::TcpSynSent,
        Self::TcpSynCrossed,
        Self::TcpSynReceived,
        Self::TcpEstablished,
        Self::TcpHalfClosed,
        Self::TcpClosing,
        Self::TcpTimeWait,
        Self::TcpClosed,
        Self::TcpResetPending,
        Self::TcpMidflow,
        Self::SctpInitSent,
        Self::SctpInitAcked,
        Self::SctpCookieEchoed,
        Self::SctpEstablished,
        Self::SctpShutdown,
        Self::SctpShutdownAcked,
        Self::SctpClosed,
        Self::TcpOneWayOpening,
        Self::TcpOneWay,
        Self::TcpOneWayClosing,
        Self::UdpOneWay,
        Self::UdpOneWayStream,
    ];

    /// The state of that number in a row.
    #[inline]
    pub(crate) fn from_raw(raw: u8) -> Option<Self> {
        Self::ALL.get(usize::from(raw.wrapping_sub(2))).copied()
    }

    pub const fn standing(self) -> Standing {
        match self {
            Self::UdpUnreplied
            | Self::EchoUnreplied
            | Self::OtherUnreplied
            | Self::TcpSynSent
            | Self::TcpSynCrossed
            | Self::TcpSynReceived
            | Self::TcpMidflow
            | Self::SctpInitSent
            | Self::SctpInitAcked
            | Self::SctpCookieEchoed
            | Self::TcpOneWayOpening
            | Self::UdpOneWay => Standing::Unreplied,
            Self::UdpReplied
            | Self::EchoReplied
            | Self::TcpTimeWait
            | Self::TcpClosed
            | Self::SctpClosed
            | Self::TcpOneWayClosing => Standing::Spent,
            Self::UdpStream
            | Self::OtherReplied
            | Self::TcpEstablished
            | Self::TcpHalfClosed
            | Self::TcpClosing
            | Self::TcpResetPending
            | Self::SctpEstablished
            | Self::SctpShutdown
            | Self::SctpShutdownAcked
            | Self::TcpOneWay
            | Self::UdpOneWayStream => Standing::Established,
        }
    }

    /// The protocol family whose packets can be in this state.
    pub(crate) const fn fits(self, flow_protocol: u8) -> bool {
        match self {
            Self::UdpUnreplied
            | Self::UdpReplied
            | Self::UdpStream
            | Self::UdpOneWay
            | Self::UdpOneWayStream => flow_protocol == protocol::UDP,
            Self::EchoUnreplied | Self::EchoReplied => {
                matches!(flow_protocol, protocol::ICMP | protocol::ICMP6)
            }
            Self::OtherUnreplied | Self::OtherReplied => !is_special(flow_protocol),
            Self::TcpSynSent
            | Self::TcpSynCrossed
            | Self::TcpSynReceived
            | Self::TcpEstablished
            | Self::TcpHalfClosed
            | Self::TcpClosing
            | Self::TcpTimeWait
            | Self::TcpClosed
            | Self::TcpResetPending
            | Self::TcpMidflow
            | Self::TcpOneWayOpening
            | Self::TcpOneWay
            | Self::TcpOneWayClosing => flow_protocol == protocol::TCP,
            Self::SctpInitSent
            | Self::SctpInitAcked
            | Self::SctpCookieEchoed
            | Self::SctpEstablished
            | Self::SctpShutdown
            | Self::SctpShutdownAcked
            | Self::SctpClosed => flow_protocol == protocol::SCTP,
        }
    }

    /// Whether only one direction is ever seen.
    #[inline]
    pub const fn is_one_way(self) -> bool {
        matches!(
            self,
            Self::TcpOneWayOpening
                | Self::TcpOneWay
                | Self::TcpOneWayClosing
                | Self::UdpOneWay
                | Self::UdpOneWayStream
        )
    }

    /// The first state of a connection, if its answers go another way.
    pub(crate) const fn one_way(self) -> Option<Self> {
        match self {
            Self::TcpSynSent => Some(Self::TcpOneWayOpening),
            Self::TcpMidflow => Some(Self::TcpOneWay),
            Self::UdpUnreplied => Some(Self::UdpOneWay),
            _ => None,
        }
    }

    /// The first state of a flow whose protocol has no handshake.
    pub(crate) const fn unreplied(flow: &Flow) -> Self {
        match flow.protocol() {
            protocol::UDP => Self::UdpUnreplied,
            protocol::ICMP | protocol::ICMP6 => Self::EchoUnreplied,
            _ => Self::OtherUnreplied,
        }
    }
}

const fn is_special(number: u8) -> bool {
    matches!(
        number,
        protocol::TCP | protocol::UDP | protocol::SCTP | protocol::ICMP | protocol::ICMP6
    )
}

/// How long a connection lives after its last packet, by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    ticks: [u32; COUNT],
}

/// The longest timeout that can be set: 20 days, so that 32 bits of the table's clock tell all ages apart.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(20 * 86_400);

impl Default for Timeouts {
    /// RFC 5382 REQ-5 (TCP: established 2 h 4 min, transitory 4 min), RFC 4787 REQ-5 (UDP: 2 min, 5 min recommended),
    /// RFC 5508 REQ-1 (ICMP queries: 60 s). A half-closed TCP connection keeps the hour that kube-proxy gives it.
    fn default() -> Self {
        let mut timeouts = Self { ticks: [0; COUNT] };
        for state in State::ALL {
            timeouts.set(state, Duration::from_secs(default_seconds(state)));
        }
        timeouts
    }
}

const fn default_seconds(state: State) -> u64 {
    match state {
        State::UdpUnreplied | State::UdpReplied | State::UdpOneWay => 120,
        State::UdpStream | State::UdpOneWayStream => 300,
        State::EchoUnreplied | State::EchoReplied => 60,
        State::OtherUnreplied | State::OtherReplied => 600,
        State::TcpSynSent
        | State::TcpSynCrossed
        | State::TcpSynReceived
        | State::TcpMidflow
        | State::TcpOneWayOpening => 240,
        State::TcpEstablished | State::TcpOneWay => 7_440,
        State::TcpHalfClosed => 3_600,
        State::TcpClosing | State::TcpTimeWait | State::TcpOneWayClosing => 240,
        // Nothing is owed to a connection that both ends have forgotten.
        State::TcpClosed => 10,
        // Long enough for the challenge and its answer.
        State::TcpResetPending => 30,
        State::SctpInitSent | State::SctpInitAcked | State::SctpCookieEchoed => 240,
        State::SctpEstablished => 7_440,
        State::SctpShutdown | State::SctpShutdownAcked => 240,
        State::SctpClosed => 10,
    }
}

/// One unit of the table's clock is 1.024 ms.
pub(crate) const TICK_SHIFT: u32 = 10;

impl Timeouts {
    /// The timeout of a state.
    pub fn get(&self, state: State) -> Duration {
        Duration::from_micros(u64::from(self.ticks(state)) << TICK_SHIFT)
    }

    /// Sets the timeout of a state, at most [`TIMEOUT_MAX`]. Rounded up to the table's clock: never shorter than asked.
    pub fn set(&mut self, state: State, timeout: Duration) {
        let micros = timeout.micros().min(TIMEOUT_MAX.micros());
        self.ticks[state as usize] = micros.div_ceil(1 << TICK_SHIFT) as u32;
    }

    #[inline]
    pub(crate) fn ticks(&self, state: State) -> u32 {
        self.ticks[state as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_have_the_numbers_of_their_places() {
        for state in State::ALL {
            assert_eq!(State::from_raw(state as u8), Some(state));
        }
        for raw in [FREE, EXTENSION, COUNT as u8, 255] {
            assert_eq!(State::from_raw(raw), None);
        }
    }

    #[test]
    fn k01_defaults_are_at_least_the_rfc_minima() {
        let timeouts = Timeouts::default();
        let at_least = |state, seconds| {
            assert!(
                timeouts.get(state) >= Duration::from_secs(seconds),
                "{state:?}"
            );
        };
        at_least(State::TcpEstablished, 2 * 3_600 + 4 * 60);
        for transitory in [
            State::TcpSynSent,
            State::TcpSynCrossed,
            State::TcpSynReceived,
            State::TcpClosing,
            State::TcpTimeWait,
        ] {
            at_least(transitory, 240);
        }
        at_least(State::UdpUnreplied, 120);
        at_least(State::UdpReplied, 120);
        at_least(State::UdpStream, 300);
        at_least(State::EchoUnreplied, 60);
    }

    #[test]
    fn k01_each_value_is_settable_and_shown() {
        let mut timeouts = Timeouts::default();
        for state in State::ALL {
            timeouts.set(state, Duration::from_millis(1_500));
            let shown = timeouts.get(state).micros();
            assert!((1_500_000..=1_501_024).contains(&shown));
        }
        timeouts.set(State::UdpStream, Duration::from_secs(u64::MAX));
        assert!(timeouts.get(State::UdpStream).micros() <= TIMEOUT_MAX.micros() + 1_024);
    }
}
