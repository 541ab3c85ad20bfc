//! The allocator, from one thread, from 64 threads and processes, and with the power cut between any two operations.

use super::*;
use crate::disk::testing::PowerCut;
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn owner(id: &str) -> Owner {
    Owner {
        container_id: id.into(),
        ifname: "eth0".into(),
    }
}

struct Fixture<D = PowerCut> {
    pool: Pool<D>,
    plan: Plan,
    cooldown: u64,
    now: u64,
}

impl Fixture {
    fn new(subnets: &[&str]) -> Self {
        Self::on(PowerCut::default(), subnets)
    }
}

impl<D: Disk> Fixture<D> {
    fn on(disk: D, subnets: &[&str]) -> Self {
        let plan = Plan::of_subnets(subnets.iter().copied()).unwrap();
        Self {
            pool: Pool::on(disk),
            plan,
            cooldown: 0,
            now: 1000,
        }
    }

    fn ask(&self, id: &str, fixed: &[&str]) -> Result<Vec<String>, IpamError> {
        let owner = owner(id);
        let fixed: Vec<IpAddr> = fixed.iter().map(|ip| ip.parse().unwrap()).collect();
        let ask = Ask {
            owner: &owner,
            plan: &self.plan,
            fixed: &fixed,
            confined: &[],
            cooldown: Duration::from_secs(self.cooldown),
            now: self.now,
        };
        let given = self
            .pool
            .allocate(&ask, &|lease| !lease.container_id.starts_with("dead"))?;
        Ok(given
            .into_iter()
            .map(|address| address.ip.to_string())
            .collect())
    }

    fn add(&self, id: &str) -> String {
        self.ask(id, &[]).unwrap().join(" ")
    }

    fn del(&self, id: &str) {
        self.pool.release(&owner(id), self.now).unwrap();
    }
}

#[test]
fn i02_a_freed_address_comes_back_only_after_the_rest_of_the_range() {
    let f = Fixture::new(&["10.1.0.0/29"]);
    assert_eq!(
        (f.add("a"), f.add("b")),
        ("10.1.0.2".into(), "10.1.0.3".into())
    );
    f.del("a");
    let rest: Vec<String> = (0..3).map(|n| f.add(&format!("c{n}"))).collect();
    assert_eq!(rest, ["10.1.0.4", "10.1.0.5", "10.1.0.6"]);
    assert_eq!(f.add("d"), "10.1.0.2");
}

#[test]
fn i02_a_cooling_address_is_avoided_until_it_has_cooled_or_nothing_else_is_left() {
    let mut f = Fixture::new(&["10.1.0.0/29"]);
    f.cooldown = 30;
    for id in ["a", "b", "c"] {
        f.add(id);
    }
    f.now = 1010;
    f.del("b");
    f.now = 1020;
    f.del("a");
    f.now = 1030;
    // 5 and 6 are fresh; then of 2 (free since 1020) and 3 (since 1010) the cooler one.
    assert_eq!(
        (f.add("e"), f.add("f")),
        ("10.1.0.5".into(), "10.1.0.6".into())
    );
    assert_eq!(
        (f.add("g"), f.add("h")),
        ("10.1.0.3".into(), "10.1.0.2".into())
    );
    f.del("g");
    f.del("h");
    f.now = 2000;
    assert_eq!(f.add("i"), "10.1.0.3", "all have cooled: the walk's next");
}

#[test]
fn cooldowns_that_are_over_are_forgotten_and_do_not_pile_up() {
    let mut f = Fixture::new(&["10.1.0.0/16"]);
    f.cooldown = 30;
    for round in 0..200 {
        let id = format!("p{round}");
        f.add(&id);
        f.del(&id);
        f.now += 1;
    }
    let listing = f.pool.hold().unwrap().listing;
    assert!(listing.leases.is_empty());
    assert!(
        (29..=31).contains(&listing.released.len()),
        "one a second, for 30 s: {}",
        listing.released.len()
    );
}

#[test]
fn i01_nothing_is_given_while_something_outside_of_the_nodes_subnets_is_held() {
    let mut f = Fixture::new(&["10.1.0.0/24"]);
    f.add("a");
    f.plan = Plan::of_subnets(["10.2.0.0/24"]).unwrap();
    let second = owner("b");
    let all = [f.plan.clone()];
    let ask = |confined| Ask {
        owner: &second,
        plan: &f.plan,
        fixed: &[],
        confined,
        cooldown: Duration::ZERO,
        now: 0,
    };
    let moved = f.pool.allocate(&ask(&all), &|_| true).unwrap_err();
    assert_eq!(
        moved.to_string(),
        "the node's pod CIDRs changed: 1 addresses (10.1.0.2) are outside of 10.2.0.1-10.2.0.254"
    );
    f.pool.allocate(&ask(&[]), &|_| true).unwrap();
}

