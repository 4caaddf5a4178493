# The one entry point for people and for CI; `make` alone prints help.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?=
SEED ?=
ARGS ?=

INSTALL := $(PYTHON) shared/pageframe/config/install.py
PROTO_FILES := $(sort $(wildcard protos/pageframe/v1/*.proto))
SERVICE_PROTO_FILES := $(filter %_service.proto,$(PROTO_FILES))
export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Workers that spin while they wait slow everything down as soon as a core is shared.
export OMP_WAIT_POLICY ?= passive
# Without bytecode every process that starts compiles PyTorch anew, and tests start hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help setup setup-bench up test verify fix protos protos-check bench clean \
  bench-memory paper kv-dtype long-context soak trace-audit tenant-isolation fairness planning \
  pictures trace-pictures pool-page dashboard preemption stall-free sim chaos gate test-gpu test-compose bench-gpu \
  streams load-test tracing-cost \
  verify-format verify-lint verify-types verify-imports verify-protos fix-format fix-lint

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: ## Make .venv and install everything for development
	@$(INSTALL) --extra dev
	@python -m pageframe.kernels.cpu.build

up: ## Set everything up and serve a model (MODEL=name ARGS="--block-size 32")
	@$(INSTALL) --extra all
	@python -m pageframe.kernels.cpu.build
	@exec pageframe up $(if $(MODEL),--model $(MODEL)) $(ARGS)

# All tests at once share the cores: a test file is one process's, and each computes with one thread.
ALL_TESTS := --numprocesses auto --maxprocesses 4 --dist loadfile

test: setup ## Set everything up and run all tests (ARGS="tests/unit -k pool" for some, in one process)
	@pageframe model prepare smollm2-135m-instruct >/dev/null
	@OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1) python -m pytest $(or $(ARGS),$(ALL_TESTS))

verify: verify-format verify-lint verify-types verify-imports verify-protos protos-check test gate ## What CI runs

fix: fix-format fix-lint ## Repair what can be repaired by itself

verify-format: setup ## Check the format
	@ruff format --check .

verify-lint: setup ## Check the style
	@ruff check .

verify-types: setup ## Check the types
	@mypy

verify-imports: setup ## Check who imports whom
	@lint-imports

verify-protos: setup ## Check the style of the protos
	@cd protos && buf lint

fix-format: setup ## Format everything
	@ruff format .

fix-lint: setup ## Repair style faults
	@ruff check --fix .

# $(1): the folder to generate into
generate = python -m grpc_tools.protoc -Iprotos --python_out=$(1) --mypy_out=quiet:$(1) $(PROTO_FILES) \
  && python -m grpc_tools.protoc -Iprotos --grpc_python_out=$(1) --mypy_grpc_out=quiet:$(1) $(SERVICE_PROTO_FILES)

protos: setup ## Generate Python from the protos
	@$(call generate,protos)

protos-check: setup ## Check that the generated Python is that of the protos
	@folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	$(call generate,"$$folder"); \
	diff -r --exclude='*.proto' --exclude=__init__.py --exclude=py.typed --exclude=__pycache__ \
	  protos/pageframe/v1 "$$folder/pageframe/v1" >&2 \
	  || { echo "generated code is out of date: run make protos" >&2; exit 1; }

# The oldest Triton that kernels are compiled with, for one chip of each generation; the other is
# the one in constraints.txt, for every chip.
GATE_TRITON := 3.6.0

gate: setup .venv-gate/triton-$(GATE_TRITON) ## Compile all GPU kernels for every chip and judge the code; needs no GPU
	@python -m pageframe.kernels.gate --quiet $(GATE_ARGS)
	@PYTHONPATH=kernels .venv-gate/bin/python -m pageframe.kernels.gate --quiet \
	  --capability 80 --capability 90 --capability 100 $(GATE_ARGS)

.venv-gate/triton-$(GATE_TRITON):
	@python -m venv --clear .venv-gate
	@.venv-gate/bin/python -m pip install --quiet --no-compile --disable-pip-version-check triton==$(GATE_TRITON)
	@touch $@

# A machine that can install nothing takes what was carried there (docs/gpu.md): SETUP= says so.
SETUP ?= setup
GPU_PYTHON = $(if $(SETUP),python,$(PYTHON) -m bench.gpu.carry run)
GPU_TESTS := tests/unit/kernels/triton tests/unit/model/test_device_streams.py

test-gpu: $(SETUP) ## Test kernels and copies on this machine's GPU (SETUP= to install nothing)
	@$(GPU_PYTHON) -m pytest -m gpu $(GPU_TESTS) $(ARGS)

test-compose: setup ## Build the images and run the compose file for real (Debian, root)
	@pageframe model prepare smollm2-135m-instruct >/dev/null
	@python -m pytest -m compose tests/compose $(ARGS)

bench-gpu: $(SETUP) ## Measure kernels and engines on this machine's GPU (PEER=vllm, ARGS="--dry-run")
	@$(GPU_PYTHON) -m bench.gpu $(if $(PEER),--peer $(PEER)) $(ARGS)

bench: setup ## Measure all that a CPU has to reach (ARGS="--peer openvino=PYTHON", ARGS="--only split")
	@python -m bench $(ARGS)

setup-bench:
	@$(INSTALL) --extra bench

bench-memory: setup ## Measure the books of KV memory, per block, at two sizes of pool
	@python -m bench.memory_ops $(ARGS)

paper: setup-bench ## Reproduce the memory tables of the PagedAttention paper
	@pageframe model prepare smollm2-135m-instruct >/dev/null
	@python -m bench.paper $(ARGS)

kv-dtype: setup-bench ## Measure the error that quantised keys and values make
	@python -m bench.kv_dtype $(ARGS)

long-context: setup ## Sessions of 32k tokens on a pool for two: promotion beside recompute
	@python -m bench.long_context $(ARGS)

sim: setup ## Simulate the whole system with faults, in virtual time (SEED=n, or ARGS="--seeds 0:300")
	@python -m pageframe.lab.simulation $(if $(SEED),--seed $(SEED)) $(ARGS)

chaos: setup ## Kill processes of a running system 100 times; nothing may be lost (ARGS="--rounds 5")
	@model=$$(pageframe model prepare smollm2-135m-instruct) && \
	python -m bench.chaos --model "$$model" $(ARGS)

soak: setup ## A million random operations on KV memory; long random runs of real models
	@python -m bench.soak $(ARGS)
	@python -m pageframe.lab.simulation --seeds 0:10000
	@python -m pytest -m soak tests/exactness

trace-audit: setup ## Rebuild the pool from its trace alone; then a trace under full load
	@model=$$(pageframe model prepare smollm2-135m-instruct) && \
	python -m bench.trace_audit --model "$$model" $(ARGS)
	@python -m bench.trace_throughput --collector-away 60

tracing-cost: setup ## Measure what tracing every KV operation costs a system that serves (ARGS="--runner native")
	@pageframe model prepare smollm2-135m-instruct >/dev/null
	@python -m bench.tracing_cost $(ARGS)

tenant-isolation: setup ## See whether time tells one tenant of another's prompts
	@model=$$(pageframe model prepare smollm2-135m-instruct) && \
	python -m bench.tenant_isolation --model "$$model" $(ARGS)

fairness: setup ## See what a tenant that floods does to one that sends little (virtual time)
	@python -m bench.fairness $(ARGS)

planning: setup-bench ## Measure what a step costs the scheduler, by what changes in it
	@python -m bench.planning $(ARGS)

stall-free: setup-bench ## Long prompts beside decodes, with and without a target (simulated H200)
	@python -m bench.stall_free $(ARGS)

preemption: setup ## Measure preempting: twice as many blocks wanted as there are, by policy
	@python -m bench.preemption $(ARGS)

pictures: pool-page trace-pictures dashboard ## Make the pictures of the documents, each from a run

trace-pictures: setup ## Provoke the stalls of docs/reading-traces.md and draw their traces (ARGS=preempted)
	@model=$$(pageframe model prepare smollm2-135m-instruct) && \
	python -m bench.reading_traces --model "$$model" $(ARGS)

pool-page: setup ## Test the pool page in Chromium; draws its picture and tells how smooth it is
	@POOL_PAGE_BROWSER=required POOL_PAGE_PICTURES=docs/images POOL_PAGE_RESULTS=bench/results \
	python -m pytest -m browser tests/browser

dashboard: setup ## Test the Grafana dashboard before a real Prometheus, and draw it
	@DASHBOARD_PROMETHEUS=required DASHBOARD_PICTURES=docs/images python -m pytest tests/dashboard

streams: setup ## Keep 1,000 streams open through one gateway for 10 minutes (ARGS="--runner native")
	@python -m bench.streams $(ARGS)

# A load generator of others, in an environment of its own: it pins what Pageframe does not.
AIPERF := 0.13.0

load-test: setup .venv-load/aiperf-$(AIPERF) ## Run a public load generator (aiperf) against the OpenAI door
	@python -m bench.openai_load --aiperf .venv-load/bin/aiperf $(ARGS)

.venv-load/aiperf-$(AIPERF):
	@python -m venv --clear .venv-load
	@.venv-load/bin/python -m pip install --quiet --no-compile --disable-pip-version-check aiperf==$(AIPERF)
	@touch $@

clean: ## Remove caches and build output; keeps .venv and prepared models
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find services protos kernels shared tests -name __pycache__ -type d -prune -exec rm -rf {} +
