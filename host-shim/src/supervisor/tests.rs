//! The supervisor with scripts in the place of the appliance's programs.

use std::fs;
use std::os::fd::{FromRawFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::appliance::testing;
use sluice_contract::LinkId;
use sluice_ports::message::PortKind;
use sluice_ports::testing::identity;

/// By which a script becomes a process that serves its ports: this program again, at [`serves_ports`].
const SERVE: &str = "exec \"$0\" --ignored --exact --nocapture supervisor::tests::serves_ports";
const INHERITED: &str = "SLUICE_TEST_PORTS";

#[test]
#[ignore = "it is the process that other tests start"]
fn serves_ports() {
    let Some(fd) = std::env::var(INHERITED)
        .ok()
        .and_then(|fd| fd.parse::<RawFd>().ok())
    else {
        return;
    };
    let listener = own(fd);
    let build = std::env::var("SLUICE_TEST_BUILD").unwrap();
    let identity = Identity {
        build: text(&build),
        ..identity()
    };
    testing::serve_inherited(&listener, identity).unwrap();
}

#[expect(unsafe_code, reason = "a number becomes a descriptor")]
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: the test that started this process left the descriptor to it, and nothing else here knows it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// A run directory with a script in the process's place.
struct Lab {
    dir: PathBuf,
    build: String,
    usurped: Arc<AtomicUsize>,
}

impl Lab {
    fn new(name: &str, script: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("sluice-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("script"), script).unwrap();
        Self {
            dir,
            build: identity().build.as_str().into(),
            usurped: Arc::default(),
        }
    }

    fn keeper(&self) -> Keeper {
        let build = self.build.clone();
        let own = std::env::current_exe().unwrap();
        // `sh -c` has its first argument as $0, and the number of the listener as $1.
        let script = format!(
            "export {INHERITED}=$1 SLUICE_TEST_BUILD={build}; . {}",
            self.dir.join("script").display()
        );
        let command = vec![
            "/bin/sh".into(),
            "-c".into(),
            script.into(),
            own.into(),
            "FD".into(),
        ];
        let wanted = Identity {
            build: text(&self.build),
            ..identity()
        };
        let ports = Ports::new().unwrap();
        let usurped = self.usurped.clone();
        Keeper {
            shared: Arc::new(Shared {
                state: Mutex::default(),
                ports: ports.clone(),
                // Whose log is watched.
                kind: Some(Kind::Tcg),
            }),
            starts: Some(Starts::Command(command, wanted)),
            ports,
            sockets: Sockets::in_dir(&self.dir),
            log: self.dir.join("vmm.log"),
            group: None,
            usurped: Box::new(move || {
                usurped.fetch_add(1, Ordering::Relaxed);
            }),
        }
    }

    fn supervisor(&self) -> Supervisor {
        self.keeper().spawn(None).unwrap()
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.dir).unwrap();
    }
}

fn eventually(supervisor: &Supervisor, good: impl Fn(&MachineStatus) -> bool) -> MachineStatus {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let status = supervisor.status();
        if good(&status) {
            return status;
        }
        assert!(Instant::now() < deadline, "{status:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn is_alive(pid: i32) -> bool {
    // An adopted one was our child all the same, and stays a zombie until this process ends.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, fields)| !fields.starts_with('Z'))
}

/// A process of an appliance speaks with root alone.
fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

#[test]
fn p03_a_process_that_is_killed_is_replaced_at_once() {
    let lab = Lab::new("killed", "echo up; exec sleep 1000");
    let supervisor = lab.supervisor();
    let first = eventually(&supervisor, |s| s.pid.is_some()).pid.unwrap();
    let target = nix::unistd::Pid::from_raw(first);
    nix::sys::signal::kill(target, nix::sys::signal::Signal::SIGKILL).unwrap();
    let status = eventually(&supervisor, |s| s.restarts == 1 && s.pid.is_some());
    assert_ne!(status.pid, Some(first));
    assert!(status.last_ending.unwrap().status.contains("SIGKILL"));
    supervisor.stop(true);
    assert!(!is_alive(status.pid.unwrap()));
    assert!(!lab.dir.join("ports.sock").exists() && !lab.dir.join("vmm.log").exists());
}

#[test]
fn the_log_of_a_process_that_writes_for_ever_stays_short() {
    // Some megabytes in all, and then its last line.
    let script = "( i=0; while [ $i -lt 200 ]; do head -c 20000 /dev/zero | tr '\\0' x; echo; \
                  i=$((i+1)); sleep 0.01; done; echo last ) & ";
    let lab = Lab::new("log", &format!("{script}\n{SERVE}"));
    let supervisor = lab.supervisor();
    let log = lab.dir.join("vmm.log");
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut largest = 0;
    while !fs::read_to_string(&log).is_ok_and(|text| text.ends_with("last\n")) {
        largest = largest.max(fs::metadata(&log).map_or(0, |it| it.len()));
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    // What comes between two looks is on top.
    assert!(largest < 3 << 20, "{largest}");
    std::thread::sleep(2 * LOG_WATCH);
    assert!(fs::metadata(&log).unwrap().len() <= 512 << 10);
    supervisor.stop(true);
}

#[test]
fn crash_loop_is_slowed_down_and_its_telling_line_kept() {
    let script = "echo '{\"sluice\":\"fault\",\"rip\":1}'; echo 'and more'; exit 70";
    let lab = Lab::new("crash", script);
    let begin = Instant::now();
    let supervisor = lab.supervisor();
    let status = eventually(&supervisor, |s| s.restarts >= 4);
    // At once, then after 100, 200 and 400 ms.
    assert!(begin.elapsed() >= Duration::from_millis(300));
    let ending = status.last_ending.unwrap();
    assert_eq!(ending.line, "{\"sluice\":\"fault\",\"rip\":1}");
    assert!(ending.status.contains("70"), "{}", ending.status);
    supervisor.stop(true);
}

#[test]
fn p04_a_process_outlives_the_daemon_and_is_adopted_with_its_ports() {
    if !is_root() {
        return;
    }
    let mut lab = Lab::new("adopt", SERVE);
    let link = LinkId::new(16).unwrap();
    let supervisor = lab.supervisor();
    let tap = fs::File::open("/dev/null").unwrap();
    supervisor
        .shared
        .ports
        .add(link, PortKind::Tap, tap.into())
        .unwrap();
    let status = eventually(&supervisor, |s| s.program.is_some());
    let pid = status.pid.unwrap();
    let session = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(pid))).unwrap();
    assert_eq!(session.as_raw(), pid, "it has a session of its own");
    let admission = supervisor.admission();
    assert!(admission.admits(Some(pid)) && !admission.admits(None));
    assert!(!admission.admits(Some(std::process::id().cast_signed())));
    supervisor.stop(false);
    drop(supervisor);
    assert!(is_alive(pid));

    let supervisor = lab.supervisor();
    let status = supervisor.status();
    assert_eq!((status.pid, status.adopted), (Some(pid), true));
    assert!(status.uptime_ms.is_some_and(|ms| ms < 60_000));
    assert!(supervisor.shared.ports.found(link).unwrap().is_some());
    supervisor.stop(false);
    drop(supervisor);

    // One with another appliance than would be started now ends, and its taps go to the next.
    lab.build = "fedcba".into();
    let supervisor = lab.supervisor();
    assert!(!is_alive(pid));
    let tap = supervisor.shared.ports.found(link).unwrap().unwrap();
    supervisor
        .shared
        .ports
        .add(link, PortKind::Tap, tap.into())
        .unwrap();
    let status = eventually(&supervisor, |s| s.build.is_some());
    assert_eq!(
        (status.build.as_deref(), status.adopted),
        (Some("fedcba"), false)
    );
    let served = || supervisor.shared.ports.status().map(|status| status.ports);
    assert_eq!(served(), Some(1));
    supervisor.stop(true);
    assert!(!is_alive(status.pid.unwrap()));
}

#[test]
fn one_daemon_at_a_time_and_one_that_is_replaced_leaves_everything() {
    if !is_root() {
        return;
    }
    let lab = Lab::new("usurp", SERVE);
    let first = lab.supervisor();
    let pid = eventually(&first, |s| s.program.is_some()).pid;
    let refused = lab.keeper().spawn(None).unwrap_err().to_string();
    assert!(refused.contains("--take-over"), "{refused}");

    let path = Sockets::in_dir(&lab.dir).ports;
    let line = Line::open(&path, true, |_| ()).unwrap();
    let second = lab.keeper().spawn(Some(line)).unwrap();
    assert_eq!(second.status().pid, pid);
    let seen = eventually(&first, |s| s.problem.is_some());
    assert!(seen.problem.unwrap().contains("taken over"));
    let deadline = Instant::now() + Duration::from_secs(5);
    while lab.usurped.load(Ordering::Relaxed) == 0 && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(lab.usurped.load(Ordering::Relaxed), 1);
    // Its end, even one that is to take all down, is not the appliance's.
    first.stop(true);
    assert!(pid.is_some_and(is_alive));
    assert!(second.shared.ports.status().is_some());
    second.stop(true);
    assert!(!pid.is_some_and(is_alive));
}

#[test]
fn a_program_that_cannot_be_started_is_a_problem_that_names_it() {
    let lab = Lab::new("missing", "");
    let mut keeper = lab.keeper();
    let command = vec![lab.dir.join("vmm").into(), "FD".into()];
    keeper.starts = Some(Starts::Command(command, identity()));
    let supervisor = keeper.spawn(None).unwrap();
    let problem = eventually(&supervisor, |s| s.problem.is_some())
        .problem
        .unwrap();
    assert!(problem.contains("vmm: No such file"), "{problem}");
    supervisor.stop(true);
}
