//! What crosses the boundary between the host and the appliance, and nothing else.
//!
//! The only code both sides compile: message types, rows, limits, drop reasons, framing and the version. No logic of
//! either side lives here. Both ends refuse a peer of another [`VERSION`], naming both numbers.
//!
//! Rules for change: enums are append-only (postcard numbers variants by position), removed variants leave a gap that is
//! never reused, and every change of an encoding moves [`VERSION`]. A test compares the fingerprint of this crate's
//! sources with `version.lock`, so a change without a decision about the version does not pass.
#![no_std]
#![forbid(unsafe_code)]

pub mod frame;
pub mod limits;
pub mod message;
pub mod name;
pub mod overlay;
pub mod policy;
pub mod report;
pub mod row;
pub mod service;
pub mod types;

pub use message::{ToGuest, ToHost};
pub use report::DropReason;
pub use row::{Key, Row};
pub use types::{Family, Generation, Identity, LinkId, Mac, Prefix, Protocol, Tenant};

/// The version of the contract. Equal on both ends or the session is refused.
pub const VERSION: u16 = 2;
