//! Host ports.

use super::serve;
use serde_json::{Value, json};
use sluice_tests::cni::CniLab;
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};

#[test]
fn b01_b02_b06_host_ports_lead_to_their_pods_while_they_live() {
    need!(
        "b01_b02_b06_host_ports_lead_to_their_pods_while_they_live",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ss")
    );
    let mut lab = CniLab::start(Wiring::Veth).expect("a node");
    let (client, _) = lab.add("client", &Value::Null).expect("a pod");
    let port = |host: u16, protocol: &str, ip: &str| json!({"hostPort": host, "containerPort": 7000, "protocol": protocol, "hostIP": ip});
    let with = |ports: Value| json!({"runtimeConfig": {"portMappings": ports}});
    let (tcp, _) = lab
        .add("tcp", &with(json!([port(8080, "tcp", "")])))
        .expect("a pod");
    let (udp, _) = lab
        .add("udp", &with(json!([port(8080, "udp", "192.0.2.10")])))
        .expect("a pod");
    let _servers = [&tcp, &udp].map(|pod| serve(pod).expect("a server"));
    let reach = |kind: &str, to: &str| {
        let program = program("sluice-load");
        let program = program.to_str().expect("path");
        client.run(&["timeout", "5", program, kind, to, "--time", "0.2"])
    };
    for to in ["192.0.2.10:8080", "[fd02::10]:8080"] {
        reach("connect", to).expect("TCP reaches its pod");
    }
    reach("udp", "192.0.2.10:8080").expect("UDP reaches the other pod");
    // A daemon that dies takes none of them away.
    lab.lab
        .node()
        .expect("a node")
        .signal(nix::sys::signal::Signal::SIGKILL);
    lab.lab.node().expect("a node").wait().expect("its end");
    lab.lab.forget_node();
    lab.lab.start_node().expect("a node again");
    reach("connect", "192.0.2.10:8080").expect("TCP reaches its pod");
    lab.del("tcp", "").expect("del").result().expect("success");
    assert!(
        reach("connect", "192.0.2.10:8080").is_err(),
        "the port is closed"
    );
    reach("udp", "192.0.2.10:8080").expect("UDP reaches the other pod");
    lab.del("udp", "").expect("del").result().expect("success");
    let (again, _) = lab
        .add("again", &with(json!([port(8080, "tcp", "")])))
        .expect("a pod");
    let _server = serve(&again).expect("a server");
    reach("connect", "192.0.2.10:8080").expect("TCP reaches the next pod");
}
