//! The lab: what the demo, the benchmarks and the tests of the whole product stand on.
//!
//! Everything here drives the built binaries from outside, as a person would: namespaces stand for pods and nodes, `sluice`
//! and `sluice-node` are started as processes, and nothing is left behind when a lab ends, however it ends.
//!
//! * [`mod@need`]: what a test needs of the machine; absent needs are a skip that the summary shows.
//! * [`netns`], [`command`]: namespaces and child processes that end with their owner.
//! * [`lab`]: a node with pods; [`claims`]: what it must show.
//! * [`policy`]: a node that follows manifests, and what it must show.
//! * [`kubernetes`]: a server that speaks as the Kubernetes API does.
//! * [`cni`]: a node that a runtime adds pods to, called as a runtime calls it.
//! * [`load`]: the traffic: windowed UDP, request/response, connection rate; [`traffic`]: between which namespaces.
//! * [`underlay`]: what joins several nodes, and nodes that are the kernel's own.
//! * [`cluster`]: several nodes of ours and the outside, [`cluster_objects`]: what they follow; [`cluster_claims`],
//!   [`cluster_services`], [`cluster_policy`], [`cluster_frames`],
//!   [`cluster_tunnels`]: what they must show; [`cluster_trouble`]: what befalls them; [`capture`]: who judges it.
//! * [`membership`]: nodes that know each other from Node objects.
//! * [`flannel`]: a node of the kernel's that is driven by Node annotations.
//! * [`qemu`]: the image alone under QEMU.
//! * [`bridge`], [`mod@bench`], [`cpu`]: the same pods over the kernel, and what both cost.
//! * [`snapshot`]: what the machine looks like, before and after.

pub mod bench;
pub mod bird;
pub mod bridge;
pub mod capture;
pub mod claims;
pub mod cluster;
pub mod cluster_claims;
pub mod cluster_direct;
pub mod cluster_frames;
pub mod cluster_objects;
pub mod cluster_policy;
pub mod cluster_services;
pub mod cluster_trouble;
pub mod cluster_tunnels;
pub mod cni;
pub mod command;
pub mod cpu;
pub mod flannel;
pub mod kubernetes;
pub mod lab;
pub mod load;
pub mod membership;
pub mod need;
pub mod netns;
pub mod ovs;
pub mod policy;
pub mod qemu;
pub mod run;
pub mod signals;
pub mod snapshot;
pub mod soak;
pub mod traffic;
pub mod underlay;
