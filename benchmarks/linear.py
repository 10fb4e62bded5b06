"""Hidden states × head → log-probabilities and entropy, until this library has that op fused.

The call, what the op means (a matrix product, then `token_logprobs`), and its error budget.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import ppo_fast
from ppo_fast import TokenLogProbs
from ppo_fast.testing import Call
from ppo_fast.testing.conditions import Conditions, logprobs_condition

LINEAR = "linear_token_logprobs"


def linear_call(
    dims: tuple[int, ...], dtype: torch.dtype, device: str, scale: float = 3.0
) -> Call:
    """Rows × vocabulary × hidden size; the logits' standard deviation is `scale`."""
    rows, vocab, width = dims
    hidden = torch.randn(rows, width, device=device)
    weight = torch.randn(vocab, width, device=device) * (scale / math.sqrt(width))
    tokens = torch.randint(vocab, (rows,), device=device)
    return Call(
        LINEAR, {"hidden": hidden.to(dtype), "weight": weight.to(dtype), "tokens": tokens}, {}, {}
    )


def composed(
    hidden: Tensor, weight: Tensor, tokens: Tensor, *, backend: str | None = None
) -> TokenLogProbs:
    """The logits in the inputs' precision, then the op that reads them."""
    return ppo_fast.token_logprobs(F.linear(hidden, weight), tokens, backend=backend)


def linear_condition(call: Call, exact: dict[str, Tensor], eps: float) -> Conditions:
    """The budget of `token_logprobs`, and what rounds a logit while H products are added.

    That is |X|·|W|ᵀ times √H/4 (Higham & Mary 2019): it reaches the label's logit directly and
    ln Σ weighted by p, and the entropy weighted by p·|ln p + entropy|.
    """
    t = call.tensors
    logits = F.linear(t["hidden"], t["weight"])
    inner = Call("token_logprobs", {"logits": logits, "tokens": t["tokens"]}, {}, {})
    base = logprobs_condition(inner, {}, eps)
    added = F.linear(t["hidden"].abs(), t["weight"].abs()) * (
        1 + math.sqrt(t["hidden"].shape[-1]) / 4
    )
    logp = logits.log_softmax(-1)
    p = logp.exp()
    at = added.gather(-1, t["tokens"][:, None])[:, 0] + (p * added).sum(-1)
    slope = (logp - (p * logp).sum(-1, keepdim=True)).abs()
    reach = {"logprobs": at, "entropy": (p * slope * added).sum(-1)}
    return {k: (ops, x + reach[k], eager) for k, (ops, x, eager) in base.items()}
