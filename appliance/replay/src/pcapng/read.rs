//! Packets out of a capture, one after the other.

use std::io::{self, Read};
use std::ops::Range;

use super::{BLOCK_MAX, BYTE_ORDER, ETHERNET, FRAME_MAX, INTERFACES_MAX, block, option};

/// First words of files that are no pcapng but its predecessor, in either byte order: microseconds, nanoseconds, and Kuznetzov's.
const CLASSIC: [u32; 3] = [0xa1b2_c3d4, 0xa1b2_3c4d, 0xa1b2_cd34];

/// Why a capture cannot be replayed.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("The capture cannot be read: {0}")]
    Io(#[from] io::Error),
    #[error(
        "This is a classic pcap file, which does not tell interfaces apart; `editcap -F pcapng OLD NEW` makes it a pcapng \
         file, and --map '#0=LINK' says which link its one interface is"
    )]
    Classic,
    #[error("This is no pcapng capture")]
    NotPcapng,
    /// A packet, counted from 1.
    #[error("Packet {number}: {fault}")]
    Packet { number: u64, fault: Fault },
    /// What is no packet.
    #[error("The block at byte {offset}, after packet {after}: {fault}")]
    Block {
        offset: u64,
        after: u64,
        fault: Fault,
    },
}

/// What is wrong with a block.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("The file ends within it")]
    Ends,
    #[error("Its length {0} is no multiple of 4, or less than a block can have")]
    Length(u32),
    #[error("Its length {0} is more than the {BLOCK_MAX} bytes that a block may have here")]
    TooLong(u32),
    #[error("Its two lengths differ: {0} and {1}")]
    Lengths(u32, u32),
    #[error("It ends before its fields do")]
    Short,
    #[error("The byte-order magic is {0:#010x}")]
    ByteOrder(u32),
    #[error("Version {0} of the format is not known")]
    Version(u16),
    #[error("There are more than {INTERFACES_MAX} interfaces")]
    Interfaces,
    #[error("An interface has link type {0}; only Ethernet (1) can be replayed")]
    LinkType(u16),
    #[error("The time resolution {0:#04x} of an interface has no meaning")]
    Resolution(u8),
    #[error("Its option {0} has the wrong length, or is longer than what is left")]
    Option(u16),
    #[error("The interface's name is no UTF-8")]
    Name,
    #[error("There is no interface {0}")]
    NoInterface(u32),
    #[error("The capture kept {kept} of its {length} bytes; capture whole frames (snap length 0)")]
    Cut { kept: u32, length: u32 },
    #[error("It claims {0} captured bytes, which its block does not have")]
    Captured(u32),
    #[error("It has {0} bytes, more than the {FRAME_MAX} of the longest frame")]
    FrameTooLong(u32),
    #[error("Its time lies before 1970 or after 2554")]
    Time,
    #[error("Packet blocks are obsolete; `editcap -F pcapng OLD NEW` writes enhanced ones")]
    Obsolete,
}

/// Where frames of a section came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// `if_name`, or `#` and its number.
    pub name: String,
    snap_length: u32,
    /// Nanoseconds are `ticks × numerator ÷ denominator`, rounded down.
    denominator: u128,
    /// Seconds to add.
    offset: i64,
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet<'b> {
    /// Counted from 1, as people and Wireshark do.
    pub number: u64,
    pub interface: &'b Interface,
    /// Nanoseconds since 1970. A simple packet has that of the packet before it.
    pub nanos: u64,
    pub bytes: &'b [u8],
}

/// Reads a capture.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    big_endian: bool,
    interfaces: Vec<Interface>,
    /// Packets so far.
    packets: u64,
    /// Bytes before the block that is being read.
    offset: u64,
    nanos: u64,
    body: Vec<u8>,
}

/// What a block turned out to be.
enum Found {
    Nothing,
    /// Interface, and where in the body the frame lies.
    Frame(usize, Range<usize>),
}

impl<R: Read> Reader<R> {
    /// The capture that `input` holds; its first section header is read.
    ///
    /// # Errors
    /// [`ReadError`].
    pub fn new(input: R) -> Result<Self, ReadError> {
        let mut reader = Self {
            input,
            big_endian: false,
            interfaces: Vec::new(),
            packets: 0,
            offset: 0,
            nanos: 0,
            body: Vec::new(),
        };
        let mut kind = [0; 4];
        match read_up_to(&mut reader.input, &mut kind)? {
            4 => {}
            _ => return Err(ReadError::NotPcapng),
        }
        let word = u32::from_le_bytes(kind);
        if CLASSIC.contains(&word) || CLASSIC.contains(&word.swap_bytes()) {
            return Err(ReadError::Classic);
        }
        if word != block::SECTION {
            return Err(ReadError::NotPcapng);
        }
        let found = reader.section().map_err(|error| reader.blame(error))?;
        reader.offset += found;
        Ok(reader)
    }

