//! The host side of a Sluice node: plumbing between pods and the appliance, and nothing that looks into a packet.
#![deny(unsafe_code)]

pub mod announce;
pub mod api;
pub mod appliance;
pub mod cluster;
pub mod cni;
pub mod config;
pub mod control;
mod files;
pub mod hostlink;
pub mod logging;
pub mod node;
pub mod supervisor;
pub mod uplink;
pub mod wiring;
