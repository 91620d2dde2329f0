# make serve   install on the first run, then serve the built-in model        ARGS="MODEL --prefill 2 …"
# make test    lint and every test             ROOM=router/queue: those of one room
# make quick   lint and the fast tests
# make help    the other targets

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
# Two that install at once would be in each other's way; -j may come from MAKEFLAGS.
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
LOCKS := setup/install.py $(wildcard setup/*.lock)
PRODUCT := __init__.py __main__.py cli common wire settings models kvcache sizing grammar engine transfer prefill decode worker router launch simulator tools \
	benchmarks setup
LINT_ROOT := $(VENV)/lint
# TORCH=any takes the torch of pip's index unchecked: an index of your own may have a build that no lock knows.
INSTALL_FLAGS := $(if $(filter any,$(TORCH)),--any-torch)
# Asked first: an older one cannot even read setup/install.py.
NEW_PYTHON := import sys; sys.version_info >= (3, 11) or sys.exit("kvferry needs Python 3.11 or newer: make install PYTHON=python3.12")
ARGS ?=
ROOM ?=
# One more than there are cores, for a quarter of a test is waiting. PROCESSES=1 leaves the machine to others.
PROCESSES ?= $(shell cores=$$(nproc); echo $$((cores < 4 ? cores + 1 : 4)))
# Tests start hundreds of processes. An environment that says otherwise makes each of them compile the product anew.
export PYTHONDONTWRITEBYTECODE :=
# A file's tests share servers: a process gets whole files, in the order of tests/conftest.py.
PYTEST = $(VENV)/bin/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

.PHONY: help install install-dev serve lock lint style types format test quick long sanitize coverage clients clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

# What is installed is for this folder and this Python, and names them: where one has changed, it is installed anew. It is
# used as it is by those who may not change it.
PLACE = $$(pwd -P), $$($(VENV)/bin/python -V 2>/dev/null)
$(shell [ ! -s $(VENV)/.installed ] || [ "$$(cat $(VENV)/.installed)" = "$(PLACE)" ] || rm -f $(VENV)/.installed* 2>/dev/null || \
	echo "$(VENV) may not be changed, and was installed for $$(cat $(VENV)/.installed)" >&2)

# Files and batches of clients are kept in a folder of the user's, unless KVFERRY_DATA_DIR names another. A file of
# settings says it by itself: the variable would overrule it.
ifeq ($(filter --config --config=%,$(ARGS)),)
serve: export KVFERRY_DATA_DIR ?= $(if $(filter /%,$(firstword $(XDG_DATA_HOME))),$(XDG_DATA_HOME),~/.local/share)/kvferry
endif
serve: install ## Serve a model (ARGS="MODEL --port 8001 …")
	@exec $(VENV)/bin/kvferry serve $(ARGS)

install: $(VENV)/.installed ## What serving needs, into .venv

install-dev: $(VENV)/.installed-dev ## That, and what the tests need

# What is installed, and how it is chosen: setup/install.py. Every file is checked against the hashes in setup/*.lock.
$(VENV)/.installed: pyproject.toml $(LOCKS)
	@$(PYTHON) -c '$(NEW_PYTHON)'
	$(PYTHON) setup/install.py --venv $(VENV) $(INSTALL_FLAGS)
	echo "$(PLACE)" > $@

$(VENV)/.installed-dev: pyproject.toml $(LOCKS)
	@$(PYTHON) -c '$(NEW_PYTHON)'
	$(PYTHON) setup/install.py --venv $(VENV) --dev $(INSTALL_FLAGS)
	echo "$(PLACE)" | tee $(VENV)/.installed > $@

lock: $(VENV)/.installed ## Write setup/*.lock anew, from pyproject.toml and constraints.txt
	@command -v uv >/dev/null || test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install -qq uv
	$(VENV)/bin/python setup/lock.py

# The root is the package: through this link it has the package's name, whatever the folder is called.
$(LINT_ROOT)/kvferry: | $(VENV)/.installed
	@mkdir -p $(LINT_ROOT)
	ln -sfn ../.. $@

lint: style types ## ruff and mypy

style: install-dev
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: install-dev $(LINT_ROOT)/kvferry
	@MYPYPATH=$(LINT_ROOT) $(VENV)/bin/python -m mypy $(addprefix $(LINT_ROOT)/kvferry/,$(PRODUCT) tests)

format: install-dev ## Put the code into shape
	@$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# Run these tests while mypy has a core for its minute; what it finds is said last.
define tests_beside_types
@$(MAKE) -s types >$(LINT_ROOT)/types.log 2>&1 & types=$$!
trap 'kill $$types 2>/dev/null || true' EXIT
failed=0
$(PYTEST) $(1) || failed=$$?
wait $$types || failed=$$?
cat $(LINT_ROOT)/types.log
exit $$failed
endef

test: style $(LINT_ROOT)/kvferry ## Lint and every test (ROOM=router/queue: those of one room)
	$(call tests_beside_types,tests/$(ROOM))

# These wait for little: as many processes as cores, each of which collects all tests.
quick: PROCESSES := $(shell cores=$$(nproc); echo $$((cores < 4 ? cores : 4)))
quick: style $(LINT_ROOT)/kvferry ## Lint and the fast tests: no servers, simulations or benchmarks
	$(call tests_beside_types,-m "not slow" tests $(addprefix --ignore tests/,e2e security simulation simulator benchmarks))

long: install-dev ## 200,000 simulated requests under faults: some ten minutes on two cores
	@$(VENV)/bin/python -m kvferry.tests.simulation --requests 200000 --processes 2

sanitize: install-dev ## Tests of the C++ under address and undefined-behaviour sanitizers: some twenty minutes
	@$(VENV)/bin/python -m kvferry.tests.sanitized

coverage: install-dev ## Every test, and which lines of the product it ran
	@$(PYTEST) --cov --cov-report term:skip-covered tests

clients: install-dev ## Unmodified client libraries call a server, each in an environment of its own
	@test -x $(VENV)/bin/uv || $(VENV)/bin/python -m pip install -qq uv
	$(VENV)/bin/python -m kvferry.tests.clients

clean: ## Remove what was installed and built
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
