//! Real container runtimes on a Sluice node: containerd through its CRI, and podman, on private sockets and directories.
//!
//! Nothing is fetched: the pause image is an archive that the test makes itself.

mod containerd;
mod cri;
mod host_ports;
mod image;
mod podman;
mod runtime;

use serde_json::{Value, json};
use sluice_tests::cni::CniLab;

/// The node's network as a runtime finds it in its configuration directory.
fn conflist(lab: &CniLab, version: &str) -> Value {
    let mut plugin = lab.config(
        version,
        &json!({"capabilities": {
            "portMappings": true, "bandwidth": true, "mac": true, "ips": true, "dns": true,
            "aliases": true,
        }}),
    );
    if let Some(object) = plugin.as_object_mut() {
        object.remove("cniVersion");
        object.remove("name");
    }
    json!({"cniVersion": version, "name": "sluice", "plugins": [plugin]})
}
