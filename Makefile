# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
MODEL := models/resnet18_cifar10.onnx
DEMO := demo/resnet18
REPORT := demo/validation

.DEFAULT_GOAL := help
.PHONY: help demo test coverage lint format typecheck check wheel-test clean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# An environment is made once and renewed when pyproject.toml changes: .base holds rerampile, .test and .dev its extras too.
$(VENV)/.base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo 'rerampile needs Python 3.11 or newer; name one with: make PYTHON=python3.12'; exit 1; }
	@echo 'Setting up $(VENV) (once; a minute or two) ...'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --editable .
	@touch $@

$(VENV)/.%: $(VENV)/.base
	@echo 'Adding the packages for: $* ...'
	@$(PIP) install --editable '.[$*]'
	@touch $@

demo: $(VENV)/.base ## Compile the shipped ResNet18, show its plan, run faulty chips
	@rm -rf $(DEMO) $(REPORT) && mkdir -p $(dir $(DEMO))
	$(BIN)/rerampile compile $(MODEL) --mapping differential -o $(DEMO)
	$(BIN)/rerampile show $(DEMO)/plan.json
	$(BIN)/rerampile validate $(DEMO) --runs 4 --images 32 -o $(REPORT)
	@echo && echo 'The deployment is in $(DEMO)/. See README.md for what each file is.'
	@echo 'What stuck cells do to it, on generated inputs: open $(REPORT)/report.html in a browser.'

test: $(VENV)/.test ## Run the tests
	@$(BIN)/pytest -q -n auto --maxprocesses 8

coverage: $(VENV)/.dev ## Run the tests and show the lines they miss
	@$(BIN)/pytest -q -n auto --maxprocesses 8 --cov

lint: $(VENV)/.dev ## Check style and formatting
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --quiet --check . && echo 'lint: clean'

format: $(VENV)/.dev ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --quiet --fix . ; $(BIN)/ruff format --quiet .

# mypy follows no package-dir map, so it sees the packages through links laid out as they are installed.
typecheck: $(VENV)/.dev ## Check the types (mypy --strict)
	@rm -rf .typecheck/rerampile && mkdir -p .typecheck/rerampile
	@ln -s $(CURDIR)/rerampile/* $(CURDIR)/passes $(CURDIR)/runtime .typecheck/rerampile/
	@cd .typecheck && $(abspath $(BIN))/mypy --config-file ../pyproject.toml -p rerampile

check: lint typecheck test ## All of these three

# sdist -> wheel -> fresh environment, tested with plain pytest outside the checkout, where no folder here can stand in.
wheel-test: $(VENV)/.dev ## Build the wheel and test it outside the checkout
	@set -e; there=$$(mktemp -d); trap 'rm -rf "$$there"' EXIT; \
	echo 'Building the wheel from the sdist ...'; \
	$(BIN)/python -m build --outdir "$$there/dist" . >"$$there/build.log" 2>&1 || { cat "$$there/build.log"; exit 1; }; \
	echo 'Installing it into a fresh environment ...'; \
	$(PYTHON) -m venv "$$there/venv"; \
	"$$there/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$$(ls "$$there"/dist/*.whl)[test]"; \
	cp -r tests pyproject.toml "$$there/"; cd "$$there"; \
	RERAMPILE_TEST_WHEEL=1 venv/bin/pytest -q tests/test_installed.py tests/test_public_api.py

clean: ## Remove everything the targets above made
	@rm -rf .venv .typecheck demo build dist *.egg-info .coverage .hypothesis .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
