"""The output head: what stands between hidden states and logits is mapped, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loop_helpers import TEXTS, tiny, trainer, weights
from model_zoo import build
from torch import Tensor, nn
from torch.nn.utils import parametrize

import ppo_fast
from ppo_fast.loop import TrainConfig, Trainer, UnsupportedModelError
from ppo_fast.loop.data.sequences import Sequences
from ppo_fast.loop.model.rounding import product
from ppo_fast.loop.model.tower import Tower
from ppo_fast.loop.rewards import letters

FP64 = 1e-12  # products of the same fp64 numbers in another order


def sequences(seed: int = 1) -> Sequences:
    tokens = torch.randint(1, 290, (3, 9), generator=torch.Generator().manual_seed(seed))
    return Sequences(tokens, torch.ones_like(tokens), torch.ones(3, 4, dtype=torch.bool))


def both(tower: Tower, seqs: Sequences) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of the kept tokens by the model's logits and by the linear head, and hidden."""
    logits, hidden = tower.logits(seqs)
    tokens = seqs.flat(seqs.response)
    own = logits.double().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(1)
    hidden = hidden.detach().requires_grad_()
    linear = ppo_fast.linear_token_logprobs(hidden, tokens=tokens, **tower.head())
    return own, linear.logprobs, hidden


# the type, its factor and its cap
FAMILIES = [
    ("llama", 1.0, None),
    ("cohere", 0.25, None),
    ("granite", 0.25, None),
    ("hyperclovax", 0.5, None),
    ("falcon_h1", 0.5, None),
    ("gemma2", 1.0, 30.0),
    ("recurrent_gemma", 1.0, 3.0),
    ("minicpm3", 1.0, None),
]


@pytest.mark.parametrize(("name", "scale", "cap"), FAMILIES)
def test_factors_and_caps_are_the_models_own(name: str, scale: float, cap: float | None) -> None:
    """Configs have several names for one thing, and one name for a factor and for 1 / it."""
    model = build(name).double()
    model.get_output_embeddings().weight.data *= 8  # logits that a cap bends
    tower = Tower(model, 0)
    own, linear, _ = both(tower, sequences())
    assert (tower.product().scale, tower.product().softcap) == (scale, cap)
    assert own.min() < -1
    torch.testing.assert_close(linear, own, rtol=0, atol=FP64)


class Halved(nn.Module):
    """Forward hook that does to the logits what some models do: a factor and a cap."""

    def forward(self, module: nn.Module, args: object, out: Any) -> Any:
        out.logits = 4.0 * torch.tanh(0.5 * out.logits / 4.0)
        return out


def test_a_cap_behind_a_factor_has_the_gradient_of_the_logits() -> None:
    model = tiny(torch.float64)[0]
    model.config.my_logit_factor, model.config.cap_of_the_output = 0.5, 4.0
    model.register_forward_hook(Halved())
    tower = Tower(model, 0)
    own, linear, hidden = both(tower, sequences())
    torch.testing.assert_close(linear, own, rtol=0, atol=FP64)
    linear.sum().backward()
    weight = model.get_output_embeddings().weight
    logits = 4.0 * torch.tanh(0.5 * (hidden @ weight.T) / 4.0)
    tokens = sequences().flat(sequences().response)
    plain = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()
    want = torch.autograd.grad(plain, hidden)[0]
    torch.testing.assert_close(hidden.grad, want, rtol=0, atol=1e-11)


class Bent(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=2.0)


