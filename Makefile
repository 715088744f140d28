# etcd-ferry: build, test and show it. `make demo` and `make test` install what is missing (Debian 12 and newer).

TARGET := $(or $(CARGO_TARGET_DIR),target)
# An etcd that .ci/install unpacked goes before the distribution's own, which may be too old.
export PATH := $(CURDIR)/target/etcd/bin:$(PATH)

.PHONY: demo test soak fuzz matrix mutants bench build deb audit sbom lint install install-tests clean

# Two regions on this machine for about 30 seconds. ARGS is passed on, for example: make demo ARGS=--keep
demo: build
	@$(TARGET)/release/etcd-ferry demo $(ARGS)

# With the failpoints, which no other build has: one build for all that tests.
TEST := cargo test --features failpoints
# Most tests wait for an etcd, a disk or a timer, so twice as many at once as there are processors.
export RUST_TEST_THREADS ?= $(shell expr $$(nproc) \* 2)

# Every test, with real etcd processes. ARGS is passed on, for example: make test ARGS="--test it bank"
test: install-tests
	$(TEST) $(ARGS)

# Every test with real processes again, with another etcd at one side: each of Debian's older ones as the origin and as the replica of ours.
matrix: install-tests
	@.ci/install bookworm target/etcd/bookworm
	@.ci/install trixie target/etcd/trixie
	@for old in bookworm trixie; do \
	  for side in ORIGIN REPLICA; do \
	    echo "matrix: $$(target/etcd/$$old/etcd --version | head -n 1) as the $$side"; \
	    env ETCD_FERRY_$${side}_ETCD=$(CURDIR)/target/etcd/$$old $(TEST) --test it $(ARGS) || exit 1; \
	  done; \
	done

# Feeds every decoder with what nobody would send, SECONDS for each target. Needs nightly Rust; cargo-fuzz is installed if it is missing.
# A single allocation of 2 MiB ends it, since none of the targets' limits allows one: the most is a frame's body, 1 MiB beyond its 64 KiB and
# half of them (src/wire/frame.rs); of a segment it is what is read ahead, 256 KiB. All memory together is far more: that is what the address
# sanitizer holds on to.
FUZZ_TARGETS := frame delta hello position segment config
fuzz: install
	@cargo +nightly --version >/dev/null || { echo "fuzz: nightly Rust is missing: rustup toolchain install nightly" >&2; exit 1; }
	@command -v c++ >/dev/null || { echo "fuzz: a C++ compiler is missing: apt-get install g++" >&2; exit 1; }
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	@for target in $(FUZZ_TARGETS); do \
	  mkdir -p fuzz/corpus/$$target; \
	  cargo +nightly fuzz run $$target fuzz/corpus/$$target fuzz/seeds -- \
	    -max_total_time=$(or $(SECONDS),30) -max_len=8192 -timeout=10 -rss_limit_mb=1024 -malloc_limit_mb=2 -print_final_stats=1 || exit 1; \
	done

# Breaks the product on purpose, fault by fault, and fails if the tests miss one. ARGS="--only SAN" runs those that name it, ARGS=--list
# lists all.
mutants: install-tests
	$(TEST) --test mutants -- $(ARGS)

# Fuzzes every decoder, then does more of what `make test` does a little of: the simulation over 100,000 seeds, and real processes under faults
# for 30 minutes. SEEDS=n alone: the simulation alone, over so many seeds; one that fails is printed, and run again by
# SEED=n cargo test --test it simulation. MINUTES=n alone: no simulation, shorter fuzzing, and real processes for so long. Both: all three.
SOAK_SEEDS = $(or $(SEEDS),$(if $(MINUTES),,100000))
SOAK_MINUTES = $(or $(MINUTES),$(if $(SEEDS),,30))
SOAK_FUZZ_SECONDS = $(or $(SECONDS),$(if $(MINUTES),10,30))
soak: install
	$(if $(SOAK_MINUTES),$(MAKE) --no-print-directory fuzz SECONDS=$(SOAK_FUZZ_SECONDS))
	$(if $(SOAK_SEEDS),SEEDS=$(SOAK_SEEDS) $(TEST) --test it simulation -- --nocapture)
	$(if $(SOAK_MINUTES),MINUTES=$(SOAK_MINUTES) $(TEST) --test it soak -- --nocapture)

# Beside etcdctl make-mirror, on real etcds; 40 to 55 minutes, or less of everything with ARGS=--quick. Fails if a bound is not kept. The small
# pieces: cargo bench --bench encode --bench segment
bench: install
	cargo bench --bench pipeline -- $(ARGS)

build: install
	cargo build --release

# A Debian package in target/debian, for Debian 12 and newer; docs/operating.md says what it does.
deb: build
	@deploy/debian/build $(TARGET)/release/etcd-ferry $(TARGET)/debian

# Licences, banned crates and sources (deny.toml); known advisories too, where their database can be reached. cargo-deny is installed if it is
# missing, which takes some minutes.
audit: install
	@cargo deny --version >/dev/null 2>&1 || cargo install --locked cargo-deny@0.20.2
	cargo deny --locked check licenses bans sources
	@if cargo deny --locked fetch db; then \
	  echo cargo deny --locked check advisories; \
	  cargo deny --locked check --disable-fetch advisories; \
	else \
	  echo "audit: advisories were NOT checked: their database cannot be reached from here" >&2; \
	fi

# What the program is made of, as CycloneDX JSON in target/sbom. cargo-cyclonedx is installed if it is missing.
sbom: install
	@cargo cyclonedx --version >/dev/null 2>&1 || cargo install --locked cargo-cyclonedx@0.5.9
	@mkdir -p $(TARGET)/sbom
	cargo cyclonedx --format json --describe binaries
	@mv etcd-ferry_bin.cdx.json $(TARGET)/sbom/etcd-ferry.cdx.json && echo "$(TARGET)/sbom/etcd-ferry.cdx.json"

lint: install
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings
	@# The fuzz targets too: checked, not linked, so that no C++ compiler is needed for what they are linked with.
	CUSTOM_LIBFUZZER_PATH=/none/libfuzzer.a cargo check --locked --target-dir target --manifest-path fuzz/Cargo.toml

install:
	@.ci/install

install-tests:
	@.ci/install --tests

clean:
	cargo clean
