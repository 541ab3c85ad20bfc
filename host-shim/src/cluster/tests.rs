//! A directory of manifests through the real source and the model to a guest that keeps the contract's rules.

use std::fs;
use std::io::{Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use sluice_contract::name::{Learnt, NameRow};
use sluice_contract::policy::{PolicyKey, PolicyRow, RulesetId};
use sluice_contract::row::LinkRow;
use sluice_contract::service::{AddressRole, PrefixRow, PrefixUse, ServiceKey, ServiceRow};
use sluice_contract::{Identity, Key, LinkId, Mac, Row};

use super::report::{LearntName, NotTold};
use super::{Cluster, pod_name};
use crate::config::Config;
use crate::control::Control;
use crate::control::testing::Guest;
use crate::uplink::config::parse_prefix;

mod api;

const LIMIT: Duration = Duration::from_secs(10);
const SERVICE_RANGES: [&str; 2] = ["10.96.0.0/12", "fd00:96::/112"];

fn directory(name: &str) -> std::path::PathBuf {
    let unique = format!("sluice-cluster-{name}-{}", std::process::id());
    std::env::temp_dir().join(unique)
}

struct Ground {
    directory: std::path::PathBuf,
    control: Control,
    cluster: Cluster,
    guest: Arc<Mutex<Guest>>,
    address: SocketAddr,
    serve: Option<JoinHandle<()>>,
}

impl Ground {
    fn new(name: &str, manifests: &[(&str, &str)]) -> Self {
        let directory = directory(name);
        let given = directory.join("manifests");
        fs::create_dir_all(&given).unwrap();
        for (file, text) in manifests {
            fs::write(given.join(file), text).unwrap();
        }
        Self::following(name, &serde_json::json!({"directory": given}))
    }

    /// A node that follows this source.
    fn following(name: &str, source: &serde_json::Value) -> Self {
        let directory = directory(name);
        let text = serde_json::json!({
            "image": "i", "run_dir": directory, "node_name": "here",
            "cni": {"node_addresses": ["192.0.2.7"]},
            "services": {"cidrs": SERVICE_RANGES},
            "source": source,
        });
        let config = Config::parse(&text.to_string(), false).unwrap();
        let control = Control::new(|_| {}).unwrap();
        let cluster = Cluster::start(&config, &control).unwrap().unwrap();
        let unique = directory.file_name().unwrap();
        let address = SocketAddr::from_abstract_name(unique.as_encoded_bytes()).unwrap();
        Self {
            directory,
            control,
            cluster,
            guest: Arc::default(),
            address,
            serve: None,
        }
    }

    /// The guest comes, and the node begins to talk.
    fn serve(&mut self) {
        let listener = UnixListener::bind_addr(&self.address).unwrap();
        self.control.serve(listener, |_| true).unwrap();
        let (guest, address) = (self.guest.clone(), self.address.clone());
        self.serve = Some(std::thread::spawn(move || {
            let mut stream = UnixStream::connect_addr(&address).unwrap();
            let mut chunk = [0; 4096];
            while let Ok(n @ 1..) = stream.read(&mut chunk) {
                let mut guest = guest.lock().unwrap();
                guest.receive(&chunk[..n]);
                let output = std::mem::take(&mut guest.output);
                if stream.write_all(&output).is_err() {
                    break;
                }
            }
        }));
    }

    fn attach(&self, pod: &str, id: u16, last: u8) -> u64 {
        let id = LinkId::new(id).unwrap();
        let row = LinkRow {
            id,
            mac: Mac::of_pod(id),
            addresses: heapless::Vec::from_slice(&[[10, 0, 0, last].into()]).unwrap(),
            mtu: 1500,
            identity: Identity(Identity::FIRST_POD),
            incarnation: 1,
            tenant: sluice_contract::Tenant::NONE,
        };
        self.cluster.attach(pod_name(pod), row, Vec::new())
    }

    fn write(&self, file: &str, text: &str) {
        fs::write(self.directory.join("manifests").join(file), text).unwrap();
    }

    fn row(&self, key: Key) -> Option<Row> {
        self.guest.lock().unwrap().rows.get(&key).cloned()
    }

    fn binding(&self, id: u16) -> Option<[RulesetId; 2]> {
        let key = Key::Policy(PolicyKey::Binding(LinkId::new(id).unwrap()));
        match self.row(key)? {
            Row::Policy(PolicyRow::Binding(row)) => Some([row.ingress, row.egress]),
            _ => None,
        }
    }

    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !holds(self) {
            assert!(Instant::now() < deadline, "{what}: not in time");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

#[test]
fn i01_i08_the_node_object_and_the_annotations_say_where_addresses_come_from() {
    let annotated = |kind: &str, name: &str, pool: &str| {
        format!(
            "apiVersion: v1\nkind: {kind}\nmetadata:\n  name: {name}\n  namespace: shop\n  annotations: {{sluice.dev/address-pool: {pool}}}\n"
        )
    };
    let node = "apiVersion: v1\nkind: Node\nmetadata: {name: here}\nspec: {podCIDRs: [10.9.0.0/24, 'fd09::/64']}\n";
    let ground = Ground::new("pools", &[("node.yaml", node)]);
    let pool = |pod: &str| ground.cluster.address_pool(&pod_name(pod));
    ground.until("the node's ranges", |it| {
        it.cluster.own_pod_cidrs() == ["10.9.0.0/24", "fd09::/64"]
    });
    assert_eq!(pool("shop/web"), None);
    let namespace = annotated("Namespace", "shop", "blue").replace("  namespace: shop\n", "");
    ground.write("shop.yaml", &namespace);
    ground.write("web.yaml", &annotated("Pod", "web", "green"));
    ground.until("the pod's own word", |_| {
        pool("shop/web").as_deref() == Some("green")
    });
    ground.until("the namespace's", |_| {
        pool("shop/db").as_deref() == Some("blue")
    });
    ground.write("shop.yaml", &namespace.replace("sluice.dev", "example.org"));
    ground.until("its end", |_| pool("shop/db").is_none());
}

impl Drop for Ground {
    fn drop(&mut self) {
        self.cluster.stop();
        self.control.stop();
        if let Some(serve) = self.serve.take() {
            serve.join().unwrap();
        }
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

const PODS: &str = "
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
---
apiVersion: v1
kind: Pod
metadata: {name: client, namespace: shop, labels: {app: client}}
---
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec: {clusterIP: 10.96.0.10, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
";

const POLICY: &str = "
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  podSelector: {matchLabels: {app: web}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 8080}]}]
";

#[test]
fn s07_the_appliance_is_told_the_ranges_of_clusterips() {
    let mut ground = Ground::new("ranges", &[("pods.yaml", PODS)]);
    ground.serve();
    for range in SERVICE_RANGES {
        let prefix = parse_prefix(range).unwrap();
        let key = Key::Service(ServiceKey::Prefix(prefix));
        let row = Row::Service(ServiceRow::Prefix(PrefixRow {
            prefix,
            purpose: PrefixUse::Services,
        }));
        ground.until(range, |it| it.row(key) == Some(row.clone()));
    }
}

#[test]
fn b11_annotations_of_pods_and_namespaces_mark_what_pods_send() {
    let shop = |annotation: &str| {
        format!(
            "apiVersion: v1\nkind: Namespace\nmetadata: {{name: shop, annotations: {{{annotation}}}}}\n"
        )
    };
    let marked = "sluice.dev/egress-dscp: '10'";
    let mut ground = Ground::new(
        "marks",
        &[("pods.yaml", PODS), ("shop.yaml", &shop(marked))],
    );
    ground.attach("shop/web", 16, 1);
    ground.attach("shop/client", 17, 2);
    ground.serve();
    let dscp = |ground: &Ground, id: u16| {
        let row = ground.row(Key::Marking(LinkId::new(id).unwrap()))?;
        match row {
            Row::Marking(row) => Some(row.dscp),
            _ => None,
        }
    };
    ground.until("the namespace's", |it| {
        [16, 17].map(|id| dscp(it, id)) == [Some(10); 2]
    });
    // The pod's own word counts more.
    let own = "apiVersion: v1\nkind: Pod\nmetadata: {name: client, namespace: shop, labels: {app: client}, \
               annotations: {sluice.dev/egress-dscp: '46'}}\n";
    ground.write("pods.yaml", own);
    ground.until("the pod's", |it| {
        [16, 17].map(|id| dscp(it, id)) == [Some(10), Some(46)]
    });
    // A number that cannot be is reported, and nothing is marked with it.
    ground.write("shop.yaml", &shop("sluice.dev/egress-dscp: '64'"));
    ground.until("nothing of a wrong number", |it| {
        dscp(it, 16).is_none()
            && it
                .cluster
                .report()
                .findings
                .iter()
                .any(|it| it.contains("egress-dscp"))
    });
    ground.cluster.detach(LinkId::new(17).unwrap(), Vec::new());
    ground.until("nothing of a pod that is gone", |it| dscp(it, 17).is_none());
}

#[test]
fn b09_annotations_of_pods_limit_packets_and_connections_and_wrong_ones_are_findings() {
    let client = |annotations: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: client, namespace: shop, annotations: {{{annotations}}}}}\n"
        )
    };
    let limited = "sluice.dev/egress-packets-per-second: '5000', sluice.dev/ingress-connections-per-second: '7'";
    let mut ground = Ground::new("rates", &[("pods.yaml", &client(limited))]);
    ground.attach("shop/client", 17, 2);
    ground.serve();
    let rates = |ground: &Ground| match ground.row(Key::Rates(LinkId::new(17).unwrap()))? {
        Row::Rates(row) => Some([
            row.ingress_packets,
            row.egress_packets,
            row.ingress_connections,
            row.egress_connections,
        ]),
        _ => None,
    };
    let number = |n| std::num::NonZeroU32::new(n);
    ground.until("the pod's", |it| {
        rates(it) == Some([None, number(5000), number(7), None])
    });
    ground.write(
        "pods.yaml",
        &client("sluice.dev/egress-packets-per-second: '-1', sluice.dev/egress-connections-per-second: unlimited"),
    );
    ground.until("nothing of a wrong number", |it| {
        let findings = it.cluster.report().findings;
        rates(it).is_none()
            && findings
                .iter()
                .any(|it| it.contains("egress-packets-per-second") && it.contains("default"))
    });
}

