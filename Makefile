# make demo: install into .venv and train a small model with dense MultiMix on the embedded digits.
# make test: install into .venv and run the tests.
# make docs: install into .venv and build the documentation in site/.
# make lint, make types: run ruff and mypy. make dist: build the wheel and the source archive.
# PACKAGES='torch==2.6.0 torchvision==0.21.0' installs these versions.
PYTHON ?= python3
VENV ?= .venv
PACKAGES ?=
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint types docs dist clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --editable '.[test]' $(PACKAGES)
	touch $@

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python train_timm.py --config hfconfigs/digits_resnet18.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --progress-bar off --editable '.[docs]'
	touch $@

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

types: $(VENV)/.installed
	$(BIN)/python -m mypy

dist:
	$(PYTHON) -m venv $(VENV)-dist
	$(VENV)-dist/bin/python -m pip install --quiet build twine
	rm -rf dist
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/python -m twine check --strict dist/*

clean:
	rm -rf $(VENV) $(VENV)-dist build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
