//! The Services of the benchmarks, the same for all contenders that have any. One of them leads to the answering pod, the others to
//! addresses where no pod is.

use crate::lab::Lab;
use crate::policy;
use anyhow::Result;
use serde_json::json;
use std::fmt::Write as _;

/// All Service addresses are in this range.
pub(super) const RANGE: &str = "10.96.0.0/16";
/// All pod addresses are in this range.
pub(super) const PODS: &str = "10.244.0.0/16";
/// The port of each Service.
pub(super) const PORT: u16 = 80;
/// Endpoints of each of the other Services.
const ENDPOINTS: usize = 2;

/// One Service.
#[derive(Clone, Debug)]
pub(super) struct Service {
    pub(super) name: String,
    pub(super) address: String,
    /// Address and port of each endpoint.
    pub(super) endpoints: Vec<(String, u16)>,
}

/// Address and port of the Service that leads to the answering pod.
pub(super) fn target(count: usize) -> String {
    format!("{}:{PORT}", address(count / 2))
}

fn address(number: usize) -> String {
    format!("10.96.{}.{}", number / 250, number % 250 + 1)
}

/// `count` Services, of which the one in the middle leads to `pod`.
pub(super) fn services(count: usize, pod: &str) -> Vec<Service> {
    let elsewhere = |number: usize| {
        let (a, b, c) = (200 + number / 62_500, number / 250 % 250, number % 250 + 1);
        (format!("10.{a}.{b}.{c}"), 8080)
    };
    let endpoints = |number: usize| match number {
        it if it == count / 2 => vec![(pod.to_owned(), super::POD_PORT)],
        other => (0..ENDPOINTS)
            .map(|endpoint| elsewhere(other * ENDPOINTS + endpoint))
            .collect(),
    };
    (0..count)
        .map(|number| Service {
            name: format!("s{number}"),
            address: address(number),
            endpoints: endpoints(number),
        })
        .collect()
}

impl Service {
    /// The Service and its EndpointSlice as manifests.
    fn manifest(&self) -> String {
        let (name, address) = (&self.name, &self.address);
        let port = self.endpoints.first().map_or(PORT, |(_, port)| *port);
        let mut text = format!(
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: bench}}\n\
             spec: {{clusterIP: {address}, ports: [{{name: http, port: {PORT}, targetPort: {port}}}]}}\n\
             ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {{name: {name}-1, namespace: bench, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{{name: http, port: {port}, protocol: TCP}}]\nendpoints:\n"
        );
        for (address, _) in &self.endpoints {
            // Writing to a string does not fail.
            let _ = writeln!(
                text,
                "- {{addresses: [{address}], conditions: {{ready: true}}}}"
            );
        }
        text
    }
}

/// Has a node that is not started yet follow manifests, and writes `count` Services there of which one leads to `pod`.
///
/// # Errors
/// If a file cannot be written.
pub(super) fn give(lab: &Lab, count: usize, pod: &str) -> Result<()> {
    std::fs::create_dir_all(lab.manifests())?;
    lab.change_config(|config| config["source"] = json!({"directory": lab.manifests()}))?;
    let all = services(count, pod);
    let text: String = all.iter().map(Service::manifest).collect();
    policy::write(lab, "services.yaml", &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize as _;

    #[test]
    fn one_service_leads_to_the_pod_and_all_addresses_differ() {
        let all = services(1000, "10.244.0.3");
        let addresses: std::collections::BTreeSet<_> = all.iter().map(|it| &it.address).collect();
        assert_eq!(addresses.len(), 1000);
        let ours: Vec<_> = all
            .iter()
            .filter(|it| it.endpoints[0] == ("10.244.0.3".into(), 7000))
            .collect();
        assert_eq!(ours.len(), 1);
        assert_eq!(target(1000), format!("{}:{PORT}", ours[0].address));
        let text = ours[0].manifest();
        let documents: Vec<_> = serde_yaml_ng::Deserializer::from_str(&text)
            .map(|it| serde_json::Value::deserialize(it).expect("YAML"))
            .collect();
        assert_eq!(documents[0]["spec"]["ports"][0]["targetPort"], 7000);
        assert_eq!(documents[1]["endpoints"][0]["addresses"][0], "10.244.0.3");
    }
}
