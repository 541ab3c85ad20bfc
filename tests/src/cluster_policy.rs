//! What Sluice claims of policy in a cluster, each shown on a running one.

use crate::cluster::Cluster;
use crate::cluster_claims::Claim;
use crate::cluster_objects::{CLUSTER_IPS, CLUSTER_PORT, LOCAL_PORT, SERVICE_PORT};
use crate::command;
use crate::netns::Netns;
use crate::traffic::{Attempt, PORT, at, attempt, serve, stream};
use anyhow::{Result, ensure};
use std::time::Duration;

const BULK: u64 = 1_000_000;
/// For what is to be in force.
const PATIENCE: Duration = Duration::from_secs(20);

/// The claim for every tunnel, by what it says.
pub const PROBES: (&str, Claim) = (
    "probes pass where policy denies everything",
    probes_pass_where_policy_denies,
);

/// The claim for three nodes and a tunnel that tells identities, by what it says.
pub const IDENTITIES: (&str, Claim) = (
    "policy goes by the identity that the tunnel tells",
    policy_goes_by_the_identity_in_the_tunnel,
);

/// Where policy denies everything a node still reaches its own pods, and nobody else does: no pod, no other node, and nobody
/// outside by whatever way.
///
/// # Errors
/// If anything is otherwise.
pub fn probes_pass_where_policy_denies(cluster: &Cluster) -> Result<String> {
    let target = cluster.pod(2)?;
    let _serving = serve(&target.netns)?;
    let others = [&cluster.pod(1)?.netns, &cluster.lab(1)?.host];
    let own = Cluster::own(2);
    let ways: Vec<(&Netns, String, u16)> = (target.addresses().into_iter())
        .zip(CLUSTER_IPS)
        .zip(own)
        .flat_map(|((address, service), own)| {
            let inside = others.into_iter().flat_map(move |from| {
                [
                    (from, address.clone(), PORT),
                    (from, service.to_owned(), SERVICE_PORT),
                ]
            });
            let outside =
                [CLUSTER_PORT, LOCAL_PORT].map(|port| (&cluster.outside, own.clone(), port));
            inside.chain(outside)
        })
        .collect();
    let all_are = |wanted: Attempt| -> Result<()> {
        // All at once: silence takes its time.
        let seen = std::thread::scope(|scope| {
            let all: Vec<_> = (ways.iter())
                .map(|(from, address, port)| scope.spawn(|| attempt(from, address, *port)))
                .collect();
            let ends = all.into_iter().map(|one| one.join());
            ends.collect::<Vec<_>>()
        });
        for ((from, address, port), seen) in ways.iter().zip(seen) {
            let seen = seen.map_err(|_| anyhow::anyhow!("an attempt broke"))??;
            let name = from.name();
            ensure!(seen == wanted, "{name} to {address}:{port}: {seen:?}");
        }
        Ok(())
    };
    command::until("every way", PATIENCE, || all_are(Attempt::Connected))?;
    cluster.objects.deny_all(true)?;
    let denied =
        command::until("the policy", PATIENCE, || all_are(Attempt::Silent)).and_then(|()| {
            for address in target.addresses() {
                stream(&cluster.lab(2)?.host, &at(&address, PORT), BULK)?;
            }
            Ok(())
        });
    // Whatever was seen: other claims follow.
    cluster.objects.deny_all(false)?;
    denied?;
    command::until("the policy's end", PATIENCE, || all_are(Attempt::Connected))?;
    Ok(format!(
        "its node reaches the pod, {} other ways do not, and do again without the policy",
        ways.len()
    ))
}

/// A pod is let in by its labels although the receiving node has never heard of its address, and another is not.
///
/// # Errors
/// If it is otherwise.
pub fn policy_goes_by_the_identity_in_the_tunnel(cluster: &Cluster) -> Result<String> {
    let target = cluster.pod(2)?;
    let _serving = serve(&target.netns)?;
    let (friend, stranger) = (cluster.pod(1)?, cluster.pod(3)?);
    cluster.objects.addresses(false)?;
    cluster.objects.only_from(Some(1))?;
    let seen = target.addresses().iter().try_for_each(|address| {
        for (from, wanted) in [(stranger, Attempt::Silent), (friend, Attempt::Connected)] {
            let what = format!("{wanted:?} from {} to {address}", from.v4);
            command::until(&what, PATIENCE, || {
                let seen = attempt(&from.netns, address, PORT)?;
                ensure!(seen == wanted, "{seen:?}");
                Ok(())
            })?;
        }
        Ok(())
    });
    // Whatever was seen: other claims follow.
    cluster.objects.only_from(None)?;
    cluster.objects.addresses(true)?;
    seen.map(|()| "one of two pods whose addresses are unknown, both families".into())
}
