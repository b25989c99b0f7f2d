# Needs Python 3.10 or newer with venv, g++ and make; the rest is installed into .venv.
#   PYTHON         interpreter that makes .venv; `gpu` runs in it  (python3)
#   TORCH          the torch to install                            (torch==2.13.0)
#   TRIMTAB_BUILD  auto, python, native or cuda: see setup.py      (auto)
#   FAMILY         one kernel family, for bench and gpu            (all)
#   ARGS           more arguments for the demo or for pytest
#   TORCHES        the torches that a wheel is tried with          (torch==2.10.0 torch==2.14.1)
SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
TRIMTAB_BUILD ?= auto
FAMILY ?=
ARGS ?=
TORCHES ?= torch==2.10.0 torch==2.14.1
export TRIMTAB_BUILD
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
PEERS := liger-kernel==0.8.5 cut-cross-entropy==25.1.1
CSRC := $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.inl %.cpp %.cu %.cuh,$(CSRC) $(wildcard tests/*/*))
FAMILIES := $(or $(FAMILY),$(patsubst bench/bench_%.py,%,$(wildcard bench/bench_*.py)))

# Another torch asks for another Triton; with ours pinned pip would put our torch in its place.
OTHER_TRITON := $(if $(filter torch==2.13.0,$(TORCH)),,s/^triton==.*/triton/)

# Stamps. Those that depend on a variable carry its value, so that another value is not ignored.
TORCHED := $(VENV)/.torch-$(subst /,_,$(TORCH))
REQUIRED := $(VENV)/.required
BUILT := $(VENV)/.built-$(TRIMTAB_BUILD)

.DEFAULT_GOAL := help
.PHONY: help build demo test lint format docs wheel bench gpu clean $(FAMILIES:%=bench-%)

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '2,7s/^#//p' $(MAKEFILE_LIST)

build: $(BUILT)  ## the environment and the compiled libraries; compiles only what changed

demo: $(BUILT)  ## the algorithms on real text, with tables and pictures in trimtab-demo/
	@$(BIN)/python -m trimtab demo $(ARGS)

test: $(BUILT)  ## the whole test suite
	@$(BIN)/pytest $(ARGS)

lint: $(REQUIRED)  ## ruff, mypy, clang-format
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy
	@$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

format: $(REQUIRED)  ## rewrites the sources in the project's style
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .
	@$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

docs: $(VENV)/.docs  ## the documents as a site, build/site/index.html
	@test -x $(BIN)/mkdocs || { echo 'the site needs Python 3.11.5: rm -r $(VENV); make PYTHON=python3.X docs'; exit 1; }
	@$(BIN)/python docs/measured.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

wheel: $(BUILT)  ## dist/*.whl, tried in a new environment with each torch of TORCHES
	@$(BIN)/python tests/try_wheel.py $(TORCHES)

bench: $(FAMILIES:%=bench-%)  ## the benchmark suites, ours beside the peers', into bench/results/

$(FAMILIES:%=bench-%): bench-%: $(BUILT) $(VENV)/.peers
	@mkdir -p build
	@$(BIN)/pytest --timeout=0 bench/bench_$*.py --benchmark-json=build/bench-$*.json --benchmark-quiet $(ARGS)
	@$(BIN)/python bench/report.py build/bench-$*.json

gpu:  ## build, tests, benchmarks and memory checker on CUDA, with the torch of PYTHON
	@$(PYTHON) bench/gpu.py $(FAMILY) $(ARGS)

clean:  ## removes what was built; .venv stays
	rm -rf build dist *.egg-info python/trimtab/*.so python/trimtab/_build_info.json
	rm -f $(VENV)/.built-*
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(TORCHED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'trimtab needs Python 3.10 or newer: make PYTHON=python3.X'; exit 1; }
	@echo 'installing $(TORCH) into $(VENV): the longest step, once'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) '$(TORCH)'
	@rm -f $(VENV)/.torch-* && touch $@

$(REQUIRED): $(TORCHED) requirements-dev.txt
	@echo 'installing requirements-dev.txt'
	@$(PIP) -r <(sed '$(OTHER_TRITON)' requirements-dev.txt) '$(TORCH)'
	@touch $@

$(VENV)/.docs: $(REQUIRED) requirements-docs.txt
	@$(PIP) -r requirements-docs.txt
	@touch $@

# Torch and Triton are there already; the peers' other requirements are not used here.
$(VENV)/.peers: $(REQUIRED) Makefile
	@$(PIP) --no-deps $(PEERS)
	@touch $@

$(BUILT): $(REQUIRED) setup.py pyproject.toml $(CSRC)
	@echo 'building trimtab (TRIMTAB_BUILD=$(TRIMTAB_BUILD))'
	@$(PIP) --no-deps --no-build-isolation --editable .
	@rm -f $(VENV)/.built-* && touch $@
