# Pare: every target works from a fresh clone with Python 3.11+ and make; `make help` lists them.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# On Linux pip's default torch is the CUDA build (several GB). TORCH_INDEX=<URL of PyTorch's CPU wheel index> avoids that.
TORCH_INDEX ?=
TORCH := torch==2.13.0

# `make test PYTEST_ARGS="-k digits -x"` narrows a run; `make serve SERVE_ARGS="--port 9000"` and
# `make chaos CHAOS_ARGS="--seed 7"` pass options on.
PYTEST_ARGS ?=
SERVE_ARGS ?=
CHAOS_ARGS ?=

.PHONY: help install install-dev demo serve test test-faults chaos fuzz fuzz-http test-docker test-gpu lint format bench lock audit wheels clean

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

demo: install  ## train a small CNN, make it smaller through a real service, show before and after
	$(BIN)/pare demo

serve: install  ## run the whole service on this machine (loopback, data in ./pare-data)
	$(BIN)/pare serve $(SERVE_ARGS)

test: install-dev  ## the tests that need neither a GPU nor Docker, but for the long ones
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not docker and not gpu and not faults and not long" $(PYTEST_ARGS)

test-faults: install-dev  ## every fault case, each without its defence, and the long tests
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -n 2 -m "(faults or long) and not docker and not gpu" --timeout 600 $(PYTEST_ARGS)

chaos: install-dev  ## five minutes of random faults over a whole service, then its invariants
	$(BIN)/python -m tests.faults.chaos $(CHAOS_ARGS)

# `make fuzz FUZZ_SECONDS=3600 FUZZ_SEED=7 FUZZ_FORMATS=pt2,onnx` sets how long, from which seed and what.
FUZZ_SECONDS ?= 600
fuzz: install-dev  ## alter valid models and datasets at random and check what intake makes of them
	$(BIN)/python -m tests.fuzz.hunt --seconds $(FUZZ_SECONDS) $(if $(FUZZ_SEED),--seed $(FUZZ_SEED)) \
	  $(if $(FUZZ_FORMATS),--formats $(FUZZ_FORMATS))

# `make fuzz-http HTTP_EXAMPLES=1000`: so many requests to each operation, and 20 times as many sequences of them.
HTTP_EXAMPLES ?= 100
fuzz-http: install-dev  ## generated requests over real sockets, other ones each time, for some minutes
	HTTP_EXAMPLES=$(HTTP_EXAMPLES) $(BIN)/pytest $(PYTEST_ARGS) tests/app/api/test_live_requests.py

test-gpu: install-dev  ## the tests that need a CUDA device
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

test-docker: install-dev  ## build the images, run a job in containers, kill a worker on the way
	$(BIN)/pytest -m docker --timeout 1500 $(PYTEST_ARGS) tests/docker

lint: install-dev  ## ruff, mypy --strict, import contracts
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: install-dev  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

bench: install-dev  ## run the benchmarks and print their tables (PARE_BENCH_DATA names a folder with extra models)
	PYTHON=$(BIN)/python benchmarks/all.sh

# Strict: a package that the source of advisories does not know fails it, instead of passing for safe.
audit: $(VENV)/.created  ## look every locked package up among the known vulnerabilities; needs network
	$(PIP) install --quiet 'pip-audit>=2.10,<3'
	for lock in requirements/*.lock; do $(BIN)/pip-audit --strict --disable-pip --require-hashes -r $$lock || exit 1; done

clean:  ## remove the environment, caches and built files; never data
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock: $(VENV)/.created  ## resolve pyproject.toml again into requirements/*.lock
	$(PIP) install --quiet 'uv>=0.9'
	@compile="$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header \
	  --no-emit-index-url --no-emit-package torch --override requirements/overrides.txt pyproject.toml" && set -x && \
	$$compile --extra queue --extra s3 --extra otel -o requirements/service.lock && \
	$$compile requirements/torch.in --extra queue --extra s3 --extra otel --extra engine --extra hf -c requirements/service.lock -o requirements/worker.lock && \
	$$compile requirements/torch.in --extra demo -c requirements/worker.lock -o requirements/demo.lock && \
	$$compile requirements/torch.in --extra demo --extra s3 --extra otel --group dev --group bench -c requirements/demo.lock -o requirements/dev.lock

# The Docker build prefers what lies in wheels/: an air-gapped machine, a private index, a chosen torch build are all its content.
wheels: $(VENV)/.created  ## download into wheels/ what the images install, by this machine's pip configuration
	# What only an older 3.11 needs is taken as well: the images' Python may be one.
	sed -E "s/ ; python_full_version < '3\.11\.[0-9]+'//" requirements/worker.lock > wheels/worker.lock
	$(PIP) download -qq --no-deps --require-hashes --dest wheels -r wheels/worker.lock
	rm wheels/worker.lock
	$(PIP) download -qq --dest wheels $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) --no-deps $(TORCH)
	$(PIP) download -qq --dest wheels 'hatchling>=1.27,<2'
