//! A short run of what `sluice-lab soak` does for minutes.

use sluice_tests::lab::Wiring;
use sluice_tests::need;
use sluice_tests::need::Need::{Root, Tool};
use sluice_tests::soak;
use std::time::Duration;

#[test]
fn mixed_load_arrives_whole_and_memory_is_flat() {
    let test = "mixed_load_arrives_whole_and_memory_is_flat";
    if !need::met(test, &[Root, Tool("ip"), Tool("ping")]) {
        return;
    }
    let seen = soak::run(Duration::from_secs(20), Wiring::Tap).expect("mixed load");
    println!("{seen}");
}
