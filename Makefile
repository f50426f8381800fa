# Two commands on a fresh machine: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Training needs Python 3.11 or newer; requirements/install.sh chooses torch's build.
export PYTHON ?= python3
VENV ?= .venv
# Which versions: locked, oldest or newest (requirements/install.sh).
VERSIONS ?= locked
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JANUS := $(BIN)/janus-cluster
NODES ?= 2
CLUSTER ?= slurm
DEMO_DATA ?= demo_data
PYTEST_ARGS ?=
FAST := -m "not slurm and not train and not slow"
# Of test-pythons: versions (3.10 3.13), `ends` for the oldest and the newest found, nothing for all
PYTHONS ?=
BENCH_OUT ?= .cache/bench
SLURM_PROGRAMS := slurmctld slurmd slurmdbd munged mariadbd ip tc shellcheck cc tmux
SLURM_SUITE ?= trixie
SLURM_PACKAGES := slurm-wlm slurmdbd munge mariadb-server iproute2 shellcheck gcc libc6-dev tmux

.PHONY: help install lock demo test test-fast test-oldest test-newest test-pythons test-slurm-versions check format
.PHONY: bench submit preflight tail sandbox slurm clean

help:  ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):[^#]*## */\1\t/' | expand -t 22

install: $(STAMP)  ## Make .venv with everything that training and the tests need

$(STAMP): pyproject.toml $(wildcard requirements/*)
	@requirements/install.sh $(VENV) $(VERSIONS)
	@touch $(STAMP)

lock:  ## Write requirements/*.txt anew: the newest versions that pyproject.toml admits today
	@$(PYTHON) -m venv .cache/uv && .cache/uv/bin/python -m pip install --quiet --disable-pip-version-check uv
	@UV=.cache/uv/bin/uv requirements/lock.sh

$(DEMO_DATA)/.complete: $(STAMP)
	@$(BIN)/python -m janus_cluster.janusvln.world.demo $(DEMO_DATA) --episodes 64 --seed 0
	@touch $@

demo: $(STAMP) $(DEMO_DATA)/.complete  ## The whole flow here: two simulated nodes, CPU, no Slurm, no root
	@DEMO_DATA=$(DEMO_DATA) $(JANUS) submit demo --nodes 2 --cluster local --follow
	@$(JANUS) simulate demo --episodes 20

slurm:  # The Debian packages of the sandbox and of the shell tests, where this user may install them
	@export PATH="$$PATH:/usr/local/sbin:/usr/sbin:/sbin"; \
	missing=""; for program in $(SLURM_PROGRAMS); do command -v $$program >/dev/null || missing="$$missing $$program"; done; \
	[ -n "$$missing" ] || exit 0; \
	sudo=""; [ "$$(id -u)" = 0 ] || sudo="sudo -n"; \
	if command -v apt-get >/dev/null && $$sudo true 2>/dev/null; then \
	  echo "missing:$$missing; installing $(SLURM_PACKAGES)"; \
	  $$sudo apt-get update -q >/dev/null && \
	  $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $(SLURM_PACKAGES) >/dev/null && exit 0; \
	fi; \
	echo "=================================================================================="; \
	echo "NO SLURM: missing$$missing, and not installed: the real-Slurm tests cannot run."; \
	echo "As root: apt-get update && apt-get install $(SLURM_PACKAGES)"; \
	echo "=================================================================================="; \
	[ "$${REQUIRE_SLURM:-0}" != 1 ]

test: $(STAMP) slurm  ## All tests, the real-Slurm ones too (REQUIRE_SLURM=1: no Slurm is a failure)
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(STAMP)  ## The tests that need neither torch nor Slurm (under a minute)
	@$(BIN)/python -m pytest -q -n 2 $(FAST) $(PYTEST_ARGS)

test-pythons:  ## The fast tests on every Python of this machine, without torch (PYTHONS=ends: oldest, newest)
	@$(PYTHON) tests/pythons.py $(PYTHONS) -- -n 2 $(FAST) $(PYTEST_ARGS)

test-oldest:  ## All tests with the oldest versions that pyproject.toml admits (before a release)
	@$(MAKE) test VERSIONS=oldest VENV=.cache/oldest

test-newest:  ## All tests with the newest versions that pyproject.toml admits (before a release)
	@$(MAKE) test VERSIONS=newest VENV=.cache/newest

test-slurm-versions: $(STAMP)  ## The Slurm tests on Debian 13's Slurm, in a root of its own (needs root, a Debian mirror)
	@command -v mmdebstrap >/dev/null || { apt-get update -q >/dev/null && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends mmdebstrap debian-archive-keyring >/dev/null; } || \
	  { echo "NOT TESTED: mmdebstrap is missing and could not be installed. As root: apt-get install mmdebstrap"; exit 1; }
	@tests/slurm_versions/run.sh $(SLURM_SUITE) $(PYTEST_ARGS)

check: $(STAMP)  ## Format, lint, types, boundaries
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

format: $(STAMP)  ## Rewrite in house format
	@$(BIN)/ruff format . && $(BIN)/ruff check --fix .

bench: $(STAMP)  ## What the command line and a training step cost, as ratios (CPU, minutes; benchmarks/README.md)
	@mkdir -p $(BENCH_OUT)
	@{ $(BIN)/python -m benchmarks.startup; echo; \
	  OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu KINETO_LOG_LEVEL=99 \
	    $(BIN)/python -m benchmarks.training_step --json $(BENCH_OUT)/bench.json; \
	} | tee $(BENCH_OUT)/bench.txt
	@echo "written: $(BENCH_OUT)/bench.txt, bench.json"

submit: $(STAMP)  ## Submit the main job: make submit NODES=2 CLUSTER=slurm
	@$(JANUS) submit --nodes $(NODES) --cluster $(CLUSTER)

preflight: $(STAMP)  ## Judge the nodes without training: make preflight NODES=2
	@$(JANUS) preflight --nodes $(NODES) --cluster $(CLUSTER)

tail: $(STAMP)  ## Follow a job: make tail JOB=12
	@test -n "$(JOB)" || { echo "which job? make tail JOB=<job id, run name or run folder>"; $(JANUS) list; exit 2; }
	@$(JANUS) tail "$(JOB)"

sandbox: $(STAMP) slurm  ## Start the rehearsal Slurm on this machine: make sandbox NODES=4
	@$(JANUS) sandbox up --nodes $(NODES)

clean:  ## Remove the environment, caches and demo data; runs/ stays
	@rm -rf $(VENV) $(DEMO_DATA) build dist .cache/slurm-root .pytest_cache .mypy_cache .ruff_cache .import_linter_cache *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
