"""`compat.arrays`: NumPy, JAX and TensorFlow arrays in and out on the same memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pages import block

import ppo_fast
from ppo_fast import Moments, Stats, compat, testing


class Framework(NamedTuple):
    """A framework: array from NumPy's, address of an array's memory, array type."""

    make: Callable[[np.ndarray], Any]
    address: Callable[[Any], int]
    kind: type


def _jax() -> Framework:
    jax = pytest.importorskip("jax", reason="needs `pip install jax`")
    return Framework(jax.numpy.asarray, lambda x: x.unsafe_buffer_pointer(), jax.Array)


def _tensorflow() -> Framework:
    tf = pytest.importorskip("tensorflow", reason="needs `pip install tensorflow-cpu`")
    # Its buffer protocol, which copies nothing.
    return Framework(tf.constant, lambda x: np.asarray(memoryview(x)).ctypes.data, tf.Tensor)


def _numpy() -> Framework:
    return Framework(np.asarray, lambda x: x.ctypes.data, np.ndarray)


@pytest.fixture(params=[_numpy, _jax, _tensorflow], ids=["numpy", "jax", "tensorflow"])
def framework(request: pytest.FixtureRequest) -> Framework:
    return request.param()


def test_a_support_of_arrays(framework: Framework) -> None:
    """Made of shared memory, and handed on as it is."""
    logits, tokens = numbers(3, 9), np.array([1, 2, 8], dtype=np.int64)
    ids, offsets = np.array([1, 5, 8, 0], dtype=np.int32), np.array([0, 2, 2, 4], dtype=np.int64)
    shared = [compat.to_tensor(framework.make(x)) for x in (ids, offsets.astype(np.int32))]
    support = ppo_fast.Support(*shared)
    want = ppo_fast.token_logprobs(
        torch.from_numpy(logits), torch.from_numpy(tokens), support=support
    )
    op = compat.arrays(ppo_fast.token_logprobs)
    given = [framework.make(x) for x in (logits, tokens.astype(np.int32))]
    got = op(*given, support=support)
    assert all(isinstance(x, framework.kind) for x in got)
    assert np.asarray(got.logprobs).tolist() == want.logprobs.tolist()
    assert support.whole.tolist() == [False, True, False]
    # Over two ids: ln of one exponential among two.
    z = logits[0, [1, 5]].astype(np.float64)
    assert abs(float(want.logprobs[0]) - (z[0] - np.logaddexp(*z))) < 1e-6


def numbers(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.int32, np.bool_], ids=str)
def test_no_copy_in_and_out(framework: Framework, dtype: type) -> None:
    array = framework.make((numbers(64, 33) > 0).astype(dtype))
    tensor = compat.to_tensor(array)
    assert tensor.data_ptr() == framework.address(array)
    assert tensor.shape == (64, 33) and tensor.numpy().tolist() == np.asarray(array).tolist()
    back = compat.to_array(tensor.clone(), like=array)
    assert isinstance(back, framework.kind) and back.dtype == array.dtype
    clone = tensor.clone()
    assert framework.address(compat.to_array(clone, like=array)) == clone.data_ptr()
    assert np.asarray(back).tolist() == np.asarray(array).tolist()


def test_gae(framework: Framework) -> None:
    """The same bits as on tensors, arrays of the framework out, moments as they are."""
    rewards, values, ends = numbers(4, 33), numbers(4, 33), numbers(4, 33) > 1
    arrays = [framework.make(x) for x in (rewards, values, ends)]
    out = compat.arrays(ppo_fast.gae)(*arrays[:2], terminated=arrays[2], gamma=0.9)
    want = ppo_fast.gae(
        *(torch.from_numpy(x) for x in (rewards, values)),
        terminated=torch.from_numpy(ends),
        gamma=0.9,
    )
    for name in ("advantages", "returns"):
        x = getattr(out, name)
        assert isinstance(x, framework.kind)
        assert np.asarray(x).tobytes() == getattr(want, name).numpy().tobytes()
    assert type(out.moments) is Moments
    assert testing.same_bits(out.moments.values, want.moments.values)


def test_a_single_result_and_statistics(framework: Framework) -> None:
    """`whiten` gives one array; a loss is a 0-d array beside its `Stats`."""
    x, y = framework.make(numbers(3, 7)), framework.make(numbers(3, 7) / 2)
    white = compat.arrays(ppo_fast.whiten)(x)
    assert isinstance(white, framework.kind)
    assert abs(float(np.asarray(white).mean())) <= 21 * np.finfo(np.float32).eps
    loss, stats = compat.arrays(ppo_fast.ppo_loss)(x, y, y)
    assert isinstance(loss, framework.kind) and type(stats) is Stats
    assert float(loss) == pytest.approx(stats.compute()["loss"], rel=2**-22)


def test_the_page_with_numpy() -> None:
    """Rewards 1, V = 0: A_t sums the powers of γλ that are left."""
    scope: dict[str, Any] = {}
    exec(block("compat.md", "import numpy"), scope)
    decay = 0.99 * 0.95
    want = [sum(decay**k for k in range(5 - t)) for t in range(5)]
    for row in scope["advantages"]:
        assert row.tolist() == pytest.approx(want, rel=10 * 2**-23)
    assert type(scope["returns"]) is np.ndarray
    assert scope["returns"].tolist() == scope["advantages"].tolist()


def test_the_page_with_jax() -> None:
    """The gradient of Σ log p[token] is one-hot − p, which JAX knows by itself."""
    jax = pytest.importorskip("jax", reason="needs `pip install jax`")
    scope: dict[str, Any] = {}
    exec(block("compat.md", "import jax"), scope)
    logits = scope["logits"]
    want = jax.nn.log_softmax(logits)[..., 0]
    one_hot = jax.nn.one_hot(scope["tokens"], 11)
    for ours, theirs, size in (
        (scope["logprobs"], want, 4 + math.log(11)),
        (scope["gradient"], one_hot - jax.nn.softmax(logits), 1.0),
    ):
        assert isinstance(ours, jax.Array)
        assert float(abs(ours - theirs).max()) <= 16 * size * 2**-23


def test_the_page_with_tensorflow() -> None:
    tf = pytest.importorskip("tensorflow", reason="needs `pip install tensorflow-cpu`")
    scope: dict[str, Any] = {}
    exec(block("compat.md", "import tensorflow"), scope)
    white = scope["white"]
    assert isinstance(white, tf.Tensor)
    kept = np.asarray(white).flatten()[:8]
    assert np.asarray(white)[1, 3:].tolist() == [0.0, 0.0]
    assert abs(kept.mean()) <= 8 * 2**-23 and kept.var(ddof=1) == pytest.approx(1.0, rel=1e-6)


def test_what_cannot_be_shared_is_an_error() -> None:
    gae = compat.arrays(ppo_fast.gae)
    with pytest.raises(TypeError, match=r"gae: the first argument .* got list"):
        gae([1.0], [0.0])
    with pytest.raises(TypeError, match=r"array must have __dlpack__ .* got SimpleNamespace"):
        compat.to_tensor(SimpleNamespace())
    with pytest.raises(TypeError, match=r"array of <U1 cannot be shared"):
        compat.to_tensor(np.array(["a"]))
    with pytest.raises(
        TypeError, match=r"array of float32 cannot .* strides \(-16, 4\) go backwards"
    ):
        compat.to_tensor(numbers(3, 4)[::-1])
    with pytest.raises(TypeError, match=r"like must be an array .* got float"):
        compat.to_array(torch.zeros(1), like=1.0)
    with pytest.raises(ValueError, match=r"gae: values must have shape \(B, T\) = \(2, 3\)"):
        gae(numbers(2, 3), numbers(2, 4))


def test_what_tensorflow_cannot_share_is_an_error() -> None:
    """Strings would end the process; variables and ragged tensors are no tensors."""
    tf = pytest.importorskip("tensorflow", reason="needs `pip install tensorflow-cpu`")
    for bad in (tf.constant(["a"]), tf.Variable([1.0]), tf.ragged.constant([[1], [1, 2]])):
        with pytest.raises(TypeError, match=f"shared through DLPack: {type(bad).__name__}"):
            compat.to_tensor(bad)


def test_bf16_of_jax_and_tensorflow() -> None:
    """NumPy has no such type of its own; the others' crosses as it is."""
    made = []
    for name in ("jax.numpy", "tensorflow"):
        module = pytest.importorskip(name, reason="needs `pip install jax tensorflow-cpu`")
        made.append(compat.to_tensor(module.ones((2, 3), module.bfloat16)))
    assert [x.dtype for x in made] == [torch.bfloat16] * 2
    assert all(bool((x == 1).all()) for x in made)
