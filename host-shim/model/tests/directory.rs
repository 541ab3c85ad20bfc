//! The manifest directory as a source: what happens to files, as the store sees it.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where its ground is not as it expects"
)]

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use sluice_model::object::Name;
use sluice_model::source::dir::Directory;
use sluice_model::source::{Running, Source};
use sluice_model::store::{Event, Store};

/// A store that follows a directory.
struct Follower {
    store: Store,
    events: Receiver<Event>,
    _running: Running,
}

impl Follower {
    fn new(path: &Path) -> Self {
        let (sender, events) = channel();
        let running = Directory::new(path).start(sender).unwrap();
        let store = Store::default();
        Self {
            store,
            events,
            _running: running,
        }
    }

    /// Applies events until `done` holds; far longer than it ever takes means that it does not come.
    #[track_caller]
    fn until(&mut self, what: &str, done: impl Fn(&Store) -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !done(&self.store) {
            let left = end.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) => self.store.apply(event),
                Err(_) => panic!(
                    "did not come: {what}; findings {:?}",
                    self.store.findings().collect::<Vec<_>>()
                ),
            }
        }
    }

    fn port(store: &Store) -> Option<i32> {
        let policy = store.network_policies().next()?;
        let rule = policy.ingress.as_ref()?.first()?;
        match rule.ports.first()?.port {
            sluice_model::object::Port::Range(first, _) => Some(i32::from(first)),
            _ => None,
        }
    }
}

fn policy(port: i32) -> String {
    format!(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: p, namespace: x}}\nspec:\n  podSelector: {{}}\n  ingress:\n  - ports: [{{port: {port}}}]\n"
    )
}

fn pod(name: &str) -> String {
    format!("apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: x}}\n")
}

#[test]
fn files_appear_change_and_go() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy(80)).unwrap();
    let mut follower = Follower::new(directory.path());
    follower.until("what was there", |it| {
        it.is_in_sync() && Follower::port(it) == Some(80)
    });
    fs::write(&file, policy(81)).unwrap();
    follower.until("the change", |it| Follower::port(it) == Some(81));
    fs::write(
        directory.path().join("b.yaml"),
        pod("a") + "---\n" + &pod("b"),
    )
    .unwrap();
    follower.until("the new file", |it| it.pod(&Name::new("x", "b")).is_some());
    fs::remove_file(&file).unwrap();
    follower.until("the removal", |it| it.network_policies().next().is_none());
    assert!(follower.store.pod(&Name::new("x", "a")).is_some());
}

#[test]
fn an_atomic_replace_is_one_change() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy(80)).unwrap();
    let mut follower = Follower::new(directory.path());
    follower.until("what was there", |it| it.is_in_sync());
    for port in 81..90 {
        let temporary = directory.path().join(".a.yaml.tmp");
        fs::write(&temporary, policy(port)).unwrap();
        fs::rename(&temporary, &file).unwrap();
    }
    // No event on the way says that the policy is gone.
    let end = Instant::now() + Duration::from_secs(20);
    while Follower::port(&follower.store) != Some(89) {
        let event = follower
            .events
            .recv_timeout(end.saturating_duration_since(Instant::now()))
            .unwrap();
        assert!(!matches!(event, Event::Removed(_)), "{event:?}");
        follower.store.apply(event);
    }
}

#[test]
fn a_typo_is_reported_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy(80) + "---\n" + &pod("a")).unwrap();
    let mut follower = Follower::new(directory.path());
    follower.until("what was there", |it| it.is_in_sync());
    for broken in [
        policy(80).replace("ingress:", "ingres:"),
        policy(80).replace("80}]", "80"),
        policy(70_000),
    ] {
        fs::write(&file, broken + "---\n" + &pod("a")).unwrap();
        follower.until("the finding", |it| it.findings().count() > 0);
        assert_eq!(Follower::port(&follower.store), Some(80));
        assert!(follower.store.pod(&Name::new("x", "a")).is_some());
        fs::write(&file, policy(80) + "---\n" + &pod("a")).unwrap();
        follower.until("no finding", |it| it.findings().count() == 0);
    }
}

#[test]
fn a_file_is_not_read_before_its_writer_has_closed_it() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, pod("a") + "---\n" + &pod("b")).unwrap();
    let mut follower = Follower::new(directory.path());
    follower.until("what was there", |it| it.is_in_sync());
    let mut writer = fs::File::create(&file).unwrap();
    writer.write_all(pod("a").as_bytes()).unwrap();
    // Another file comes through meanwhile; pod b is not gone.
    fs::write(directory.path().join("b.yaml"), pod("c")).unwrap();
    follower.until("the other file", |it| {
        it.pod(&Name::new("x", "c")).is_some()
    });
    assert!(follower.store.pod(&Name::new("x", "b")).is_some());
    writer
        .write_all(("---\n".to_owned() + &pod("b") + "---\n" + &pod("d")).as_bytes())
        .unwrap();
    drop(writer);
    follower.until("the rest", |it| it.pod(&Name::new("x", "d")).is_some());
    assert!(follower.store.pod(&Name::new("x", "b")).is_some());
}

#[test]
fn editors_and_their_temporary_files_are_not_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a.yaml");
    fs::write(&file, policy(80)).unwrap();
    let mut follower = Follower::new(directory.path());
    follower.until("what was there", |it| it.is_in_sync());
    // As vim does: a swap file, a backup by rename, a new file.
    fs::write(directory.path().join(".a.yaml.swp"), "]").unwrap();
    fs::write(directory.path().join("4913"), "").unwrap();
    fs::rename(&file, directory.path().join("a.yaml~")).unwrap();
    fs::write(&file, policy(81)).unwrap();
    fs::remove_file(directory.path().join("a.yaml~")).unwrap();
    follower.until("the change", |it| Follower::port(it) == Some(81));
    assert_eq!(follower.store.findings().count(), 0);
}

#[test]
fn a_config_map_volume_is_followed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let version = |name: &str, port: i32| {
        fs::create_dir(path.join(name)).unwrap();
        fs::write(path.join(name).join("a.yaml"), policy(port)).unwrap();
    };
    version("..1", 80);
    std::os::unix::fs::symlink("..1", path.join("..data")).unwrap();
    std::os::unix::fs::symlink("..data/a.yaml", path.join("a.yaml")).unwrap();
    let mut follower = Follower::new(path);
    follower.until("what was there", |it| Follower::port(it) == Some(80));
    version("..2", 81);
    std::os::unix::fs::symlink("..2", path.join("..data_tmp")).unwrap();
    fs::rename(path.join("..data_tmp"), path.join("..data")).unwrap();
    follower.until("the swap", |it| Follower::port(it) == Some(81));
}

#[test]
fn a_directory_that_goes_and_comes_back_is_followed_again() {
    let parent = tempfile::tempdir().unwrap();
    let path = parent.path().join("manifests");
    let mut follower = Follower::new(&path);
    follower.until("that there is none", |it| it.lost().is_some());
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), policy(80)).unwrap();
    follower.until("the directory", |it| {
        it.is_in_sync() && Follower::port(it) == Some(80)
    });
    fs::rename(&path, parent.path().join("old")).unwrap();
    follower.until("that it is gone", |it| it.lost().is_some());
    assert_eq!(Follower::port(&follower.store), Some(80));
    fs::create_dir(&path).unwrap();
    fs::write(path.join("a.yaml"), policy(81)).unwrap();
    follower.until("the other directory", |it| {
        it.lost().is_none() && Follower::port(it) == Some(81)
    });
}
