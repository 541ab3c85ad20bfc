//! The image, when it is built by its profile; anything else could not be linked as one.
//!
//! The image has its own start and stack and no operating system below it, and the host's crates in
//! the same workspace switch on what such a program cannot have. So `build.rs` sets `cfg(image)`
//! for the profile `guest` only, and other builds of the whole workspace get a program that says
//! how to build it.
#![cfg_attr(image, no_std, no_main)]

#[cfg(image)]
mod image;

#[cfg(not(image))]
fn main() -> std::process::ExitCode {
    eprintln!(
        "This is not the image. Build it with: \
         cargo build --profile guest -p sluice-guest --bin sluice-appliance"
    );
    std::process::ExitCode::FAILURE
}
