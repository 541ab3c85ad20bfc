#!/usr/bin/env bash
# setup.sh run|demo|test: installs what that target needs and the machine lacks, or says exactly what is missing where it
# may not install. `run` needs the least: tests bring peers (BIRD, Open vSwitch, containerd …) that no node needs.
set -euo pipefail

# program:package
run=(
  ip:iproute2
  tc:iproute2
  ping:iputils-ping
  cc:gcc
)
# A machine without a usable /dev/kvm runs the appliance under QEMU.
[ -r /dev/kvm ] && [ -w /dev/kvm ] || run+=(qemu-system-x86_64:qemu-system-x86)
demo=(
  "${run[@]}"
  tcpdump:tcpdump
  tshark:tshark
  ethtool:ethtool
  iptables:iptables
  nsenter:util-linux
)
tests=(
  "${demo[@]}"
  qemu-system-x86_64:qemu-system-x86
  iperf3:iperf3
  containerd:containerd
  runc:runc
  podman:podman
  conmon:conmon
  /usr/lib/cni/bridge:containernetworking-plugins
  ovs-vswitchd:openvswitch-switch
  bird:bird2
  dnsmasq:dnsmasq-base
  nft:nftables
)
purpose=${1:-test}
case $purpose in
  run) wanted=("${run[@]}") ;;
  demo) wanted=("${demo[@]}") ;;
  test) wanted=("${tests[@]}") ;;
  *) echo "setup: there is no '$purpose'; there are: run demo test"; exit 2 ;;
esac

missing=()
for entry in "${wanted[@]}"; do
  command -v "${entry%%:*}" >/dev/null 2>&1 || missing+=("${entry##*:}")
done
for tool in cargo; do
  command -v "$tool" >/dev/null 2>&1 || { echo "setup: $tool is missing: install a Rust toolchain (see rust-version in Cargo.toml)"; exit 1; }
done
if [ "$purpose" = test ] && ! cargo nextest --version >/dev/null 2>&1; then
  echo "setup: installing cargo-nextest (once)"
  cargo install --locked --quiet cargo-nextest
fi
[ ${#missing[@]} -eq 0 ] && exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "setup: make $purpose needs these packages, installing them: ${missing[*]}"
  log=$(mktemp)
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log"
    echo "setup: apt-get failed; the packages wanted are: ${missing[*]}"
    exit 1
  fi
  rm -f "$log"
else
  echo "setup: make $purpose needs these Debian/Ubuntu packages; install them or run as root: ${missing[*]}"
  exit 1
fi
