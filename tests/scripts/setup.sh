#!/usr/bin/env bash
# Installs what run, demo, test and bench need and the machine lacks. Says exactly what is missing where it may not install.
set -euo pipefail

# program:package
wanted=(
  qemu-system-x86_64:qemu-system-x86
  ip:iproute2
  tc:iproute2
  ping:iputils-ping
  iperf3:iperf3
  tcpdump:tcpdump
  tshark:tshark
  ethtool:ethtool
  cc:gcc
  iptables:iptables
  nsenter:util-linux
  containerd:containerd
  runc:runc
  podman:podman
  conmon:conmon
  /usr/lib/cni/bridge:containernetworking-plugins
  ovs-vswitchd:openvswitch-switch
  bird:bird2
  dnsmasq:dnsmasq-base
)

missing=()
for entry in "${wanted[@]}"; do
  command -v "${entry%%:*}" >/dev/null 2>&1 || missing+=("${entry##*:}")
done
for tool in cargo; do
  command -v "$tool" >/dev/null 2>&1 || { echo "setup: $tool is missing: install a Rust toolchain (see rust-version in Cargo.toml)"; exit 1; }
done
if ! cargo nextest --version >/dev/null 2>&1; then
  echo "setup: installing cargo-nextest (once)"
  cargo install --locked --quiet cargo-nextest
fi
[ ${#missing[@]} -eq 0 ] && exit 0

mapfile -t missing < <(printf '%s\n' "${missing[@]}" | sort -u)
if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null 2>&1; then
  echo "setup: installing ${missing[*]}"
  log=$(mktemp)
  if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1; then
    tail -n 20 "$log"
    echo "setup: apt-get failed; the packages wanted are: ${missing[*]}"
    exit 1
  fi
  rm -f "$log"
else
  echo "setup: please install these Debian/Ubuntu packages (or run as root): ${missing[*]}"
  exit 1
fi
