# The two commands of the README: `make demo` and `make test`. Everything runs in .venv, made when missing.
PYTHON ?= python3
BIN := .venv/bin
# Two busy processes on two cores want one thread each; the launcher sets its roles' own.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint prove bench clean

demo: .venv/installed
	$(BIN)/python launch.py

test: .venv/installed lint
	$(BIN)/pytest -m "not prove"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Long learning runs and long series of kills.
prove: .venv/installed
	$(BIN)/pytest -m prove --timeout 3600

# Each script's last output line is one JSON object.
bench: .venv/installed
	$(BIN)/pip install -q -c constraints.txt -e .[bench]
	for script in transport packing local_engine overlap vs_trl; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# torch first and pinned: the constraints hold the pair that the whole platform is tested with.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .[test]
	touch $@

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info
