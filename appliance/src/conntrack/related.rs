//! ICMP errors do not say which connection they are of, but quote a packet of it. (Later fragments, which share a datagram
//! with a packet that does say so, are [`crate::fragments`]' matter.)

use crate::conntrack::state::State;
use crate::conntrack::{Conntrack, Hit};
use crate::flow::Flow;
use crate::time::Instant;
use crate::wire::protocol;

impl Conntrack<'_> {
    /// The connection of the packet that an ICMP error quotes, and the direction in which *the error* travels.
    ///
    /// `quoted` is the flow as quoted. Whoever sends an error got the packet as it left here, so the error meets the
    /// connection like an answer to it: [`Conntrack::outgoing`] of the hit, reversed, is what the quotation has to be
    /// changed to, and its source and destination are those of the error itself. `sequence` is the quoted TCP sequence
    /// number, if it was quoted: one that cannot be under way is a guess (RFC 5927 §4.1), and finds nothing. Of a connection
    /// that is seen one way only, the node that sees both judges that.
    ///
    /// An error does not count as use of the connection.
    pub fn related(&self, quoted: &Flow, sequence: Option<u32>, now: Instant) -> Option<Hit> {
        let back = quoted.reversed();
        let hit = self.lookup(&back, self.hash(&back), now)?;
        let row = self.region.rows.get(hit.id.0 as usize)?;
        if row.protocol == protocol::TCP
            && hit.state != State::TcpMidflow
            && !hit.state.is_one_way()
            && let Some(sequence) = sequence
        {
            let tcp = self.region.details.get(hit.id.0 as usize)?.tcp(hit.state);
            if !tcp.is_in_flight(hit.direction.opposite(), sequence) {
                return None;
            }
        }
        Some(hit)
    }
}
