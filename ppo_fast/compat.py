"""Ops under the names and signatures of other libraries, and on other frameworks' arrays.

The functions take and return what TRL's, verl's and OpenRLHF's of the same names do, so that a
Hugging Face Trainer's `compute_loss` or a plain loop changes one import. `arrays` gives any op of
`ppo_fast` NumPy, JAX or TensorFlow arrays for tensors, sharing their memory (DLPack).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppo_fast.ops.logprobs import token_logprobs
from ppo_fast.ops.whiten import whiten
from ppo_fast.reference.common import compute, kl_terms
from ppo_fast.support import Support

# verl's other names of the estimators, and the bound that it and OpenRLHF put on a value.
_VERL_NAMES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}
_KL_CLAMP = 10.0
_IS_WEIGHT_CLIP = 10.0


def selective_log_softmax(
    logits: Tensor,
    index: Tensor,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    support: Support | None = None,
) -> Tensor:
    """Log-probabilities (nats) of the indexed tokens, TRL's `log_softmax(logits).gather(index)`.

    Args:
        logits: `(..., V)` fp32, bf16 or fp16 (fp64 except on Triton).
        index: `(...)` int32 or int64, or `(..., K)` for K tokens of each row.
        temperature: a positive number, divides the logits.
        row_mask: `(...)`; rows that it leaves out are 0 and never read.
        support: kept ids of every row, as in `token_logprobs`, with an index of `(...)`.

    Returns:
        Index's shape, fp32 (fp64 for fp64 logits), differentiable in the logits.

    Raises:
        ValueError: shape, device or range. TypeError: dtype.
    """
    if index.dim() == logits.dim():
        if support is not None:
            raise ValueError(
                f"selective_log_softmax: index must have shape (...) with a support, got"
                f" {tuple(index.shape)} beside logits {tuple(logits.shape)}"
            )
        # Every row K times, by a stride of 0.
        logits = logits.unsqueeze(-2).expand(*index.shape, logits.shape[-1])
        row_mask = None if row_mask is None else row_mask[..., None].expand(index.shape)
    out = token_logprobs(logits, index, temperature=temperature, mask=row_mask, support=support)
    return out.logprobs


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
    *,
    support: Support | None = None,
) -> tuple[Tensor, Tensor]:
    """TRL's pair of `selective_log_softmax` and the rows' entropy, from one read of the logits.

    Both `(...)` in nats, fp32 (fp64 for fp64 logits); without `entropy_requires_grad` the second
    is detached. Arguments and errors as above, with an index of `(...)`.
    """
    out = token_logprobs(logits, index, temperature=temperature, mask=row_mask, support=support)
    return out.logprobs, out.entropy if entropy_requires_grad else out.entropy.detach()


def entropy_from_logits(
    logits: Tensor, chunk_size: int | None = None, *, support: Support | None = None
) -> Tensor:
    """−Σ p ln p (nats) of every row of `(..., V)`, as TRL's and verl's functions of this name.

    `(...)` fp32 (fp64 for fp64 logits), differentiable. TRL's `chunk_size` changes nothing: no
    probabilities are held. With a support it is over the kept ids alone, as no token is known
    that could be missing among them. Errors as above.
    """
    first = torch.zeros((), dtype=torch.int64, device=logits.device).expand(logits.shape[:-1])
    if support is not None and support.n_rows == first.numel() and support.ids.numel():
        at = support.offsets[:-1].clamp(max=support.ids.numel() - 1)
        first = torch.where(support.whole, 0, support.ids[at]).view(first.shape)
    return token_logprobs(logits, first, support=support).entropy


def logprobs_from_logits(
    logits: Tensor,
    labels: Tensor,
    inplace_backward: bool = False,
    *,
    support: Support | None = None,
) -> Tensor:
    """Log-probabilities (nats) of the labels, as verl's function of this name.

    `logits` `(..., V)` and `labels` `(...)` give `(...)` fp32 (fp64 for fp64), differentiable;
    a label of −100 gives 0. `inplace_backward` lets the backward write over the logits, which
    nothing else may then use: False here, True in verl. `support` holds kept ids of every row,
    those of ignored labels too. Errors as above.
    """
    out = token_logprobs(logits, labels, inplace_backward=inplace_backward, support=support)
    return out.logprobs


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """(values − mean)·rsqrt(var + 1e-8) over the kept slots, as TRL's and verl's.

    `values` and `mask` `(B, T)` or `(N,)` give the same shape, fp32 (fp64 for fp64), detached;
    masked slots are 0, where the originals leave numbers, and a mask that keeps nothing gives
    zeros, where verl raises. Without `shift_mean` the mean is added back. Errors as above.
    """
    return whiten(values, mask, shift_mean=shift_mean)


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    """Per-token estimates of KL(π‖π_ref) from samples of π, as verl's function of this name.

    `kl_penalty` is "kl" or "k1", "abs", "mse" or "k2", "low_var_kl" or "k3" (bounded by ±10);
    with a trailing "+" the value is kept and the gradient is k2's. Both log-probabilities have
    one shape, which is the result's, fp32 (fp64 for fp64). Plain PyTorch: no kernel is behind
    it, and `ppo_loss(ref_logprobs=...)` computes it with the loss.

    Raises:
        ValueError: another estimator.
    """
    name = _VERL_NAMES.get(kl_penalty.removesuffix("+"), kl_penalty.removesuffix("+"))
    if name not in ("k1", "k2", "k3", "abs"):
        raise ValueError(
            f"kl_penalty: kl_penalty must be kl, k1, abs, mse, k2, low_var_kl or k3, with or"
            f" without a +, got {kl_penalty!r}"
        )
    name += "+" if kl_penalty.endswith("+") else ""
    d = compute(logprob) - compute(ref_logprob)
    return kl_terms(d, name, _KL_CLAMP if name.startswith("k3") else None)


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    """Per-token estimates of KL(π‖π_ref) bounded by ±10, as OpenRLHF's function of this name.

    `unbiased_gradient` takes k2's gradient, times the detached ratio to `log_probs_old` (at most
    10) where given. One shape for all, which is the result's, fp32 (fp64 for fp64). Plain
    PyTorch, like `kl_penalty`.

    Raises:
        ValueError: an estimator other than "k1", "k2" and "k3".
    """
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(
            f"compute_approx_kl: kl_estimator must be k1, k2 or k3, got {kl_estimator!r}"
        )
    d = compute(log_probs) - compute(log_probs_base)
    if not unbiased_gradient:
        return kl_terms(d, kl_estimator, _KL_CLAMP)
    ratio = None
    if log_probs_old is not None:
        ratio = (compute(log_probs) - compute(log_probs_old)).exp().clamp(max=_IS_WEIGHT_CLIP)
        ratio = ratio.detach()
    return kl_terms(d, f"{kl_estimator}+", _KL_CLAMP, ratio)


def arrays(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op on arrays of another framework: those in, those out, no copy either way.

    Every argument with DLPack's interface (NumPy, JAX, CuPy, ...) or that is a TensorFlow tensor
    becomes a tensor on the same memory; the result's tensors become arrays of the first
    argument's framework on theirs. `Stats`, `Moments` and `Support` stay as they are; a support
    of arrays is `ppo_fast.Support(to_tensor(ids), to_tensor(offsets))`. Gradients do not cross:
    see `to_tensor`.

    Example:
        >>> gae = compat.arrays(ppo_fast.gae)
        >>> advantages, returns, moments = gae(rewards, values, gamma=0.99)  # NumPy in and out

    Raises:
        TypeError: the first argument is no such array, or an argument is a NumPy masked array,
            whose mask would be lost. Otherwise what the op raises.
    """

    @functools.wraps(op)
    def call(first: Any, *args: Any, **options: Any) -> Any:
        if not _is_array(first):
            raise TypeError(
                f"{op.__name__}: the first argument must be an array with __dlpack__,"
                f" got {type(first).__name__}"
            )
        result = op(
            to_tensor(first),
            *(to_tensor(x) if _is_array(x) else x for x in args),
            **{name: to_tensor(x) if _is_array(x) else x for name, x in options.items()},
        )
        if isinstance(result, Tensor):
            return to_array(result, like=first)
        return type(result)(
            *(to_array(x, like=first) if isinstance(x, Tensor) else x for x in result)
        )

    return call


