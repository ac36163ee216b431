# run         the page at http://127.0.0.1:7860, with everything it needs installed first
# test        the tests that fit into about ten minutes on two cores
# test-full   the long ones too
# check       lint, formatting, types and the layers between packages
# fix         what lint and formatting can mend by themselves
# test-bigdl  the real IPEX-LLM, in the environment that `make bigdl` builds
# bigdl       .venv-bigdl: BigDL-LLM / IPEX-LLM in an environment of its own (Python 3.11), for `engine: bigdl`
# bench       speed and memory, printed; nothing is asserted about time
#
# TORCH=cpu or TORCH=xpu takes torch's smaller CPU build, or its build for Intel GPUs, instead of the default (CUDA) one.
# ARGS="--port 7861" passes flags on.

PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
TORCH  ?=
BIGDL_PYTHON ?= $(shell command -v python3.11 || command -v python3.10 || echo python3)
ARGS   ?=

.PHONY: run test test-full test-bigdl check fix bench bigdl browser clean

run: $(VENV)/.run
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/.dev browser
	$(BIN)/python -m pytest -m "not full" $(ARGS)

test-full: $(VENV)/.dev browser
	$(BIN)/python -m pytest $(ARGS)

test-bigdl: $(VENV)/.dev bigdl
	$(BIN)/python -m pytest $(ARGS) tests/test_nibble_engines_bigdl.py tests/test_nibble_bigdl_convert.py tests/test_tutorials.py

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py

fix: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m bench.decode
	$(BIN)/python -m bench.stop

bigdl: .venv-bigdl/.made

# torch first and alone: together with the rest pip may take another build of it.
.venv-bigdl/.made: requirements-bigdl.txt
	$(BIGDL_PYTHON) -m venv .venv-bigdl
	.venv-bigdl/bin/pip install --disable-pip-version-check -q $(if $(TORCH),--index-url https://download.pytorch.org/whl/$(TORCH)) 'torch==2.13.0'
	.venv-bigdl/bin/pip install --disable-pip-version-check -q -r requirements-bigdl.txt
	@touch $@

# Chromium for the browser tests, where the system's package manager can give it; they skip, saying so, where it cannot.
browser:
	@sh scripts/chromium.sh

$(VENV)/.made:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Nibble needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.made
	$(if $(TORCH),$(BIN)/pip install 'torch==2.13.*' --index-url https://download.pytorch.org/whl/$(TORCH),@true)
	@touch $@

$(VENV)/.run: requirements.txt $(VENV)/.torch
	$(BIN)/pip install --disable-pip-version-check -q -r requirements.txt
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.run
	$(BIN)/pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis
