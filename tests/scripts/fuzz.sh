#!/usr/bin/env bash
# Builds the fuzz targets with coverage (stable toolchain, libFuzzer) and runs each for FUZZ_SECONDS from its kept seeds.
# A finding is kept under target/fuzz/artifacts and named in the output.
set -euo pipefail
cd "$(dirname "$0")/../.."

seconds=${FUZZ_SECONDS:-60}
out=$PWD/target/fuzz
export CARGO_TARGET_DIR=$out
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 --cfg fuzzing"
# A target triple keeps the flags away from build scripts.
triple=$(rustc -vV | sed -n 's/^host: //p')
cargo build --quiet --release --target "$triple" --manifest-path tests/fuzz/Cargo.toml

failed=0
for source in tests/fuzz/targets/*.rs; do
  target=$(basename "$source" .rs)
  seeds=tests/fuzz/seeds/$target
  mkdir -p "$out/corpus/$target" "$out/artifacts"
  log=$out/$target.log
  if "$out/$triple/release/$target" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=9000 \
       -artifact_prefix="$out/artifacts/$target-" "$out/corpus/$target" $([ -d "$seeds" ] && echo "$seeds") >"$log" 2>&1; then
    runs=$(sed -nE 's/^Done ([0-9]+) runs.*/\1/p' "$log")
    echo "fuzz $target: ${runs:-?} runs in $seconds s, no finding"
  else
    failed=$((failed + 1))
    echo "fuzz $target: FINDING (input under target/fuzz/artifacts)"; tail -n 25 "$log"
  fi
done
[ "$failed" -eq 0 ]
