# Both main targets first make .venv from constraints.txt; README.md names the plain pip lines that this stands for.

SHELL := /bin/sh
BIN := .venv/bin
TORCH := $(shell grep '^torch==' constraints.txt)
CPU_INDEX := https://download.pytorch.org/whl/cpu

# An index to take torch from, "" for pip's own. auto: PyTorch's CPU index on Linux without an NVIDIA GPU, because the
# public index has CUDA builds of several GB there; but never where pip was configured with indexes of its own.
TORCH_INDEX ?= auto
PIP_ARGS ?=
WORKERS ?= auto

.PHONY: help demo test lint clean

help:
	@echo 'make demo    install into .venv, then run the main job on handwritten digits: runs/digits/report.html'
	@echo 'make test    install into .venv with the developer tools, then lint and run all tests'
	@echo 'make lint    ruff and mypy'
	@echo 'make clean   remove .venv, caches and build results (runs/ stays)'
	@echo 'Options: TORCH_INDEX=URL (of torch alone), PIP_ARGS="..." (every pip line), WORKERS=N (test processes)'

demo: .venv/.base
	$(BIN)/onejump run digits

test: .venv/.dev
	@$(MAKE) --no-print-directory lint; lint=$$?; \
	$(BIN)/pytest -n $(WORKERS) --maxprocesses 8 && exit $$lint

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy onejump

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.dev: .venv/.base
	$(BIN)/pip install -c constraints.txt $(PIP_ARGS) -e '.[dev]'
	@touch $@

.venv/.base: pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in python3 python3.13 python3.12 python3.11 none; do \
	    $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "onejump needs Python 3.11 or newer with venv; python3 is $$(python3 --version 2>/dev/null || echo missing)." \
	      "Install one (Debian, Ubuntu: apt install python3-venv) and run make again." >&2; exit 1; \
	  fi; \
	  $$python -m venv --clear .venv; }
	@index='$(TORCH_INDEX)'; \
	if [ "$$index" = auto ]; then \
	  index=; \
	  if [ "$$(uname -s)" = Linux ] && ! nvidia-smi -L >/dev/null 2>&1 \
	    && ! $(BIN)/pip config list | grep -E 'index|find-links' >/dev/null; then index=$(CPU_INDEX); fi; \
	fi; \
	set -x; $(BIN)/pip install --no-deps $${index:+--extra-index-url $$index --retries 1} $(PIP_ARGS) $(TORCH)
	$(BIN)/pip install -c constraints.txt $(PIP_ARGS) -e .
	@touch $@
