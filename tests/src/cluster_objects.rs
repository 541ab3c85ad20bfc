//! What the cluster's objects say: a pod on each node, Services in front of the second node's, and policies that come and go.
//! All nodes follow one directory, as they would follow one API.

use crate::underlay::node4;
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Of the Service whose backend is the pod of node 2.
pub const CLUSTER_IPS: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
/// Its port, at the ClusterIP and at the load balancer's addresses.
pub const SERVICE_PORT: u16 = 80;
/// Its ports at every node: of the same pod, by either traffic policy.
pub const CLUSTER_PORT: u16 = 30080;
pub const LOCAL_PORT: u16 = 30081;
/// The port at every node of a Service that nobody serves.
pub const NOBODYS_PORT: u16 = 30082;
/// The port at every node on which load balancers ask for the endpoints of the Service with the policy Local.
pub const HEALTH_PORT: u16 = 30083;
/// Of a Service in front of a program at node 2's own address: its ports, of which one is the tunnel's there, and the same at every
/// node.
pub const AT_NODE_IP: &str = "10.96.0.24";
pub const TO_TUNNEL: [u16; 2] = [80, 30084];
pub const TO_PROGRAM: [u16; 2] = [81, 30085];
/// Where the program would be.
pub const PROGRAM_PORT: u16 = 7001;
/// Of the ranges of ClusterIPs, what no Service has.
pub const NOBODYS_IPS: [&str; 2] = ["10.96.7.7", "fd00:96::7777"];
/// What a load balancer has given the Service: one address in each family, by either traffic policy.
pub const CLUSTER_LB: [&str; 2] = ["198.51.100.80", "2001:db8:80::80"];
pub const LOCAL_LB: [&str; 2] = ["198.51.100.81", "2001:db8:80::81"];
/// Who may use the load balancer's addresses: who is on the nodes' wire, and pods.
const NEAR: &str = "[192.168.50.0/24, 10.244.0.0/16, 'fd50::/64', 'fd00:244::/48']";
/// All ClusterIPs are of these ranges, and all pods of the others.
pub const SERVICES: [&str; 2] = ["10.96.0.0/16", "fd00:96::/112"];
pub const PODS: [&str; 2] = ["10.244.0.0/16", "fd00:244::/48"];

/// The directory of manifests; it goes with its owner.
#[derive(Debug)]
pub struct Objects {
    directory: PathBuf,
    nodes: u8,
}