class Normed(nn.Linear):
    """A head that normalises what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x / x.norm(dim=-1, keepdim=True))


def replaced(kind: type[nn.Linear]) -> Any:
    model = tiny()[0]
    model.config.tie_word_embeddings = False
    head = kind(32, 300, bias=False)
    head.weight.data.copy_(model.lm_head.weight)
    model.lm_head = head
    return model


def hooked_head() -> Any:
    model = tiny()[0]
    model.lm_head.register_forward_hook(lambda module, args, out: out + out.square())
    return model


def masked_tokens() -> Any:
    model = tiny()[0]

    def mask(module: nn.Module, args: object, out: Any) -> Any:
        out.logits[..., 260:] = torch.finfo(out.logits.dtype).min
        return out

    model.register_forward_hook(mask)
    return model


def cropped() -> Any:
    model = tiny()[0]

    def crop(module: nn.Module, args: object, out: Any) -> Any:
        out.logits = out.logits[..., :290]
        return out

    model.register_forward_hook(crop)
    return model


HEADS = [
    (lambda: replaced(Bent), r"output head lm_head \(Bent\) of LlamaForCausalLM is not"),
    (lambda: replaced(Normed), r"output head lm_head \(Normed\) of LlamaForCausalLM is not"),
    (hooked_head, r"output head lm_head \(Linear\) of LlamaForCausalLM is not"),
    (masked_tokens, "LlamaForCausalLM makes its logits of what its output head lm_head"),
    (cropped, "LlamaForCausalLM makes its logits of what its output head lm_head"),
]


def made(out: Path, model: Any, **options: Any) -> Trainer:
    config = TrainConfig(
        out=out,
        updates=2,
        batch=4,
        micro_batch=4,
        max_new_tokens=4,
        train_layers=0,
        warmup=0,
        model="mine",
        device="cpu",
        save_every=0,
        compare=0,
        **options,
    )
    return Trainer(config, model, tiny()[1], TEXTS, letters)


@pytest.mark.parametrize(("make", "message"), HEADS)
def test_another_head_is_refused_before_anything(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        made(tmp_path / "out", make())
    assert "--head logits" in str(caught.value)
    assert not (tmp_path / "out").exists()
    record = made(tmp_path / "logits", make(), head="logits").step()
    assert record["rollout_gap_max"] < 1e-4 and record["steps"] == 4


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrized_head_trains_its_parameters(tmp_path: Path) -> None:
    model = replaced(nn.Linear)
    parametrize.register_parametrization(model.lm_head, "weight", Doubled())
    t = made(tmp_path, model)
    original = model.lm_head.parametrizations.weight.original
    before = original.detach().clone()
    assert t.step()["rollout_gap_max"] < 1e-4
    assert not torch.equal(original, before)


def shifted_in_batches(module: nn.Module, args: object, out: Any) -> Any:
    """Another logit of one token, in forwards of more rows than a trial has."""
    if out.logits.dim() == 2 and len(out.logits) > 4:
        out.logits[:, 7] -= 3.0
    return out


@pytest.mark.parametrize("whose", ["policy", "reference"])
def test_the_first_batch_is_compared_with_the_models_logits(tmp_path: Path, whose: str) -> None:
    """A gap that made-up tokens do not show stops the run before its first optimiser step."""
    t = trainer(tmp_path)
    before = weights(t)
    getattr(t.agent, whose).model.register_forward_hook(shifted_in_batches)
    message = r"differ from those of the model's own logits by .* nats at token 7: output head"
    with pytest.raises(UnsupportedModelError, match=message):
        t.step()
    assert all(map(torch.equal, weights(t), before))
    again = trainer(tmp_path, head="logits")
    getattr(again.agent, whose).model.register_forward_hook(shifted_in_batches)
    if whose == "reference":
        assert again.step()["steps"] == 4


def test_the_comparison_is_made_once(tmp_path: Path) -> None:
    t = trainer(tmp_path)
    t.step()
    formed: list[int] = []
    head = t.agent.policy.model.get_output_embeddings()
    head.register_forward_hook(lambda m, a, out: formed.append(len(out) if out.dim() == 2 else 0))
    t.step()
    assert sum(formed) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_within_its_bound_and_a_wrong_one_is_not(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 96, generator=generator).to(dtype)
    weight = torch.randn(5000, 96, generator=generator).to(dtype)
    bias = torch.randn(5000, generator=generator).to(dtype)
    want, bound = product(hidden, weight, bias, dtype)
    got = torch.nn.functional.linear(hidden, weight, bias).double()
    assert ((got - want).abs() <= bound).all()
    weight[4321] *= 1.5
    other = torch.nn.functional.linear(hidden, weight, bias).double()
    assert ((other - want).abs() > bound).any(0).nonzero().flatten().tolist() == [4321]
