# Everything runs in a virtual environment of its own, made from nothing but Python and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LOWEST := $(VENV)-lowest
# The pins of constraints.txt have left Python 3.10 behind, which has a list of its own.
CONSTRAINTS := $(or $(wildcard constraints-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])').txt),constraints.txt)
# Two processes of one thread each: the suite is many small models, which threads only slow down.
export OMP_NUM_THREADS ?= 1
# Compiling every module of torch and its companions takes as long as installing them; Python compiles what is imported.
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile

# What the lowest versions are tried with: all that touches PEFT, transformers, accelerate and the hub.
LOWEST_TESTS := tests/test_registration.py tests/test_peft.py tests/test_placing.py tests/test_saving.py tests/test_transformers.py \
	tests/test_hub.py tests/test_refusals.py tests/training/test_trainer.py tests/distributed/test_ddp.py tests/distributed/test_meshes.py \
	tests/test_constraint.py::test_exactly_the_budget_differs -k "not callback_reports"

.PHONY: demo test test-lowest test-pythons lint types bench clean

demo: $(VENV)/.examples
	OMP_NUM_THREADS=$$(nproc 2>/dev/null || echo 2) $(BIN)/python examples/quickstart.py $(ARGS)

test: lint types
	$(BIN)/python -m pytest -n 2 $(ARGS)
	$(if $(ARGS),,$(MAKE) test-lowest)

test-lowest: $(LOWEST)/.ready
	$(LOWEST)/bin/python -m pytest -n 2 $(LOWEST_TESTS)

# The whole suite on every Python that is found, one after the other: some ten minutes each on two cores.
test-pythons:
	for version in 3.10 3.11 3.12 3.13; do \
		if python$$version -c '' 2>/dev/null; then \
			$(MAKE) test PYTHON=python$$version VENV=$(VENV)-$$version || exit 1; \
		else echo "python$$version was not found"; fi; \
	done

bench: $(VENV)/.bench
	for name in selection step memory scaling distributed; do \
		$(BIN)/python -m benchmarks.$$name --json benchmarks/results/$$name.json || exit 1; \
	done
	$(BIN)/python -m benchmarks.report
	$(BIN)/python -m benchmarks.distributed_report

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(VENV)/.examples $(VENV)/.test $(VENV)/.bench: $(VENV)/.%: pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -c $(CONSTRAINTS) -e '.[$*]'
	touch $@

$(LOWEST)/.ready: pyproject.toml constraints-lowest.txt
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python $(INSTALL) -c constraints-lowest.txt -e . pytest pytest-xdist
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-* .pytest_cache .ruff_cache .mypy_cache out runs
