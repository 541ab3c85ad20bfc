#!/usr/bin/env bash
# bench.sh all|node|cni|model|pipeline|conntrack: measures and prints; nothing passes or fails by a figure.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}

dataplane() { cargo bench --quiet -p sluice-appliance --bench "$1"; }
# Each part on its own, so that the memory of one is not that of the other.
model() {
  for part in node services policies large; do cargo bench --quiet --profile release -p sluice-model --bench scale -- $part; done
  cargo bench --quiet --profile release -p sluice-tests --bench model
}

case $what in
  node) target/release/sluice-lab bench ;;
  cni) cargo bench --quiet -p sluice-tests --bench cni_add ;;
  model) model ;;
  pipeline | conntrack) dataplane "$what" ;;
  all) target/release/sluice-lab bench; cargo bench --quiet -p sluice-tests --bench cni_add; model; dataplane conntrack; dataplane pipeline ;;
  *) echo "bench: there is no '$what'; there are: all node cni model pipeline conntrack"; exit 2 ;;
esac
