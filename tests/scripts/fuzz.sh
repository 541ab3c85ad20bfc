#!/usr/bin/env bash
# Fuzzes with coverage on the stable toolchain (libFuzzer): each target of tests/fuzz/targets, or those named, starting from
# the inputs under tests/fuzz/seeds.
#
#   fuzz.sh [TARGET…]           run each for FUZZ_SECONDS (60), FUZZ_JOBS (1) at a time
#   fuzz.sh --merge [TARGET…]   keep what was found since: the fewest inputs that reach all code reached so far
#
# FUZZ_SANITIZER=address also watches memory. Inputs that fail are under target/fuzz/artifacts and named in the output.
set -euo pipefail
cd "$(dirname "$0")/../.."

merge=
[ "${1:-}" = --merge ] && { merge=yes; shift; }
seconds=${FUZZ_SECONDS:-60} jobs=${FUZZ_JOBS:-1} sanitizer=${FUZZ_SANITIZER:-}
most_files=300 most_bytes=$((300 * 1024)) # of one target's seeds

targets=("$@")
if [ ${#targets[@]} -eq 0 ]; then
  for source in tests/fuzz/targets/*.rs; do targets+=("$(basename "$source" .rs)"); done
fi
for target in "${targets[@]}"; do
  [ -f "tests/fuzz/targets/$target.rs" ] || { echo "fuzz: there is no target $target in tests/fuzz/targets" >&2; exit 2; }
done

out=$PWD/target/fuzz
build=$out${sanitizer:+/$sanitizer}
export CARGO_TARGET_DIR=$build
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
if [ -n "$sanitizer" ]; then
  # The runtime comes with the stable toolchain; only the option is not stable.
  export RUSTC_BOOTSTRAP=1 RUSTFLAGS="$RUSTFLAGS -Zsanitizer=$sanitizer"
fi
# A target triple keeps the flags away from build scripts.
triple=$(rustc -vV | sed -n 's/^host: //p')
# What a target stands on is built only for it.
features=$(for target in "${targets[@]}"; do
  awk -v name="\"$target\"" '/^\[/ { here = 0 } $1 == "name" { here = $3 == name } here && $1 == "required-features"' tests/fuzz/Cargo.toml
done | grep -oE '"[a-z]+"' | tr -d '"' | sort -u | paste -sd, || true)
cargo build --quiet --release --target "$triple" --manifest-path tests/fuzz/Cargo.toml --features "$features" "${targets[@]/#/--bin=}"
mkdir -p "$out/corpus" "$out/artifacts"

limits=(-timeout=10 -rss_limit_mb=2048 -max_len=9000)

fuzz() { # TARGET: one line of result, and what it printed if it failed
  local target=$1 seeds=tests/fuzz/seeds/$1 log=$out/$1.log runs
  mkdir -p "$out/corpus/$target"
  local corpora=("$out/corpus/$target")
  [ -d "$seeds" ] && corpora+=("$seeds")
  if "$build/$triple/release/$target" "${limits[@]}" -max_total_time="$seconds" \
       -artifact_prefix="$out/artifacts/$target-" "${corpora[@]}" >"$log" 2>&1; then
    runs=$(sed -nE 's/^Done ([0-9]+) runs in ([0-9]+) .*/\1 runs in \2 s/p' "$log")
    echo "fuzz $target: ${runs:-?}, $(grep -oE 'cov: [0-9]+' "$log" | tail -n 1), no finding"
  else
    echo "fuzz $target: FINDING (input under target/fuzz/artifacts)"; tail -n 25 "$log"
    return 1
  fi
}

merge() { # TARGET: seeds and what was found become the new seeds
  local target=$1 seeds=tests/fuzz/seeds/$1 new=$out/merged/$1 files=0 bytes=0 size file
  mkdir -p "$seeds" "$out/corpus/$target"
  rm -rf "$new"; mkdir -p "$new"
  # As few as cover all, by edges only, not how often each was taken: a tenth of the inputs, and fuzzing finds the rest again
  # within seconds.
  "$build/$triple/release/$target" "${limits[@]}" -set_cover_merge=1 -use_counters=0 "$new" "$seeds" "$out/corpus/$target" \
    >"$out/$target.log" 2>&1 || { echo "fuzz $target: the merge failed"; tail -n 25 "$out/$target.log"; return 1; }
  rm -rf "$seeds"; mkdir -p "$seeds"
  # The smallest first, as far as they fit.
  while read -r size file; do
    [ $((files + 1)) -le "$most_files" ] && [ $((bytes + size)) -le "$most_bytes" ] || break
    cp "$new/$file" "$seeds/"; files=$((files + 1)) bytes=$((bytes + size))
  done < <(find "$new" -type f -printf '%s %f\n' | sort -n)
  echo "fuzz $target: $files seeds of $(find "$new" -type f | wc -l), $bytes bytes"
}

failed=0
if [ -n "$merge" ]; then
  for target in "${targets[@]}"; do merge "$target" || failed=$((failed + 1)); done
else
  running=0
  for target in "${targets[@]}"; do
    [ "$running" -lt "$jobs" ] || { wait -n || failed=$((failed + 1)); running=$((running - 1)); }
    fuzz "$target" & running=$((running + 1))
  done
  while [ "$running" -gt 0 ]; do wait -n || failed=$((failed + 1)); running=$((running - 1)); done
fi
[ "$failed" -eq 0 ]
