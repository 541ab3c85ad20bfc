#!/usr/bin/env bash
# bench.sh all|node|nodes|cni|model|pipeline|conntrack: measures and prints; nothing passes or fails by a figure.
# QUICK=1: node and nodes with fewer contenders and less time, each in less than three minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}
extent=()
[ "${QUICK:-0}" = 0 ] || extent=(--rounds 2 --seconds 0.5 --few)

# Pods over Sluice, the kernel, Open vSwitch and a forwarder without logic; writes target/bench/.
paths() { target/release/sluice-lab bench "$1" "${extent[@]}"; }

dataplane() { cargo bench --quiet -p sluice-appliance --bench "$1"; }
# Each part on its own, so that the memory of one is not that of the other.
model() {
  for part in node services policies large; do cargo bench --quiet --profile release -p sluice-model --bench scale -- $part; done
  cargo bench --quiet --profile release -p sluice-tests --bench model
}

case $what in
  node | nodes) paths "$what" ;;
  cni) cargo bench --quiet -p sluice-tests --bench cni_add ;;
  model) model ;;
  pipeline | conntrack) dataplane "$what" ;;
  all) paths node; paths nodes; cargo bench --quiet -p sluice-tests --bench cni_add; model; dataplane conntrack; dataplane pipeline ;;
  *) echo "bench: there is no '$what'; there are: all node nodes cni model pipeline conntrack"; exit 2 ;;
esac
