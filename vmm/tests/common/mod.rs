//! Tiny guests, built byte by byte, and the VMM run on them.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::panic,
    reason = "shared by several test binaries, none of which uses all of it; a failed step here is a failed test"
)]

pub mod driver;

use std::path::Path;
use std::path::PathBuf;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::time::Duration;
use std::time::Instant;

use serde_json::Value;
use tempfile::TempDir;

pub const BASE: u32 = 0x20_0000;
pub const PARK: u32 = 0xd000_0000;
pub const HEARTBEAT: u32 = PARK + 4;
pub const DEVICE: u32 = 0xd000_1000;

/// 32-bit code for the PVH entry, flat segments, no stack.
#[derive(Debug, Default, Clone)]
pub struct Code(pub Vec<u8>);

impl Code {
    fn bytes(mut self, bytes: &[u8]) -> Code {
        self.0.extend_from_slice(bytes);
        self
    }

    fn word(self, word: u32) -> Code {
        self.bytes(&word.to_le_bytes())
    }

    /// `mov dword [address], value`
    pub fn store(self, address: u32, value: u32) -> Code {
        self.bytes(&[0xc7, 0x05]).word(address).word(value)
    }

    /// Prints with one `rep outsb`; the text sits in the code and is jumped over.
    pub fn print(self, text: &str) -> Code {
        let length = u32::try_from(text.len()).unwrap();
        let code = self.bytes(&[0xe9]).word(length); // jmp over the text
        let address = BASE + u32::try_from(code.0.len()).unwrap();
        code.bytes(text.as_bytes())
            .bytes(&[0xbe])
            .word(address) // mov esi
            .bytes(&[0xb9])
            .word(length) // mov ecx
            .bytes(&[0xba])
            .word(0x402) // mov edx
            .bytes(&[0xfc, 0xf3, 0x6e]) // cld; rep outsb
    }

    /// Prints with one `out` per byte.
    pub fn print_slowly(self, text: &str) -> Code {
        let code = self.bytes(&[0xba]).word(0x402);
        text.bytes()
            .fold(code, |code, byte| code.bytes(&[0xb0, byte, 0xee]))
    }

    /// `out 0xf4, code`
    pub fn exit(self, code: u32) -> Code {
        self.bytes(&[0xba])
            .word(0xf4)
            .bytes(&[0xb8])
            .word(code)
            .bytes(&[0xef])
    }

    pub fn park(self, micros: u32) -> Code {
        self.store(PARK, micros)
    }

    pub fn spin(self) -> Code {
        self.bytes(&[0xeb, 0xfe])
    }

    /// Heartbeats for `count` times 2^24 TSC cycles (about 6 ms each).
    pub fn beat_for(self, count: u8) -> Code {
        let now = [0x0f, 0x31, 0x0f, 0xac, 0xd0, 24]; // rdtsc; shrd eax, edx, 24
        let code = self.bytes(&now).bytes(&[0x89, 0xc3]); // mov ebx, eax
        let start = code.0.len();
        let code = code.store(HEARTBEAT, 1).bytes(&now);
        let code = code.bytes(&[0x29, 0xd8, 0x83, 0xf8, count]); // sub eax, ebx; cmp eax, count
        let back = u8::try_from(code.0.len() + 2 - start).unwrap();
        code.bytes(&[0x72, 0_u8.wrapping_sub(back)]) // jb start
    }

    /// Park for ever, again and again.
    pub fn park_for_ever(self) -> Code {
        let code = self.park(0);
        code.bytes(&[0xeb, 0xf4])
    }

    pub fn halt(self) -> Code {
        self.bytes(&[0xf4])
    }

    pub fn undefined(self) -> Code {
        self.bytes(&[0x0f, 0x0b])
    }

    /// Exits with `equal` if the dword at `address` has `value`, else with `different`.
    pub fn exit_if(self, address: u32, value: u32, equal: u32, different: u32) -> Code {
        // cmp dword [address], value; jne over the first exit
        let first = Code::default().exit(equal);
        let skip = u8::try_from(first.0.len()).unwrap();
        self.bytes(&[0x81, 0x3d])
            .word(address)
            .word(value)
            .bytes(&[0x75, skip])
            .bytes(&first.0)
            .exit(different)
    }

    /// Waits, parking up to 100 ms at a time, until the 16-bit word at `address` has `value`.
    pub fn park_until(self, address: u32, value: u16) -> Code {
        // loop: cmp word [address], value; je done; park; jmp loop
        let park = Code::default().park(100_000);
        let park_length = u8::try_from(park.0.len()).unwrap();
        let code = self
            .bytes(&[0x66, 0x81, 0x3d])
            .word(address)
            .bytes(&value.to_le_bytes());
        let code = code.bytes(&[0x74, park_length + 2]).bytes(&park.0);
        let back = 9 + 2 + park_length + 2;
        code.bytes(&[0xeb, 0_u8.wrapping_sub(back)])
    }

    pub fn image(&self) -> Image {
        Image {
            code: self.0.clone(),
            ..Image::default()
        }
    }
}

