"""Weights that are not whole here: DTensors of hidden states, ZeRO-3 partitions."""

from __future__ import annotations

import pytest
import torch
from conftest import usable
from torch.distributed.tensor import Shard

import ppo_fast
from ppo_fast import testing
from ppo_fast.ops.distributed_weight import require_plain
from ppo_fast.testing import linear_call, linear_divergence_call, linear_ppo_call


class Sharded(torch.Tensor):
    """A tensor with what a DTensor is known by."""

    placements = (Shard(0),)
    full_tensor = None


def partitioned(x: torch.Tensor) -> torch.nn.Parameter:
    """A parameter as ZeRO-3 leaves it: what DeepSpeed 0.19 sets, and nothing in it."""
    out = torch.nn.Parameter(torch.empty(0))
    out.ds_id, out.ds_shape = 0, x.shape  # type: ignore[attr-defined]
    return out


def gathered(x: torch.Tensor) -> torch.nn.Parameter:
    """The same inside of `GatheredParameters`."""
    out = partitioned(x)
    out.data = x.clone()
    return out


def taken_away(x: torch.nn.Parameter) -> None:
    """The end of the context: the parameter itself loses its content."""
    x.data = torch.empty(0)


@pytest.mark.parametrize("name", ["hidden", "teacher_hidden"])
def test_a_hidden_state_in_a_dtensor_is_refused(name: str) -> None:
    """Its rows may be all or this rank's: there is no one meaning."""
    call = linear_divergence_call()._replace(cotangents={})
    call = call.replace(**{name: call.tensors[name].as_subclass(Sharded)})
    said = (
        rf"{name.replace('_', '.')} must be a plain tensor.* DTensor of placements \(Shard\(dim=0"
    )
    with pytest.raises(TypeError, match=said):
        testing.run(call, usable("cpu"))
    require_plain("op", "hidden", torch.zeros(1))


@pytest.mark.parametrize("name", ["weight", "bias", "teacher_weight"])
def test_a_partition_of_zero_3_is_refused(name: str) -> None:
    """It says what to do; whole, the same parameter passes."""
    call = linear_divergence_call()._replace(cotangents={})
    want, x = testing.run(call, usable("cpu")), call.tensors[name]
    shown = name.replace("_", ".")
    said = (
        rf"linear_divergence: {shown} must be whole, got a ZeRO-3 partition of shape \(0,\) for"
        rf" .*deepspeed\.zero\.GatheredParameters\(\[{shown}\]\)"
    )
    with pytest.raises(ValueError, match=said):
        testing.run(call.replace(**{name: partitioned(x)}), usable("cpu"))
    got = testing.run(call.replace(**{name: gathered(x)}), usable("cpu"))
    assert all(testing.same_bits(got[k], x) for k, x in want.items())


@pytest.mark.parametrize("kept", [None, 5])
def test_a_weight_that_is_gone_in_the_backward_is_told(kept: int | None) -> None:
    """The backward reads it again: no gradient is made of nothing."""
    call = linear_call(kept=kept, sparse=None if kept is None else True)
    weight = gathered(call.tensors["weight"])
    tensors = call.tensors | {"hidden": call.tensors["hidden"].requires_grad_()}
    out = ppo_fast.linear_token_logprobs(
        **tensors | {"weight": weight}, **call.options, backend=usable("cpu")
    )
    taken_away(weight)
    with pytest.raises(RuntimeError, match=r"weight has shape \(0,\) in the backward.*Gathered"):
        out.logprobs.sum().backward()


def test_a_loss_whose_gradients_are_formed_does_not_need_it_again() -> None:
    """The gradient by the hidden states, with a frozen weight."""
    call = linear_ppo_call()
    want = testing.run(call, usable("cpu"))["grad_hidden"]
    weight = gathered(call.tensors["weight"]).requires_grad_(False)
    hidden = call.tensors["hidden"].requires_grad_()
    given = call.tensors | {"hidden": hidden, "weight": weight}
    loss = ppo_fast.linear_ppo_loss(**given, **call.options, backend=usable("cpu")).loss
    taken_away(weight)
    loss.backward(call.cotangents["loss"])
    assert hidden.grad is not None
    assert testing.same_bits(hidden.grad, want)
