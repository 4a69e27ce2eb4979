# Every target sets up what it needs: a pinned .venv here, wheels from a folder on a GPU machine.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
PRESET ?= demo
MINUTES ?= 10
RUN ?= runs/$(PRESET)

# On a GPU machine: its own python3, missing pure-Python wheels from WHEELS, results into OUT.
GPU_PYTHON ?= python3
WHEELS ?=
OUT ?= out
LANE ?= gpu
# The machine may be lent for ten at a time, and results are written at the end.
GPU_MINUTES ?= 6
TUNE_MINUTES ?= 4
# Ops to tune; none named is all.
OPS ?=
# Which benchmark lines, as pytest's -k; empty is all.
LINES ?=

.PHONY: help test test-full lint lanes lane-cpu lane-interpret lane-aot lane-compiled bench check train speedrun \
        another-set \
        gpu-wheels gpu-test gpu-bench gpu-tune gpu-site full-sets full-tritons full-trainers clean

help:
	@echo "make test       lint, types, the four CPU lanes and one other instruction set"
	@echo "make test-full  the same in long form, every instruction set, other tritons, other trainers"
	@echo "make lint       ruff check, ruff format, mypy"
	@echo "make bench      our ops beside their peers, on this machine"
	@echo "make check      our torch path against the best eager peer, turn by turn"
	@echo "make train      train PRESET=$(PRESET) for MINUTES=$(MINUTES) into RUN=$(RUN)"
	@echo "make speedrun   the best training run of ten minutes that docs/speedrun.md knows"
	@echo "make gpu-wheels what an offline GPU machine lacks, as wheels: WHEELS=dir"
	@echo "make gpu-test   the gpu lane: WHEELS=dir OUT=dir TESTS=files; LANE=cpu rehearses it"
	@echo "make gpu-bench  the benchmarks on a GPU: WHEELS=dir OUT=dir; FULL=--full GPU_MINUTES=60 sweeps"
	@echo "make gpu-tune   the offline sweep of launch configurations: WHEELS=dir OUT=dir"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "error: Python 3.11 or later is needed; say which: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt torch triton
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

test: $(READY)
	$(MAKE) --no-print-directory -j2 --output-sync=target lane-cpu lane-compiled lane-interpret lane-aot another-set lint

test-full: $(READY)
	$(MAKE) --no-print-directory -j2 --output-sync=target lint lane-cpu lane-interpret lane-aot lane-compiled FULL=--full
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --lane compiled --arch 80 --full
	$(MAKE) --no-print-directory full-sets
	$(MAKE) --no-print-directory full-tritons
	$(MAKE) --no-print-directory full-trainers

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

lane-cpu lane-interpret lane-aot lane-compiled: lane-%: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --lane $* $(FULL)

# No result may hang on how a CPU rounds: the critical tests under one other instruction set, and
# with `make test-full` all value tests under each that this CPU has.
another-set: $(READY)
	$(PY) tests/helpers/instruction_sets.py --critical

full-sets: $(READY)
	$(PY) tests/helpers/instruction_sets.py

# The oldest triton that pyproject.toml allows, and those after the pinned one (docs/versions.md).
# The ahead-of-time lane in short form (sm_90): the long one takes about a quarter of an hour of one
# core for each. The interpreter of 3.6 needs numpy below 2.4.
TRITONS := 3.6.0 3.8.0 3.9.0
NUMPY_3.6.0 := numpy<2.4

full-tritons: $(TRITONS:%=full-triton-%)

full-triton-%:
	$(PYTHON) -m venv $(VENV)-triton-$*
	$(VENV)-triton-$*/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 triton==$* \
	    '$(or $(NUMPY_$*),numpy)' einops pytest hypothesis pytest-benchmark safetensors tqdm matplotlib
	OMP_NUM_THREADS=1 $(VENV)-triton-$*/bin/python -m pytest -q --lane interpret
	OMP_NUM_THREADS=1 $(VENV)-triton-$*/bin/python -m pytest -q --lane aot

# What `make test` skips: the newest transformers and what trains and judges its models, beside the
# pinned torch.
full-trainers:
	$(PYTHON) -m venv $(VENV)-trainers
	$(VENV)-trainers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch triton
	$(VENV)-trainers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
	    -e '.[dev,hf]' accelerate lightning peft trl lm_eval
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)-trainers/bin/python -m pytest -q --lane cpu \
	    tests/models/test_huggingface.py tests/models/test_huggingface_generate.py \
	    tests/models/test_huggingface_trainers.py tests/models/test_tied_embedding.py tests/project/test_pages.py