/// An ELF file with one segment and, usually, a PVH note.
#[derive(Debug, Clone)]
pub struct Image {
    pub code: Vec<u8>,
    pub address: u64,
    pub extra_memory: u64,
    pub note: bool,
}

impl Default for Image {
    fn default() -> Image {
        Image {
            code: vec![0xf4],
            address: BASE.into(),
            extra_memory: 0,
            note: true,
        }
    }
}

impl Image {
    pub fn bytes(&self) -> Vec<u8> {
        let headers = if self.note { 2_u16 } else { 1 };
        let note_at = 64 + 56 * u64::from(headers);
        let code_at = note_at + 20;
        let length = self.code.len() as u64;
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&2_u16.to_le_bytes()); // executable
        file.extend_from_slice(&62_u16.to_le_bytes()); // x86-64
        file.extend_from_slice(&1_u32.to_le_bytes());
        file.extend_from_slice(&self.address.to_le_bytes()); // 64-bit entry, unused
        file.extend_from_slice(&64_u64.to_le_bytes()); // program headers
        file.extend_from_slice(&[0; 8]);
        file.extend_from_slice(&[0; 4]);
        for half in [64, 56, headers, 0, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut header = |kind: u32, at: u64, address: u64, length: u64, memory: u64| {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&7_u32.to_le_bytes());
            for value in [at, address, address, length, memory, 4] {
                file.extend_from_slice(&value.to_le_bytes());
            }
        };
        header(1, code_at, self.address, length, length + self.extra_memory);
        if self.note {
            header(4, note_at, 0, 20, 20);
        }
        for word in [4_u32, 4, 18] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(b"Xen\0");
        file.extend_from_slice(&u32::try_from(self.address).unwrap_or(0).to_le_bytes());
        file.extend_from_slice(&self.code);
        file
    }

    pub fn write(&self, folder: &Path) -> PathBuf {
        let path = folder.join("image");
        std::fs::write(&path, self.bytes()).unwrap();
        path
    }
}

/// Whether this machine can run a VM; says so loudly if not.
pub fn kvm_works() -> bool {
    match kvm_ioctls::Kvm::new().and_then(|kvm| kvm.create_vm()) {
        Ok(_) => true,
        Err(error) => {
            println!("SKIP: /dev/kvm does not work here: {error}");
            false
        }
    }
}

/// A `sluice-vmm` process; killed when dropped.
#[derive(Debug)]
pub struct Vmm {
    pub child: Child,
    pub folder: TempDir,
}

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    pub status: i32,
    pub stderr: String,
}

impl Finished {
    /// All lines that are JSON objects with `key`.
    pub fn lines(&self, key: &str) -> Vec<Value> {
        self.stderr
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|value| value.get(key).is_some())
            .collect()
    }

    pub fn end(&self) -> Value {
        let end = self
            .lines("vmm")
            .pop()
            .unwrap_or_else(|| panic!("no end line: {}", self.stderr));
        assert_eq!(end["vmm"], "end", "{}", self.stderr);
        assert_eq!(end["status"], self.status, "{}", self.stderr);
        end
    }
}

impl Vmm {
    pub fn start(image: &Image, arguments: &[&str]) -> Vmm {
        let folder = tempfile::tempdir().unwrap();
        Vmm::start_in(folder, image, arguments)
    }

    pub fn start_in(folder: TempDir, image: &Image, arguments: &[&str]) -> Vmm {
        let vmm = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"));
        Vmm::start_as(vmm, folder, image, arguments)
    }

    /// Starts by way of another program: `command` ends with the VMM's name.
    pub fn start_as(
        mut command: Command,
        folder: TempDir,
        image: &Image,
        arguments: &[&str],
    ) -> Vmm {
        let path = image.write(folder.path());
        let child = command
            .arg("--image")
            .arg(path)
            .args(["--memory", "8M"])
            .args(arguments)
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Vmm { child, folder }
    }

    pub fn finish(mut self) -> Finished {
        let mut stderr = String::new();
        let mut pipe = self.child.stderr.take().unwrap();
        std::io::Read::read_to_string(&mut pipe, &mut stderr).unwrap();
        let status = self.child.wait().unwrap().code().unwrap_or(-1);
        Finished { status, stderr }
    }

    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let signal = rustix::process::Signal::from_named_raw(signal).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // Already finished is fine.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn run(image: &Image, arguments: &[&str]) -> Finished {
    Vmm::start(image, arguments).finish()
}

/// Polls until `ready` gives something; the bound only ends a broken test.
pub fn wait_for<T>(what: &str, mut ready: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(value) = ready() {
            return value;
        }
        assert!(
            begin.elapsed() < Duration::from_secs(30),
            "timed out waiting for {what}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Starts on bytes that need not be an image.
pub fn run_on_file(bytes: &[u8]) -> Finished {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("file"), bytes).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_sluice-vmm"))
        .args(["--image", "file"])
        .current_dir(folder.path())
        .output()
        .unwrap();
    Finished {
        status: output.status.code().unwrap_or(-1),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}
