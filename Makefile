# Two commands need nothing before them: `make demo` and `make test`. Each makes .venv with pinned versions first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2

.PHONY: demo test check format clean

demo: .venv/ready
	$(BIN)/diffq-fx demo

test: .venv/ready
	$(BIN)/pytest -n $(WORKERS) -q

# What a developer runs before a commit: format, lint, types, tests, doctests.
check: .venv/ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -n $(WORKERS) -q
	$(BIN)/pytest -q --doctest-modules diffq_fx

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info