#[test]
fn i04_exhaustion_names_the_range_and_counts_used_and_leaked() {
    let f = Fixture::new(&["10.1.0.0/24"]);
    for n in 0..253 {
        f.add(&format!("{}{n}", if n < 7 { "dead" } else { "pod" }));
    }
    assert!(f.pool.usage(&f.plan).unwrap().is_full());
    let said = f.ask("late", &[]).unwrap_err().to_string();
    assert_eq!(
        said,
        "no addresses available in range set 10.1.0.1-10.1.0.254: 253 of 253 used, 7 of them leaked"
    );
    f.del("pod7");
    assert!(!f.pool.usage(&f.plan).unwrap().is_full());
    f.add("late");
}

#[test]
fn i11_both_families_in_the_order_of_the_plan_or_none() {
    let f = Fixture::new(&["fd00::/120", "10.1.0.0/30"]);
    assert_eq!(f.add("a"), "fd00::2 10.1.0.2");
    assert!(matches!(f.ask("b", &[]), Err(IpamError::Exhausted { .. })));
    let held: Vec<String> = f
        .pool
        .leases()
        .unwrap()
        .into_iter()
        .map(|l| l.container_id)
        .collect();
    assert_eq!(held, ["a", "a"], "the first family's address was freed");
    f.del("a");
    assert!(f.pool.leases().unwrap().is_empty());
}

#[test]
fn i09_a_fixed_address_is_given_or_refused_and_never_another() {
    let f = Fixture::new(&["10.1.0.0/24", "fd00::/64"]);
    assert_eq!(
        f.ask("a", &["10.1.0.77"]).unwrap(),
        ["10.1.0.77", "fd00::2"]
    );
    let taken = f.ask("b", &["fd00::9", "10.1.0.77"]).unwrap_err();
    assert!(
        matches!(&taken, IpamError::Taken { owner, .. } if owner == "a eth0"),
        "{taken}"
    );
    for bad in ["10.1.0.1", "10.1.0.0", "10.1.0.255", "192.0.2.1", "fd00::1"] {
        assert!(
            matches!(f.ask("b", &[bad]), Err(IpamError::NotAllowed { .. })),
            "{bad}"
        );
    }
    assert!(f.ask("b", &["10.1.0.5", "10.1.0.6"]).is_err());
    assert_eq!(f.pool.leases().unwrap().len(), 2);
}

#[test]
fn i06_an_unseen_holder_loses_its_address_only_at_the_second_look_a_minute_later() {
    let f = Fixture::new(&["10.1.0.0/24"]);
    for id in ["live", "unseen", "gone", "blinking"] {
        f.add(id);
    }
    let start = Instant::now();
    let look = |after: u64, blinking: Standing| {
        let observe = |lease: &Lease| match lease.container_id.as_str() {
            "live" => Standing::Live,
            "gone" => Standing::Gone,
            "blinking" => blinking,
            _ => Standing::Unseen,
        };
        let freed = f
            .pool
            .collect(&observe, start + Duration::from_secs(after), 0)
            .unwrap();
        freed
            .into_iter()
            .map(|lease| lease.container_id)
            .collect::<Vec<_>>()
    };
    assert_eq!(look(0, Standing::Unseen), ["gone"]);
    assert!(look(30, Standing::Unseen).is_empty());
    assert!(look(59, Standing::Live).is_empty());
    assert_eq!(
        look(60, Standing::Unseen),
        ["unseen"],
        "blinking was seen in between"
    );
    assert!(look(119, Standing::Unseen).is_empty());
    assert_eq!(look(120, Standing::Unseen), ["blinking"]);
    assert_eq!(f.pool.leases().unwrap().len(), 1);
}

#[test]
fn i05_another_boot_frees_what_the_last_one_held() {
    let f = Fixture::new(&["10.1.0.0/24"]);
    f.add("from-host-local");
    assert!(
        f.pool.enter_boot("first").unwrap().is_empty(),
        "a taken-over store is left alone"
    );
    for n in 0..100 {
        f.add(&n.to_string());
    }
    assert!(f.pool.enter_boot("first").unwrap().is_empty());
    assert_eq!(f.pool.enter_boot("second").unwrap().len(), 101);
    assert!(f.pool.leases().unwrap().is_empty());
}

