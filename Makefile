# Everything a developer runs. `make help` lists it; each target first sets up what it needs in .venv.

PYTHON ?= python3
BENCH ?=
LOOP ?=
FAULTS ?=
LLM ?= tests/llm tests/test_examples.py
BIN := .venv/bin
PINNED_TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo llm-demo loop-demo test test-unit test-llm test-feast check bench faults docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: .venv/.ready-demo ## Embed the documentation on this disk, and search it
	HF_HUB_OFFLINE=1 $(BIN)/python examples/demo.py

llm-demo: .venv/.ready-llm ## Serve a tiny language model on this CPU, and talk to it with OpenAI's client
	$(BIN)/python tools/llm_demo.py

loop-demo: .venv/.ready-dev ## Features, training, registry, batch job and service of a small city (LOOP=--synthetic to make it up in any case)
	$(BIN)/python tools/loop_demo.py $(LOOP)

test-unit: .venv/.ready-dev ## Run the unit tests alone, in seconds
	$(BIN)/python -m pytest tests/unit

test: .venv/.ready-dev ## Run the tests: of units, of components, and those that start Ray
	@sh tools/apt.sh chromium || echo "tests in a browser will be skipped"
	@sh tools/apt.sh postgresql || echo "tests that need a PostgreSQL will be skipped"
	@sh tools/apt.sh redis-server || echo "tests that need a Redis will be skipped"
	$(BIN)/python -m pytest tests/unit tests/components tests/test_architecture.py
	$(BIN)/python -m pytest tests --ignore=tests/unit --ignore=tests/components --ignore=tests/test_architecture.py

test-llm: .venv/.ready-llm ## Run the tests that start an LLM engine, on CPUs and tiny models (LLM=FILE runs those of a file)
	$(BIN)/python -m pytest -o faulthandler_timeout=900 -m llm $(LLM)

test-feast: .venv/.ready-dev ## Run the test of the export to Feast, in an environment that it makes
	$(BIN)/python -m pytest -o faulthandler_timeout=900 -m feast tests/feast

check: .venv/.ready-dev ## Check style, types, import rings, and that the reference is up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

bench: .venv/.ready-dev ## Measure batch embedding beside plain Ray Data (BENCH='--rounds 1' passes options on)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/batch_embed.py $(BENCH)

faults: .venv/.ready-dev ## Kill, fill, freeze and damage; count rows and requests (FAULTS=--record keeps the figures)
	@sh tools/apt.sh wrk || echo "the test that uses wrk will be skipped"
	$(BIN)/python -m pytest -o faulthandler_timeout=900 -m faults tests/properties tests/faults tests/test_examples.py $(FAULTS)
	$(BIN)/python -m pytest -o faulthandler_timeout=900 -m faults tests/integration

docs: .venv/.ready-dev ## Write docs/reference from the code
	$(BIN)/python docs/generate.py

clean: ## Remove .venv, caches and what the targets wrote
	rm -rf .venv demo-output dist build .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.ready-llm: .venv/.ready-dev tools/llm.sh
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,llm-cpu]'
	sh tools/llm.sh .venv
	@touch $@

# Torch goes first and by its exact version: on its own, pip takes the build of that version which fits the machine's index,
# rather than whichever the other packages' requirements lead to.
.venv/.ready-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "headrace needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1): try make PYTHON=python3.11" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt '$(PINNED_TORCH)'
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$*]'
	@touch $@
