//! The trunk device: a virtio-net whose rings are served by this process (`here`) or by another one (`trunk`).
//!
//! What it offers is what the backend offers, less what this VMM or the contract does not carry. It has no configuration: no
//! MAC (link addresses belong to the pods behind the trunk), one queue pair, link always up.

use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_TSO4;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_TSO6;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_USO4;
use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_USO6;
use virtio_bindings::virtio_net::VIRTIO_NET_F_HOST_TSO4;
use virtio_bindings::virtio_net::VIRTIO_NET_F_HOST_TSO6;
use virtio_bindings::virtio_net::VIRTIO_NET_F_HOST_USO;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use crate::virtio::Device;
use crate::virtio::FEATURE_EVENT_INDEX;
use crate::virtio::FEATURE_INDIRECT;
use crate::virtio::FEATURE_VERSION_1;
use crate::virtio::QueueLayout;
use crate::virtio::backend::Activation;
use crate::virtio::here::Here;
use crate::virtio::trunk::Trunk;

const DEVICE_ID: u32 = 1;
/// Receive, transmit.
pub const QUEUES: usize = 2;
/// Room for four of the image's largest batches.
const QUEUE_SIZES: [u16; QUEUES] = [1024; QUEUES];

/// The features of the contract (`docs/machine.md`, "Devices").
const CARRIED: u64 = FEATURE_VERSION_1
    | FEATURE_INDIRECT
    | FEATURE_EVENT_INDEX
    | 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_GUEST_USO4
    | 1 << VIRTIO_NET_F_GUEST_USO6
    | 1 << VIRTIO_NET_F_HOST_USO;

/// Who serves the rings.
#[derive(Debug)]
pub enum Server {
    /// The engine of this process.
    Here(Here),
    /// A vhost-user backend.
    Backend(Trunk),
}

/// The device the guest's driver sees.
#[derive(Debug)]
pub struct Net {
    server: Server,
}

impl Net {
    /// A device whose rings `server` serves.
    #[must_use]
    pub fn new(server: Server) -> Net {
        Net { server }
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        let offered = match &self.server {
            Server::Here(here) => here.features(),
            Server::Backend(trunk) => trunk.features(),
        };
        offered & CARRIED
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, _offset: u64, bytes: &mut [u8]) {
        bytes.fill(0);
    }

    fn activate(&mut self, features: u64, queues: &[QueueLayout]) {
        let activation = Activation {
            features,
            queues: queues.to_vec(),
        };
        match &self.server {
            Server::Here(here) => here.start(&activation),
            Server::Backend(trunk) => trunk.start(activation),
        }
    }

    fn reset(&mut self) {
        match &self.server {
            Server::Here(here) => here.reset(),
            Server::Backend(trunk) => trunk.reset(),
        }
    }
}