def to_tensor(array: Any) -> Tensor:
    """The tensor on the memory of a NumPy, JAX, TensorFlow or other DLPack array.

    Nothing is copied: the array must not change while the tensor is in use, nor the tensor where
    the framework takes its arrays for constants (JAX, TensorFlow). For gradients call
    `requires_grad_()` on it, and give `.grad` back with `to_array`.

    Raises:
        TypeError: no DLPack array, of a type that DLPack has no name for, or a masked array, whose
            mask DLPack does not carry.
    """
    if _is_masked(array):
        raise TypeError(
            f"to_tensor: array must not be masked, got {type(array).__name__}: its mask would be"
            " lost; give its .data, and the op ~numpy.ma.getmaskarray(array) as mask"
        )
    if not _is_array(array):
        raise TypeError(
            f"to_tensor: array must have __dlpack__ or be a TensorFlow tensor,"
            f" got {type(array).__name__}"
        )
    dtype: Any = getattr(array, "dtype", "unknown type")
    try:
        if not _is_tensorflow(array):
            # PyTorch 2.13 ends the process on those.
            if min(getattr(array, "strides", None) or (0,)) < 0:
                raise ValueError(f"strides {array.strides} go backwards")
            return torch.utils.dlpack.from_dlpack(array)
        tf = sys.modules["tensorflow"]
        # TensorFlow ends the process on strings.
        if not isinstance(array, tf.Tensor) or not (
            dtype.is_floating or dtype.is_integer or dtype.is_bool
        ):
            raise ValueError(f"{type(array).__name__} is no tensor of numbers")
        return torch.utils.dlpack.from_dlpack(tf.experimental.dlpack.to_dlpack(array))
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(
            f"to_tensor: array of {dtype} cannot be shared through DLPack: {error}"
        ) from error


def to_array(tensor: Tensor, *, like: Any) -> Any:
    """The array of `like`'s framework on the memory of a tensor, which is detached.

    Raises:
        TypeError: `like` is of no framework with DLPack.
    """
    tensor = tensor.detach()
    if _is_tensorflow(like):
        return sys.modules["tensorflow"].experimental.dlpack.from_dlpack(tensor.__dlpack__())
    if not hasattr(like, "__array_namespace__"):
        raise TypeError(
            f"to_array: like must be an array of NumPy, JAX, TensorFlow or another framework with"
            f" __array_namespace__, got {type(like).__name__}"
        )
    return like.__array_namespace__().from_dlpack(tensor)


def _is_array(x: Any) -> bool:
    return not isinstance(x, Tensor) and (hasattr(x, "__dlpack__") or _is_tensorflow(x))


def _is_masked(x: Any) -> bool:
    ma: Any = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(x, ma.MaskedArray)


def _is_tensorflow(x: Any) -> bool:
    # Its tensors have no array namespace, and older ones no __dlpack__.
    return type(x).__module__.partition(".")[0] == "tensorflow"
