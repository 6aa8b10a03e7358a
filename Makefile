# Every target sets itself up: the first run makes .venv and installs dmqfx and its tools into it.
# The versions are those of constraints-dev.txt. pip would compile every module, which takes most of a minute (--no-compile): Python
# compiles those that are used. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check check-format check-lint check-types check-house format bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml setup.py constraints-dev.txt $(wildcard dmqfx/runtime/kernels/*.cpp dmqfx/runtime/kernels/*.h)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints-dev.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## quantize the bundled emoji model and draw float beside quantized (demo.png)
	$(BIN)/dmqfx demo --out demo.png

# A worker runs whole files, in the order of their names: models are captured once per worker, and most tests of a file
# share them. (Files of most tests first would leave those of few long tests for the end, when one worker has nothing to do.)
test: $(STAMP)  ## the fast tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: $(STAMP)  ## the tests that take long
	$(BIN)/pytest -m slow $(ARGS)

check: check-format check-lint check-types check-house  ## format, lint, types, house rules

check-format: $(STAMP)
	$(BIN)/ruff format --check --output-format concise .

check-lint: $(STAMP)
	$(BIN)/ruff check .

# mypy reads packages from folders, and dmqfx.passes lives in ./passes: give it the layout of the wheel, made of links.
check-types: $(STAMP)
	rm -rf build/typed && mkdir -p build/typed/dmqfx
	cd build/typed/dmqfx && ln -s ../../../dmqfx/* ../../../passes ../../../policies .
	cd build/typed && ../../$(BIN)/mypy --config-file ../../pyproject.toml --package dmqfx

check-house: $(STAMP)
	$(BIN)/pytest -q tests/test_house.py

format: $(STAMP)  ## put the sources into the format that check wants
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## the measurements of benchmarks/ (long)
	for file in benchmarks/bench_*.py; do $(BIN)/python "$$file" || exit 1; done

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info dmqfx/runtime/kernels/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache demo.png
