//! Puts an image, the PVH start info, the memory map and the command line into guest RAM.
//!
//! The image is read with `linux-loader`; its headers are surveyed first, so that a wrong file, a truncated one and too little
//! memory are told apart before a byte is copied.

use std::fs::File;
use std::io;
use std::io::Read;
use std::io::Seek;
use std::io::SeekFrom;
use std::path::Path;
use std::path::PathBuf;

use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::BootConfigurator;
use linux_loader::configurator::BootParams;
use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::loader::Elf;
use linux_loader::loader::KernelLoader;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::hvm_memmap_table_entry;
use linux_loader::loader::elf::start_info::hvm_start_info;
use linux_loader::loader::load_cmdline;
use rustix::rand::GetRandomFlags;
use rustix::rand::getrandom;
use vm_memory::GuestAddress;

use crate::memory::COMMAND_LINE;
use crate::memory::COMMAND_LINE_MAX;
use crate::memory::GuestRam;
use crate::memory::IMAGE_MIN;
use crate::memory::MEMORY_MAP;
use crate::memory::START_INFO;

/// "xEn3" with the top bit set: Xen's `hvm/start_info.h`.
const START_INFO_MAGIC: u32 = 0x336e_c578;
/// Octets of randomness for the guest.
const SEED: usize = 32;
const START_INFO_VERSION: u32 = 1;
/// Type 1 of an E820 entry.
const MEMORY_TYPE_RAM: u32 = 1;

const ELF_HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
/// More segments than any image of ours; bounds the survey of a hostile file.
const PROGRAM_HEADERS_MAX: u16 = 64;

/// The image cannot be booted, and why.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("cannot open the image {path}")]
    Open { path: PathBuf, source: io::Error },
    #[error("cannot read the image {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a 64-bit x86 ELF image: {reason}")]
    NotAnImage { path: PathBuf, reason: &'static str },
    #[error("{path} is truncated: its headers promise {expected} bytes, the file has {actual}")]
    Truncated {
        path: PathBuf,
        expected: u64,
        actual: u64,
    },
    #[error("{path} has no PVH entry note, so there is no way to start it")]
    NoPvhNote { path: PathBuf },
    #[error("{path} wants to be loaded at {address:#x}, below {IMAGE_MIN:#x}")]
    TooLow { path: PathBuf, address: u64 },
    #[error(
        "too little memory: {path} needs {needed} bytes of RAM (use --memory {}M or more), got {given}",
        needed.div_ceil(2 << 20) * 2
    )]
    TooLittleMemory {
        path: PathBuf,
        needed: u64,
        given: u64,
    },
    #[error("cannot load {path}")]
    Load {
        path: PathBuf,
        source: linux_loader::loader::Error,
    },
    #[error("the command line token {token:?} is bad: {reason}")]
    CommandLine { token: String, reason: String },
    #[error("the kernel gives no random numbers for the guest's seed")]
    Random { source: io::Error },
    #[error("cannot write the boot parameters")]
    Parameters {
        source: linux_loader::configurator::Error,
    },
}

/// What the vCPU needs to know about a loaded image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Where execution starts, in 32-bit protected mode.
    pub address: u64,
    /// First byte after the image.
    pub image_end: u64,
}

/// Loads the image at `path` into `ram`.
///
/// # Errors
/// One variant of [`BootError`] per cause an operator can tell apart.
pub fn load_image(ram: &GuestRam, path: &Path) -> Result<Entry, BootError> {
    let path_buf = || path.to_path_buf();
    let mut file = File::open(path).map_err(|source| BootError::Open {
        path: path_buf(),
        source,
    })?;
    let image_end = survey(&mut file, path)?;
    if image_end > ram.size() {
        return Err(BootError::TooLittleMemory {
            path: path_buf(),
            needed: image_end,
            given: ram.size(),
        });
    }
    let loaded =
        Elf::load(ram.memory(), None, &mut file, None).map_err(|source| BootError::Load {
            path: path_buf(),
            source,
        })?;
    match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) if address.0 < image_end => Ok(Entry {
            address: address.0,
            image_end,
        }),
        PvhBootCapability::PvhEntryPresent(_) => Err(BootError::NotAnImage {
            path: path_buf(),
            reason: "its PVH entry lies outside its segments",
        }),
        _ => Err(BootError::NoPvhNote { path: path_buf() }),
    }
}

/// Reads only the headers; returns the first address after the last segment.
fn survey(file: &mut File, path: &Path) -> Result<u64, BootError> {
    let path_buf = || path.to_path_buf();
    let not_an_image = |reason| BootError::NotAnImage {
        path: path_buf(),
        reason,
    };
    let read_error = |source| BootError::Read {
        path: path_buf(),
        source,
    };
    let actual = file.metadata().map_err(read_error)?.len();

    let mut header = [0; ELF_HEADER_SIZE];
    let read = read_up_to(file, &mut header).map_err(read_error)?;
    if read < 4 || !header.starts_with(b"\x7fELF") {
        return Err(not_an_image("the ELF magic is missing"));
    }
    if read < ELF_HEADER_SIZE {
        return Err(BootError::Truncated {
            path: path_buf(),
            expected: 64,
            actual,
        });
    }
    let [_, _, _, _, class, endian, ..] = header;
    if (class, endian) != (2, 1) || u16_at(&header, 18) != 62 {
        return Err(not_an_image("wrong class, byte order or machine"));
    }
    let table = u64_at(&header, 32);
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_SIZE || count > PROGRAM_HEADERS_MAX {
        return Err(not_an_image(
            "its program headers have a strange size or number",
        ));
    }
    file.seek(SeekFrom::Start(table)).map_err(read_error)?;
    let mut end = 0;
    for index in 0..u64::from(count) {
        let mut header = [0; PROGRAM_HEADER_SIZE];
        if read_up_to(file, &mut header).map_err(read_error)? < PROGRAM_HEADER_SIZE {
            let expected = table.saturating_add((index + 1) * PROGRAM_HEADER_SIZE as u64);
            return Err(BootError::Truncated {
                path: path_buf(),
                expected,
                actual,
            });
        }
        let expected = u64_at(&header, 8).saturating_add(u64_at(&header, 32));
        if expected > actual {
            return Err(BootError::Truncated {
                path: path_buf(),
                expected,
                actual,
            });
        }
        if u32_at(&header, 0) != PT_LOAD {
            continue;
        }
        let (address, file_size, size) = (
            u64_at(&header, 24),
            u64_at(&header, 32),
            u64_at(&header, 40),
        );
        if file_size > size {
            return Err(not_an_image(
                "a segment is larger in the file than in memory",
            ));
        }
        if address < IMAGE_MIN {
            return Err(BootError::TooLow {
                path: path_buf(),
                address,
            });
        }
        end = end.max(address.saturating_add(size));
    }
    if end == 0 {
        return Err(not_an_image("it has nothing to load"));
    }
    Ok(end)
}

