//! The pods' addresses.
