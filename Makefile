# Every target sets up what it needs and never calls sudo. PYTHON=/path chooses the interpreter.

VENV := .venv
BIN := $(VENV)/bin
KEEP ?=
ASK ?=
SEEDS ?= 20
COUNT ?= 1000000
PEERS ?= meshd
PYTEST ?=
# Test processes beside each other: one more than processors, since what takes long mostly waits. With options, none.
JOBS ?= $(if $(PYTEST),0,$(shell echo $$(($$(getconf _NPROCESSORS_ONLN) + 1))))
SOURCES := meshd cms naming plugins

# ASYNC114: wants a list of every startable function. ASYNC124: handlers of Starlette and hooks are async
# by contract, with or without an await. ASYNC9xx: opt-in rules for libraries without structured callers.
FLAKE8_IGNORED := ASYNC114,ASYNC124,ASYNC9

# A question may hold any character: it travels through the environment and is never expanded.
override ASK := $(value ASK)
export ASK PYTHON

.DEFAULT_GOAL := help
.PHONY: help venv demo demo-stop test check check-style check-mypy check-pyright check-async check-imports check-bandit audit format sim fuzz plots bench bench-gossip build clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: ## set up .venv: every dependency, llama-cpp-python built here
	@deploy/bootstrap.sh

demo: venv ## five daemons, a real model; KEEP=1 leaves them running, ASK='...' takes any question
	@$(BIN)/python deploy/demo/demo.py $(if $(KEEP),--keep) $(if $(ASK),--ask="$$ASK")

demo-stop: venv ## end the mesh that KEEP=1 left running
	@$(BIN)/python deploy/demo/demo.py --stop

test: venv ## all tests; PYTEST='-k name' passes options, JOBS=N processes beside each other
	@$(BIN)/python -m pytest -n $(JOBS) $(PYTEST)

check: check-style check-mypy check-pyright check-async check-imports check-bandit ## linters, types, import rules, bandit; -j runs them beside each other

check-style: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check-mypy: venv
	$(BIN)/mypy

check-pyright: venv
	$(BIN)/pyright

check-async: venv
	$(BIN)/flake8 --select=ASYNC --extend-ignore=$(FLAKE8_IGNORED) $(SOURCES)

check-imports: venv
	$(BIN)/lint-imports

check-bandit: venv
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive $(SOURCES) deploy

audit: venv ## are the installed packages the pinned ones, has any a known advisory
	@$(BIN)/python deploy/audit.py

format: venv ## let ruff format and mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sim: venv ## the simulated mesh, every scenario with SEEDS=N seeds
	@$(BIN)/python -m tests.sim.run --seeds $(SEEDS)

fuzz: venv ## COUNT=N broken datagrams, streams and files against the real code
	@$(BIN)/python -m tests.fuzz.run --count $(COUNT)

plots: venv ## the simulator's figures as pictures in docs/figures (installs matplotlib)
	@$(BIN)/python -m pip install --quiet -c constraints.txt --group plots
	@$(BIN)/python -m tests.sim.run --plots docs/figures

bench: venv ## the figures of docs/benchmarks.md
	@for figure in $(notdir $(basename $(wildcard tests/bench/bench_*.py))); do \
	    echo "== $$figure"; $(BIN)/python -m tests.bench.$$figure || exit; done

bench-gossip: venv ## membership beside other libraries; PEERS=meshd,kinship,... (about 40 minutes, needs root)
	@$(BIN)/python -m tests.bench.gossip.run --peers $(PEERS) --out gossip.jsonl
	@$(BIN)/python -m tests.bench.gossip.report gossip.jsonl

build: venv ## wheel and source archive in dist/
	@$(BIN)/python -m build --no-isolation --outdir dist

clean: ## remove what was built here, .venv too
	rm -rf $(VENV) .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
