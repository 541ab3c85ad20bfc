//! Standard error that stays small where it is a log file.
//!
//! The node gives the VMM a file for its standard error, in memory (`/run`), and the VMM may outlive the
//! node's daemon for weeks with a guest that logs for ever. So the VMM itself keeps the file below
//! [`CAP`]: when it is full, its last part stays and the rest goes. It does so only with a file that it
//! may read as well as write, as the node opens it: what a shell redirects to (`2>`, `2>>`), a pipe or a
//! terminal is left alone.

use std::fs::File;
use std::io;
use std::io::Seek;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::OFlags;
use rustix::fs::fcntl_getfl;

/// The largest size of the file. The log of the VMM before this one may lie beside it, so both together
/// take a mebibyte.
pub const CAP: u64 = 512 << 10;
/// What stays of a full one.
const KEPT: usize = 128 << 10;

/// Standard error, or what stands for it.
#[derive(Debug)]
pub struct LogFile {
    output: File,
    /// `None`: it may become as large as it likes.
    size: Option<u64>,
}

impl LogFile {
    /// Writes to this descriptor.
    ///
    /// # Errors
    /// The process is out of descriptors.
    pub fn new(output: impl AsFd) -> io::Result<LogFile> {
        let output = File::from(output.as_fd().try_clone_to_owned()?);
        let mode = fcntl_getfl(&output)? & OFlags::RWMODE;
        let found = output.metadata()?;
        let capped = found.is_file() && mode == OFlags::RDWR;
        let size = capped.then_some(found.len());
        Ok(LogFile { output, size })
    }

    /// Keeps the last lines that fit.
    fn shorten(&mut self, size: u64) -> io::Result<u64> {
        let from = size.saturating_sub(KEPT as u64);
        let mut kept = vec![0; KEPT.min(usize::try_from(size).unwrap_or(KEPT))];
        self.output.read_exact_at(&mut kept, from)?;
        // A line that begins before it is not kept in part.
        let begin = kept.iter().position(|byte| *byte == b'\n');
        let kept = kept.get(begin.map_or(0, |at| at + 1)..).unwrap_or_default();
        self.output.set_len(0)?;
        self.output.rewind()?;
        self.output.write_all(kept)?;
        Ok(kept.len() as u64)
    }
}

impl Write for LogFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(size) = self.size
            && size + bytes.len() as u64 > CAP
        {
            // A file that cannot be shortened grows no more.
            self.size = Some(self.shorten(size)?);
        }
        let written = self.output.write(bytes)?;
        if let Some(size) = &mut self.size {
            *size += written as u64;
        }
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.output.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    fn line(number: u32) -> String {
        format!("{number:08} {}\n", "x".repeat(500))
    }

    fn write(output: &File, lines: u32) {
        let mut log = LogFile::new(output).unwrap();
        for number in 0..lines {
            log.write_all(line(number).as_bytes()).unwrap();
            assert!(output.metadata().unwrap().len() <= CAP);
        }
    }

    #[test]
    fn a_log_that_never_ends_stays_small_and_keeps_its_last_lines_whole() {
        let dir = tempfile::tempdir().unwrap();
        for append in [true, false] {
            let path = dir.path().join(format!("{append}"));
            let mut options = OpenOptions::new();
            options.read(true).write(true).append(append).create(true);
            let file = options.open(&path).unwrap();
            write(&file, 5000);
            let text = std::fs::read_to_string(&path).unwrap();
            let mut numbers = text.lines().map(|it| {
                assert_eq!(it.len(), line(0).len() - 1);
                it.split_once(' ').unwrap().0.parse::<u32>().unwrap()
            });
            let first = numbers.next().unwrap();
            assert!(numbers.eq(first + 1..5000), "lines in order, to the last");
            assert!(text.len() >= KEPT / 2);
        }
    }

    #[test]
    fn a_file_that_is_not_the_nodes_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("redirected");
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .unwrap();
        let mut log = LogFile::new(&file).unwrap();
        for number in 0..2000 {
            log.write_all(line(number).as_bytes()).unwrap();
        }
        assert!(file.metadata().unwrap().len() > CAP);
    }
}
