#!/usr/bin/env bash
# Runs what proves the product and closes with one line: `N passed, N failed, N skipped`. `test.sh boot`: QEMU only.
set -uo pipefail
cd "$(dirname "$0")/../.."

export SLUICE_SKIPS=$PWD/target/skips.txt
export SLUICE_IMAGE=$PWD/target/guest/sluice-appliance
mkdir -p target
: > "$SLUICE_SKIPS"
passed=0 failed=0

step() { # NAME COMMAND…: one line, its output only if it fails
  local name=$1 log; shift
  log=$(mktemp)
  local start=$SECONDS
  if "$@" >"$log" 2>&1; then
    passed=$((passed + 1)); echo "ok    $name ($((SECONDS - start)) s)"
  else
    failed=$((failed + 1)); echo "FAIL  $name ($((SECONDS - start)) s)"; tail -n 60 "$log"
  fi
  rm -f "$log"
}

nextest() { # ARGUMENTS…: adds the tests' own numbers
  local log; log=$(mktemp)
  cargo nextest run "$@" 2>&1 | tee "$log" | grep -vE '^ +(Compiling|Downloaded|Downloading)'
  local status=${PIPESTATUS[0]} summary
  summary=$(grep -E 'Summary' "$log" | tail -n 1 | sed -E 's/\x1b\[[0-9;]*m//g')
  local ok bad
  ok=$(sed -nE 's/.*[ :]([0-9]+) passed.*/\1/p' <<<"$summary")
  bad=$(sed -nE 's/.*[ ,]([0-9]+) (failed|timed out).*/\1/p' <<<"$summary")
  passed=$((passed + ${ok:-0})); failed=$((failed + ${bad:-0}))
  [ "$status" -eq 0 ] || [ "${bad:-0}" -gt 0 ] || failed=$((failed + 1))
  rm -f "$log"
}

step "guest image" cargo build --profile guest -p sluice-guest --bin sluice-appliance
step "host programs" cargo build -p sluice-vmm -p sluice-trunk -p sluice-process -p sluice-host -p sluice-cni -p sluice-replay -p sluice-tests --bins
if [ "${1:-all}" = boot ]; then
  nextest -p sluice-tests --test boot
else
  nextest --workspace
  echo "the same features with the appliance as a process (SLUICE_ISOLATION=process):"
  SLUICE_ISOLATION=process nextest --workspace -E 'binary(datapath) | binary(lifecycle) | binary(restarts) | binary(overlay)'
  export FUZZ_SECONDS=${FUZZ_SECONDS:-2} FUZZ_JOBS=${FUZZ_JOBS:-$(nproc)}
  # `ownership` stands on the whole cluster model, which takes minutes to build with coverage: `make fuzz` runs it, and a
  # property test of the model has the same invariant.
  mapfile -t targets < <(basename -s .rs tests/fuzz/targets/*.rs | grep -v '^ownership$')
  step "fuzz targets, $FUZZ_SECONDS s each" tests/scripts/fuzz.sh "${targets[@]}"
fi

skipped=$(wc -l < "$SLUICE_SKIPS")
[ "$skipped" -eq 0 ] || sed 's/^/SKIP  /' "$SLUICE_SKIPS"
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