bench: $(READY)
	$(PY) -m pytest bench --benchmark-only
	$(PY) -m bench.bounds --quick --by stlm --against bench/results/bounds-h200.json
	$(PY) -m bench.executor

check: $(READY)
	$(PY) -m bench.check

train: $(READY)
	$(PY) -m stlm_models.train --preset $(PRESET) --minutes $(MINUTES) --out $(RUN)

# The best line of docs/speedrun.md; another folder each time: make speedrun RUN=runs/again.
speedrun: RUN = runs/speedrun
speedrun: train

# Of one day, so that they fit each other; and the peers to measure against.
GPU_PACKAGES = pytest pytest-xdist execnet pytest-timeout pytest-benchmark py-cpuinfo2 pluggy iniconfig \
    packaging pygments hypothesis sortedcontainers einops liger-kernel cut-cross-entropy fla-core
GPU_PYTHON_VERSION ?= 3.12

gpu-wheels:
	@test -n "$(WHEELS)" || { echo "error: say where to: make gpu-wheels WHEELS=dir" >&2; exit 1; }
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
	    --python-version $(GPU_PYTHON_VERSION) --platform manylinux_2_28_x86_64 \
	    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
	    --dest $(WHEELS) $(GPU_PACKAGES)

gpu-site:
	@mkdir -p $(OUT)
	@if [ -n "$(WHEELS)" ]; then \
	    $(GPU_PYTHON) -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade \
	        --target /tmp/stlm-site $(WHEELS)/*.whl; fi

# The work tree may travel without its history.
COMMIT ?= $(shell git rev-parse --short HEAD 2>/dev/null || echo unknown)
WITH_SITE = PYTHONPATH=/tmp/stlm-site:$$PYTHONPATH $(GPU_PYTHON)
GPU_RUN = $(WITH_SITE) -m

# Most of the lane's time is compiling, which many processes share where pytest-xdist is there; a few
# tests at a time, since some compile long. A test that hangs ends its process, and another begins.
JOBS ?= 15
TESTS ?= tests
have = $(shell $(WITH_SITE) -c 'import $(1)' 2>/dev/null && echo "$(2)")
SPREAD = $(call have,xdist,-n $(1) --dist load --maxschedchunk 5)
PATIENCE = $(call have,pytest_timeout,--timeout 100 --timeout-method thread)
GPU_TEST = $(GPU_RUN) pytest $(TESTS) -q --lane $(LANE) --tb=short --durations=10 $(PATIENCE) \
    --ends-at $$(( $$(date +%s) + 60 * $(1) ))
RESULTS = $(OUT)/gpu-test.xml $(OUT)/gpu-test-exclusive.xml

gpu-test: gpu-site
	@rm -f $(RESULTS)
	$(GPU_RUN) stlm_kernels.env 2>&1 | tee $(OUT)/gpu-test.log
	-$(call GPU_TEST,$(GPU_MINUTES)) $(call SPREAD,$(JOBS)) -m 'not exclusive' \
	    --junitxml=$(OUT)/gpu-test.xml 2>&1 | tee -a $(OUT)/gpu-test.log
	-$(call GPU_TEST,2) $(call SPREAD,1) -m exclusive \
	    --junitxml=$(OUT)/gpu-test-exclusive.xml 2>&1 | tee -a $(OUT)/gpu-test.log
	$(WITH_SITE) tests/helpers/digest.py $(RESULTS) 2>&1 | tee -a $(OUT)/gpu-test.log

gpu-bench: gpu-site
	$(GPU_RUN) pytest bench --benchmark-only -k '$(LINES)' $(FULL) --minutes $(GPU_MINUTES) --commit $(COMMIT) \
	    --benchmark-json=$(OUT)/gpu-bench.json 2>&1 | tee $(OUT)/gpu-bench.log

gpu-tune: gpu-site
	$(GPU_RUN) bench.tune $(OPS) --minutes $(TUNE_MINUTES) --commit $(COMMIT) 2>&1 | tee $(OUT)/gpu-tune.log
	cp stlm_kernels/tuned/*.json $(OUT)/

clean:
	rm -rf $(VENV) $(VENV)-triton-* $(VENV)-trainers .cache out build *.egg-info