#[test]
fn k04_links_of_one_namespace_share_a_number_that_no_other_namespace_has() {
    let mut ground = Ground::new("tenants", &[("pods.yaml", PODS)]);
    ground.attach("shop/web", 16, 1);
    ground.attach("shop/client", 17, 2);
    ground.attach("yard/gate", 18, 3);
    ground.serve();
    let tenant = |ground: &Ground, id: u16| match ground.row(Key::Link(LinkId::new(id).unwrap()))? {
        Row::Link(row) => Some(row.tenant.raw()),
        _ => None,
    };
    ground.until("three links", |it| {
        [16, 17, 18].map(|id| tenant(it, id)) == [Some(1), Some(1), Some(2)]
    });
}

#[test]
fn n20_link_and_policy_are_one_change_and_nothing_is_said_before_all_is_known() {
    let mut ground = Ground::new("n20", &[("pods.yaml", PODS), ("policy.yaml", POLICY)]);
    ground.serve();
    assert!(ground.cluster.await_pod(&pod_name("shop/web"), LIMIT));
    let revision = ground.attach("shop/web", 16, 1);
    let key = Key::Link(LinkId::new(16).unwrap());
    ground.control.wait(revision, key, LIMIT).unwrap();
    // In one commit: whoever sees the link sees its binding, its rules and the settings without which none counts.
    let [ingress, egress] = ground.binding(16).unwrap();
    assert_ne!(ingress, RulesetId::NONE);
    assert_eq!(egress, RulesetId::NONE);
    assert!(
        ground
            .row(Key::Policy(PolicyKey::Ruleset(ingress)))
            .is_some()
    );
    assert!(ground.row(Key::Policy(PolicyKey::Settings)).is_some());
    let Some(Row::Link(link)) = ground.row(key) else {
        panic!("no link")
    };
    assert!(link.identity.is_pod());

    let revision = ground.cluster.detach(link.id, Vec::new());
    ground.control.wait(revision, key, LIMIT).unwrap();
    assert_eq!((ground.row(key), ground.binding(16)), (None, None));
}

