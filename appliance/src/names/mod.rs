//! Domain names in policy: which addresses they have, as each pod is told by those whom it asks.
//!
//! ```text
//! pod ─ question ─→ [asked] ──────────────────────────→ resolver
//! pod ←─ answer ── [learned, before it is sent on] ←── resolver
//! ```
//!
//! An answer is believed only if the pod asked just this of just this one with just this number, through a connection that is
//! tracked, and if it comes from an address that the host calls a resolver. It says something about the pod that asked
//! and nobody else. What is not understood is sent on all the same: nothing here decides which names can be resolved.

mod book;
mod learned;
pub mod message;
mod streams;

pub use learned::{Counts, KNOWN, Learned, Limits, Told, Who};
pub use streams::Part;

/// Where resolvers are asked.
pub const PORT: u16 = 53;
