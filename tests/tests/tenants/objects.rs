//! The objects of both namespaces.

use std::fmt::Write as _;

/// The Service of the namespace that must not be hurt.
pub(crate) const SERVICE: &str = "10.96.0.10";

/// Pods of both namespaces and the Service.
pub(crate) const SHOP: &str = "\
apiVersion: v1
kind: Namespace
metadata: {name: shop}
---
apiVersion: v1
kind: Namespace
metadata: {name: aaa}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {role: client}}
---
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: shop, labels: {role: server}}
---
apiVersion: v1
kind: Pod
metadata: {name: third, namespace: shop, labels: {role: third}}
---
apiVersion: v1
kind: Pod
metadata: {name: one, namespace: aaa, labels: {role: hostile}}
---
apiVersion: v1
kind: Pod
metadata: {name: two, namespace: aaa, labels: {role: hostile}}
---
apiVersion: v1
kind: Service
metadata: {name: server, namespace: shop}
spec:
  clusterIP: 10.96.0.10
  selector: {role: server}
  ports: [{port: 80, targetPort: 7000}]
";

/// Everything that the first namespace may do and the third pod may not.
pub(crate) const CLIENTS_ONLY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: clients-only, namespace: shop}
spec:
  podSelector: {matchLabels: {role: server}}
  policyTypes: [Ingress]
  ingress:
  - from: [{podSelector: {matchLabels: {role: client}}}]
";

/// A pod of the other namespace that a runtime adds.
pub(crate) fn pod(name: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop, labels: {{role: late}}}}\n"
    )
}

/// What the hostile namespace writes: addresses of others, ten thousand addresses, fifty thousand networks.
pub(crate) fn hostile() -> String {
    let mut text = String::from(TAKEOVER);
    let late: Vec<String> = (128..255).map(|it| format!("10.244.1.{it}")).collect();
    service(&mut text, "blocker", "10.96.9.8", &late);
    let many: Vec<String> = (0..10_000)
        .map(|it| format!("100.64.{}.{}", it / 250, it % 250 + 1))
        .collect();
    service(&mut text, "many", "10.96.9.7", &many);
    for policy in 0..10 {
        let _infallible = write!(
            text,
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: networks-{policy}, namespace: aaa}}\n\
             spec:\n  podSelector: {{}}\n  policyTypes: [Ingress]\n  ingress:\n  - from:\n"
        );
        for network in 0..5_000 {
            let (high, low) = (network / 250, network % 250);
            let _infallible = writeln!(
                text,
                "    - ipBlock: {{cidr: {}.{high}.{low}.{}/31}}",
                20 + policy,
                network % 2 * 2
            );
        }
    }
    text
}

/// Addresses of the other namespace's Service and pods, of both nodes and of somebody outside.
const TAKEOVER: &str = "\
apiVersion: v1
kind: Service
metadata: {name: takeover, namespace: aaa}
spec:
  clusterIP: 10.96.9.9
  selector: {role: hostile}
  externalIPs: [10.96.0.10, 10.244.1.2, 10.244.1.3, 10.244.2.2, 192.168.50.2, 192.168.50.3, 192.168.50.201]
  ports:
  - {name: a, port: 80, targetPort: 9}
  - {name: b, port: 7000, targetPort: 9}
  - {name: c, port: 9, targetPort: 9}
";

fn service(text: &mut String, name: &str, cluster_ip: &str, external: &[String]) {
    let _infallible = write!(
        text,
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: aaa}}\n\
         spec:\n  clusterIP: {cluster_ip}\n  selector: {{role: hostile}}\n\
         \x20 externalIPs: [{}]\n  ports: [{{port: 9, targetPort: 9}}]\n",
        external.join(", ")
    );
}