#[test]
fn policies_come_change_and_go_with_their_files_and_a_typo_changes_nothing() {
    let mut ground = Ground::new("files", &[("pods.yaml", PODS)]);
    ground.attach("shop/web", 16, 1);
    ground.serve();
    ground.until("an unrestricted pod", |it| {
        it.binding(16) == Some([RulesetId::NONE; 2])
    });

    ground.write("policy.yaml", POLICY);
    let is_isolated = |it: &Ground| {
        it.binding(16)
            .is_some_and(|[ingress, _]| ingress != RulesetId::NONE)
    };
    ground.until("isolation", is_isolated);
    let before = ground.guest.lock().unwrap().rows.clone();

    ground.write(
        "policy.yaml",
        &POLICY.replace("podSelector: {matchLabels: {app: web}}", "podSelectorr: {}"),
    );
    ground.until("a finding", |it| it.cluster.report().errors > 0);
    assert_eq!(ground.guest.lock().unwrap().rows, before);
    let problems = Cluster::problems(&ground.cluster.report());
    assert!(
        problems[0].contains("policy.yaml:6") && problems[0].contains("podSelectorr"),
        "{problems:?}"
    );

    fs::remove_file(ground.directory.join("manifests/policy.yaml")).unwrap();
    ground.until("freedom", |it| it.binding(16) == Some([RulesetId::NONE; 2]));
    // The findings of a directory follow its objects.
    ground.until("no problem", |it| {
        Cluster::problems(&it.cluster.report()).is_empty()
    });
}

