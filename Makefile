# Two commands do everything: `make demo` and `make test`. Both build the environment first; both are idempotent.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-hosts test-gpu unit integration lint env gpu lock clean
.DEFAULT_GOAL := demo

demo: $(STAMP)  ## train PPO on the embedded task: 8 ranks, real engines, no GPU needed
	$(VENV)/bin/mrl demo $(ARGS)

test: $(STAMP)  ## everything that CI checks; two at a time, since ranks that wait for each other leave time to the rest
	$(MAKE) --no-print-directory --keep-going --jobs=2 --output-sync=target integration lint unit

test-hosts: $(STAMP)  ## jobs over several hosts, which are network namespaces of this one: needs root
	$(PYTHON) -m pytest tests/hosts -rs $(ARGS)

test-gpu: $(STAMP)  ## transformer-engine's layers and kernels: needs one CUDA device, some of it two
	$(PYTHON) -m pytest tests/gpu tests/unit/ops tests/unit/reshard -rs $(ARGS)

unit: $(STAMP)  ## the fast part of the tests
	$(PYTHON) -m pytest tests/unit $(ARGS)

integration: $(STAMP)  ## the tests with real ranks and engines
	$(PYTHON) -m pytest tests/integration $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check mrl tests tools examples setup.py
	$(VENV)/bin/ruff format --check mrl tests tools examples setup.py
	$(VENV)/bin/mypy

env: $(STAMP)

$(STAMP): requirements.lock pyproject.toml setup.py
	sh tools/make_env.sh $(VENV)
	touch $@

gpu: $(STAMP)  ## transformer-engine, compiled against the environment's torch: needs nvcc, 5 to 20 minutes
	sh tools/make_te.sh $(VENV)

lock:  ## resolve the pinned requirements again
	$(VENV)/bin/uv pip compile --quiet --python $(PYTHON) --extra dev --extra ray pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
