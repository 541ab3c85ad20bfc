//! Lines out of bytes that come in pieces.

/// The longest line: an object may have 1.5 MiB in the API server's store, and JSON is larger.
const LINE: usize = 16 << 20;

/// Bytes of lines that are not whole yet.
#[derive(Debug, Default)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// Where the next line begins.
    start: usize,
    /// Up to here there is no end of a line.
    looked: usize,
}

impl Lines {
    /// Takes bytes; `false`: a line is too long.
    #[must_use]
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        self.buffer.drain(..self.start);
        self.looked -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
        self.buffer.len() <= LINE + bytes.len()
    }

    /// The next whole line that is not empty.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let rest = self.buffer.get(self.looked..)?;
            let Some(length) = rest.iter().position(|byte| *byte == b'\n') else {
                self.looked = self.buffer.len();
                return None;
            };
            let end = self.looked + length;
            let line = self.buffer.get(self.start..end)?.to_vec();
            self.start = end + 1;
            self.looked = self.start;
            if !line.trim_ascii().is_empty() {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_bytes_are_cut(text in "[ab\n]{0,60}", cut in 1..8usize) {
            let mut lines = Lines::default();
            let mut found = Vec::new();
            for piece in text.as_bytes().chunks(cut) {
                prop_assert!(lines.push(piece));
                while let Some(line) = lines.next() {
                    found.push(String::from_utf8(line).unwrap());
                }
            }
            let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
            let expected: Vec<&str> = whole.split('\n').filter(|line| !line.is_empty()).collect();
            prop_assert_eq!(found, expected);
        }
    }
}
