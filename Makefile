# Needs python3 >= 3.11 with venv and pip; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help demo small test test-nightly test-parity lint format docs bench clean

help:
	@echo "make demo [CLIP=video.mp4]  encode a clip, decode it, print rate and quality"
	@echo "make small DATA=CLIPS       train the small model; continues where it was stopped"
	@echo "make test                   run the fast tests"
	@echo "make test-parity            compare with torch and diffusers (installs both)"
	@echo "make test-nightly           run all tests, the slow ones included"
	@echo "make lint                   check style and types"
	@echo "make format                 fix style"
	@echo "make docs                   build the documentation site into site/"
	@echo "make bench                  run all benchmarks"
	@echo "make clean                  remove .venv, caches and build outputs"

demo: $(VENV)/.installed
	$(BIN)/gnvc demo $(if $(CLIP),--clip "$(CLIP)")

# Four stages, each from the run of the one before, then the refiner on clips that the finished
# codec coded; see docs/training.md.
SMALL := codec rollout refiner joint
small: $(VENV)/.installed
	@test -n "$(DATA)" || { echo "name the folder of clips: make small DATA=CLIPS"; exit 2; }
	set -e; for stage in $(SMALL); do \
		$(BIN)/gnvc train --config small/$$stage --data.path "$(DATA)" --data.decode_cache runs/small/decoded; \
	done
	$(BIN)/gnvc release runs/small/joint runs/small/joint.safetensors
	# Exit code 3: some videos could not be read and were left out.
	$(BIN)/gnvc cache-coded --data "$(DATA)" --to runs/small/coded_clips \
		--model runs/small/joint.safetensors || test $$? -eq 3
	$(BIN)/gnvc train --config small/coded
	$(BIN)/gnvc release runs/small/coded runs/small.safetensors --name small

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not parity"

test-parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n 2 tests/parity

test-nightly: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.installed-parity
	set -e; for script in benchmarks/*.py; do $(BIN)/python "$$script"; done

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build dist site *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Each file marks a set of extras as installed.
$(VENV)/.installed: requirements.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[eval]"
	@touch $@

$(VENV)/.installed-test: requirements.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[test]"
	@touch $@ $(VENV)/.installed

$(VENV)/.installed-lint: requirements.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[test,lint]"
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed

$(VENV)/.installed-docs: requirements.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	@touch $@

$(VENV)/.installed-parity: requirements.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[test,test-buckets,parity]"
	# Without torchvision, which lpips requires: few builds of it match a build of torch.
	$(INSTALL) --no-deps lpips==0.1.4
	@touch $@ $(VENV)/.installed-test $(VENV)/.installed
