//! Links the image by its own script, without the C library's start, at fixed addresses.

use std::env;
use std::path::Path;

fn main() {
    println!("cargo:rerun-if-changed=image.ld");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-check-cfg=cfg(image)");
    if !is_guest_profile() {
        return;
    }
    println!("cargo:rustc-cfg=image");
    let here = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for argument in [
        "-nostartfiles",
        "-nostdlib",
        "-static",
        "-no-pie",
        &format!("-Wl,-T,{here}/image.ld"),
        "-Wl,--build-id=sha1",
        "-Wl,-z,max-page-size=4096",
        "-Wl,-z,norelro",
        "-Wl,-z,noexecstack",
        "-Wl,--no-eh-frame-hdr",
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
}

/// Cargo tells build scripts no profile names, but puts their output under `<target>/<profile>/build`.
fn is_guest_profile() -> bool {
    let out = env::var("OUT_DIR").unwrap_or_default();
    let mut above = Path::new(&out).ancestors();
    above.any(|path| path.ends_with("guest/build"))
}
