"""Choosing a backend: by argument, context, environment, device; named ones never fall back."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import ppo_fast
from ppo_fast import _backend, _dispatch, _ext, testing

CHOICES = ("PPO_FAST_BACKEND", "TRITON_INTERPRET", "PPO_FAST_CUDA_EMULATE")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter."""
    env = {k: v for k, v in os.environ.items() if k not in CHOICES}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=env | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_backends_are_named_with_reasons() -> None:
    found = ppo_fast.backends()
    assert list(found) == ["reference", "cpu", "triton", "cuda"]
    assert found["reference"] is None
    assert all(reason is None or len(reason) > 20 for reason in found.values())


def test_the_extension_is_built_where_it_can_be() -> None:
    """A machine with a compiler has the `cpu` backend: its tests must not be skipped there."""
    compiler = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
    reason = ppo_fast.backends()["cpu"]
    assert reason is None or compiler is None, f"{compiler} is here, but: {reason}"


def test_triton_is_usable_here() -> None:
    """Compiled on a GPU, else interpreted: conftest.py set TRITON_INTERPRET."""
    assert ppo_fast.backends()["triton"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++ to emulate CUDA with")
def test_cuda_is_emulated_here() -> None:
    """conftest.py set PPO_FAST_CUDA_EMULATE, so that its tests are not skipped."""
    assert ppo_fast.backends()["cuda"] is None


def test_the_result_of_backends_is_a_copy() -> None:
    ppo_fast.backends()["reference"] = "broken"
    assert ppo_fast.backends()["reference"] is None


def test_the_argument_wins_over_the_context() -> None:
    x = torch.zeros(2, 3)
    with ppo_fast.use_backend("triton"):
        assert _backend.select("op", None, x) == "triton"
        assert _backend.select("op", "reference", x) == "reference"
        with ppo_fast.use_backend("reference"):
            assert _backend.select("op", None, x) == "reference"
        assert _backend.select("op", None, x) == "triton"


def test_the_context_ends_with_an_exception() -> None:
    before = _backend._chosen.name
    with pytest.raises(KeyError), ppo_fast.use_backend("reference"):
        raise KeyError
    assert _backend._chosen.name == before


@pytest.mark.parametrize("name", ["fast", "", "CPU"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=f"use_backend: backend must be one of .*got '{name}'"):
        ppo_fast.use_backend(name)


@pytest.mark.case("I12")
def test_a_named_backend_that_is_unusable_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reason and its mend; the automatic choice says so once and runs the reference."""
    monkeypatch.setitem(_backend._REASONS, "cpu", "it is not built; run make")
    monkeypatch.setattr(_backend._chosen, "warned", False)
    monkeypatch.setattr(_backend._chosen, "name", None)
    call = testing.gae_call()
    with pytest.raises(
        ppo_fast.BackendUnavailableError,
        match=r"gae: .*'cpu' is not usable: it is not built; run make",
    ):
        testing.run(call, "cpu")
    with pytest.raises(ppo_fast.BackendUnavailableError, match=r"use_backend: .*run make"):
        ppo_fast.use_backend("cpu")
    with pytest.warns(
        RuntimeWarning, match="slow PyTorch reference. cpu: it is not built; run make"
    ):
        out = testing.run(call, None)
    want = testing.run(call, "reference")
    assert all(testing.same_bits(out[k], want[k]) for k in want)
    testing.run(call, None)  # a second warning would be an error here


def test_the_automatic_choice_is_the_device_s() -> None:
    reason = ppo_fast.backends()["cpu"]
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    assert _backend.select("op", None, torch.zeros(1)) == "cpu"
    assert _backend.select("op", None, torch.zeros(1, dtype=torch.float64)) == "cpu"
    assert _backend.select("op", None, torch.zeros(1, device="meta")) == "reference"


def test_tensors_elsewhere_are_refused() -> None:
    reason = ppo_fast.backends()["cpu"]
    if reason:
        pytest.skip(f"backend 'cpu': {reason}")
    with pytest.raises(ValueError, match="op: backend 'cpu' needs CPU tensors, got meta"):
        _backend.select("op", "cpu", torch.zeros(1, device="meta"))


def test_a_gpu_s_backend_needs_cuda_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_ext, "EMULATED", False)
    monkeypatch.setitem(_backend._REASONS, "cuda", None)
    for name in ("triton", "cuda"):
        with pytest.raises(ValueError, match=f"'{name}' needs CUDA tensors, got cpu"):
            _backend.select("op", name, torch.zeros(1))


def pretend(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], architectures: list[str]
) -> None:
    """A GPU of this capability, and a build for these architectures."""
    build = types.SimpleNamespace(build_info=lambda: {"cuda": {"architectures": architectures}})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(_ext, "module", lambda: build)
    uncached = getattr(_ext.wrong_gpu, "__wrapped__", _ext.wrong_gpu)
    monkeypatch.setattr(_ext, "wrong_gpu", uncached)
    monkeypatch.setattr(_ext, "EMULATED", False)
    monkeypatch.setattr(_backend._chosen, "name", None)
    for name in ("triton", "cuda"):
        monkeypatch.setitem(_backend._REASONS, name, None)


class OnGpu(torch.Tensor):
    """A tensor that only says that it is on a GPU."""

    device = torch.device("cuda", 0)


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16).as_subclass(OnGpu)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (10, 3)])
def test_a_build_runs_where_its_machine_code_does(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    x = torch.zeros(1).as_subclass(OnGpu)
    pretend(monkeypatch, capability, ["80", "90a", "100"])
    assert _backend.select("gae", "cuda", x) == "cuda" and ppo_fast.backends()["cuda"] is None


def test_a_kernel_says_which_gpu_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1).as_subclass(OnGpu)
    pretend(monkeypatch, (7, 5), ["80", "90a", "100"])
    text = r"sm_80, sm_90a, sm_100, the GPU is sm_75; run `.*sm_8x, sm_90 or sm_10x"
    with pytest.raises(ppo_fast.BackendUnavailableError, match=f"gae: .*{text}"):
        _backend.select("gae", "cuda", x)
    assert re.search(text, str(ppo_fast.backends()["cuda"]))


def test_an_emulated_gpu_has_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), ["90a"])
    monkeypatch.setattr(_ext, "EMULATED", True)
    with pytest.raises(ValueError, match=r"gae: backend 'cuda' is emulated .*got cuda:0"):
        _backend.select("gae", "cuda", torch.zeros(1).as_subclass(OnGpu))


def test_the_default_on_a_gpu_is_triton_but_in_the_regimes_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few, many = on_gpu(16, 4096), on_gpu(512, 4096)
    pretend(monkeypatch, (9, 0), ["90a"])
    choose = functools.partial(_backend.select, "gae", None)
    assert choose(few, sequences=16) == "cuda" and choose(many, sequences=512) == "triton"
    assert choose(many, sequences=4096, time_major=True) == "cuda"
    assert _backend.select("whiten", None, many) == "triton"
    assert _backend.select("whiten", None, on_gpu(4, 4)) == "cuda"
    with ppo_fast.use_backend("triton"):
        assert choose(few, sequences=16) == "triton"


def test_a_measurement_decides_over_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way, on its own GPU and dtype alone."""
    pretend(monkeypatch, (9, 0), ["90a"])
    few, many = on_gpu(16, 4096), on_gpu(512, 4096)
    for regime, backend in (("few long sequences", "triton"), ("", "cuda")):
        case = _dispatch.Case("gae", regime, (9, 0), torch.bfloat16)
        monkeypatch.setitem(_dispatch.MEASURED, case, _dispatch.Measured(backend, "some.json"))
    choose = functools.partial(_backend.select, "gae", None)
    assert choose(few, sequences=16) == "triton" and choose(many, sequences=512) == "cuda"
    assert choose(few.half(), sequences=16) == "cuda"
    pretend(monkeypatch, (8, 0), ["80"])
    assert choose(few, sequences=16) == "cuda" and choose(many, sequences=512) == "triton"


def test_the_default_falls_to_the_kernels_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    small = on_gpu(4, 4)
    pretend(monkeypatch, (9, 0), ["90a"])
    assert _backend.select("ppo_loss", None, small) == "cuda"
    pretend(monkeypatch, (9, 0), ["80"])
    assert _backend.select("ppo_loss", None, small) == "triton"
    monkeypatch.setitem(_backend._REASONS, "cuda", "not built")
    assert _backend.select("ppo_loss", None, small) == "triton"
    pretend(monkeypatch, (9, 0), ["90a"])
    monkeypatch.setitem(_backend._REASONS, "triton", "not installed")
    assert _backend.select("ppo_loss", None, on_gpu(512, 4096)) == "cuda"


# Goal rows of the benchmarks, and the default of each.
DEFAULTS = [
    (_dispatch.Work("gae", 512 * 8192, 512), "triton", None),
    (_dispatch.Work("gae", 16 * 65536, 16), "cuda", "few long sequences"),
    (_dispatch.Work("gae", 32768 * 8, 32768, True), "cuda", "time-major"),
    (_dispatch.Work("gae", 4096 * 128, 4096, True), "cuda", "time-major"),
    (_dispatch.Work("rlhf_advantages", 32768 * 8, 32768), "cuda", "short rows"),
    (_dispatch.Work("ppo_loss", 262144), "cuda", "any"),
    (_dispatch.Work("value_loss", 262144), "triton", None),
    (_dispatch.Work("token_logprobs", 8192 * 151936), "triton", None),
    (_dispatch.Work("token_logprobs", 64 * 151936), "cuda", "small"),
    (_dispatch.Work("logits_ppo_loss", 8192 * 151936), "cuda", "any"),
    (_dispatch.Work("linear_ppo_loss", 8192 * 4096), "cuda", "any"),
    (_dispatch.Work("linear_token_logprobs", 8192 * 4096), "triton", None),
]


@pytest.mark.parametrize(("work", "backend", "regime"), DEFAULTS, ids=lambda x: str(x))
def test_the_provider_of_a_benchmark_s_case(
    work: _dispatch.Work, backend: str, regime: str | None
) -> None:
    found = _dispatch.regime_of(work, (9, 0))
    assert (None if found is None else found.name) == regime
    assert _dispatch.provider(work, (9, 0), torch.bfloat16) == backend


def test_a_regime_of_clusters_needs_them() -> None:
    work = _dispatch.Work("logits_ppo_loss", 8192 * 151936)
    assert _dispatch.provider(work, (8, 0), torch.bfloat16) == "triton"
    assert _dispatch.provider(work, (10, 0), torch.bfloat16) == "cuda"


def test_a_compiled_graph_chooses_as_eager_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capability and build are constants of the graph."""
    pretend(monkeypatch, (9, 0), ["90a"])

    def choice(x: torch.Tensor) -> torch.Tensor:
        return x + (_backend._cuda_runs_on(0) == (9, 0))

    compiled = torch.compile(choice, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(3)).tolist() == [1.0] * 3


def test_every_regime_is_documented_and_every_measurement_names_its_results() -> None:
    root = Path(__file__).parents[2]
    page = (root / "docs/backends.md").read_text()
    for regime in _dispatch.REGIMES:
        assert f"| {regime.name} | {', '.join(f'`{op}`' for op in regime.ops)} |" in page
    results = [measured.results for measured in _dispatch.MEASURED.values()]
    assert all((root / "benchmarks/results" / name).is_file() for name in results)


def test_the_environment_chooses() -> None:
    code = (
        "import torch; from ppo_fast._backend import select;"
        "print(select('op', None, torch.zeros(1)))"
    )
    assert python(code, PPO_FAST_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, PPO_FAST_BACKEND="fast")
    assert (
        wrong.returncode != 0
        and "backend must be one of" in wrong.stderr
        and "'fast'" in wrong.stderr
    )


@pytest.mark.case("I12")
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_backends_say_what_they_lack() -> None:
    out = python("import ppo_fast; print(ppo_fast.backends())").stdout
    assert "there is no GPU; set TRITON_INTERPRET=1" in out
    assert "built without CUDA" in out and "set PPO_FAST_CUDA_EMULATE=1" in out
