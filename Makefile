# The whole interface of the repository: `make help`.
SHELL := /bin/bash
NODES ?= 1
BENCH ?= all
EXAMPLE ?= examples/two-pods
REL := target/release
export SLUICE_IMAGE ?= $(CURDIR)/target/guest/sluice-appliance

.PHONY: help setup build image run demo test check boot-test bench fuzz fuzz-merge miri clean

help: ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## install what tests and benchmarks lack (root on Debian/Ubuntu), or say what
	@tests/scripts/setup.sh test

setup-%:
	@tests/scripts/setup.sh $*

image: ## the guest image: one static ELF with a PVH note
	@cargo build --profile guest -p sluice-guest --bin sluice-appliance

build: setup-run image ## everything, optimised
	@cargo build --release -p sluice-vmm -p sluice-trunk -p sluice-process -p sluice-host -p sluice-cni -p sluice-replay -p sluice-tests

run: build ## one node with the pods of EXAMPLE, live status until Ctrl-C, then nothing is left
	@$(REL)/sluice-lab run $(EXAMPLE)

demo: setup-demo build ## bring it up, send traffic, print a checklist; NODES=2 for the overlay
	@$(REL)/sluice-lab demo --nodes $(NODES)

test: setup ## everything that proves the product; ends with `N passed, N failed`
	@tests/scripts/test.sh

check: image ## format, lints, documentation, guest build
	@cargo fmt --all -- --check
	@cargo clippy --quiet --workspace --all-targets -- -D warnings
	@cargo clippy --quiet --profile guest -p sluice-guest --bin sluice-appliance -- -D warnings
	@RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --quiet --workspace --no-deps --document-private-items

boot-test: setup ## the image under QEMU without KVM: self-test in ring 3, then real traffic
	@tests/scripts/test.sh boot

bench: setup build ## measure against the kernel's paths in one interleaved run; BENCH=node, nodes or pipeline for a part, QUICK=1 for less
	@tests/scripts/bench.sh $(BENCH)

fuzz: ## a minute of each fuzz target; FUZZ_SECONDS and TARGETS="frames rings" to change it
	@tests/scripts/fuzz.sh $(TARGETS)

fuzz-merge: ## keep what fuzzing has found since as seeds: the fewest inputs that reach the same code
	@tests/scripts/fuzz.sh --merge $(TARGETS)

miri: ## the memory that the trunk shares with a guest, each access checked: by Miri, else by AddressSanitizer
	@tests/scripts/miri.sh

clean: ## remove what was built
	@cargo clean
