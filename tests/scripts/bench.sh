#!/usr/bin/env bash
# bench.sh all|node|pipeline|conntrack: measures and prints; nothing passes or fails by a figure.
set -euo pipefail
cd "$(dirname "$0")/../.."
what=${1:-all}

dataplane() { cargo bench --quiet -p sluice-appliance --bench "$1"; }

case $what in
  node) target/release/sluice-lab bench ;;
  pipeline | conntrack) dataplane "$what" ;;
  all) target/release/sluice-lab bench; dataplane conntrack; dataplane pipeline ;;
  *) echo "bench: there is no '$what'; there are: all node pipeline conntrack"; exit 2 ;;
esac
