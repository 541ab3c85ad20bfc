//! Changes: whatever order events come in, however they are cut, the tables are those of the store; and a guest that follows by
//! deltas has the same rows as one that was told everything.

use std::collections::BTreeMap;

use proptest::prelude::*;
use sluice_appliance::Arena;
use sluice_appliance::hash::Hasher;
use sluice_appliance::policy::Policy;
use sluice_contract::{Key, Row};
use sluice_model::compile::Model;
use sluice_model::diff::Step;
use sluice_model::object::ObjectKey;
use sluice_model::store::Event;

use crate::ground::{
    LIMITS, REGION, attach_all, commit, differences, empty_model, ends, events, guest_allows,
    model, say, world,
};
use crate::random::Script;
use crate::reference::{Connection, End, World};

/// A guest sees `before`, then the change to `after` as a delta; `open(from, after, to)` holds in both.
#[track_caller]
pub(crate) fn follows(
    before: impl Fn(&mut World),
    after: impl Fn(&mut World),
    open: impl Fn(&str, bool, &str) -> bool,
) {
    let mut world = world();
    before(&mut world);
    let mut model = model(&world);
    let mut region = vec![0u8; REGION];
    let mut guest =
        Policy::new(&mut Arena::new(&mut region), &LIMITS, Hasher::new([7; 16])).unwrap();
    let check = |world: &World, guest: &Policy<'_>, changed: bool| {
        assert_eq!(differences(world, guest, &[80, 81]), [""; 0]);
        for from in ends(world) {
            for to in ends(world) {
                if let (End::Pod(a), End::Pod(b)) = (from, to)
                    && a.ip != b.ip
                {
                    let it = Connection {
                        from,
                        to,
                        protocol: "TCP",
                        port: 80,
                    };
                    let allowed = guest_allows(guest, world, &it, sluice_contract::Protocol::Tcp);
                    assert_eq!(
                        allowed,
                        open(&say(from), changed, &say(to)),
                        "{} → {}",
                        say(from),
                        say(to)
                    );
                }
            }
        }
    };
    commit(&mut guest, false, &model.tables().take_delta());
    check(&world, &guest, false);
    let former = world.clone();
    after(&mut world);
    for event in change(&former, &world) {
        model.apply(event);
    }
    model.compile();
    commit(&mut guest, false, &model.tables().take_delta());
    check(&world, &guest, true);
}

/// The events from one world to another.
fn change(from: &World, to: &World) -> Vec<Event> {
    let keyed = |world: &World| -> BTreeMap<ObjectKey, Event> {
        let keyed = events(world).into_iter().filter_map(|event| match &event {
            Event::Put(object) => Some((object.key(), event)),
            _ => None,
        });
        keyed.collect()
    };
    let (former, now) = (keyed(from), keyed(to));
    let gone = former
        .keys()
        .filter(|key| !now.contains_key(key))
        .cloned()
        .map(Event::Removed);
    let gone: Vec<_> = gone.collect();
    let put = now
        .into_iter()
        .filter(|(key, event)| former.get(key) != Some(event));
    put.map(|(_, event)| event).chain(gone).collect()
}

fn rows(model: &mut Model) -> BTreeMap<Key, Row> {
    model.tables().all().map(|row| (row.key(), row)).collect()
}

