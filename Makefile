PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Python compiles what it imports; compiling all of torch would take longer than the demo.
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt

.PHONY: demo test lint types docs clean

# Installs what the demo needs (1.1 GB with a CPU build of torch), and fits a head twice: about a minute.
demo: $(VENV)/installed
	@echo 'Fitting a head twice, never frozen and frozen and solved: half a minute.'
	$(BIN)/glai demo

# Lint, types and all tests on two cores: about ten minutes, and two more where the tools are to be installed.
test: $(VENV)/installed-for-tests lint types
	@echo 'Running all tests on two cores: about ten minutes.'
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/installed-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Type checkers do not follow the mapping of callbacks/ and datamodules/ into the package in an editable install,
# so they are given the package as a user gets it.
types: $(VENV)/installed-for-tests
	rm -rf build/typed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target build/typed .
	python=$$(cd $(BIN) && pwd)/python && cd build/typed && "$$python" -m mypy --config-file ../../pyproject.toml -p glai_lightning

# The site of the documents. A warning is an error: a dead link, a page that no one finds. With --quiet there are none.
docs: $(VENV)/installed-for-tests
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo 'Built build/site. To read it: $(BIN)/python -m http.server -d build/site'

$(VENV)/bin/python:
	@echo 'Installing into $(VENV): a minute or two, and more where torch comes with CUDA.'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml constraints.txt tests/torchvision_operators.py
	$(PIP_INSTALL) -e '.[report]'
	$(BIN)/python tests/torchvision_operators.py
	touch $@

$(VENV)/installed-for-tests: $(VENV)/installed tests/install_learn2learn.sh
	$(PIP_INSTALL) -e '.[test]'
	tests/install_learn2learn.sh $(BIN)/python
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
