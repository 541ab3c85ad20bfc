#!/usr/bin/env bash
# bench.sh all|node|cni|pipeline|conntrack: measures and prints; nothing passes or fails by a figure.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}

dataplane() { cargo bench --quiet -p sluice-appliance --bench "$1"; }

case $what in
  node) target/release/sluice-lab bench ;;
  cni) cargo bench --quiet -p sluice-tests --bench cni_add ;;
  pipeline | conntrack) dataplane "$what" ;;
  all) target/release/sluice-lab bench; cargo bench --quiet -p sluice-tests --bench cni_add; dataplane conntrack; dataplane pipeline ;;
  *) echo "bench: there is no '$what'; there are: all node cni pipeline conntrack"; exit 2 ;;
esac
