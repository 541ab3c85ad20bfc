//! Rows B-01…B-08 as far as they are CNI's: claims, clashes, validation.

use crate::fixture::{Fixture, Said};
use serde_json::{Value, json};

fn with_ports(f: &Fixture, id: &str, ports: &Value) -> Said {
    f.call(
        "ADD",
        id,
        &f.config("1.1.0", json!({"runtimeConfig": {"portMappings": ports}})),
    )
}

fn port(number: u16, protocol: &str, ip: &str) -> Value {
    json!({"hostPort": number, "containerPort": 80, "protocol": protocol, "hostIP": ip})
}

#[test]
fn b02_one_port_on_other_addresses_and_protocols_coexists() {
    let f = Fixture::new();
    for (n, ports) in [
        json!([port(8080, "tcp", "192.0.2.1")]),
        json!([port(8080, "tcp", "192.0.2.2")]),
        json!([port(8080, "udp", "192.0.2.2"), port(8080, "sctp", "")]),
    ]
    .iter()
    .enumerate()
    {
        with_ports(&f, &format!("c{n}"), ports).result();
    }
}

#[test]
fn b03_the_second_claim_of_a_port_is_refused_and_the_first_stays() {
    let f = Fixture::new();
    with_ports(&f, "a", &json!([port(8080, "tcp", "")])).result();
    let said = with_ports(&f, "b", &json!([port(8080, "TCP", "192.0.2.1")]));
    let text = said.error(104);
    assert!(
        text.contains("8080/tcp") && text.contains("container a"),
        "{text}"
    );
    assert_eq!((f.links(), f.held().len()), (vec!["a:eth0".to_owned()], 1));
    f.del("b").silent();
    f.del("a").silent();
    with_ports(&f, "b", &json!([port(8080, "tcp", "")])).result();
}

#[test]
fn b03_of_parallel_claims_one_wins() {
    let f = Fixture::new();
    f.node.state().delay = std::time::Duration::from_millis(50);
    let won = std::thread::scope(|scope| {
        let claim = |n: usize| with_ports(&f, &format!("c{n}"), &json!([port(53, "udp", "")])).code;
        let claims: Vec<_> = (0..8).map(|n| scope.spawn(move || claim(n))).collect();
        claims
            .into_iter()
            .filter(|_| true)
            .map(|c| c.join().unwrap())
            .filter(|c| *c == Some(0))
            .count()
    });
    assert_eq!((won, f.held().len()), (1, 1));
}

#[test]
fn b06_a_claim_ends_with_its_attachment_even_if_the_node_died_in_between() {
    let mut f = Fixture::new();
    with_ports(&f, "a", &json!([port(8080, "tcp", "")])).result();
    f.stop();
    f.del("a").silent();
    f.start();
    with_ports(&f, "b", &json!([port(8080, "tcp", "")])).result();
}

#[test]
fn b08_rates_and_ports_that_cannot_be_are_code_7() {
    let f = Fixture::new();
    let bandwidth = |value: Value| {
        f.call(
            "ADD",
            "a",
            &f.config("1.1.0", json!({"runtimeConfig": {"bandwidth": value}})),
        )
        .error(7)
    };
    assert!(bandwidth(json!({"ingressRate": 5})).contains("burst must also be set"));
    assert!(bandwidth(json!({"egressBurst": 5})).contains("rate must also be set"));
    assert!(bandwidth(json!({"egressRate": 1, "egressBurst": 40_000_000_000u64})).contains("4GB"));
    with_ports(&f, "a", &json!([port(0, "tcp", "")])).error(7);
    with_ports(&f, "a", &json!([port(1, "icmp", "")])).error(7);
    f.assert_empty();
}
