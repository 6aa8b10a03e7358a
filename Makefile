# Every target sets itself up: the first run makes .venv and installs dmqfx and its tools into it.
# The versions are those of constraints-dev.txt. PYTHON picks the interpreter (3.10 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPED := build/typed
WORKERS ?= 2
export PYTHONDONTWRITEBYTECODE := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow check bench clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)  ## quantize the bundled emoji model and draw float beside quantized (demo.png)
	$(BIN)/dmqfx demo --out demo.png

# A worker runs whole files: models are captured once per worker, and most tests of a file share them.
test: $(STAMP)  ## the fast tests
	$(BIN)/pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(STAMP)  ## the tests that take more than a minute each
	$(BIN)/pytest -m slow $(ARGS)

# mypy reads packages from folders, and dmqfx.passes lives in ./passes: give it the layout of the wheel, as links.
check: $(STAMP)  ## format, lint, types, house rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	rm -rf $(TYPED)/dmqfx && mkdir -p $(TYPED)/dmqfx
	ln -s $(CURDIR)/dmqfx/* $(CURDIR)/passes $(CURDIR)/policies $(TYPED)/dmqfx
	cd $(TYPED) && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package dmqfx
	$(BIN)/pytest tests/test_house.py $(ARGS)

bench: $(STAMP)  ## the measurements of benchmarks/ (long)
	for file in benchmarks/bench_*.py; do $(BIN)/python "$$file" || exit 1; done

clean:  ## remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache demo.png
