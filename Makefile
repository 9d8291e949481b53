# make demo: install into .venv and train a small model with dense MultiMix on the embedded digits.
# make test: install into .venv and run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --progress-bar off --editable '.[test]'
	touch $@

demo: $(VENV)/.installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python train_timm.py --config hfconfigs/digits_resnet18.yaml

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .hypothesis
