//! Packets into a capture.

use std::io::{self, Write};

use super::{BYTE_ORDER, ETHERNET, block, option};

/// Nanoseconds, as `if_tsresol` says it.
const NANOSECONDS: u8 = 9;

/// Which way a frame went, seen from the dataplane (`epb_flags`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Traffic {
    Came = 1,
    Left = 2,
}

/// Writes a capture of one section.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    /// A capture of these interfaces, which packets name by their place.
    ///
    /// # Errors
    /// Of the output.
    pub fn new<'n>(
        output: W,
        application: &str,
        interfaces: impl IntoIterator<Item = &'n str>,
    ) -> io::Result<Self> {
        let mut writer = Self { output };
        let mut body = Vec::new();
        body.extend(BYTE_ORDER.to_le_bytes());
        body.extend(1u16.to_le_bytes());
        body.extend(0u16.to_le_bytes());
        // How long the section is, is not said.
        body.extend((-1i64).to_le_bytes());
        put_option(&mut body, option::APPLICATION, application.as_bytes());
        put_option(&mut body, option::END, &[]);
        writer.block(block::SECTION, &body)?;
        for name in interfaces {
            let mut body = Vec::new();
            body.extend(ETHERNET.to_le_bytes());
            body.extend([0; 2]);
            // No snap length.
            body.extend(0u32.to_le_bytes());
            put_option(&mut body, option::NAME, name.as_bytes());
            put_option(&mut body, option::RESOLUTION, &[NANOSECONDS]);
            put_option(&mut body, option::END, &[]);
            writer.block(block::INTERFACE, &body)?;
        }
        Ok(writer)
    }

    /// One frame.
    ///
    /// # Errors
    /// Of the output.
    pub fn packet(
        &mut self,
        interface: u32,
        nanos: u64,
        bytes: &[u8],
        traffic: Traffic,
        comment: &str,
    ) -> io::Result<()> {
        let length = u32::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut body = Vec::with_capacity(bytes.len() + comment.len() + 48);
        body.extend(interface.to_le_bytes());
        body.extend(((nanos >> 32) as u32).to_le_bytes());
        body.extend((nanos as u32).to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(length.to_le_bytes());
        body.extend(bytes);
        pad(&mut body);
        put_option(&mut body, option::COMMENT, comment.as_bytes());
        put_option(&mut body, option::FLAGS, &(traffic as u32).to_le_bytes());
        put_option(&mut body, option::END, &[]);
        self.block(block::ENHANCED, &body)
    }

    fn block(&mut self, kind: u32, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(body.len() + 12).map_err(io::Error::other)?;
        self.output.write_all(&kind.to_le_bytes())?;
        self.output.write_all(&length.to_le_bytes())?;
        self.output.write_all(body)?;
        self.output.write_all(&length.to_le_bytes())
    }

    /// Everything is written out.
    ///
    /// # Errors
    /// Of the output.
    pub fn finish(mut self) -> io::Result<W> {
        self.output.flush()?;
        Ok(self.output)
    }
}

/// An option of at most 65 535 bytes; what is longer is cut, which only comments could be.
fn put_option(body: &mut Vec<u8>, code: u16, value: &[u8]) {
    let length = value.len().min(usize::from(u16::MAX));
    body.extend(code.to_le_bytes());
    body.extend((length as u16).to_le_bytes());
    body.extend(value.iter().take(length));
    pad(body);
}

/// Everything begins at a multiple of four.
fn pad(body: &mut Vec<u8>) {
    body.resize(body.len().next_multiple_of(4), 0);
}