#[test]
fn services_lead_to_attached_pods_and_the_nodes_addresses_are_known() {
    let mut ground = Ground::new("services", &[("pods.yaml", PODS)]);
    ground.serve();
    ground.attach("shop/web", 16, 1);
    let has_backend = |it: &Ground| {
        it.guest.lock().unwrap().rows.values().any(|row| match row {
            Row::Service(ServiceRow::Backend(row)) => {
                row.address == std::net::IpAddr::from([10, 0, 0, 1]) && row.port == 8080
            }
            _ => false,
        })
    };
    ground.until("a backend", has_backend);
    let rows = ground.guest.lock().unwrap().rows.clone();
    let is_node = |row: &Row| {
        matches!(row, Row::Service(ServiceRow::Address(it))
        if it.role == AddressRole::Node && it.address == std::net::IpAddr::from([192, 0, 2, 7]))
    };
    assert!(rows.values().any(is_node));
    let translates = |row: &Row| matches!(row, Row::Service(ServiceRow::Nat(it)) if it.node4 == Some([192, 0, 2, 7].into()));
    assert!(rows.values().any(translates));
    let services = ground.cluster.services();
    assert_eq!(services[0].ports[0].endpoints, ["10.0.0.1:8080"]);
}

#[test]
fn directory_that_is_not_there_leaves_the_appliance_alone_until_it_is() {
    let mut ground = Ground::new("absent", &[]);
    let given = ground.directory.join("manifests");
    fs::remove_dir(&given).unwrap();
    // The source may have seen it: begin again with one that has never been there.
    let text = serde_json::json!({"image": "i", "run_dir": ground.directory, "source": {"directory": given}});
    let config = Config::parse(&text.to_string(), false).unwrap();
    ground.control = Control::new(|_| {}).unwrap();
    ground.cluster = Cluster::start(&config, &ground.control).unwrap().unwrap();
    ground.attach("shop/web", 16, 1);
    ground.serve();
    ground.until("a reason", |it| it.cluster.report().lost.is_some());
    std::thread::sleep(Duration::from_millis(300));
    assert!(ground.guest.lock().unwrap().rows.is_empty());
    assert!(
        !ground
            .cluster
            .await_pod(&pod_name("shop/web"), Duration::ZERO)
    );
    assert_eq!(Cluster::problems(&ground.cluster.report()).len(), 2);

    fs::create_dir(&given).unwrap();
    ground.write("pods.yaml", PODS);
    ground.until("the link", |it| it.binding(16).is_some());
}

#[test]
fn what_is_asked_about_policy_is_answered_from_the_same_tables() {
    let ground = Ground::new("ask", &[("pods.yaml", PODS), ("policy.yaml", POLICY)]);
    assert!(ground.cluster.await_pod(&pod_name("shop/web"), LIMIT));
    ground.attach("shop/web", 16, 1);
    ground.attach("shop/client", 17, 2);
    ground.attach("stranger", 18, 3);
    let policies = ground.cluster.policies();
    assert_eq!((policies[0].pods, policies[0].pods_here), (1, 1));
    let accepted = |from: &str, to: &str| ground.cluster.trace(from, to).unwrap().accepted;
    assert!(accepted("shop/client", "shop/web:8080/tcp"));
    assert!(!accepted("shop/client", "shop/web:8081/tcp"));
    // A pod that no manifest describes has no labels; its address says who it is as well as its name.
    assert!(!accepted("default/stranger", "shop/web:8080/tcp"));
    assert!(!accepted("10.0.0.3", "shop/web:8080/tcp"));
    assert!(accepted("10.0.0.2", "shop/web:8080/tcp"));
    let of = ground.cluster.policies_of("shop/web").unwrap();
    assert!(of.directions[0].isolated && !of.directions[1].isolated);
    assert!(ground.cluster.policies_of("shop/nobody").is_err());
}

