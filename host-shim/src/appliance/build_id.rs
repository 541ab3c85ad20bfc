//! The build id of a program: the note that a linker leaves in an ELF file.

use std::fs::File;
use std::io;
use std::path::Path;

use object::Object as _;
use object::read::{File as ElfFile, ReadCache};

/// The longest id that is one: that of a SHA-256.
const LONGEST: usize = 32;

/// The build id of an ELF file in hexadecimal.
///
/// # Errors
/// When the file cannot be read, is no ELF file, or has no build id.
pub fn read(path: &Path) -> io::Result<String> {
    // Only the headers and the note are read, whatever the size of the file.
    let file = ReadCache::new(File::open(path)?);
    let invalid = |reason: String| io::Error::new(io::ErrorKind::InvalidData, reason);
    let elf = ElfFile::parse(&file).map_err(|error| invalid(error.to_string()))?;
    let id = elf.build_id().map_err(|error| invalid(error.to_string()))?;
    match id {
        Some(id) if (1..=LONGEST).contains(&id.len()) => {
            Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
        }
        _ => Err(invalid("it has no build id".into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_has_one_id_and_what_is_no_program_none() {
        let own = std::env::current_exe().unwrap();
        let id = read(&own).unwrap();
        assert!(
            id.len() >= 16 && id.bytes().all(|b| b.is_ascii_hexdigit()),
            "{id}"
        );
        // As the whole file has it in its note, behind the owner's name.
        let bytes = std::fs::read(&own).unwrap();
        let raw: Vec<u8> = (0..id.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(&id[at..at + 2], 16).unwrap())
            .collect();
        let note = [&3u32.to_le_bytes()[..], b"GNU\0", &raw].concat();
        assert!(bytes.windows(note.len()).any(|part| part == note));

        let dir = std::env::temp_dir().join(format!("sluice-build-id-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let text = dir.join("text");
        std::fs::write(&text, "no program").unwrap();
        assert_eq!(read(&text).unwrap_err().kind(), io::ErrorKind::InvalidData);
        // Cut anywhere, it is refused or read, and never a panic.
        let cut = dir.join("cut");
        for length in (0..bytes.len().min(4096)).step_by(61) {
            std::fs::write(&cut, &bytes[..length]).unwrap();
            assert!(read(&cut).is_err(), "{length}");
        }
        std::fs::remove_dir_all(&dir).unwrap();
        assert_eq!(read(&text).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