#[test]
fn the_second_attachment_of_a_container_is_another_and_the_same_again_is_refused() {
    let f = Fixture::new(&["10.1.0.0/24"]);
    f.add("a");
    assert!(matches!(f.ask("a", &[]), Err(IpamError::Duplicate { .. })));
    let second = Owner {
        container_id: "a".into(),
        ifname: "net1".into(),
    };
    let ask = Ask {
        owner: &second,
        plan: &f.plan,
        fixed: &[],
        confined: &[],
        cooldown: Duration::ZERO,
        now: 0,
    };
    f.pool.allocate(&ask, &|_| true).unwrap();
    f.del("a");
    assert_eq!(f.pool.leases().unwrap()[0].ifname.as_deref(), Some("net1"));
}

#[test]
fn the_layout_on_disk_is_that_of_host_local() {
    let dir = tempfile::tempdir().unwrap();
    // Written by host-local: of today, and of before interface names were kept.
    std::fs::write(dir.path().join("10.1.0.2"), "today\r\neth0").unwrap();
    std::fs::write(dir.path().join("10.1.0.3"), "old").unwrap();
    std::fs::write(dir.path().join("10.1.0.4"), "").unwrap();
    std::fs::write(dir.path().join("last_reserved_ip.0"), "10.1.0.2").unwrap();
    let f = Fixture::on(Directory::open(dir.path()).unwrap(), &["10.1.0.0/24"]);
    assert_eq!(f.add("new"), "10.1.0.5");
    assert_eq!(
        std::fs::read(dir.path().join("10.1.0.5")).unwrap(),
        b"new\r\neth0"
    );
    assert_eq!(
        std::fs::read(dir.path().join("last_reserved_ip.0")).unwrap(),
        b"10.1.0.5"
    );
    assert!(f.ask("today", &[]).is_err() && f.ask("old", &[]).is_err());
    f.del("old");
    f.del("today");
    assert!(!dir.path().join("10.1.0.3").exists() && !dir.path().join("10.1.0.2").exists());
    let freed = f
        .pool
        .collect(&|_| Standing::Live, Instant::now(), 0)
        .unwrap();
    assert!(freed.is_empty());
}

/// Adds and deletes for a while; returns every address that two had at once.
fn churn(dir: &Path, seed: usize, rounds: usize) -> Vec<String> {
    let f = Fixture::on(
        Directory::open(dir).unwrap(),
        &["10.1.0.0/24", "fd00::/120"],
    );
    let held = dir.parent().unwrap().join("held");
    let mut faults = Vec::new();
    for round in 0..rounds {
        let id = format!("pod-{seed}-{round}");
        let given = f.ask(&id, &[]).unwrap();
        // A second witness, by other means: whoever has an address makes a file that must not be there yet.
        for ip in &given {
            if std::fs::File::create_new(held.join(ip)).is_err() {
                faults.push(format!("{id} was given {ip}, which somebody has"));
            }
        }
        for ip in &given {
            std::fs::remove_file(held.join(ip)).unwrap();
        }
        f.del(&id);
    }
    faults
}

fn churn_dirs() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("held")).unwrap();
    let pool = dir.path().join("pool");
    (dir, pool)
}

fn left(pool: &Path) -> Vec<String> {
    let names = std::fs::read_dir(pool).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names
        .filter(|name| name.parse::<IpAddr>().is_ok() || name.starts_with(".stage"))
        .collect()
}

#[test]
fn c14_64_threads_never_get_an_address_twice_and_leak_none() {
    let (_dir, pool) = churn_dirs();
    let faults: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..64)
            .map(|seed| {
                scope.spawn({
                    let pool = &pool;
                    move || churn(pool, seed, 4)
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().unwrap())
            .collect()
    });
    assert!(faults.is_empty(), "{faults:?}");
    assert_eq!(left(&pool), [""; 0]);
}

const CHILD: &str = "SLUICE_IPAM_CHURN";

/// Not a test of its own: what the processes of the next test do.
#[test]
fn churning_child() {
    if let Some(pool) = std::env::var_os(CHILD) {
        let pid = usize::try_from(std::process::id()).unwrap();
        assert_eq!(churn(Path::new(&pool), pid, 3), [""; 0]);
    }
}

#[test]
fn c14_64_processes_never_get_an_address_twice_and_leak_none() {
    let (_dir, pool) = churn_dirs();
    let start = |_| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "pool::tests::churning_child"])
            .env(CHILD, &pool)
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap()
    };
    let children: Vec<_> = (0..64).map(start).collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stdout)
        );
    }
    assert_eq!(left(&pool), [""; 0]);
}

