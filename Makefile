# What one does here; `make` alone lists the targets. Nothing is needed beyond Rust and a C toolchain,
# except for the tests: Java 17 and Maven for a broker, Python 3.10 for an independent reader.

# In CI the artifacts live outside the clone, so that a repeated run is quick.
ifndef CARGO_TARGET_DIR
ifdef CI
export CARGO_TARGET_DIR := $(HOME)/.cache/millrace-target
endif
endif
TARGET := $(or $(CARGO_TARGET_DIR),target)

# Dependencies are compiled once, optimised, for everything (see the profiles in Cargo.toml). A
# release differs in our own crates only: optimised, without assertions, hence without failpoints.
RELEASE := CARGO_PROFILE_DEV_OPT_LEVEL=3 CARGO_PROFILE_DEV_DEBUG_ASSERTIONS=false CARGO_PROFILE_DEV_OVERFLOW_CHECKS=false

export MILLRACE_TEST_KAFKA ?= 127.0.0.1:9092
SERVICES := tests/services

.PHONY: help build demo test test-unit test-slt test-crash crash-long sim sim-long oracle oracle-long test-http tpch check fmt bench idle services-start services-stop
.DEFAULT_GOAL := help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  make %-15s %s\n", $$1, $$2 }'

build: ## Build the binary: target/release/millrace
	@$(RELEASE) cargo build --workspace --bins
	@mkdir -p target/release
	@cp -f $(TARGET)/debug/millrace target/release/millrace.new && mv -f target/release/millrace.new target/release/millrace
	@echo "built target/release/millrace"

demo: build ## Run the Nexmark pipeline and watch it (Ctrl-C ends it)
	@demo/demo.sh target/release/millrace

test: ## Install what the tests need and run everything that CI runs
	@tests/run.sh

test-unit: ## Run the unit tests alone
	@cargo test --workspace --lib --bins

test-slt: ## Run the SQL corpus alone (MILLRACE_SLT=joins picks files)
	@$(SERVICES)/kafka.sh start >/dev/null
	@cargo build --workspace --all-targets && cargo test --workspace --test slt

test-crash: ## Run the crash tests alone
	@$(SERVICES)/kafka.sh start >/dev/null && $(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --all-targets && cargo test --workspace --test crash -- --nocapture --test-threads 1

crash-long: ## 200 kills and 30 zombies (about twenty minutes)
	@$(SERVICES)/kafka.sh start >/dev/null && $(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --all-targets
	@MILLRACE_CRASH_KILLS=200 MILLRACE_CRASH_ZOMBIES=30 cargo test --workspace --test crash -- --nocapture --test-threads 1

sim: ## The simulations and the model of what `make test` runs, alone (seconds)
	@cargo test --workspace --lib -- --nocapture sim:: model::

sim-long: ## 22,000 seeded schedules and a larger model (minutes); figures in docs/operating/evidence
	@cargo test --workspace --lib -- --ignored --nocapture --test-threads 1 no_schedule_of_ten_thousand no_order_of_more_events

oracle: ## Random queries and schedules against one-shot queries and DuckDB, alone (2,000 pairs; MILLRACE_SEED=n for others)
	@$(SERVICES)/kafka.sh start >/dev/null && $(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --all-targets
	@MILLRACE_ORACLE_PAIRS=$${MILLRACE_ORACLE_PAIRS:-2000} cargo test --workspace --test properties -- --nocapture

oracle-long: ## 50,000 pairs of query and schedule (hours)
	@$(SERVICES)/kafka.sh start >/dev/null && $(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --all-targets
	@MILLRACE_SEED=$${MILLRACE_SEED:-$$(date +%s)} MILLRACE_ORACLE_PAIRS=$${MILLRACE_ORACLE_PAIRS:-50000} cargo test --workspace --test properties -- --nocapture

test-http: ## Run the tests of the HTTP API and of outside services alone
	@$(SERVICES)/kafka.sh start >/dev/null && $(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --all-targets && cargo test --workspace --test http --test services

tpch: ## Compare TPC-H's views under refreshes with batch answers and DuckDB, at scale 1 (MILLRACE_TPCH_SCALE=0.1)
	@$(SERVICES)/pyiceberg.sh install
	@cargo build --workspace --bins
	@MILLRACE_TEST_SILENCE_S=3600 MILLRACE_TPCH_SCALE=$${MILLRACE_TPCH_SCALE:-1} cargo test --workspace --test http -- --nocapture tpch

check: ## Check format and lints
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- -D warnings

fmt: ## Format the sources
	@cargo fmt --all

bench: ## Measure Nexmark (see benches/)
	@$(RELEASE) cargo build --workspace --bins
	@$(TARGET)/debug/millrace-benches nexmark --input memory --events 5000000

idle: build ## Measure the CPU time of a server whose sources are quiet (takes a minute)
	@tests/idle.sh target/release/millrace

services-start: ## Start the broker of the tests
	@$(SERVICES)/kafka.sh start

services-stop: ## Stop it
	@$(SERVICES)/kafka.sh stop