const NAMES: &str = "
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names}
spec:
  tier: Admin
  priority: 1
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}
  egress:
  - {action: Accept, to: [{domainNames: ['*.site.test']}]}
  - {action: Deny, to: [{networks: [0.0.0.0/0]}]}
";

#[test]
fn n14_what_pods_were_told_is_listed_and_explains_a_trace() {
    let mut ground = Ground::new("told", &[("pods.yaml", PODS), ("names.yaml", NAMES)]);
    assert!(ground.cluster.await_pod(&pod_name("shop/web"), LIMIT));
    ground.attach("shop/client", 17, 2);
    let cluster = &ground.cluster;
    assert_eq!(cluster.names(None), Err(NotTold::Silent));
    let trace = |cluster: &Cluster, to: &str| cluster.trace("shop/client", to).unwrap();
    let silent = trace(cluster, "192.0.2.1:443");
    assert!(!silent.accepted && silent.to_string().contains("sluice status"));

    let learnt = |link, name: &str, last, left| Learnt {
        link: LinkId::new(link).unwrap(),
        name: NameRow::parse(name).unwrap().id,
        address: [192, 0, 2, last].into(),
        left,
    };
    ground.guest.lock().unwrap().names = vec![
        learnt(17, "*.site.test", 2, 30),
        learnt(17, "*.site.test", 1, 20),
        learnt(17, "*.site.test", 3, -20),
        learnt(17, "no.rule.test", 4, 20),
        learnt(99, "*.site.test", 5, 20),
    ];
    ground.serve();
    let revision = ground.control.revision();
    let key = Key::Link(LinkId::new(17).unwrap());
    ground.control.wait(revision, key, LIMIT).unwrap();
    let cluster = &ground.cluster;
    let told = |address: [u8; 4], seconds| LearntName {
        pod: "shop/client".into(),
        link: 17,
        name: "*.site.test".into(),
        address: address.into(),
        seconds,
    };
    let names = vec![told([192, 0, 2, 1], 20), told([192, 0, 2, 2], 30)];
    for of in [None, Some("shop/client")] {
        let all = cluster.names(of).unwrap();
        assert_eq!((&all.names, all.more), (&names, false));
    }
    assert_eq!(cluster.policies_of("shop/client").unwrap().names, names);
    assert_eq!(cluster.policies_of("shop/web").unwrap().names, []);
    let elsewhere = cluster.names(Some("shop/web")).unwrap_err().to_string();
    assert!(elsewhere.contains("not on this node"), "{elsewhere}");
    let nobody = cluster.names(Some("shop/nobody")).unwrap_err().to_string();
    assert!(nobody.contains("no pod shop/nobody"), "{nobody}");
    for (last, accepted, why) in [
        (1, true, "*.site.test has 192.0.2.1, for 20 s more"),
        (3, false, "*.site.test had 192.0.2.3 until 20 s ago"),
        (
            4,
            false,
            "was not told that any of its domains has 192.0.2.4",
        ),
    ] {
        let answer = trace(cluster, &format!("192.0.2.{last}:443"));
        assert_eq!(answer.accepted, accepted);
        assert!(answer.to_string().contains(why), "{answer}");
    }
}

#[test]
fn n19_questions_about_policy_hold_up_no_change() {
    let mut ground = Ground::new("asking", &[("pods.yaml", PODS), ("policy.yaml", POLICY)]);
    ground.serve();
    assert!(ground.cluster.await_pod(&pod_name("shop/web"), LIMIT));
    ground.attach("shop/web", 16, 1);
    // Somebody looks for as long as all this takes: a link and a file are in force before the answer is there.
    let seen = ground.cluster.ask(|now| {
        let revision = ground.attach("shop/client", 17, 2);
        let key = Key::Link(LinkId::new(17).unwrap());
        ground.control.wait(revision, key, LIMIT).unwrap();
        fs::remove_file(ground.directory.join("manifests/policy.yaml")).unwrap();
        ground.until("freedom", |it| it.binding(16) == Some([RulesetId::NONE; 2]));
        (now.links.len(), now.store.network_policies().count())
    });
    assert_eq!(seen, (1, 1), "the answer is of the moment of the question");
    assert_eq!(ground.cluster.policies(), []);
}

