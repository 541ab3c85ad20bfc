//! The CNI plugin on a real node: namespaces, interfaces and the appliance are there, or named as missing, or gone.

mod addresses;
mod bandwidth;
mod chain;
mod given;
mod install;
mod mtu;
mod pools;
mod ports;
mod readiness;
mod status;
mod verbs;

use serde_json::Value;
use sluice_tests::cni::{Call, CniLab};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::program;
use sluice_tests::netns::Netns;
use std::time::Duration;

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn of(call: Call<'_>, lab: &CniLab, keys: &Value) -> sluice_tests::cni::Said {
    lab.call(&call, &lab.config("1.1.0", keys))
        .expect("the plugin starts")
}

fn serve(pod: &Netns) -> anyhow::Result<Running> {
    let mut command = pod.command(program("sluice-load"));
    command.arg("serve").stdout(std::process::Stdio::null());
    let server = Running::start("sluice-load", &mut command)?;
    command::until("the server", Duration::from_secs(30), || {
        let listening = pod.run(&["ss", "-ltnH", "sport", "=", ":7000"])?;
        anyhow::ensure!(!listening.trim().is_empty(), "not listening yet");
        Ok(())
    })?;
    Ok(server)
}
