//! The pause image: one program that waits for ever, in an OCI archive made here.

use anyhow::Result;
use serde_json::{Value, json};
use sluice_tests::command;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

/// The image's name.
pub(crate) const NAME: &str = "sluice.test/pause:1";

/// A static ELF64 for x86-64 that calls pause(2) for ever: file header, one program header, nine bytes of code.
fn program() -> Vec<u8> {
    const LOAD: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // mov eax, 34 (pause); syscall; jmp back to the mov.
    let code = [0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7];
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    for half in [2u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1u32.to_le_bytes());
    for word in [LOAD + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 64, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // PT_LOAD, read and execute.
    elf.extend(1u32.to_le_bytes());
    elf.extend(5u32.to_le_bytes());
    for word in [0, LOAD, LOAD, size, size, 0x1000] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// Writes the archive below `dir` and returns its path.
pub(crate) fn archive(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("pause-root");
    let layout = dir.join("pause-image");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&root)?;
    fs::create_dir_all(&blobs)?;
    fs::write(root.join("pause"), program())?;
    fs::set_permissions(root.join("pause"), fs::Permissions::from_mode(0o755))?;
    let layer = dir.join("layer.tar");
    tar(&root, &layer, "pause")?;
    let layer = blob(
        &blobs,
        &fs::read(&layer)?,
        "application/vnd.oci.image.layer.v1.tar",
    )?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": {"Entrypoint": ["/pause"]},
        "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
    });
    let bytes = config.to_string();
    let config = blob(
        &blobs,
        bytes.as_bytes(),
        "application/vnd.oci.image.config.v1+json",
    )?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer],
    });
    let mut manifest = blob(&blobs, manifest.to_string().as_bytes(), kind)?;
    manifest["annotations"] = json!({
        "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": NAME,
    });
    manifest["platform"] = json!({"architecture": "amd64", "os": "linux"});
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(layout.join("index.json"), index.to_string())?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion": "1.0.0"}"#,
    )?;
    let archive = dir.join("pause.tar");
    tar(&layout, &archive, ".")?;
    Ok(archive)
}

fn tar(dir: &Path, to: &Path, what: &str) -> Result<()> {
    let (dir, to) = (dir.to_string_lossy(), to.to_string_lossy());
    command::run(&[
        "tar",
        "-C",
        &dir,
        "--owner=0",
        "--group=0",
        "-cf",
        &to,
        what,
    ])
    .map(drop)
}

/// Stores bytes under their digest; returns the descriptor.
fn blob(blobs: &Path, bytes: &[u8], kind: &str) -> Result<Value> {
    let temporary = blobs.join("new");
    fs::write(&temporary, bytes)?;
    let sum = command::run(&["sha256sum", &temporary.to_string_lossy()])?;
    let digest = sum.split(' ').next().unwrap_or_default();
    fs::rename(&temporary, blobs.join(digest))?;
    Ok(json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": bytes.len()}))
}