#[test]
fn n19_many_questions_and_many_changes_go_on_side_by_side() {
    const CHANGES: u8 = 60;
    let mut ground = Ground::new("askers", &[("pods.yaml", PODS), ("policy.yaml", POLICY)]);
    ground.serve();
    assert!(ground.cluster.await_pod(&pod_name("shop/web"), LIMIT));
    ground.attach("shop/web", 16, 1);
    ground.attach("shop/client", 17, 2);
    let over = std::sync::atomic::AtomicBool::new(false);
    let answers = std::thread::scope(|scope| {
        let ask = || {
            let mut answers = 0;
            while answers == 0 || !over.load(std::sync::atomic::Ordering::Relaxed) {
                let cluster = &ground.cluster;
                let trace = cluster.trace("shop/client", "shop/web:8080/tcp").unwrap();
                let other = cluster.trace("shop/client", "shop/web:8081/tcp").unwrap();
                assert!(trace.accepted && !other.accepted);
                assert!(cluster.policies_of("shop/web").unwrap().directions[0].isolated);
                answers += 1;
            }
            answers
        };
        let askers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        for n in 0..CHANGES {
            let id = 18 + u16::from(n % 3);
            let key = Key::Link(LinkId::new(id).unwrap());
            let revision = ground.attach("shop/other", id, 100 + n);
            ground.control.wait(revision, key, LIMIT).unwrap();
            let revision = ground.cluster.detach(LinkId::new(id).unwrap(), Vec::new());
            ground.control.wait(revision, key, LIMIT).unwrap();
        }
        over.store(true, std::sync::atomic::Ordering::Relaxed);
        let joined = askers.into_iter().map(|it| it.join().unwrap());
        joined.collect::<Vec<i32>>()
    });
    assert!(answers.iter().all(|it| *it > 0));
}

#[test]
fn s28_who_asks_for_dsr_where_it_cannot_be_had_is_told_why() {
    let service = "apiVersion: v1
kind: Service
metadata: {name: s, namespace: shop, annotations: {sluice.dev/forwarding-mode: dsr}}
spec: {clusterIP: 10.96.0.9, ports: [{port: 80, nodePort: 30080}]}
";
    let ground = Ground::new("dsr", &[("pods.yaml", PODS), ("service.yaml", service)]);
    ground.until("a finding", |it| it.cluster.report().wrong > 0);
    let findings = ground.cluster.report().findings;
    let reason = "Service shop/s: metadata.annotations[sluice.dev/forwarding-mode]: Clients outside get the node's address, not dsr: the node has no uplink";
    assert!(findings[0].ends_with(reason), "{findings:?}");
    // It is served all the same.
    assert_eq!(Cluster::problems(&ground.cluster.report()), [""; 0]);
}

#[test]
fn z06_the_status_names_who_does_not_get_its_address_and_who_has_it_and_a_pod_is_attached_all_the_same()
 {
    let thief = "
apiVersion: v1
kind: Service
metadata: {name: x, namespace: a}
spec: {clusterIP: 10.96.0.66, externalIPs: [10.96.0.10, 192.0.2.7, 10.0.0.1], ports: [{port: 80}]}
";
    let mut ground = Ground::new("owners", &[("pods.yaml", PODS), ("thief.yaml", thief)]);
    ground.serve();
    ground.until("what the thief gets", |it| it.cluster.report().in_sync);
    let revision = ground.attach("shop/web", 16, 1);
    let link = Key::Link(LinkId::new(16).unwrap());
    ground.control.wait(revision, link, LIMIT).unwrap();
    let report = ground.cluster.report();
    let said = |part: &str| {
        let mut all = report.findings.iter();
        all.any(|it| it.contains("Service a/x") && it.contains(part))
    };
    assert!(said(
        "10.96.0.10 is not used: it is the ClusterIP of Service shop/web"
    ));
    assert!(said("192.0.2.7 is not used: it is an address of node here"));
    assert!(said("10.0.0.1 is not used: Pod shop/web has it"));
    assert_eq!((report.wrong, report.errors), (3, 0));
    let summary = ground
        .cluster
        .services()
        .into_iter()
        .find(|it| it.name == "a/x");
    let summary = summary.unwrap();
    assert_eq!((summary.external_ips.len(), summary.problems.len()), (0, 3));
}
