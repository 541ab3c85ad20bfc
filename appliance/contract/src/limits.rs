//! Every capacity of the boundary, named, with its reason. The host refuses what the guest cannot hold.

/// The longest framed payload. One page: small enough to reassemble on the stack, large enough for a batch of rows.
pub const FRAME_PAYLOAD: usize = 4096;
/// Addresses of one link: a dual-stack pod with one spare each.
pub const LINK_ADDRESSES: usize = 4;
/// Characters of one log line from the guest.
pub const LOG_TEXT: usize = 160;
/// Counters in one statistics message: keeps the message well below [`FRAME_PAYLOAD`].
pub const STATS_BATCH: usize = 64;
/// Addresses of names in one message: in the longest form well below [`FRAME_PAYLOAD`].
pub const NAMES_BATCH: usize = 64;
/// Addresses of names that are told for one question: those of a pod always, and of all pods as many.
pub const NAMES_TOLD: usize = 8_192;
/// Refused rows in one message: in the longest form well below [`FRAME_PAYLOAD`].
pub const REFUSED_BATCH: usize = 64;
/// Slots of a Maglev table in one row: with the key, half a kilobyte.
pub const SLOT_CHUNK: usize = 240;
/// Different lengths of the source ranges of one Service: each costs a lookup per new connection.
pub const SOURCE_LENGTHS: usize = 8;
/// Ranges of addresses with a meaning. They are compared one by one, at each new connection.
pub const PREFIXES: usize = 64;
/// Routes. They are compared one by one, at each new connection.
pub const ROUTES: usize = 64;