/// One step of a random history.
#[derive(Clone, Debug)]
enum Step {
    Add(u8),
    AddFixed(u8, u8),
    Del(u8),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u8..6).prop_map(Step::Add),
        ((0u8..6), (0u8..8)).prop_map(|(id, ip)| Step::AddFixed(id, ip)),
        (0u8..6).prop_map(Step::Del),
    ]
}

fn take_step(f: &Fixture, step: &Step) -> Result<Option<(u8, Vec<String>)>, IpamError> {
    match step {
        Step::Add(id) => f.ask(&id.to_string(), &[]).map(|ips| Some((*id, ips))),
        Step::AddFixed(id, ip) => f
            .ask(&id.to_string(), &[&format!("10.1.0.{ip}")])
            .map(|ips| Some((*id, ips))),
        Step::Del(id) => f
            .pool
            .release(&owner(&id.to_string()), f.now)
            .map(|_| Some((*id, vec![]))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    /// The power goes at any operation of any history, and any subset of what was not synced is lost: whatever an ADD has
    /// answered is held by its owner, whatever a DEL has answered is free, no address has two owners, and life goes on.
    #[test]
    fn i10_a_power_cut_at_any_write_loses_nothing_and_doubles_nothing(
        steps in proptest::collection::vec(step(), 1..14),
        cut in 0usize..120,
        kept in any::<u64>(),
        cooldown in prop_oneof![Just(0u64), Just(50)],
    ) {
        let disk = PowerCut::default();
        let mut f = Fixture::on(disk.clone(), &["10.1.0.0/29", "fd00::/125"]);
        f.cooldown = cooldown;
        disk.cut_after(cut);
        let mut promised: BTreeMap<u8, Vec<String>> = BTreeMap::new();
        let mut in_doubt = None;
        for step in &steps {
            f.now += 10;
            match take_step(&f, step) {
                Ok(Some((id, ips))) => { promised.insert(id, ips); }
                Ok(None) => {}
                Err(IpamError::Disk { .. }) => {
                    let (Step::Add(id) | Step::AddFixed(id, _) | Step::Del(id)) = step;
                    in_doubt = Some(*id);
                    break;
                }
                Err(_) => {}
            }
        }
        disk.restart(kept);
        let mut after = Fixture::on(disk, &["10.1.0.0/29", "fd00::/125"]);
        after.cooldown = cooldown;
        after.now = f.now;
        let mut found: BTreeMap<u8, BTreeSet<String>> = BTreeMap::new();
        let mut seen = BTreeSet::new();
        for lease in after.pool.leases().unwrap() {
            prop_assert!(seen.insert(lease.ip), "two files for one address");
            let id: u8 = lease.container_id.parse().expect("no file is empty or torn");
            found.entry(id).or_default().insert(lease.ip.to_string());
        }
        for (id, ips) in &promised {
            if in_doubt != Some(*id) {
                let want: BTreeSet<String> = ips.iter().cloned().collect();
                prop_assert_eq!(found.remove(id).unwrap_or_default(), want, "of {}", id);
            }
        }
        // What is left is the attachment whose call was cut; its DEL, which the runtime sends, frees everything of it.
        prop_assert!(found.keys().all(|id| Some(*id) == in_doubt), "{:?}", found);
        if let Some(id) = in_doubt {
            after.del(&id.to_string());
            let others = after.pool.leases().unwrap();
            let others = others.iter().filter(|it| it.ip.is_ipv4()).count() as u128;
            match after.ask(&id.to_string(), &[]) {
                Ok(_) => {}
                // Nothing leaked: the others have all there is.
                Err(IpamError::Exhausted { total, .. }) => prop_assert_eq!(others, total),
                Err(error) => prop_assert!(false, "{}", error),
            }
        }
    }
}

#[test]
fn c15_a_disk_that_refuses_in_the_middle_of_an_add_leaves_nothing_held() {
    let disk = PowerCut::default();
    let f = Fixture::on(disk.clone(), &["10.1.0.0/29", "fd00::/125"]);
    f.add("first");
    let of_one_add = {
        let before = disk.operations();
        f.add("second");
        disk.operations() - before
    };
    for fault in 0..of_one_add {
        disk.refuse_after(fault);
        if f.ask("third", &[]).is_ok() {
            f.del("third");
        }
        let held: BTreeSet<String> = f
            .pool
            .leases()
            .unwrap()
            .into_iter()
            .map(|l| l.container_id)
            .collect();
        assert_eq!(
            held.into_iter().collect::<Vec<_>>(),
            ["first", "second"],
            "fault {fault}"
        );
    }
}
