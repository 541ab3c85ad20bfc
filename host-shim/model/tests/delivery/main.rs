//! Delivery: recorded clusters are told in other orders, in pieces, at once and twice, and come to the same configuration, byte
//! for byte.
#![expect(
    clippy::unwrap_used,
    reason = "a test ends where its ground is not as it expects"
)]

mod recording;

use std::collections::BTreeMap;

use sluice_contract::frame::{self, FRAME_MAX};
use sluice_contract::{Key, ToGuest};
use sluice_model::compile::{Config, DefaultDeny, Maglev, Model};
use sluice_model::diff::Step;
use sluice_model::object::Kind;
use sluice_model::store::Event;
use sluice_model::validate::admit_as;

use crate::recording::{
    Random, Said, Subject, by_subject, read, reversed, shuffled, split, squashed,
};

/// A deployment's rollout with an address that is used again; policies, labels and ports that change; nodes, Services and
/// ended jobs.
const RECORDINGS: [(&str, &str); 3] = [
    ("rollout", include_str!("recordings/rollout.jsonl")),
    ("policies", include_str!("recordings/policies.jsonl")),
    ("nodes", include_str!("recordings/nodes.jsonl")),
];
const SEEDS: u64 = 48;

/// How often the model compiles while it is told.
#[derive(Clone, Copy, Debug)]
enum Compiles {
    AtTheEnd,
    AfterEach,
    Sometimes(u64),
}

fn configs() -> [Config; 2] {
    let plain = Config {
        node: "here".into(),
        ..Config::default()
    };
    let strict = Config {
        default_deny: Some(DefaultDeny {
            dns: true,
            egress: Vec::new(),
        }),
        maglev: Maglev::Always,
        endpoints_from_selectors: true,
        ..plain.clone()
    };
    [plain, strict]
}

/// A row as the guest gets it.
fn bytes(message: &ToGuest) -> Vec<u8> {
    let mut buffer = [0; FRAME_MAX];
    frame::encode(message, &mut buffer).unwrap().to_vec()
}

/// All that the node is told because of the cluster: rows in their order, what policy sees of each link, the nodes, and which
/// health checks are answered.
fn compiled(model: &mut Model) -> Vec<u8> {
    model.compile();
    let mut all: Vec<u8> = model
        .tables()
        .all()
        .flat_map(|row| bytes(&ToGuest::Put(row)))
        .collect();
    for link in model.links().keys() {
        let seen = (
            link,
            model.identity(*link),
            model.egress_dscp(*link),
            model.rates(*link),
        );
        all.extend(format!("{seen:?}\n").bytes());
    }
    all.extend(format!("{:?}\n", model.health_checks()).bytes());
    all.extend(format!("{:?}", model.take_members().unwrap()).bytes());
    all
}

/// A model that is told, and a guest that follows it by what it says of each change.
fn told(config: &Config, said: &[Said], compiles: Compiles) -> Vec<u8> {
    let mut model = Model::new(config, []);
    let mut guest: BTreeMap<Key, Vec<u8>> = BTreeMap::new();
    let mut random = Random(match compiles {
        Compiles::Sometimes(seed) => seed,
        _ => 0,
    });
    for it in said {
        it.tell(&mut model);
        let now = match compiles {
            Compiles::AtTheEnd => false,
            Compiles::AfterEach => true,
            Compiles::Sometimes(_) => random.below(5) == 0,
        };
        if now {
            model.compile();
            follow(&mut guest, &mut model);
        }
    }
    let all = compiled(&mut model);
    follow(&mut guest, &mut model);
    let whole = model.tables().all();
    let whole: BTreeMap<Key, Vec<u8>> = whole
        .map(|row| (row.key(), bytes(&ToGuest::Put(row))))
        .collect();
    assert_eq!(guest, whole, "deltas lead elsewhere");
    all
}

fn follow(guest: &mut BTreeMap<Key, Vec<u8>>, model: &mut Model) {
    for step in model.tables().take_delta() {
        match step {
            Step::Put(row) => guest.insert(row.key(), bytes(&ToGuest::Put(row))),
            Step::Remove(key) => guest.remove(&key),
        };
    }
}

/// Every recording under every configuration, with what it comes to when told as it was recorded.
fn each(mut check: impl FnMut(&str, &Config, &[Said], &[u8])) {
    for (name, text) in RECORDINGS {
        let said = read(text);
        for config in configs() {
            let expected = told(&config, &said, Compiles::AtTheEnd);
            check(name, &config, &said, &expected);
        }
    }
}

fn all_compiles() -> [Compiles; 3] {
    [
        Compiles::AtTheEnd,
        Compiles::AfterEach,
        Compiles::Sometimes(7),
    ]
}

