//! NetworkPolicy and ClusterNetworkPolicy: the truth tables of the conformance cases, and random policies, each judged by
//! the compiled tables and by a reference that only knows the documentation.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test ends where its ground is not as it expects; JSON is built from values"
)]

mod cluster_tables;
mod ground;
mod names;
mod packets;
mod random;
mod reference;
mod replay;
mod tables;

use proptest::prelude::*;

use crate::ground::{differences, model, with_guest, world};
use crate::random::Script;

/// How many sets of policies; `make test` asks for all 10 000.
fn cases() -> u32 {
    let wanted = std::env::var("SLUICE_POLICY_SETS").ok();
    wanted.and_then(|it| it.parse().ok()).unwrap_or(1_000)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), ..ProptestConfig::default() })]

    #[test]
    fn n02_random_policies_are_judged_as_the_documentation_says(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let mut world = world();
        Script::new(&bytes).furnish(&mut world);
        let mut model = model(&world);
        let differences = with_guest(&mut model, |policy| differences(&world, policy, &[80, 81, 8080]));
        prop_assert!(differences.is_empty(), "{differences:#?}\n{:#?}\n{:#?}", world.policies, world.cluster_policies);
    }
}
