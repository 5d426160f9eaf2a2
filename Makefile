# Every target works in a fresh clone on a machine with Python 3.11 or newer and make: it first builds .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := reference datasets gpu conformance

.DEFAULT_GOAL := help
.PHONY: help setup types demo test lint bench figures structure clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do \
		printf '%-17s %s\n' "$$target" "$$text"; done
	@echo
	@echo "  PYTHON=python3.12 make setup    builds .venv with another Python"
	@echo "  PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup"
	@echo "                                  takes PyTorch's CPU build: a far smaller download on Linux without an NVIDIA GPU"

setup: $(VENV)/.done types  ## build .venv with the exact versions of constraints.txt

# The stamp is written last, so an interrupted installation is taken up again. Python's version is checked only where it is
# used: an existing .venv keeps the one it was made with.
$(VENV)/.done: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { \
		command -v "$(PYTHON)" > /dev/null || { \
			echo "error: no '$(PYTHON)' found. Install Python 3.11 or newer, or name one: make setup PYTHON=/path/to/python3" >&2; exit 1; }; \
		"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$("$(PYTHON)" -V 2>&1). Name another: make setup PYTHON=python3.12" >&2; exit 1; }; \
		echo "creating $(VENV) with $$("$(PYTHON)" -V)"; \
		"$(PYTHON)" -m venv $(VENV); }
	@echo "installing the versions of constraints.txt into $(VENV) (once; minutes, depending on the network)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Type checkers and editors don't see through an editable install's import hook. These links show them smca.<folder> as a plain tree,
# and a path file in the environment leads there. (Python then imports through the links, too; without them, by the hook.)
types:
	@mkdir -p build/types/smca
	@for package in $(PACKAGES); do ln -sfn ../../../$$package build/types/smca/$$package; done
	@test ! -x $(BIN)/python || $(BIN)/python -c 'import pathlib, sysconfig; \
		pathlib.Path(sysconfig.get_path("purelib"), "zz-smca-sources.pth").write_text("$(CURDIR)/build/types\n")'

demo: setup  ## train on the built-in data and evaluate: minutes on a laptop; results in runs/demo
	$(BIN)/smca train demo --output runs/demo --overwrite

test: setup  ## run the tests and the conformance suite
	$(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 4 --dist loadfile

lint: setup  ## check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy $(addprefix -p smca.,$(PACKAGES))

bench: setup  ## measure attention backends and a training step on this machine
	$(BIN)/smca benchmark

figures: setup  ## redraw the pictures of docs/ from docs/results
	$(BIN)/python docs/figures.py

structure: setup  ## the project in numbers: folders, lines, longest files and functions, circles of imports
	@$(BIN)/python tests/structure.py

clean:  ## remove build products and caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