    /// The next frame; `None` at the end.
    ///
    /// # Errors
    /// [`ReadError`]; the capture is not to be read on then.
    pub fn next_packet(&mut self) -> Result<Option<Packet<'_>>, ReadError> {
        let Some((interface, range)) = self.advance()? else {
            return Ok(None);
        };
        // Both were found to be there.
        let (Some(interface), Some(bytes)) = (self.interfaces.get(interface), self.body.get(range))
        else {
            return Ok(None);
        };
        Ok(Some(Packet {
            number: self.packets,
            interface,
            nanos: self.nanos,
            bytes,
        }))
    }

    /// Reads on to the next frame: its interface, and where in the body it lies.
    fn advance(&mut self) -> Result<Option<(usize, Range<usize>)>, ReadError> {
        loop {
            let mut kind = [0; 4];
            match read_up_to(&mut self.input, &mut kind)? {
                0 => return Ok(None),
                4 => {}
                _ => return Err(self.blame(Fault::Ends.into())),
            }
            let kind = self.word(kind);
            let is_packet = matches!(kind, block::PACKET | block::SIMPLE | block::ENHANCED);
            self.packets += u64::from(is_packet);
            match self.block(kind) {
                Ok((length, found)) => {
                    self.offset += length;
                    if let Found::Frame(interface, range) = found {
                        return Ok(Some((interface, range)));
                    }
                }
                Err(Trouble::Fault(fault)) if is_packet => {
                    let number = self.packets;
                    return Err(ReadError::Packet { number, fault });
                }
                Err(trouble) => return Err(self.blame(trouble)),
            }
        }
    }

    fn blame(&self, trouble: Trouble) -> ReadError {
        match trouble {
            Trouble::Io(error) => ReadError::Io(error),
            Trouble::Fault(fault) => ReadError::Block {
                offset: self.offset,
                after: self.packets,
                fault,
            },
        }
    }

    fn word(&self, bytes: [u8; 4]) -> u32 {
        if self.big_endian {
            u32::from_be_bytes(bytes)
        } else {
            u32::from_le_bytes(bytes)
        }
    }

    fn half(&self, bytes: [u8; 2]) -> u16 {
        if self.big_endian {
            u16::from_be_bytes(bytes)
        } else {
            u16::from_le_bytes(bytes)
        }
    }

    /// The field at `at` of the body.
    fn word_at(&self, at: usize) -> Result<u32, Fault> {
        let bytes = self.body.get(at..).and_then(|rest| rest.first_chunk());
        Ok(self.word(*bytes.ok_or(Fault::Short)?))
    }

    fn half_at(&self, at: usize) -> Result<u16, Fault> {
        let bytes = self.body.get(at..).and_then(|rest| rest.first_chunk());
        Ok(self.half(*bytes.ok_or(Fault::Short)?))
    }

    fn exact(&mut self, bytes: &mut [u8]) -> Result<(), Trouble> {
        if read_up_to(&mut self.input, bytes)? == bytes.len() {
            Ok(())
        } else {
            Err(Fault::Ends.into())
        }
    }

    /// A section header behind its type; yields its length.
    fn section(&mut self) -> Result<u64, Trouble> {
        let (mut length, mut magic) = ([0; 4], [0; 4]);
        self.exact(&mut length)?;
        self.exact(&mut magic)?;
        self.big_endian = match (u32::from_le_bytes(magic), u32::from_be_bytes(magic)) {
            (BYTE_ORDER, _) => false,
            (_, BYTE_ORDER) => true,
            (other, _) => return Err(Fault::ByteOrder(other).into()),
        };
        let length = self.word(length);
        self.rest(length, 4)?;
        let major = self.half_at(0)?;
        // Minor versions 0 and 2 are the same.
        if major != 1 || !matches!(self.half_at(2)?, 0 | 2) {
            return Err(Fault::Version(major).into());
        }
        self.interfaces.clear();
        Ok(u64::from(length))
    }

    /// A block behind its type; yields its length.
    fn block(&mut self, kind: u32) -> Result<(u64, Found), Trouble> {
        if kind == block::SECTION {
            return Ok((self.section()?, Found::Nothing));
        }
        let mut length = [0; 4];
        self.exact(&mut length)?;
        let length = self.word(length);
        self.rest(length, 0)?;
        let found = match kind {
            block::INTERFACE => self.interface().map(|()| Found::Nothing),
            block::ENHANCED => self.enhanced(),
            block::SIMPLE => self.simple(),
            block::PACKET => Err(Fault::Obsolete),
            _ => Ok(Found::Nothing),
        }?;
        Ok((u64::from(length), found))
    }

    /// Reads what follows a block's length into the body, without the length at its end; `read` bytes of it were read before.
    fn rest(&mut self, length: u32, read: u32) -> Result<(), Trouble> {
        if length > BLOCK_MAX {
            return Err(Fault::TooLong(length).into());
        }
        if !length.is_multiple_of(4) || length < 12 + read {
            return Err(Fault::Length(length).into());
        }
        let mut body = std::mem::take(&mut self.body);
        body.clear();
        body.resize((length - 12 - read) as usize, 0);
        let read = self.exact(&mut body);
        self.body = body;
        read?;
        let mut again = [0; 4];
        self.exact(&mut again)?;
        match self.word(again) {
            again if again == length => Ok(()),
            again => Err(Fault::Lengths(length, again).into()),
        }
    }

    fn interface(&mut self) -> Result<(), Fault> {
        let link_type = self.half_at(0)?;
        if link_type != ETHERNET {
            return Err(Fault::LinkType(link_type));
        }
        if self.interfaces.len() == INTERFACES_MAX {
            return Err(Fault::Interfaces);
        }
        let mut interface = Interface {
            name: format!("#{}", self.interfaces.len()),
            snap_length: self.word_at(4)?,
            denominator: 1_000_000,
            offset: 0,
        };
        let mut at = 8;
        while at < self.body.len() {
            let (code, length) = (self.half_at(at)?, usize::from(self.half_at(at + 2)?));
            let value = self.body.get(at + 4..at + 4 + length);
            let value = value.ok_or(Fault::Option(code))?;
            match (code, value) {
                (option::END, _) => break,
                (option::NAME, name) => {
                    let name = std::str::from_utf8(name).map_err(|_| Fault::Name)?;
                    interface.name = name.trim_end_matches('\0').to_owned();
                }
                (option::RESOLUTION, [raw]) => interface.denominator = ticks_per_second(*raw)?,
                (option::OFFSET, value) => {
                    let value = value.try_into().map_err(|_| Fault::Option(code))?;
                    interface.offset = if self.big_endian {
                        i64::from_be_bytes(value)
                    } else {
                        i64::from_le_bytes(value)
                    };
                }
                (option::RESOLUTION, _) => return Err(Fault::Option(code)),
                _ => {}
            }
            at += 4 + length.next_multiple_of(4);
        }
        self.interfaces.push(interface);
        Ok(())
    }

    fn enhanced(&mut self) -> Result<Found, Fault> {
        let id = self.word_at(0)?;
        let (high, low) = (self.word_at(4)?, self.word_at(8)?);
        let (kept, length) = (self.word_at(12)?, self.word_at(16)?);
        let interface = self.interfaces.get(id as usize);
        let interface = interface.ok_or(Fault::NoInterface(id))?;
        self.nanos = interface.nanos(u64::from(high) << 32 | u64::from(low))?;
        if kept < length {
            return Err(Fault::Cut { kept, length });
        }
        self.frame(id as usize, 20, kept)
    }

    /// A packet of interface 0 without a time, as long as the snap length lets it be.
    fn simple(&mut self) -> Result<Found, Fault> {
        let length = self.word_at(0)?;
        let interface = self.interfaces.first().ok_or(Fault::NoInterface(0))?;
        let kept = match interface.snap_length {
            0 => length,
            snap => length.min(snap),
        };
        if kept < length {
            return Err(Fault::Cut { kept, length });
        }
        self.frame(0, 4, kept)
    }

    fn frame(&self, interface: usize, at: usize, length: u32) -> Result<Found, Fault> {
        if length as usize > FRAME_MAX {
            return Err(Fault::FrameTooLong(length));
        }
        let range = at..at + length as usize;
        if range.end > self.body.len() {
            return Err(Fault::Captured(length));
        }
        Ok(Found::Frame(interface, range))
    }
}

impl Interface {
    fn nanos(&self, ticks: u64) -> Result<u64, Fault> {
        let nanos = u128::from(ticks) * 1_000_000_000 / self.denominator;
        let nanos = i128::try_from(nanos).map_err(|_| Fault::Time)?;
        let nanos = nanos + i128::from(self.offset) * 1_000_000_000;
        u64::try_from(nanos).map_err(|_| Fault::Time)
    }
}

/// `if_tsresol`: a negative power of ten, or of two if the highest bit is set.
fn ticks_per_second(raw: u8) -> Result<u128, Fault> {
    let power = u32::from(raw & 0x7f);
    let base = if raw & 0x80 == 0 { 10u128 } else { 2 };
    base.checked_pow(power).ok_or(Fault::Resolution(raw))
}

/// What ended a block.
enum Trouble {
    Io(io::Error),
    Fault(Fault),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Fault> for Trouble {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

/// Fills `bytes` as far as the input goes.
fn read_up_to(input: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match input.read(rest) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
