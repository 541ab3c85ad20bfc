//! One JSON object per line, for the debug port: built in place, bounded, always valid JSON.

use core::fmt::{self, Write};

/// Longest line; what does not fit is cut inside the last value, the object is still closed.
pub const LINE: usize = 1024;

/// A line under construction: `{"sluice":"<kind>", ...}`.
#[derive(Debug)]
pub struct Line {
    bytes: [u8; LINE],
    length: usize,
}

/// Room kept for closing a string and the object.
const TAIL: usize = 3;

impl Line {
    pub fn new(kind: &str) -> Self {
        let mut line = Self {
            bytes: [0; LINE],
            length: 0,
        };
        line.raw(b"{");
        line.quoted("", "sluice", format_args!("{kind}"));
        line
    }

    /// Adds `"key":number`.
    pub fn number(mut self, key: &str, value: impl Into<u64>) -> Self {
        let value = value.into();
        self.plain(key, format_args!("{value}"));
        self
    }

    /// Adds `"key":true` or `"key":false`.
    pub fn flag(mut self, key: &str, value: bool) -> Self {
        self.plain(key, format_args!("{value}"));
        self
    }

    /// Adds `"key":"text"`, escaped.
    pub fn text(mut self, key: &str, value: impl fmt::Display) -> Self {
        self.quoted(",", key, format_args!("{value}"));
        self
    }

    /// The finished line with its line feed.
    pub fn finish(&mut self) -> &[u8] {
        let end = self.length.min(LINE - 2);
        if let Some(tail) = self.bytes.get_mut(end..end + 2) {
            tail.copy_from_slice(b"}\n");
        }
        self.bytes.get(..end + 2).unwrap_or_default()
    }

    /// A number or word is dropped whole, key and all, if it does not fit.
    fn plain(&mut self, key: &str, value: fmt::Arguments<'_>) {
        let before = self.length;
        if write!(Unescaped(self), ",\"{key}\":{value}").is_err() {
            self.length = before;
        }
    }

    /// A string that does not fit is cut, and dropped whole if not even its key fits.
    fn quoted(&mut self, before: &str, key: &str, value: fmt::Arguments<'_>) {
        let start = self.length;
        if write!(Unescaped(self), "{before}\"{key}\":\"").is_err() {
            self.length = start;
            return;
        }
        // The error only says that the value was cut; the quote below closes what there is.
        let _ = Escaped(self).write_fmt(value);
        if let Some(quote) = self.bytes.get_mut(self.length) {
            *quote = b'"';
            self.length += 1;
        }
    }

    fn raw(&mut self, bytes: &[u8]) -> bool {
        let end = self.length + bytes.len();
        if end > LINE - TAIL {
            return false;
        }
        if let Some(place) = self.bytes.get_mut(self.length..end) {
            place.copy_from_slice(bytes);
            self.length = end;
        }
        true
    }
}

struct Unescaped<'a>(&'a mut Line);

impl Write for Unescaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if self.0.raw(text.as_bytes()) {
            Ok(())
        } else {
            Err(fmt::Error)
        }
    }
}

struct Escaped<'a>(&'a mut Line);

impl Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut utf8 = [0; 4];
        for character in text.chars() {
            let fits = match character {
                '"' => self.0.raw(b"\\\""),
                '\\' => self.0.raw(b"\\\\"),
                '\n' => self.0.raw(b"\\n"),
                c if c.is_control() => self.0.raw(b" "),
                c => self.0.raw(c.encode_utf8(&mut utf8).as_bytes()),
            };
            if !fits {
                return Err(fmt::Error);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::string::String;

    fn text(mut line: Line) -> String {
        String::from_utf8(line.finish().to_vec()).unwrap()
    }

    #[test]
    fn a_line_is_one_object() {
        let line = Line::new("boot")
            .number("ram_mib", 64u32)
            .text("version", "1.0")
            .flag("ok", true);
        assert_eq!(
            text(line),
            "{\"sluice\":\"boot\",\"ram_mib\":64,\"version\":\"1.0\",\"ok\":true}\n"
        );
    }

    #[test]
    fn quotes_and_line_feeds_are_escaped() {
        let line = Line::new("panic").text("message", "a\"b\\c\nd\te");
        assert_eq!(
            text(line),
            "{\"sluice\":\"panic\",\"message\":\"a\\\"b\\\\c\\nd e\"}\n"
        );
    }

    proptest! {
        #[test]
        fn whatever_is_put_in_the_line_stays_closed(
            values in proptest::collection::vec(".{0,400}", 0..8)
        ) {
            let mut line = Line::new("log");
            for value in &values {
                line = line.text("value", value).number("n", 12_345_678u32);
            }
            let text = text(line);
            prop_assert!(text.len() <= LINE);
            let parsed: Result<serde_json::Value, _> = serde_json::from_str(&text);
            prop_assert!(parsed.is_ok(), "{text}");
        }
    }
}
