//! The CNI plugin on a real node: namespaces, interfaces and the appliance are there, or named as missing, or gone.

use serde_json::{Value, json};
use sluice_tests::cni::{Call, CniLab, REFERENCE, addresses, call_plugin, ping};
use sluice_tests::command::{self, Running};
use sluice_tests::lab::{Wiring, program};
use sluice_tests::need;
use sluice_tests::need::Need::{Kvm, Root, Tool};
use sluice_tests::netns::Netns;
use std::path::Path;
use std::time::Duration;

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

fn of(call: Call<'_>, lab: &CniLab, keys: &Value) -> sluice_tests::cni::Said {
    lab.call(&call, &lab.config("1.1.0", keys))
        .expect("the plugin starts")
}

#[test]
fn c01_w02_a_pod_has_what_the_result_says_in_both_wirings() {
    need!(
        "c01_w02_a_pod_has_what_the_result_says_in_both_wirings",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let (a, of_a) = lab.add("a", &Value::Null).expect("a pod");
        let (b, of_b) = lab.add("b", &Value::Null).expect("a pod");
        let said: Vec<String> = of_a["ips"]
            .as_array()
            .expect("ips")
            .iter()
            .map(|ip| text(&ip["address"]))
            .collect();
        assert_eq!(addresses(&a, "eth0").expect("eth0"), said);
        assert_eq!(said, ["10.88.0.2/32", "fd88::2/128"]);
        let link: Value =
            serde_json::from_str(&a.run(&["ip", "-j", "link", "show"]).expect("links"))
                .expect("json");
        let names: Vec<String> = link
            .as_array()
            .expect("links")
            .iter()
            .map(|l| text(&l["ifname"]))
            .collect();
        assert_eq!(names, ["lo", "eth0"], "exactly one new interface");
        assert_eq!(link[1]["address"], of_a["interfaces"][0]["mac"]);
        assert_eq!(link[1]["operstate"], "UP");
        assert_eq!(link[1]["mtu"], of_a["interfaces"][0]["mtu"]);
        let routes = a.run(&["ip", "route"]).expect("routes");
        assert!(routes.contains("default via 169.254.1.1"), "{routes}");
        for ip in of_b["ips"].as_array().expect("ips") {
            let to = text(&ip["address"]);
            ping(&a, to.split('/').next().expect("an address")).expect("pod reaches pod");
        }
        // W-09: a fresh pod reaches itself.
        for own in ["127.0.0.1", "::1"] {
            ping(&a, own).expect("loopback");
        }
        for (id, netns) in [("a", &a), ("b", &b)] {
            lab.del(id, netns.path().to_str().expect("path"))
                .expect("del")
                .result()
                .expect("success");
            assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
        }
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

#[test]
fn c02_an_interface_in_use_stays_as_it_is() {
    need!(
        "c02_an_interface_in_use_stays_as_it_is",
        Root,
        Kvm,
        Tool("ip")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let (netns, _) = lab.add("a", &Value::Null).expect("a pod");
    let before = netns.run(&["ip", "-o", "addr"]).expect("a look");
    let path = netns.path();
    let path = path.to_str().expect("path");
    for id in ["a", "another"] {
        let (code, said) = of(Call::new("ADD", id, path), &lab, &Value::Null)
            .error()
            .expect("refused");
        assert_eq!(code, 103, "{said}");
    }
    assert_eq!(netns.run(&["ip", "-o", "addr"]).expect("a look"), before);
    assert_eq!(
        lab.left().expect("a look").len(),
        2 + 2 + 1 + 1,
        "two interfaces, two addresses, a link, a record"
    );
}

#[test]
fn c03_del_succeeds_in_every_odd_situation() {
    need!(
        "c03_del_succeeds_in_every_odd_situation",
        Root,
        Kvm,
        Tool("ip")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let (netns, _) = lab.add("a", &Value::Null).expect("a pod");
        let path = netns.path();
        drop(netns);
        for path in [path.to_str().expect("path"), "", "/nonexistent"] {
            assert_eq!(
                lab.del("a", path).expect("del").result().expect("success"),
                Value::Null
            );
        }
        lab.del("never", "")
            .expect("del")
            .result()
            .expect("success");
        let (netns, _) = lab.add("b", &Value::Null).expect("a pod");
        netns.run(&["ip", "link", "del", "eth0"]).expect("gone");
        lab.del("b", netns.path().to_str().expect("path"))
            .expect("del")
            .result()
            .expect("success");
        assert_eq!(lab.left().expect("a look"), [""; 0]);
    }
}

/// Takes something away, given the pod and the result of its ADD.
type Damage<'a> = &'a dyn Fn(&Netns, &Value);

#[test]
fn c06_whatever_is_taken_away_is_named_by_check() {
    need!(
        "c06_whatever_is_taken_away_is_named_by_check",
        Root,
        Kvm,
        Tool("ip"),
        Tool("tc")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let damages: [(&str, Damage<'_>); 7] = [
        ("the pod's address 10.88.0.", &|pod, result| {
            let address = text(&result["ips"][0]["address"]);
            pod.run(&["ip", "addr", "del", &address, "dev", "eth0"])
                .expect("del");
        }),
        ("the pod's default route via 169.254.1.1", &|pod, _| {
            pod.run(&["ip", "route", "del", "default"]).expect("del");
        }),
        ("the state UP", &|pod, _| {
            pod.run(&["ip", "link", "set", "eth0", "down"])
                .expect("down");
        }),
        ("the pod's interface eth0", &|pod, _| {
            pod.run(&["ip", "link", "del", "eth0"]).expect("del");
        }),
        ("the host's interface slt", &|_, result| {
            let tap = text(&result["interfaces"][2]["name"]);
            lab.lab
                .host
                .run(&["ip", "link", "set", &tap, "down"])
                .expect("down");
            lab.lab
                .host
                .run(&["ip", "tuntap", "del", "dev", &tap, "mode", "tap"])
                .ok();
            lab.lab.host.run(&["ip", "link", "del", &tap]).ok();
        }),
        ("the redirect of slv", &|_, result| {
            let veth = text(&result["interfaces"][1]["name"]);
            lab.lab
                .host
                .run(&["tc", "qdisc", "del", "dev", &veth, "clsact"])
                .expect("del");
        }),
        ("the node's link", &|_, _| {
            let links = lab
                .lab
                .sluice(&["link", "list", "-o", "json"])
                .expect("links");
            let links: Value = serde_json::from_str(&links).expect("json");
            lab.lab
                .sluice(&["link", "del", &text(&links[0]["pod"])])
                .expect("del");
        }),
    ];
    for (index, (missing, damage)) in damages.into_iter().enumerate() {
        let id = format!("c{index}");
        let (netns, result) = lab.add(&id, &Value::Null).expect("a pod");
        let path = netns.path();
        let path = path.to_str().expect("path");
        let keys = json!({"prevResult": result});
        of(Call::new("CHECK", &id, path), &lab, &keys)
            .result()
            .expect("whole right after ADD");
        damage(&netns, &result);
        let (code, said) = of(Call::new("CHECK", &id, path), &lab, &keys)
            .error()
            .expect("damaged");
        assert_eq!(code, 106);
        assert!(said.contains(missing), "{missing}: {said}");
        lab.del(&id, path).expect("del").result().expect("success");
    }
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c15_a_fault_at_any_step_of_wiring_leaves_nothing() {
    need!(
        "c15_a_fault_at_any_step_of_wiring_leaves_nothing",
        Root,
        Kvm,
        Tool("ip")
    );
    for wiring in [Wiring::Veth, Wiring::Tap] {
        let lab = CniLab::start(wiring).expect("a node");
        let netns = Netns::new("faulty").expect("a namespace");
        let path = netns.path();
        let path = path.to_str().expect("path");
        let refused = |keys: &Value, netns: &str| {
            let said = of(Call::new("ADD", "a", netns), &lab, keys)
                .error()
                .expect("refused");
            assert_eq!(lab.left().expect("a look"), [""; 0], "{said:?}");
            said
        };
        // Not a namespace; names on the host in the way; a route that cannot be; a sysctl that is not there.
        let file = lab.path("file");
        std::fs::write(&file, "").expect("a file");
        assert_eq!(refused(&Value::Null, file.to_str().expect("path")).0, 8);
        lab.lab
            .host
            .run(&["ip", "link", "add", "slt16", "type", "bridge"])
            .expect("in the way");
        let in_the_way = of(Call::new("ADD", "a", path), &lab, &Value::Null)
            .error()
            .expect("refused");
        assert_eq!(in_the_way.0, 103, "{in_the_way:?}");
        lab.lab
            .host
            .run(&["ip", "link", "del", "slt16"])
            .expect("out of the way");
        let (code, said) = refused(
            &json!({"sysctl": {"net.ipv4.conf.eth0.no_such": "1"}}),
            path,
        );
        assert!(
            code == 7 && said.contains("no_such") && said.contains("does not have it"),
            "{said}"
        );
        assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
        of(Call::new("ADD", "a", path), &lab, &Value::Null)
            .result()
            .expect("nothing is in the way");
        lab.del("a", path).expect("del").result().expect("success");
    }
}

#[test]
fn w10_sysctls_mac_mtu_and_fixed_address_are_the_pods() {
    need!(
        "w10_sysctls_mac_mtu_and_fixed_address_are_the_pods",
        Root,
        Kvm,
        Tool("ip")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let keys = json!({
        "mtu": 1400,
        "sysctl": {"net.ipv4.conf.IFNAME.arp_notify": "1", "net/ipv4/ip_local_port_range": "20000 30000"},
        "runtimeConfig": {"mac": "02:00:00:00:00:09", "ips": ["10.88.0.77/24"]},
    });
    let (netns, result) = lab.add("a", &keys).expect("a pod");
    let shown = netns.run(&["ip", "addr", "show", "eth0"]).expect("eth0");
    for part in ["mtu 1400", "02:00:00:00:00:09", "10.88.0.77/32"] {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let sysctl = |name: &str| netns.run(&["cat", name]).expect("sysctl");
    assert_eq!(
        sysctl("/proc/sys/net/ipv4/conf/eth0/arp_notify").trim(),
        "1"
    );
    assert_eq!(
        sysctl("/proc/sys/net/ipv4/ip_local_port_range").trim(),
        "20000\t30000"
    );
    let path = netns.path();
    let mut check = keys.clone();
    check["prevResult"] = result;
    let call = Call::new("CHECK", "a", path.to_str().expect("path"));
    of(call, &lab, &check).result().expect("whole");
    netns
        .run(&[
            "sh",
            "-c",
            "echo 0 > /proc/sys/net/ipv4/conf/eth0/arp_notify",
        ])
        .expect("written");
    assert!(
        of(call, &lab, &check)
            .error()
            .expect("changed")
            .1
            .contains("arp_notify")
    );
}

#[test]
fn c04_c05_c08_without_an_appliance_add_fails_del_works_and_status_says_so() {
    need!(
        "c04_c05_c08_without_an_appliance_add_fails_del_works_and_status_says_so",
        Root,
        Tool("ip")
    );
    let mut lab = CniLab::prepare(Wiring::Veth, "external").expect("a node");
    // Never healthy: nobody brings an appliance.
    lab.lab.start_node_only().expect("a daemon");
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let call = |verb| {
        of(
            Call::new(verb, "a", path.to_str().expect("path")),
            &lab,
            &Value::Null,
        )
    };
    let added = call("ADD");
    assert_eq!(added.error().expect("refused").0, 11);
    assert!(added.took < Duration::from_secs(2), "{:?}", added.took);
    let deleted = call("DEL");
    deleted.result().expect("success");
    assert!(deleted.took < Duration::from_secs(2), "{:?}", deleted.took);
    assert_eq!(call("STATUS").error().expect("refused").0, 50);
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c18_c19_host_local_as_delegate_and_two_attachments_of_one_pod() {
    let host_local = Path::new(REFERENCE).join("host-local");
    need!(
        "c18_c19_host_local_as_delegate_and_two_attachments_of_one_pod",
        Root,
        Kvm,
        Tool("ip")
    );
    if !host_local.exists() {
        return need::skip(
            "c18_c19_host_local_as_delegate",
            "needs containernetworking-plugins",
        );
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let ipam = json!({"ipam": {
        "type": "host-local", "dataDir": lab.path("networks"), "ranges": [[{"subnet": "10.99.0.0/24"}]],
    }});
    let config = lab.config("1.0.0", &ipam);
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let first = Call::new("ADD", "a", path.to_str().expect("path"));
    let second = Call {
        ifname: "net1",
        ..first
    };
    let of_first = lab
        .call(&first, &config)
        .expect("starts")
        .result()
        .expect("eth0");
    lab.call(&second, &config)
        .expect("starts")
        .result()
        .expect("net1");
    assert_eq!(of_first["ips"][0]["address"], "10.99.0.2/32");
    assert_eq!(addresses(&netns, "net1").expect("net1"), ["10.99.0.3/32"]);
    lab.call(
        &Call {
            verb: "DEL",
            ..first
        },
        &config,
    )
    .expect("starts")
    .result()
    .expect("success");
    assert_eq!(
        addresses(&netns, "net1").expect("net1 stays"),
        ["10.99.0.3/32"]
    );
    assert_eq!(lab.held().expect("a look"), ["10.99.0.3"]);
    lab.call(
        &Call {
            verb: "DEL",
            ..second
        },
        &config,
    )
    .expect("starts")
    .result()
    .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c07_gc_frees_the_stale_and_the_rest_keep_their_traffic() {
    need!(
        "c07_gc_frees_the_stale_and_the_rest_keep_their_traffic",
        Root,
        Kvm,
        Tool("ip"),
        Tool("ping")
    );
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let mut pods = Vec::new();
    for id in ["a", "b", "c", "d", "e"] {
        pods.push(lab.add(id, &Value::Null).expect("a pod"));
    }
    // The sandboxes of d and e are gone, and nobody told us.
    pods.truncate(3);
    let valid: Vec<Value> = ["a", "b", "c"]
        .map(|id| json!({"containerID": id, "ifname": "eth0"}))
        .to_vec();
    let keys = json!({"cni.dev/valid-attachments": valid});
    of(Call::new("GC", "", ""), &lab, &keys)
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look").len(), 3 * (2 + 2 + 1 + 1));
    for (netns, _) in &pods {
        for (_, result) in &pods {
            let to = text(&result["ips"][0]["address"]);
            ping(netns, to.split('/').next().expect("an address")).expect("traffic goes on");
        }
    }
}

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

fn serve(pod: &Netns) -> anyhow::Result<Running> {
    let mut command = pod.command(program("sluice-load"));
    command.arg("serve").stdout(std::process::Stdio::null());
    let server = Running::start("sluice-load", &mut command)?;
    command::until("the server", Duration::from_secs(5), || {
        let listening = pod.run(&["ss", "-ltnH", "sport", "=", ":7000"])?;
        anyhow::ensure!(!listening.trim().is_empty(), "not listening yet");
        Ok(())
    })?;
    Ok(server)
}

#[test]
fn chained_before_debians_portmap_and_bandwidth() {
    need!(
        "chained_before_debians_portmap_and_bandwidth",
        Root,
        Kvm,
        Tool("ip"),
        Tool("iptables")
    );
    if !Path::new(REFERENCE).join("portmap").exists() {
        return need::skip(
            "chained_before_debians_portmap_and_bandwidth",
            "needs containernetworking-plugins",
        );
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let add = Call::new("ADD", "a", path.to_str().expect("path"));
    let first = lab
        .call(&add, &lab.config("1.0.0", &Value::Null))
        .expect("starts")
        .result()
        .expect("ours");
    let theirs = |name: &str, previous: &Value| {
        json!({
            "cniVersion": "1.0.0", "name": "sluice", "type": name, "prevResult": previous,
            "backend": "iptables", "snat": true,
            "runtimeConfig": {
                "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}],
                "bandwidth": {"ingressRate": 8_000_000, "ingressBurst": 8_000_000},
            },
        })
    };
    let mut result = first.clone();
    for name in ["portmap", "bandwidth"] {
        let said = lab
            .call_reference(name, &add, &theirs(name, &result))
            .expect("starts");
        match said.result() {
            Ok(next) => result = next,
            Err(error) => {
                // What this kernel does not have (tbf, iptables modules) is not ours to prove.
                need::skip(&format!("chained before {name}"), &format!("{error:#}"));
            }
        }
    }
    assert_eq!(
        result["ips"], first["ips"],
        "the chain hands our addresses on"
    );
    let check = json!({"prevResult": result});
    lab.call(
        &Call {
            verb: "CHECK",
            ..add
        },
        &lab.config("1.0.0", &check),
    )
    .expect("starts")
    .result()
    .expect("whole, whatever they changed");
    for name in ["bandwidth", "portmap"] {
        let del = Call { verb: "DEL", ..add };
        let said = lab
            .call_reference(name, &del, &theirs(name, &result))
            .expect("starts");
        if let Err(error) = said.result() {
            need::skip(&format!("DEL of {name}"), &format!("{error:#}"));
        }
    }
    lab.del("a", add.netns)
        .expect("del")
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c11_chained_after_debians_bridge_and_ptp_their_interfaces_are_taken_over() {
    let test = "c11_chained_after_debians_bridge_and_ptp_their_interfaces_are_taken_over";
    if !need::met(test, &[Root, Kvm, Tool("ip"), Tool("ping")]) {
        return;
    }
    if !Path::new(REFERENCE).join("ptp").exists() {
        return need::skip(test, "needs containernetworking-plugins");
    }
    let lab = CniLab::start(Wiring::Veth).expect("a node");
    let (other, _) = lab.add("other", &Value::Null).expect("a pod");
    for (n, kind) in ["bridge", "ptp"].into_iter().enumerate() {
        let netns = Netns::new(kind).expect("a namespace");
        let path = netns.path();
        let add = Call::new("ADD", kind, path.to_str().expect("path"));
        let del = Call { verb: "DEL", ..add };
        let theirs = json!({
            "cniVersion": "1.0.0", "name": "chained", "type": kind, "bridge": "cni0", "isGateway": true,
            "ipam": {
                "type": "host-local", "dataDir": lab.path("theirs"),
                "ranges": [[{"subnet": format!("10.22.{n}.0/24")}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        });
        let previous = lab
            .call_reference(kind, &add, &theirs)
            .expect("starts")
            .result()
            .expect("theirs");
        let mut config = lab.config("1.0.0", &json!({"prevResult": previous}));
        config.as_object_mut().expect("an object").remove("ipam");
        let result = lab
            .call(&add, &config)
            .expect("starts")
            .result()
            .expect("ours");
        let before = previous["interfaces"].as_array().expect("interfaces").len();
        for index in 0..before {
            for key in ["name", "mac", "sandbox"] {
                assert_eq!(
                    result["interfaces"][index][key],
                    previous["interfaces"][index][key]
                );
            }
        }
        assert_eq!(
            addresses(&netns, "eth0").expect("eth0"),
            [format!("10.22.{n}.2/32")]
        );
        ping(&netns, "10.88.0.2").expect("it reaches a pod of ours");
        ping(&other, &format!("10.22.{n}.2")).expect("and is reached");
        config["prevResult"] = result;
        lab.call(
            &Call {
                verb: "CHECK",
                ..add
            },
            &config,
        )
        .expect("starts")
        .result()
        .expect("whole");
        lab.call(&del, &config)
            .expect("starts")
            .result()
            .expect("success");
        lab.call_reference(kind, &del, &theirs)
            .expect("starts")
            .result()
            .expect("success");
        assert!(netns.run(&["ip", "link", "show", "eth0"]).is_err());
    }
    lab.del("other", "")
        .expect("del")
        .result()
        .expect("success");
    assert_eq!(lab.left().expect("a look"), [""; 0]);
}

#[test]
fn c16_p11_install_places_the_plugin_once_the_node_forwards_and_uninstall_leaves_nothing() {
    let test =
        "c16_p11_install_places_the_plugin_once_the_node_forwards_and_uninstall_leaves_nothing";
    if !need::met(test, &[Root, Kvm, Tool("ip")]) {
        return;
    }
    let mut lab = CniLab::prepare(Wiring::Veth, "auto").expect("a node");
    let (bin, conf) = (lab.path("bin"), lab.path("net.d"));
    let state = lab.path("state");
    let run = |lab: &CniLab, verb: &str| {
        let (bin, conf, state) = (
            bin.to_string_lossy(),
            conf.to_string_lossy(),
            state.to_string_lossy(),
        );
        let words = [
            verb,
            "--bin-dir",
            &bin,
            "--conf-dir",
            &conf,
            "--state-dir",
            &state,
        ];
        lab.lab.sluice(&words)
    };
    let said = run(&lab, "install")
        .expect_err("nobody forwards")
        .to_string();
    assert!(said.contains("does not forward"), "{said}");
    assert!(!conf.exists() && !bin.exists());
    lab.lab.start_node().expect("a node");
    let said = run(&lab, "install").expect("installed");
    assert!(said.contains("there and back"), "{said}");
    assert_eq!(
        lab.left().expect("a look"),
        [""; 0],
        "the self-test leaves nothing"
    );
    let list: Value =
        serde_json::from_slice(&std::fs::read(conf.join("10-sluice.conflist")).expect("a list"))
            .expect("json");
    let mut config = list["plugins"][0].clone();
    config["cniVersion"] = list["cniVersion"].clone();
    config["name"] = list["name"].clone();
    config["ipam"]["dataDir"] = json!(lab.path("networks"));
    let netns = Netns::new("a").expect("a namespace");
    let path = netns.path();
    let call = Call::new("ADD", "a", path.to_str().expect("path"));
    let mut plugin = std::process::Command::new(bin.join("sluice-cni"));
    call_plugin(&mut plugin, &call, &config)
        .expect("starts")
        .result()
        .expect("a pod");
    let said = run(&lab, "uninstall")
        .expect_err("a pod is attached")
        .to_string();
    assert!(said.contains("1 pods are attached"), "{said}");
    lab.del("a", "").expect("del").result().expect("success");
    run(&lab, "uninstall").expect("removed");
    for dir in [&bin, &conf] {
        assert_eq!(std::fs::read_dir(dir).expect("a folder").count(), 0);
    }
}
