//! Whether this host can run a virtual machine, and if not, why.

use std::ffi::CString;
use std::io;
use std::path::Path;
use std::path::PathBuf;

use kvm_ioctls::Cap;
use kvm_ioctls::Kvm;
use kvm_ioctls::VmFd;

/// The only version of the KVM interface there has ever been.
const API_VERSION: i32 = 12;

/// KVM cannot be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot use KVM: {path}: {reason}; without KVM the same image runs under QEMU (TCG), see docs/machine.md"
)]
pub struct NoKvm {
    path: PathBuf,
    reason: String,
}

/// Opens the KVM device at `path` and checks what this VMM needs of it.
///
/// # Errors
/// It is missing, forbidden, not KVM, or too old.
pub fn open(path: &Path) -> Result<Kvm, NoKvm> {
    let no_kvm = |reason: String| NoKvm {
        path: path.to_path_buf(),
        reason,
    };
    let name = CString::new(path.as_os_str().as_encoded_bytes())
        .map_err(|_| no_kvm("the path contains a zero byte".into()))?;
    let kvm = Kvm::new_with_path(&name).map_err(|error| no_kvm(kvm_reason(error.errno())))?;
    if kvm.get_api_version() != API_VERSION {
        return Err(no_kvm("this is no KVM device".into()));
    }
    for (capability, name) in [
        (Cap::UserMemory, "user memory"),
        (Cap::Ioeventfd, "ioeventfd"),
    ] {
        if !kvm.check_extension(capability) {
            return Err(no_kvm(format!("the host's KVM has no {name}")));
        }
    }
    Ok(kvm)
}

fn kvm_reason(errno: i32) -> String {
    match errno {
        libc::ENOENT => {
            "it does not exist (no hardware virtualisation, or the kvm module is not loaded)".into()
        }
        libc::EACCES | libc::EPERM => {
            "no permission (add the user to the group \"kvm\", or start as root)".into()
        }
        errno => io::Error::from_raw_os_error(errno).to_string(),
    }
}

/// Creates an empty virtual machine.
///
/// # Errors
/// KVM refuses.
pub fn create_vm(kvm: &Kvm) -> Result<VmFd, kvm_ioctls::Error> {
    loop {
        match kvm.create_vm() {
            // Creation waits for locks inside the kernel, and any signal interrupts that.
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_kvm_is_told_from_a_forbidden_one_and_both_point_to_qemu() {
        for (errno, word) in [
            (libc::ENOENT, "does not exist"),
            (libc::EACCES, "no permission"),
        ] {
            let error = NoKvm {
                path: "/dev/kvm".into(),
                reason: kvm_reason(errno),
            }
            .to_string();
            assert!(error.contains("/dev/kvm"), "{error}");
            assert!(error.contains(word), "{error}");
            assert!(error.contains("QEMU"), "{error}");
            assert!(error.contains("docs/machine.md"), "{error}");
        }
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        for path in ["/does/not/exist", "/dev/null"] {
            let error = open(Path::new(path)).unwrap_err();
            assert!(error.to_string().contains(path), "{error}");
        }
    }
}
