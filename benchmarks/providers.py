"""Who is measured: this library's backends, the peers, and the ceilings, bound to inputs."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ppo_fast
from benchmarks import peers
from benchmarks.shapes import BOTH, Case
from benchmarks.timing import Bound
from ppo_fast.testing import Call, output
from ppo_fast.testing.calls import DIFFERENTIABLE


@dataclass(frozen=True)
class Provider:
    """One contestant. `missing` gives the reason why it cannot run here, or None.

    A ceiling moves bytes and computes nothing that a gate could check. A `plain` one is PyTorch's
    own arithmetic. `roundings` is what its documented method may err beyond the op's budget, in
    spacings of fp32.
    """

    name: str
    bind: Callable[[Case, Call], Bound]
    missing: Callable[[], str | None] = lambda: None
    ceiling: bool = False
    plain: bool = False
    roundings: float = 0.0


def _leaves(case: Case, call: Call) -> tuple[dict[str, Tensor], list[str]]:
    """The call's tensors, those that gradients flow to as leaves when the case asks for them."""
    tensors, names = dict(call.tensors), []
    if case.grad:
        names = [name for name in DIFFERENTIABLE[call.op][0] if name in tensors]
        for name in names:
            tensors[name] = tensors[name].detach().clone().requires_grad_()
    return tensors, names


def _timed(
    case: Case,
    call: Call,
    forward: Callable[[], Any],
    leaves: dict[str, Tensor],
    named: Callable[[Any], dict[str, Tensor]],
) -> Bound:
    """`forward`, followed by the gradients of the call's cotangents where the case wants them."""
    if case.direction != BOTH:
        return Bound(forward, lambda out: {k: v.detach() for k, v in named(out).items()})
    inputs, cotangents = tuple(leaves.values()), tuple(call.cotangents.values())
    wanted = len(cotangents)

    def both() -> tuple[Any, tuple[Tensor, ...]]:
        out = forward()
        return out, torch.autograd.grad(out[:wanted], inputs, cotangents)

    def every(result: Any) -> dict[str, Tensor]:
        out, grads = result
        of = {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
        return {k: v.detach() for k, v in (named(out) | of).items()}

    return Bound(both, every)


def _ours(backend: str, *, inplace: bool = False) -> Provider:
    def bind(case: Case, call: Call) -> Bound:
        tensors, names = _leaves(case, call)
        op = getattr(ppo_fast, call.op)
        options = dict(call.options, backend=backend)
        if inplace:
            options["inplace_backward"] = True
        leaves = {name: tensors[name] for name in names}
        bound = _timed(case, call, lambda: op(**tensors, **options), leaves, output)
        if not inplace:
            return bound

        def restore() -> None:
            with torch.no_grad():
                tensors["logits"].copy_(call.tensors["logits"])

        return Bound(bound.call, bound.named, restore)

    name = f"ppo_fast-{backend}" + ("-inplace" if inplace else "")
    return Provider(name, bind, lambda: ppo_fast.backends()[backend], plain=backend == "reference")


def _torch_peer(name: str, compiled: bool = False) -> Provider:
    """The plain PyTorch function of the op, eager or compiled (forward and, traced, backward)."""

    def bind(case: Case, call: Call) -> Bound:
        plain, named = _PLAIN[call.op]
        function: Any = torch.compile(plain, dynamic=False) if compiled else plain
        tensors, names = _leaves(case, call)
        leaves = {key: tensors[key] for key in names}
        options = {k: v for k, v in call.options.items() if k in _OPTIONS[call.op]}
        return _timed(case, call, lambda: function(**tensors, **options), leaves, named)

    return Provider(name, bind, plain=True)


def _pair(*names: str) -> Callable[[Any], dict[str, Tensor]]:
    return lambda out: dict(zip(names, out, strict=True))


def _with_stats(names: tuple[str, ...]) -> Callable[[Any], dict[str, Tensor]]:
    return lambda out: {"loss": out[0], **dict(zip(names, out[1], strict=True))}


_PLAIN: dict[str, tuple[Callable[..., Any], Callable[[Any], dict[str, Tensor]]]] = {
    "token_logprobs": (peers.token_logprobs, _pair("logprobs", "entropy")),
    "ppo_loss": (peers.ppo_loss, _with_stats(peers.PPO_STATS)),
    "value_loss": (peers.value_loss, _with_stats(peers.VALUE_STATS)),
    "gae": (peers.gae_loop, _pair("advantages", "returns")),
}
_OPTIONS = {
    "token_logprobs": (),
    "ppo_loss": ("clip_low", "clip_high", "entropy_coef", "kl_coef", "kl_clamp"),
    "value_loss": ("clip",),
    "gae": ("gamma", "lam"),
}


def _needs(module: str, package: str) -> Callable[[], str | None]:
    """Reason why a package's module does not import, if it does not."""

    def missing() -> str | None:
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{module} does not import ({error}); pip install '{package}'"
        return None

    return missing


def _torchrl(case: Case, call: Call) -> Bound:
    """torchrl's vectorised GAE; next values and flags, which its collectors keep, are given."""
    from torchrl.objectives.value.functional import vec_generalized_advantage_estimate

    rewards, values = (call.tensors[name].unsqueeze(-1) for name in ("rewards", "values"))
    after = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)
    done = torch.zeros_like(rewards, dtype=torch.bool)
    done[:, -1] = True
    gamma, lam = call.options["gamma"], call.options["lam"]

    def run() -> tuple[Tensor, Tensor]:
        return vec_generalized_advantage_estimate(gamma, lam, values, after, rewards, done, done)

    return Bound(run, lambda out: {"advantages": out[0][..., 0], "returns": out[1][..., 0]})


