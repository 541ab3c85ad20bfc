//! Any bytes as a capture, through the reader and, as far as they are one, through a node: no panic, and the counters agree.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sluice_replay::replay::{Replay, memory};
use sluice_replay::tables::Tables;

thread_local! {
    static TABLES: Tables =
        Tables::read(include_str!("../../../examples/replay/tables.json")).expect("the example is good");
}

fuzz_target!(|bytes: &[u8]| TABLES.with(|tables| {
    let mut memory = memory(tables);
    let node = Replay::new(tables, 0, &mut memory, &[], std::io::sink()).expect("the example is good");
    if let Ok(totals) = node.run(bytes, |_| Ok(())) {
        assert!(totals.balanced, "{totals:?}");
    }
}));