#[test]
fn delivery_recordings_are_what_they_claim() {
    let mut kinds = BTreeMap::<Kind, [usize; 2]>::new();
    each(|name, config, said, expected| {
        assert!(said.len() > 40, "{name} is short");
        let mut model = Model::new(config, []);
        for it in said {
            assert!(it.tell(&mut model), "{name}: {it:?}");
            if let Subject::Object(kind, _) = it.subject {
                kinds.entry(kind).or_default()[usize::from(it.state.is_none())] += 1;
            }
        }
        model.compile();
        assert!(model.tables().len() > 20, "{name} comes to little");
        assert!(expected.len() > 1000, "{name} comes to little");
        // Each line matters to somebody: what was true in the middle is not what is true in the end.
        let half = told(config, &said[..said.len() / 2], Compiles::AtTheEnd);
        assert_ne!(half, expected);
    });
    assert_eq!(kinds.len(), Kind::ALL.len());
    let never_deleted: Vec<_> = kinds.iter().filter(|(_, [_, gone])| *gone == 0).collect();
    assert!(never_deleted.is_empty(), "{never_deleted:?}");
}

#[test]
fn delivery_events_one_by_one_and_all_at_once_come_to_the_same_bytes() {
    each(|name, config, said, expected| {
        for compiles in all_compiles() {
            assert_eq!(
                told(config, said, compiles),
                expected,
                "{name} {compiles:?}"
            );
        }
    });
}

#[test]
fn delivery_reversed_comes_to_the_same_bytes() {
    each(|name, config, said, expected| {
        for compiles in all_compiles() {
            let reversed = told(config, &reversed(said), compiles);
            assert_eq!(reversed, expected, "{name} {compiles:?}");
            let mut last = squashed(said);
            last.reverse();
            assert_eq!(
                told(config, &last, compiles),
                expected,
                "{name} {compiles:?}"
            );
        }
    });
}

#[test]
fn delivery_shuffled_comes_to_the_same_bytes() {
    each(|name, config, said, expected| {
        for seed in 0..SEEDS {
            let shuffled = shuffled(said, seed);
            assert_ne!(shuffled, said);
            let told = told(config, &shuffled, Compiles::Sometimes(seed));
            assert_eq!(told, expected, "{name}, seed {seed}");
        }
    });
}

#[test]
fn delivery_split_changes_come_to_the_same_bytes() {
    each(|name, config, said, expected| {
        let steps = split(said);
        assert!(
            steps.len() > said.len(),
            "{name} has changes of several fields"
        );
        for compiles in all_compiles() {
            assert_eq!(
                told(config, &steps, compiles),
                expected,
                "{name} {compiles:?}"
            );
        }
        let shuffled = shuffled(&steps, 3);
        assert_eq!(
            told(config, &shuffled, Compiles::Sometimes(3)),
            expected,
            "{name}"
        );
    });
}

#[test]
fn delivery_squashed_changes_come_to_the_same_bytes() {
    each(|name, config, said, expected| {
        let last = squashed(said);
        assert!(
            last.len() < by_subject(said).len(),
            "{name}: something is deleted"
        );
        for compiles in all_compiles() {
            assert_eq!(
                told(config, &last, compiles),
                expected,
                "{name} {compiles:?}"
            );
        }
    });
}

#[test]
fn delivery_duplicated_events_come_to_the_same_bytes() {
    each(|name, config, said, expected| {
        let twice: Vec<Said> = said
            .iter()
            .flat_map(|it| [it.clone(), it.clone()])
            .collect();
        let again: Vec<Said> = said.iter().chain(said).cloned().collect();
        // Old news once more, and then what is true.
        let mut late = said.to_vec();
        late.extend(said.iter().rev().cloned());
        late.extend(
            by_subject(said)
                .into_values()
                .filter_map(|all| all.last().copied().cloned()),
        );
        for compiles in all_compiles() {
            for all in [&twice, &again, &late] {
                assert_eq!(told(config, all, compiles), expected, "{name} {compiles:?}");
            }
        }
    });
}

#[test]
fn delivery_a_list_in_any_order_comes_to_the_same_bytes_whatever_was_known_before() {
    each(|name, config, said, expected| {
        let last = squashed(said);
        for seed in 0..8 {
            // Whatever was seen of the past, the list says what is there; links are not listed.
            let mut model = Model::new(config, []);
            for it in &said[..said.len() * seed / 8] {
                it.tell(&mut model);
            }
            model.compile();
            for link in model.links().keys().copied().collect::<Vec<_>>() {
                model.detach(link);
            }
            for it in last
                .iter()
                .filter(|it| matches!(it.subject, Subject::Link(_)))
            {
                it.tell(&mut model);
            }
            let mut random = Random(seed as u64);
            let mut kinds = Kind::ALL.to_vec();
            while !kinds.is_empty() {
                let kind = kinds.swap_remove(random.below(kinds.len()));
                let mut objects: Vec<_> = (last.iter())
                    .filter(|it| matches!(it.subject, Subject::Object(of, _) if of == kind))
                    .filter_map(|it| admit_as(kind, it.state.clone()?).object)
                    .collect();
                if seed % 2 == 1 {
                    objects.reverse();
                }
                model.apply(Event::Listed {
                    kind,
                    objects,
                    refused: [].into(),
                });
                if random.below(2) == 0 {
                    model.compile();
                }
            }
            assert_eq!(compiled(&mut model), expected, "{name}, seed {seed}");
        }
    });
}