/// A guest that is nothing but its rows, and insists that steps make sense.
fn take(rows: &mut BTreeMap<Key, Row>, steps: Vec<Step>) {
    for step in steps {
        match step {
            Step::Put(row) => {
                assert_ne!(rows.get(&row.key()), Some(&row), "said twice");
                rows.insert(row.key(), row);
            }
            Step::Remove(key) => assert!(rows.remove(&key).is_some(), "{key:?} was not there"),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    #[test]
    fn order_splitting_squashing_and_repetition_of_events_do_not_matter(
        scripts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..200), 1..4),
        seed in any::<u64>(),
    ) {
        // Some states of the cluster, one after the other; the last one counts.
        let worlds: Vec<World> = scripts.iter().map(|bytes| {
            let mut world = world();
            Script::new(bytes).furnish(&mut world);
            world
        }).collect();
        let last = worlds.last().unwrap();
        let expected = rows(&mut model(last));

        // Step by step, compiled after every event, followed by deltas.
        let mut stepwise = empty_model();
        let mut followed = BTreeMap::new();
        let mut former = World::default();
        for world in &worlds {
            for event in change(&former, world) {
                stepwise.apply(event);
                stepwise.compile();
                take(&mut followed, stepwise.tables().take_delta());
            }
            former = world.clone();
        }
        attach_all(last, &mut stepwise);
        stepwise.compile();
        take(&mut followed, stepwise.tables().take_delta());
        prop_assert_eq!(&rows(&mut stepwise), &expected);
        prop_assert_eq!(&followed, &expected);
        prop_assert!(!stepwise.tables().has_changes());

        // All at once, shuffled, each event twice, the links first.
        let mut shuffled = empty_model();
        attach_all(last, &mut shuffled);
        let mut events: Vec<Event> = events(last).into_iter().flat_map(|it| [it.clone(), it]).collect();
        let mut state = seed | 1;
        for at in (1..events.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            events.swap(at, (state >> 33) as usize % (at + 1));
        }
        for (at, event) in events.into_iter().enumerate() {
            shuffled.apply(event);
            if at % 7 == 0 {
                shuffled.compile();
            }
        }
        shuffled.compile();
        prop_assert_eq!(&rows(&mut shuffled), &expected);
    }
}

#[test]
fn everything_that_was_put_is_taken_away_again() {
    let mut world = world();
    Script::new(&[97; 300]).furnish(&mut world);
    let mut model = model(&world);
    let mut followed = BTreeMap::new();
    take(&mut followed, model.tables().take_delta());
    assert!(followed.len() > 20);
    for event in change(&world, &World::default()) {
        model.apply(event);
    }
    for pod in 0..world.pods.len() {
        model.detach(crate::ground::link(pod));
    }
    model.compile();
    take(&mut followed, model.tables().take_delta());
    // What holds for the whole node stays.
    assert_eq!(followed.len(), 1, "{followed:#?}");
    assert_eq!(model.identities().iter().count(), 0);
}

#[test]
fn n23_an_address_that_goes_to_another_pod_goes_with_one_commit() {
    let mut world = world();
    world.policies = vec![crate::ground::policy(
        "x",
        "p",
        serde_json::json!({
            "podSelector": {"matchLabels": {"pod": "a"}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {"pod": "b"}}}]}],
        }),
    )];
    let mut model = model(&world);
    let mut region = vec![0u8; REGION];
    let mut guest =
        Policy::new(&mut Arena::new(&mut region), &LIMITS, Hasher::new([7; 16])).unwrap();
    commit(&mut guest, false, &model.tables().take_delta());
    let b = world.pods[1].ip;
    let before = guest.identity_of(b);
    // x/b is being deleted, and a new pod of z already has its address.
    let mut former = world.pods[1].manifest.clone();
    former["metadata"]["deletionTimestamp"] = serde_json::json!("2026-01-01T00:00:00Z");
    let mut other = world.pods[8].manifest.clone();
    other["metadata"]["name"] = serde_json::json!("d");
    other["status"]["podIP"] = serde_json::json!(b.to_string());
    for manifest in [former, other] {
        let admission = sluice_model::validate::admit_as(sluice_model::object::Kind::Pod, manifest);
        model.apply(Event::Put(admission.object.unwrap()));
    }
    model.detach(crate::ground::link(1));
    model.compile();
    commit(&mut guest, false, &model.tables().take_delta());
    assert_ne!(guest.identity_of(b), before);
    assert_eq!(guest.identity_of(b), guest.identity_of(world.pods[8].ip));
}