fn read_up_to(file: &mut File, bytes: &mut [u8]) -> io::Result<usize> {
    let limit = bytes.len() as u64;
    let mut rest = Vec::new();
    file.take(limit).read_to_end(&mut rest)?;
    if let Some(target) = bytes.get_mut(..rest.len()) {
        target.copy_from_slice(&rest);
    }
    Ok(rest.len())
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    bytes
        .get(offset..)
        .and_then(|rest| rest.first_chunk())
        .copied()
        .unwrap_or([0; N])
}

fn u16_at(bytes: &[u8], offset: usize) -> u16 {
    u16::from_le_bytes(field(bytes, offset))
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(field(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(field(bytes, offset))
}

/// The guest's command line, token by token.
#[derive(Debug, Clone)]
pub struct CommandLine(Cmdline);

impl CommandLine {
    /// An empty command line.
    ///
    /// # Errors
    /// Never in practice: the capacity is a constant.
    pub fn new() -> Result<CommandLine, BootError> {
        Cmdline::new(COMMAND_LINE_MAX)
            .map(CommandLine)
            .map_err(|error| bad_token("", &error))
    }

    /// Appends one token.
    ///
    /// # Errors
    /// The token has bytes that are not printable ASCII, or the line is full.
    pub fn push(&mut self, token: &str) -> Result<(), BootError> {
        self.0
            .insert_str(token)
            .map_err(|error| bad_token(token, &error))
    }

    /// Appends randomness of the host for the guest: not every processor has a generator that can be trusted, and
    /// secrets of the guest's tables depend on it.
    ///
    /// # Errors
    /// The kernel has none, or the line is full.
    pub fn push_seed(&mut self) -> Result<(), BootError> {
        let mut seed = [0_u8; SEED];
        let random = |source: rustix::io::Errno| BootError::Random {
            source: source.into(),
        };
        let taken = getrandom(&mut seed, GetRandomFlags::empty()).map_err(random)?;
        if taken != SEED {
            return Err(random(rustix::io::Errno::IO));
        }
        let digits: String = seed.iter().map(|octet| format!("{octet:02x}")).collect();
        // A token with a secret in it is not shown.
        self.push(&format!("sluice.seed={digits}"))
            .map_err(|_| bad_token("sluice.seed=…", &linux_loader::cmdline::Error::TooLarge))
    }

    /// The whole line.
    ///
    /// # Errors
    /// Never in practice: `push` refused zero bytes.
    pub fn text(&self) -> Result<String, BootError> {
        let text = self.0.as_cstring().map_err(|error| bad_token("", &error))?;
        Ok(text.to_string_lossy().into_owned())
    }
}

fn bad_token(token: &str, error: &linux_loader::cmdline::Error) -> BootError {
    BootError::CommandLine {
        token: token.to_owned(),
        reason: error.to_string(),
    }
}

/// Writes start info, memory map and command line; `ebx` must hold [`START_INFO`] at entry.
///
/// # Errors
/// RAM is smaller than the boot area.
pub fn write_parameters(ram: &GuestRam, command_line: &CommandLine) -> Result<(), BootError> {
    load_cmdline(ram.memory(), GuestAddress(COMMAND_LINE), &command_line.0).map_err(|error| {
        BootError::CommandLine {
            token: "…".into(),
            reason: format!("the line cannot be written: {error}"),
        }
    })?;
    let start_info = hvm_start_info {
        magic: START_INFO_MAGIC,
        version: START_INFO_VERSION,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: 1,
        ..Default::default()
    };
    let map = [hvm_memmap_table_entry {
        addr: 0,
        size: ram.size(),
        type_: MEMORY_TYPE_RAM,
        reserved: 0,
    }];
    let mut parameters = BootParams::new(&start_info, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    PvhBootConfigurator::write_bootparams(&parameters, ram.memory())
        .map_err(|source| BootError::Parameters { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_machine_gets_its_own_seed_of_32_octets() {
        let seeded = || {
            let mut line = CommandLine::new().unwrap();
            line.push("a=1").unwrap();
            line.push_seed().unwrap();
            line.text().unwrap()
        };
        let (one, other) = (seeded(), seeded());
        let digits = one.strip_prefix("a=1 sluice.seed=").unwrap();
        assert_eq!(digits.len(), 64);
        assert!(digits.bytes().all(|byte| byte.is_ascii_hexdigit()));
        assert_ne!(one, other);
    }
}
