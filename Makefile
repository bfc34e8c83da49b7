# Everything runs in a virtual environment of its own, made from nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two processes of one thread each: the suite is many small models, which threads only slow down.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types bench clean

demo: $(VENV)/.examples
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/python examples/quickstart.py $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 $(ARGS)

bench: $(VENV)/.bench
	for name in selection step memory scaling; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.report

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/.examples $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache out runs
