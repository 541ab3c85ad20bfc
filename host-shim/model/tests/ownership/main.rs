//! Who owns an address: of all that may claim one, the right one has it, whatever the names and the order.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test ends where its ground is not as it expects; JSON is built from values"
)]

mod rules;
mod world;

use proptest::prelude::*;

/// Random worlds; set `SLUICE_OWNERSHIP_WORLDS` for more.
fn worlds() -> u32 {
    let asked = std::env::var("SLUICE_OWNERSHIP_WORLDS").ok();
    asked.and_then(|it| it.parse().ok()).unwrap_or(256)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: worlds(), ..ProptestConfig::default() })]
    #[test]
    fn z06_no_object_of_a_namespace_changes_what_becomes_of_packets_to_another_ones_addresses(
        bytes in proptest::collection::vec(any::<u8>(), 0..160)
    ) {
        world::holds(&bytes);
    }
}

/// A world in which every packet is dropped proves nothing.
#[test]
fn packets_of_the_random_worlds_arrive() {
    let mut choices = world::Choices(&[0; 8]);
    let config = world::config(&mut choices);
    // A Service with external and balanced addresses, a node port, and one endpoint here.
    let victim = world::victim(&mut world::Choices(&[1, 1, 1, 0, 1, 0]));
    let mut model = world::model(&config, victim.objects.iter());
    let packets = world::packets(&victim);
    let ends = world::endings(0, &mut model, &packets);
    let to_pod = ends
        .iter()
        .filter(|(it, _)| it == "Forward(link 16)")
        .count();
    let to_peer = ends
        .iter()
        .filter(|(it, _)| it == "Forward(link 1)")
        .count();
    assert!(
        to_pod > 30 && to_peer > 30,
        "{to_pod} and {to_peer} of {}",
        ends.len()
    );
}
