# Pare: every target works from a fresh clone with Python 3.11+ and make; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On Linux pip's default torch is the CUDA build (several GB). TORCH_INDEX=<URL of PyTorch's CPU wheel index> avoids that.
TORCH_INDEX ?=
TORCH := torch==2.13.0

.PHONY: help install install-dev demo serve test test-docker lint format bench lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml requirements/demo.lock
	$(PIP) install --quiet --no-deps --require-hashes -r requirements/demo.lock
	$(PIP) install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(PIP) install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements/dev.lock
	$(PIP) install --quiet --no-deps --require-hashes -r requirements/dev.lock
	@touch $@

install: $(VENV)/.installed  ## make .venv with everything that serves and runs jobs
install-dev: $(VENV)/.installed-dev  ## the same, with what tests and linters need

lock: $(VENV)/.created  ## resolve pyproject.toml again into requirements/*.lock
	$(PIP) install --quiet 'uv>=0.9'
	@compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-package torch --override requirements/overrides.txt pyproject.toml" && set -x && \
	$$compile --extra queue -o requirements/service.lock && \
	$$compile requirements/torch.in --extra queue --extra engine -c requirements/service.lock -o requirements/worker.lock && \
	$$compile requirements/torch.in --extra demo -c requirements/worker.lock -o requirements/demo.lock && \
	$$compile requirements/torch.in --extra demo --group dev -c requirements/demo.lock -o requirements/dev.lock
