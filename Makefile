# `make` alone lists the targets. Each installs what it needs into .venv first, from the tested versions
# in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/embedded  ## send a batch of invented messages, from PostgreSQL to a simulated Mac, in under a minute
	@$(BIN)/python demo/demo.py

run: .venv/embedded  ## server and dispatcher over the embedded PostgreSQL in ./pgdata, until Ctrl-C
	@$(BIN)/python demo/demo.py --run

# The same every day: the same examples, the same order of the tests and of every set.
test: .venv/test  ## run the tests
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 3

# Chance is here: another seed at each run, unless SEED= gives one.
SEED ?= $(shell date +%s)
faults: .venv/faults  ## kill each process at each step, fail over to a standby, and break everything at random, in some 5 minutes
	$(BIN)/python -m pytest -m 'faults or hypothesis' --hypothesis-seed=$(SEED) || \
	    { echo 'replay: make faults SEED=$(SEED)'; exit 1; }

SECONDS ?= 3600
soak: .venv/faults  ## break everything at random for an hour; `make soak SEED=7 SECONDS=1` replays the run of seed 7
	@PYTHONPATH=. $(BIN)/python tools/chaos.py --seconds $(SECONDS) --seed $(SEED)

bench: .venv/bench  ## measure the product beside its peers and its limits, in less than 8 minutes on two cores
	@$(BIN)/python bench/bench.py

lint: .venv/lint  ## formatting, lints and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy .

# One stamp for each set of packages; a change of the versions installs anew.
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

.PHONY: help demo run test faults soak bench lint
