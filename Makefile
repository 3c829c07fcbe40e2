# Needs python3 >= 3.11 with venv and pip; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-parity test-all lint format bench clean

help:
	@echo "make demo [CLIP=video.mp4]  code a clip, decode it, show what it cost"
	@echo "make test                   the tests that take seconds"
	@echo "make test-parity            comparison with torch and diffusers, which it installs"
	@echo "make test-all               all tests"
	@echo "make lint | format          check | repair style"
	@echo "make bench                  all benchmarks"
	@echo "make clean                  remove .venv and caches"

demo: $(VENV)/.installed
	$(BIN)/gnvc demo $(if $(CLIP),--clip "$(CLIP)")

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not parity"

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n 2 tests/parity

test-all: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-parity
	set -e; for script in benchmarks/*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.installed-test: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-parity: requirements.txt pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[test,parity]"
	# Without torchvision, which it asks for: few builds of it fit a build of torch.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps lpips==0.1.4
	@touch $@ $(VENV)/.installed $(VENV)/.installed-test
