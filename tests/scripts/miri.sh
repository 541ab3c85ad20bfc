#!/usr/bin/env bash
# Runs the tests of the code that shares memory with a guest (vmm/trunk: rings, chains, memory) where each access is checked.
#
# With Miri, a component of a nightly toolchain, where that is installed: what needs no system call. Else the whole crate's tests
# under AddressSanitizer, whose runtime comes with the stable toolchain. It sees accesses beyond memory and after its end; other
# undefined behaviour (aliasing, data races, uninitialised values) only Miri sees.
set -euo pipefail
cd "$(dirname "$0")/../.."

if cargo +nightly miri --version >/dev/null 2>&1; then
  export CARGO_TARGET_DIR=$PWD/target/miri
  export MIRIFLAGS="${MIRIFLAGS:--Zmiri-disable-isolation -Zmiri-many-seeds=0..8}"
  exec cargo +nightly miri test -p sluice-trunk --lib -- shared_tests
fi

echo "miri: no Miri is installed; install it with \`rustup toolchain install nightly --component miri\`" >&2
echo "miri: running the tests of sluice-trunk under AddressSanitizer instead: aliasing, data races and uninitialised values go unchecked" >&2
export CARGO_TARGET_DIR=$PWD/target/asan
# Only the option is not stable. The target triple keeps it away from build scripts.
export RUSTC_BOOTSTRAP=1 RUSTFLAGS="-Zsanitizer=address"
cargo test -p sluice-trunk --lib --target "$(rustc -vV | sed -n 's/^host: //p')"
