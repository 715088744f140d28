# etcd-ferry: build, test and show it. `make demo` and `make test` install what is missing (Debian 12 and newer).

TARGET := $(or $(CARGO_TARGET_DIR),target)
# An etcd that .ci/install unpacked goes before the distribution's own, which may be too old.
export PATH := $(CURDIR)/target/etcd/bin:$(PATH)

.PHONY: demo test soak mutants bench build lint install clean

# Two regions on this machine for about 30 seconds. ARGS is passed on, for example: make demo ARGS=--keep
demo: build
	@$(TARGET)/release/etcd-ferry demo $(ARGS)

# Every test, with real etcd processes. ARGS is passed on, for example: make test ARGS="--test it bank"
test: install
	cargo test $(ARGS)

# Breaks the product on purpose, fault by fault, and fails if the tests miss one. ARGS="--only SAN" runs those that name it, ARGS=--list
# lists all.
mutants: install
	cargo test --test mutants -- $(ARGS)

# More of what `make test` does a little of. SEEDS=n: the simulation alone, over so many seeds; one that fails is printed, and run again by
# SEED=n cargo test --test it simulation. MINUTES=n: real processes under faults alone, for so long. Neither: both, 100,000 seeds and 30 minutes.
soak: install
	$(if $(MINUTES),,SEEDS=$(or $(SEEDS),100000) cargo test --test it simulation -- --nocapture)
	$(if $(SEEDS),,MINUTES=$(or $(MINUTES),30) cargo test --test it soak -- --nocapture)

# Beside etcdctl make-mirror, on real etcds; about 35 minutes, or less of everything with ARGS=--quick. Fails if a bound is not kept. The small
# pieces: cargo bench --bench encode --bench segment
bench: install
	cargo bench --bench pipeline -- $(ARGS)

build: install
	cargo build --release

lint: install
	cargo fmt --check
	cargo clippy --all-targets -- -D warnings

install:
	@.ci/install

clean:
	cargo clean
