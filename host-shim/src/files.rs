//! Small files of the run directory that must be whole or absent, whoever dies in between.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::Serialize;

/// Replaces a JSON file of the run directory: a reader sees the old or the new one, whoever dies. Nothing in the run
/// directory outlives a boot, nor does anything that it tells of, so no power cut can make it wrong and it is not synced.
///
/// # Errors
/// As the file system says.
pub(crate) fn write_json(path: &Path, value: &impl Serialize) -> io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&beside)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    fs::rename(&beside, path)
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "file not removed");
        }
        _ => {}
    }
}