impl Objects {
    /// Those of a cluster of `nodes` nodes, in a directory of that name.
    ///
    /// # Errors
    /// As the file system says.
    pub fn write(name: &str, nodes: u8) -> Result<Self> {
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&directory)?;
        let this = Self { directory, nodes };
        this.addresses(true)?;
        let services = [
            service("across", 20, "'2'", (CLUSTER_PORT, "Cluster", CLUSTER_LB)),
            service("local", 21, "'2'", (LOCAL_PORT, "Local", LOCAL_LB)),
            service("nobody", 22, "nowhere", (NOBODYS_PORT, "Cluster", [""; 2])),
        ];
        this.put("services.yaml", &services.join("---\n"))?;
        Ok(this)
    }

    /// Where they are.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Whether the pods' objects say which addresses they have: if not, a node knows its own pods' alone.
    ///
    /// # Errors
    /// As the file system says.
    pub fn addresses(&self, told: bool) -> Result<()> {
        let pods: Vec<String> = (1..=self.nodes).map(|node| pod(node, told)).collect();
        self.put("pods.yaml", &pods.join("---\n"))
    }

    /// Node 2 has a program at its own address, as node exporters have, and a Service in front of it has the tunnel's port among its
    /// own.
    ///
    /// # Errors
    /// As the file system says.
    pub fn serve_at_node(&self, tunnel: u16) -> Result<()> {
        let port = |name: &str, [port, node_port]: [u16; 2], target: u16| {
            format!(
                "{{name: {name}, protocol: UDP, port: {port}, targetPort: {target}, nodePort: {node_port}}}"
            )
        };
        let address = node4(2);
        self.put(
            "at-node.yaml",
            &format!(
                "apiVersion: v1
kind: Pod
metadata: {{name: exporter, namespace: default, labels: {{at: node}}}}
spec: {{nodeName: node-2, hostNetwork: true, containers: []}}
status: {{podIP: {address}, podIPs: [{{ip: {address}}}]}}
---
apiVersion: v1
kind: Service
metadata: {{name: at-node, namespace: default}}
spec:
  type: NodePort
  clusterIP: {AT_NODE_IP}
  selector: {{at: node}}
  ports: [{}, {}]
",
                port("tunnel", TO_TUNNEL, tunnel),
                port("program", TO_PROGRAM, PROGRAM_PORT)
            ),
        )
    }

    /// Nobody may begin a connection to any pod, or everybody may.
    ///
    /// # Errors
    /// As the file system says.
    pub fn deny_all(&self, denied: bool) -> Result<()> {
        self.policy(
            "deny-all",
            denied.then_some("{podSelector: {}, policyTypes: [Ingress]}"),
        )
    }

    /// Only the pod of that node may begin a connection to the second node's, or everybody may.
    ///
    /// # Errors
    /// As the file system says.
    pub fn only_from(&self, node: Option<u8>) -> Result<()> {
        let spec = node.map(|node| {
            format!(
                "{{podSelector: {{matchLabels: {{node: '2'}}}}, \
                 ingress: [{{from: [{{podSelector: {{matchLabels: {{node: '{node}'}}}}}}]}}]}}"
            )
        });
        self.policy("only-from", spec.as_deref())
    }

    /// Puts a policy in, or takes it out.
    fn policy(&self, name: &str, spec: Option<&str>) -> Result<()> {
        let file = format!("{name}.yaml");
        match spec {
            Some(spec) => self.put(
                &file,
                &format!(
                    "apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {name}, namespace: default}}
spec: {spec}
"
                ),
            ),
            None => Ok(std::fs::remove_file(self.directory.join(file))?),
        }
    }

    /// As an editor writes a file.
    fn put(&self, file: &str, text: &str) -> Result<()> {
        let path = self.directory.join(file);
        let beside = path.with_extension("new");
        std::fs::write(&beside, text)?;
        Ok(std::fs::rename(beside, path)?)
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.directory) {
            eprintln!("{} stays behind: {error}", self.directory.display());
        }
    }
}

fn pod(node: u8, addresses: bool) -> String {
    let status = if addresses {
        format!(
            "status:
  podIP: 10.244.{node}.2
  podIPs: [{{ip: 10.244.{node}.2}}, {{ip: 'fd00:244:0:{node:x}::2'}}]
"
        )
    } else {
        String::new()
    };
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: pod-{node}, namespace: default, labels: {{node: '{node}'}}}}
spec: {{nodeName: node-{node}, containers: []}}
{status}"
    )
}

/// `last`: of its ClusterIPs; then its port at the nodes, its external traffic policy and a load balancer's addresses.
fn service(
    name: &str,
    last: u8,
    node: &str,
    (node_port, policy, balanced): (u16, &str, [&str; 2]),
) -> String {
    let (kind, status) = match balanced {
        ["", _] => ("NodePort", String::new()),
        [v4, v6] => (
            "LoadBalancer",
            format!("status: {{loadBalancer: {{ingress: [{{ip: {v4}}}, {{ip: '{v6}'}}]}}}}\n"),
        ),
    };
    let ranges = match kind {
        "LoadBalancer" => format!("  loadBalancerSourceRanges: {NEAR}\n"),
        _ => String::new(),
    };
    let health = match (kind, policy) {
        ("LoadBalancer", "Local") => format!("  healthCheckNodePort: {HEALTH_PORT}\n"),
        _ => String::new(),
    };
    let port = |protocol: &str| {
        format!(
            "{{name: {}, protocol: {protocol}, port: {SERVICE_PORT}, targetPort: 7000, nodePort: {node_port}}}",
            protocol.to_lowercase()
        )
    };
    format!(
        "apiVersion: v1
kind: Service
metadata: {{name: {name}, namespace: default}}
spec:
  type: {kind}
  externalTrafficPolicy: {policy}
{ranges}{health}  clusterIP: 10.96.0.{last}
  clusterIPs: [10.96.0.{last}, 'fd00:96::{last}']
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector: {{node: {node}}}
  ports: [{}, {}]
{status}",
        port("TCP"),
        port("UDP")
    )
}
