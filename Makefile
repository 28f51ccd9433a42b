# `make` lists the targets. Each target first installs what it needs into .venv, in the versions of constraints.txt.

PYTHON ?= python3
BIN := .venv/bin

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

demo: .venv/embedded  ## import people and send three batches over a stand-in for Messages, in under a minute
	@$(BIN)/python demo/demo.py

demo-page: .venv/embedded  ## the same, and serve the owner's page over it, until Ctrl-C
	@$(BIN)/python demo/demo.py --page

run: .venv/embedded  ## run the server and the dispatcher over the embedded PostgreSQL in ./pgdata, until Ctrl-C
	@$(BIN)/python demo/demo.py --run

# Every run is the same: the examples, the order of the tests and the order of sets are fixed.
test: .venv/test  ## run the tests
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -n 3

owner-test: .venv/test  ## run the tests of composing, importing, the owner's API and command line
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -m 'owner and not faults' -n 3

page-test: .venv/page  ## run the tests of the owner's page in a real browser: Debian's chromium
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -m page -n 4

pictures: .venv/page  ## take the pictures of the owner's page for the documentation from the running demo
	@$(BIN)/python tools/pictures.py docs/pictures

# A different seed at each run, unless you set SEED.
# WORKERS=2 takes half the time, and does not print the figures of docs/reliability.md.
WORKERS ?= 0
SEED := $(or $(SEED),$(shell date +%s))
faults: .venv/faults  ## kill each process at each step, fail over to a standby, inject random faults, in about 8 minutes
	$(BIN)/python -m pytest -n $(WORKERS) -m 'faults or hypothesis' --hypothesis-seed=$(SEED) || \
	    { echo 'replay: make faults SEED=$(SEED)'; exit 1; }

mac-test: .venv/test  ## run the tests of the sender on the Mac
	PYTHONHASHSEED=0 $(BIN)/python -m pytest -m 'mac and not (mac_faults or faults)' -n 3

mac-faults: .venv/test  ## kill the sender on the Mac, Messages and osascript at each step, in a quarter of an hour
	$(BIN)/python -m pytest -m mac_faults -n 3

SECONDS ?= 3600
soak: .venv/faults  ## inject random faults for an hour; `make soak SEED=7 SECONDS=1` replays the round of seed 7
	@PYTHONPATH=.:mac $(BIN)/python tools/chaos.py --seconds $(SECONDS) --seed $(SEED)

bench: .venv/bench  ## compare the product with its peers and its limits, in 11 minutes on two cores
	@$(BIN)/python bench/bench.py

bench-test: .venv/test  ## run each measurement of the benchmark once, in a small size
	$(BIN)/python -m pytest -m bench -n 2

lint: .venv/lint  ## check formatting, lints and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy .
	$(BIN)/vermin --quiet --no-tips --violations --target=3.9- mac/mac_sender.py

# One stamp file for each set of packages. If the versions change, make installs the packages again.
.venv/%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$*]'
	@touch $@

.PHONY: help demo demo-page run test owner-test page-test pictures faults mac-test mac-faults soak bench bench-test lint
