# What CI runs is what a person runs. `make help` lists the targets.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
DEMO ?= full

# ninja and deepspeed are programs of the environment: the compiler of DeepSpeed's ops looks for ninja on PATH.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

python_is_new_enough := 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 10) else \
	"make: %s is Python %d.%d; 3.10 or newer is needed (make PYTHON=/path/to/python3)" % (sys.executable, v[0], v[1]))'

# $(call install,FILE) installs FILE unless exactly this content was installed here before.
define install
	@cat requirements.txt $(1) | cmp -s - $(VENV)/$(1).installed || { \
		echo "Installing $(1) into $(VENV) (once, and again when it changes) ..."; \
		rm -f $(VENV)/$(1).installed; \
		$(BIN)/python -m pip install -r $(1) || { \
			echo "make: pip could not install $(1); the reason is above. Repeat with: make $(MAKECMDGOALS)" >&2; exit 1; }; \
		cat requirements.txt $(1) > $(VENV)/$(1).installed; }
endef

.PHONY: help venv setup setup-dev demo real-images bench bench-data bench-training gpu test test-long check format

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 16

venv:
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		command -v $(PYTHON) >/dev/null || { \
			echo "make: no $(PYTHON) on PATH; Python 3.10 or newer is needed (make PYTHON=/path/to/python3)" >&2; exit 1; }; \
		$(PYTHON) -c $(python_is_new_enough); \
		echo "Making the environment $(VENV) ..."; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "make: $(PYTHON) -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }; }

setup: venv  ## .venv with requirements.txt
	$(call install,requirements.txt)
	@[ $(VENV)/deepspeed.prepared -nt $(VENV)/requirements.txt.installed ] || { \
		echo "Letting DeepSpeed compile what it needs (once, half a minute) ..."; \
		$(BIN)/python -m utils.engine.prepare && touch $(VENV)/deepspeed.prepared; }

setup-dev: setup  ## .venv with the tools of the tests too
	$(call install,requirements-dev.txt)

demo: setup  ## data, base, training, export, scores, a chat: runs/demo/ (DEMO=smoke: the same stages in a minute or two)
	@$(BIN)/python -m demo --size $(DEMO)

real-images: setup  ## learn the real images in the folder PIXELLM_REALDATA by heart: runs/real_images/
	@$(BIN)/python -m demo.real_images

bench-data: setup  ## how fast data are read, and what a large data set costs: runs/bench/data.json
	@$(BIN)/python -m tools.bench.data

bench: setup  ## answering and training against the release's way and a plain cache: runs/bench/ (a quarter of an hour)
	@$(BIN)/python -m tools.bench.answering

bench-training: setup  ## what a training step costs: 7B on a GPU, the tiny shape without one: runs/bench/training.json
	@$(BIN)/python -m tools.bench.training

gpu: setup-dev  ## tests, benches and a 7B-shaped decode on CUDA: runs/gpu/summary.json; ends with 2 where there is none
	@$(BIN)/python tools/gpu.py

test: setup-dev  ## every test but the long ones, without network
	@$(BIN)/python -m pytest -m "not long and not gpu" $(PYTEST_ARGS)

test-long: setup-dev  ## the long tests
	@$(BIN)/python -m pytest -m long $(PYTEST_ARGS)

check: setup-dev  ## ruff, format, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: setup-dev  ## rewrite with ruff
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
