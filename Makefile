PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt

.PHONY: demo test lint types clean

demo: $(VENV)/installed
	$(BIN)/glai fit --config recipes/supervised.yaml

test: $(VENV)/installed-for-tests lint types
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow the mapping of callbacks/ and datamodules/ into the package in an editable install,
# so they are given the package as a user gets it.
types: $(VENV)/installed-for-tests
	rm -rf build/typed
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --target build/typed .
	cd build/typed && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p glai_lightning

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP_INSTALL) -e .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/bin/python pyproject.toml constraints.txt tests/install_learn2learn.sh
	$(PIP_INSTALL) -e '.[test]'
	tests/install_learn2learn.sh $(BIN)/python
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build *.egg-info
