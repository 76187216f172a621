# Two commands need nothing before them: `make demo` and `make test`. Each makes .venv with pinned versions first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
KERNELS := diffq_fx/kernels/_kernels.abi3.so

.PHONY: demo test check format clean

demo: .venv/ready
	$(BIN)/diffq-fx demo

test: $(KERNELS)
	$(BIN)/pytest -n $(WORKERS) -q

# What a developer runs before a commit: format, lint, types, tests, doctests.
check: $(KERNELS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest -n $(WORKERS) -q
	$(BIN)/pytest -q --doctest-modules diffq_fx

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# Built with the package; this builds them anew when their sources change, and does nothing for want of a compiler.
$(KERNELS): setup.py $(wildcard diffq_fx/kernels/*.[ch]) | .venv/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build *.egg-info $(KERNELS)