def _tianshou(case: Case, call: Call) -> Bound:
    """tianshou's numba recursion over the flat batch, and its returns."""
    from tianshou.algorithm.algorithm_base import _gae

    shape = call.tensors["rewards"].shape
    # float64 rewards beside float32 values: the mixture that its own warm-up compiles.
    rewards = call.tensors["rewards"].flatten().double().numpy()
    values = call.tensors["values"].flatten().numpy()
    next_values, ends = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
    next_values[:, :-1], ends[:, -1] = call.tensors["values"][:, 1:], True
    after, end = next_values.flatten().numpy(), ends.flatten().numpy()
    gamma, lam = call.options["gamma"], call.options["lam"]

    def run() -> tuple[Any, Any]:
        advantages = _gae(values, after, rewards, end, gamma, lam)
        return advantages, advantages + values

    def named(out: tuple[Any, Any]) -> dict[str, Tensor]:
        pair = (torch.from_numpy(x).view(shape).float() for x in out)
        return dict(zip(("advantages", "returns"), pair, strict=True))

    return Bound(run, named)


def _ceiling(name: str, function: Callable[..., list[Tensor]]) -> Provider:
    def bind(case: Case, call: Call) -> Bound:
        tensors = [x for key, x in call.tensors.items() if key != "tokens"]
        return Bound(lambda: function(*tensors), lambda out: {})

    return Provider(name, bind, ceiling=True)


CPU, REFERENCE = _ours("cpu"), _ours("reference")
INPLACE = _ours("cpu", inplace=True)
EAGER, COMPILE, LOOP = _torch_peer("eager"), _torch_peer("compile", True), _torch_peer("loop")
# torchrl drops the terms of its series below 1e-7: of the largest delta 1e-7 / (1 − γλ) = 1.7e-6.
TORCHRL = Provider(
    "torchrl",
    _torchrl,
    _needs("torchrl.objectives.value", "torchrl==0.14.1"),
    roundings=1.7e-6 * 2**23,
)
TIANSHOU = Provider("tianshou", _tianshou, _needs("tianshou.algorithm", "tianshou==2.0.1"))
READ, COPY = _ceiling("read", peers.read), _ceiling("copy", peers.copy)


def providers_of(case: Case) -> tuple[Provider, ...]:
    """Who takes part in a case; ratios in the table are to the first peer, the baseline."""
    if case.direction.startswith("call"):
        return (CPU, REFERENCE)
    if case.op == "token_logprobs":
        if case.direction == BOTH:
            return (CPU, INPLACE, REFERENCE, EAGER, COMPILE, COPY)
        return (CPU, REFERENCE, EAGER, COMPILE, READ)
    if case.op == "gae":
        return (CPU, REFERENCE, LOOP, TORCHRL, TIANSHOU, COPY)
    return (CPU, REFERENCE, EAGER, COMPILE, COPY)
