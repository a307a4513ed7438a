.PHONY: demo demo-full test test-long check docs docs-serve format clean
PYTHON ?= python3
BIN := .venv/bin

demo: .venv/installed
	$(BIN)/cavmae demo

demo-full: .venv/installed
	$(BIN)/cavmae demo-full

# Each process of the tests has a core: more threads would spin while they wait for each other.
test: export OMP_NUM_THREADS = 1
test: check
	$(BIN)/pytest -m "not slow" --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
	$(BIN)/pytest -m "slow and not long" --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 25

test-long: .venv/installed
	$(BIN)/pytest -m long --durations 25

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: .venv/installed
	$(BIN)/python -m mkdocs build --strict

docs-serve: .venv/installed
	$(BIN)/python -m mkdocs serve --dev-addr 127.0.0.1:8000

format: .venv/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/installed: pyproject.toml constraints.txt
	@test -x $(BIN)/pip || { $(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13) \
	    and "error: $(PYTHON) is %d.%d; name a Python 3.11 or 3.12, as in: make PYTHON=python3.11 $(MAKECMDGOALS)" \
	    % sys.version_info[:2])' && $(PYTHON) -m venv --clear .venv; }
	@echo "Installing into .venv: some gigabytes, a few minutes"
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site *.egg-info .pytest_cache .ruff_cache .grimp_cache .import_linter_cache
