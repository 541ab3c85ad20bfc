//! `sluice-vmm`: one KVM virtual machine for one Sluice appliance, small enough to read in an afternoon.
//!
//! Read in this order:
//!
//! ```text
//! config   what the operator asked for, checked once          memory   guest RAM and the physical map
//! boot     image, start info and command line into RAM        bus      address -> device, with an effect
//! vcpu     the one loop around KVM_RUN                        park     how a vCPU sleeps, and the watchdog
//! report   the guest's log port and exit port                 exit     how a VM ended, as a status and a line
//! lines    standard error that can neither block nor kill        log_file nor fill the node's memory
//! event    eventfds and the thread that serves the console    socket   non-blocking connect
//! virtio   transport registers, trunk (vhost-user), control   kvm      can this host do it at all
//! vm       create, wire, start                                run      watch and stop
//! ```
//!
//! The contract it implements is `docs/machine.md`. Everything the guest writes (registers, rings, log bytes) is untrusted:
//! it may harm the guest itself, never this process. `unsafe` lives in `memory` and `event` only.

#![deny(unsafe_code)]

pub mod boot;
pub mod bus;
pub mod config;
pub mod event;
pub mod exit;
pub mod gauge;
pub mod kvm;
pub mod lines;
pub mod log_file;
pub mod memory;
pub mod park;
pub mod ports;
pub mod report;
pub mod run;
pub mod socket;
pub mod vcpu;
pub mod virtio;
pub mod vm;
