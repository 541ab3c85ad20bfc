//! Any other IPAM plugin: started as the CNI specification says, with a bound on its time and on its words.
//!
//! What goes in and comes out is left as it is; reading it is the caller's.

use std::io::{self, ErrorKind, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// The longest answer that is read.
const ANSWER: u64 = 1 << 20;

/// One question to a delegate.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    pub program: &'a Path,
    /// `CNI_COMMAND` and its company.
    pub variables: &'a [(&'a str, &'a str)],
    /// The configuration.
    pub stdin: &'a [u8],
    pub deadline: Instant,
}

/// What it said.
#[derive(Clone, Debug)]
pub struct Said {
    pub status: ExitStatus,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum DelegateError {
    #[error("no plugin {name:?} in {path:?}")]
    NotFound { name: String, path: String },
    #[error("{0:?} is no name of a plugin")]
    Name(String),
    #[error("cannot run {program:?}")]
    Run { program: PathBuf, source: io::Error },
    #[error("{program:?} did not answer in time and was ended")]
    Late { program: PathBuf },
}

/// Finds the plugin `name` in the directories of `path` (`CNI_PATH`).
///
/// # Errors
/// If the name is no plain name or there is no such file.
pub fn find(name: &str, path: &str) -> Result<PathBuf, DelegateError> {
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(DelegateError::Name(name.into()));
    }
    std::env::split_paths(path)
        .filter(|dir| dir.is_absolute())
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .ok_or_else(|| DelegateError::NotFound {
            name: name.into(),
            path: path.into(),
        })
}

/// Asks.
///
/// # Errors
/// If it cannot be started or does not end in time; then it is ended and waited for.
pub fn run(call: &Call<'_>) -> Result<Said, DelegateError> {
    let failed = |source| DelegateError::Run {
        program: call.program.to_owned(),
        source,
    };
    let mut child = start(call).map_err(failed)?;
    // Three pipes, so that a plugin that writes before it reads, or talks without end, cannot hang us.
    let (sender, receiver) = mpsc::channel();
    let (Some(mut stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        return Err(failed(ErrorKind::BrokenPipe.into()));
    };
    let input = call.stdin.to_vec();
    // A plugin may answer without having read its input.
    thread::spawn(move || drop(stdin.write_all(&input)));
    let errors = thread::spawn(move || read(stderr));
    thread::spawn(move || drop(sender.send(read(stdout))));
    let left = call.deadline.saturating_duration_since(Instant::now());
    let stdout = receiver.recv_timeout(left);
    let status = match &stdout {
        Ok(_) => wait(&mut child, call.deadline),
        Err(_) => Ok(None),
    };
    match (status, stdout) {
        (Ok(Some(status)), Ok(stdout)) => {
            let stderr = errors.join().unwrap_or_default();
            Ok(Said {
                status,
                stdout,
                stderr: String::from_utf8_lossy(&stderr).into_owned(),
            })
        }
        (Err(error), _) => {
            end(&mut child);
            Err(failed(error))
        }
        _ => {
            end(&mut child);
            Err(DelegateError::Late {
                program: call.program.to_owned(),
            })
        }
    }
}

fn start(call: &Call<'_>) -> io::Result<Child> {
    let mut attempts = 0;
    loop {
        let child = Command::new(call.program)
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(call.variables.iter().copied())
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        match child {
            // Somebody writes the file in place: an upgrade that does not rename.
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy && attempts < 50 => {
                attempts += 1;
                thread::sleep(Duration::from_millis(10));
            }
            child => return child,
        }
    }
}

fn read(from: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Whatever was said before an error is the answer.
    let _until_the_end = from.take(ANSWER).read_to_end(&mut bytes);
    bytes
}

fn wait(child: &mut Child, deadline: Instant) -> io::Result<Option<ExitStatus>> {
    loop {
        match child.try_wait()? {
            Some(status) => return Ok(Some(status)),
            None if Instant::now() >= deadline => return Ok(None),
            // Its standard output is closed: it is about to end.
            None => thread::sleep(Duration::from_micros(200)),
        }
    }
}

fn end(child: &mut Child) {
    // It may have ended by itself.
    let _gone_already = child.kill();
    let _reaped = child.wait();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(script: &str, patience: Duration) -> Result<Said, DelegateError> {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("plugin");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&program, mode).unwrap();
        run(&Call {
            program: &program,
            variables: &[("CNI_COMMAND", "ADD")],
            stdin: &vec![b'x'; 200_000],
            deadline: Instant::now() + patience,
        })
    }

    #[test]
    fn i12_a_driver_gets_input_and_environment_and_its_words_come_back() {
        let said = ask(
            "wc -c; echo $CNI_COMMAND; echo oops >&2; exit 3",
            Duration::from_secs(20),
        );
        let said = said.unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "200000\nADD");
        assert_eq!((said.status.code(), said.stderr.trim()), (Some(3), "oops"));
    }

    #[test]
    fn c20_a_driver_that_hangs_is_ended() {
        let late = ask("exec sleep 600", Duration::from_millis(100)).unwrap_err();
        assert!(matches!(late, DelegateError::Late { .. }), "{late}");
        let late = ask("exec sleep 600 >&-", Duration::from_millis(100)).unwrap_err();
        assert!(matches!(late, DelegateError::Late { .. }), "{late}");
    }

    #[test]
    fn c18_only_plain_names_in_absolute_directories_are_found() {
        for name in ["", ".", "..", "../sh", "/bin/sh"] {
            assert!(
                matches!(find(name, "/bin"), Err(DelegateError::Name(_))),
                "{name}"
            );
        }
        assert!(find("sh", "bin:/nonexistent").is_err());
        assert_eq!(
            find("sh", "/nonexistent:/bin").unwrap(),
            Path::new("/bin/sh")
        );
    }
}
