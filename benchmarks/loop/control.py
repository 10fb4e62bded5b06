"""The control libraries' own advantages and losses, each in turn with what replaces it.

    python -m benchmarks.loop.control [sb3 torchrl tianshou skrl cleanrl]

with the Python of an environment that has them (`make test-control` makes one) prints the rows of
docs/integrations: medians of one interleaved run, an episode's end every 100 steps. Times are of
the processor, on one thread: other work on the cores does not add to them. Results that differ
raise MismatchError. The losses of Stable-Baselines3 and skrl are replaced here alone: these rows
say why the swap-ins leave them.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import ppo_fast
from benchmarks.harness.machine import ROOT, describe
from benchmarks.harness.timing import interleave, median
from benchmarks.loop.swap_rows import Draws, sampler
from benchmarks.report.tables import describe_facts
from ppo_fast.integrations import sb3, skrl, tianshou, torchrl
from ppo_fast.integrations._extract import Block, extract
from ppo_fast.integrations._first_call import first_call

BUDGET = 3.0  # seconds for each side of a row
GAMMA, LAM, CLIP = 0.99, 0.95, 0.2
END = 100
BATCHES = (64, 4096, 65536)

Call = Callable[[], Any]


class Row(NamedTuple):
    """A measurement: the library's calls by their names, and ours; each gives its result."""

    what: str
    theirs: dict[str, Call]
    ours: Call


def milliseconds(row: Row) -> dict[str, float]:
    """Medians by the calls' names, ours under "here"."""
    for name, theirs in row.theirs.items():
        sides = (lambda _, call=call: call() for call in (theirs, row.ours))
        first_call(f"{row.what}: {name}", *sides, {}, lambda _, result: result)
    calls = {**row.theirs, "here": row.ours}
    samples = interleave({name: sampler(call) for name, call in calls.items()}, BUDGET)
    return {name: 1e3 * median(taken) for name, taken in samples.items()}


def ends(steps: int, *rest: int) -> Tensor:
    """(T, ...) bool."""
    flags = torch.zeros(steps, *rest, dtype=torch.bool)
    flags[END - 1 :: END] = True
    return flags


def sb3_rows() -> Iterator[Row]:
    """The rollout buffer's advantages, then the losses and the update of `PPO.train`."""
    from stable_baselines3.common.buffers import RolloutBuffer

    name = "compute_returns_and_advantage"
    own = getattr(RolloutBuffer, name)
    with sb3.patched():
        patched = getattr(RolloutBuffer, name)
        for steps, envs in ((2048, 1), (2048, 16), (128, 256)):
            x = Draws()
            buffer = SimpleNamespace(
                gamma=GAMMA,
                gae_lambda=LAM,
                buffer_size=steps,
                rewards=x.normal(steps, envs).numpy(),
                values=x.normal(steps, envs).numpy(),
                episode_starts=ends(steps, envs).roll(1, 0).float().numpy(),
                advantages=np.zeros((steps, envs), np.float32),
            )
            call = partial(_filled, buffer, x.normal(envs, 1), np.zeros(envs, bool))
            yield Row(
                f"advantages, {steps} × {envs}",
                {"sb3": partial(call, own)},
                partial(call, patched),
            )
    yield from _sb3_losses()


def _filled(buffer: Any, last: Tensor, dones: Any, method: Callable[..., None]) -> Any:
    method(buffer, last, dones)
    return buffer.advantages, buffer.returns


def _sb3_losses() -> Iterator[Row]:
    from stable_baselines3 import PPO

    block = Block("advantages = rollout_data.advantages", "clip_fractions.append")
    extracted, build = extract(PPO.train, {"loss": block})
    own = extracted["loss"].original
    for size in BATCHES:
        x = Draws()
        new = x.leaf(size, scale=0.1)
        old, advantages = new.detach() + 0.1 * x.normal(size), x.normal(size)
        call = partial(
            _sb3_minibatch, new, SimpleNamespace(old_log_prob=old, advantages=advantages)
        )
        yield Row(f"policy loss, {size}", {"sb3": partial(call, own)}, partial(call, _sb3_loss))
    model = PPO("MlpPolicy", "CartPole-v1", seed=0, device="cpu", n_epochs=1).learn(2048)
    ours = build({"loss": _sb3_loss})
    yield Row("update, 2048 in batches of 64", {"sb3": model.train}, partial(ours, model))


def _sb3_minibatch(new: Tensor, data: Any, loss: Any) -> Any:
    logs: dict[str, list[float]] = {"pg_losses": [], "clip_fractions": []}
    model = SimpleNamespace(normalize_advantage=True)
    given = {"log_prob": new, "rollout_data": data, "self": model, "clip_range": CLIP}
    policy = loss(**given, **logs)["policy_loss"]
    return policy, torch.autograd.grad(policy, [new]), logs


def _sb3_loss(
    log_prob: Tensor,
    rollout_data: Any,
    self: Any,
    clip_range: float,
    pg_losses: list[float],
    clip_fractions: list[float],
) -> dict[str, Tensor]:
    advantages = ppo_fast.whiten(rollout_data.advantages, eps_at="std")
    loss, stats = _policy_loss(log_prob, rollout_data.old_log_prob, advantages, clip_range)
    found = stats.compute()
    pg_losses.append(found["policy_loss"])
    clip_fractions.append(found["clip_frac_eps"])
    return {"policy_loss": loss}


def _policy_loss(new: Tensor, old: Tensor, advantages: Tensor, clip: float) -> ppo_fast.Loss:
    return ppo_fast.ppo_loss(
        new, old, advantages, clip_low=clip, clip_high=clip, log_ratio_clamp=None
    )


def torchrl_rows() -> Iterator[Row]:
    """Both forms of the advantages."""
    from torchrl.objectives.value import functional

    names = {"loop": "generalized_advantage_estimate"}
    names["vectorised"] = f"vec_{names['loop']}"
    own = {name: getattr(functional, function) for name, function in names.items()}
    with torchrl.patched():
        patched = functional.generalized_advantage_estimate
        for envs, steps in ((1, 2048), (16, 2048), (64, 1024)):
            x, shape = Draws(), (envs, steps, 1)
            done = ends(steps, 1).expand(shape).contiguous()
            given = (GAMMA, LAM, *(x.normal(*shape) for _ in range(3)), done, done)
            theirs: dict[str, Call] = {name: partial(f, *given) for name, f in own.items()}
            yield Row(f"advantages, {envs} × {steps}", theirs, partial(patched, *given))


def tianshou_rows() -> Iterator[Row]:
    """The recursion with the statements around it, in fp64."""
    from tianshou.data import Batch, ReplayBuffer

    (place,) = tianshou.integration.find()
    own = place.original
    with tianshou.patched():
        patched = getattr(place.holder, place.key)
        for steps in (2048, 32768):
            x, buffer, done = Draws(), ReplayBuffer(steps), ends(steps).numpy()
            rewards, values, after = x.normal(3, steps).double().numpy()
            none = np.zeros(steps, bool)
            for reward, end in zip(rewards, done, strict=True):
                step = {"obs": 0, "act": 0, "obs_next": 0, "rew": reward}
                buffer.add(Batch(**step, terminated=end, truncated=False))
            batch = Batch(rew=rewards, terminated=done, truncated=none)
            given = (batch, buffer, np.arange(steps), after, values, GAMMA, LAM)
            yield Row(
                f"advantages, {steps}",
                {"tianshou": partial(own, *given)},
                partial(patched, *given),
            )


def skrl_rows() -> Iterator[Row]:
    """Advantages of 2.0 and later, then the statements of the policy's loss."""
    from skrl.agents.torch.ppo import ppo

    own = ppo.compute_gae
    with skrl.patched():
        patched = ppo.compute_gae
        for steps, envs in ((32, 2), (1024, 16), (64, 512), (16, 4096)):
            x = Draws()
            last = x.normal(envs, 1)
            given = {"rewards": x.normal(steps, envs, 1), "values": x.normal(steps, envs, 1)}
            given["terminated"] = ends(steps, envs, 1)
            if "last_values" in own.__kwdefaults__ or "truncated" in own.__annotations__:
                given |= {"truncated": torch.zeros_like(given["terminated"]), "last_values": last}
            else:
                given["next_values"] = last
            yield Row(
                f"advantages, {steps} × {envs}",
                {"skrl": partial(own, **given)},
                partial(patched, **given),
            )
    block = Block("ratio = torch.exp(next_log_prob", "policy_loss = ")
    loss = extract(ppo.PPO.update, {"loss": block})[0]["loss"].original
    for size in BATCHES:
        x = Draws()
        new, advantages = x.leaf(size, 1, scale=0.1), x.normal(size, 1)
        call = partial(_skrl_minibatch, new, new.detach() + 0.1 * x.normal(size, 1), advantages)
        theirs = {"skrl": partial(call, loss)}
        yield Row(f"policy loss, {size}", theirs, partial(call, _skrl_loss))


def _skrl_minibatch(new: Tensor, old: Tensor, advantages: Tensor, loss: Any) -> Any:
    agent = SimpleNamespace(cfg=SimpleNamespace(ratio_clip=CLIP))
    given = {"next_log_prob": new, "sampled_log_prob": old, "sampled_advantages": advantages}
    policy = loss(**given, self=agent)["policy_loss"]
    return policy, torch.autograd.grad(policy, [new])


def _skrl_loss(
    next_log_prob: Tensor, sampled_log_prob: Tensor, sampled_advantages: Tensor, self: Any
) -> dict[str, Tensor]:
    flat = (x.flatten() for x in (next_log_prob, sampled_log_prob, sampled_advantages))
    return {"policy_loss": _policy_loss(*flat, self.cfg.ratio_clip).loss}


def cleanrl_rows() -> Iterator[Row]:
    """The statements of its ppo.py, and the lines of docs/integrations/cleanrl.md."""
    page = (ROOT / "docs/integrations/cleanrl.md").read_text("utf-8")
    gae, loss = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    args = {"gamma": GAMMA, "gae_lambda": LAM, "clip_coef": CLIP, "norm_adv": True}
    args |= {"clip_vloss": True, "ent_coef": 0.01, "vf_coef": 0.5}
    shared = {"torch": torch, "np": np, "ppo_fast": ppo_fast, "device": "cpu"}
    for steps, envs in ((128, 4), (2048, 16), (128, 256)):
        x = Draws()
        last = x.normal(envs, 1)
        scope = shared | {
            "args": SimpleNamespace(**args, num_steps=steps),
            "rewards": x.normal(steps, envs),
            "values": x.normal(steps, envs),
            "dones": ends(steps, envs).roll(1, 0).float(),
            "next_done": torch.zeros(envs),
            "next_obs": None,
            "agent": SimpleNamespace(get_value=lambda _, last=last: last),
        }
        sides = _cleanrl("next_value = ", "returns = "), gae
        yield _executed(f"advantages, {steps} × {envs}", sides, scope, "advantages", "returns")
    for size in BATCHES:
        x = Draws()
        scope = shared | {name: x.leaf(size, scale=0.1) for name in ("newlogprob", "entropy")}
        scope |= {"newvalue": x.leaf(size, 1, scale=0.1), "args": SimpleNamespace(**args)}
        scope |= {f"b_{name}": x.normal(size) for name in ("advantages", "values", "returns")}
        scope["b_logprobs"] = scope["newlogprob"].detach() + 0.1 * x.normal(size)
        scope |= {"mb_inds": torch.randperm(size), "clipfracs": []}
        yield _executed(
            f"losses, {size}", (_cleanrl("logratio = ", "loss = "), loss), scope, "loss"
        )


def _cleanrl(first: str, last: str) -> ast.Module:
    """Its consecutive statements that begin with these texts."""
    spec = importlib.util.find_spec("cleanrl")
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / "ppo.py").read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        texts = [ast.unparse(one) for one in body] if isinstance(body, list) else []
        starts = [i for i, text in enumerate(texts) if text.startswith(first)]
        stops = [i for i, text in enumerate(texts) if text.startswith(last)]
        if starts and stops:
            return ast.Module(body[starts[0] : stops[0] + 1], [])
    raise ValueError(f"cleanrl's ppo.py has no statements from `{first}` to `{last}`")


def _executed(what: str, sides: tuple[Any, Any], scope: dict[str, Any], *names: str) -> Row:
    leaves = [x for x in scope.values() if isinstance(x, Tensor) and x.requires_grad]

    def run(code: Any) -> Any:
        found = dict(scope)
        exec(code, found)
        results = [found[name] for name in names]
        return results, torch.autograd.grad(results[0], leaves) if leaves else ()

    theirs, ours = (partial(run, compile(source, what, "exec")) for source in sides)
    return Row(what, {"cleanrl": theirs}, ours)


LIBRARIES = {
    "sb3": ("stable_baselines3", sb3_rows),
    "torchrl": ("torchrl", torchrl_rows),
    "tianshou": ("tianshou", tianshou_rows),
    "skrl": ("skrl", skrl_rows),
    "cleanrl": ("cleanrl", cleanrl_rows),
}


def main() -> None:
    """Print a table for each library."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=", ".join(LIBRARIES))
    chosen = parser.parse_args().libraries or [*LIBRARIES]
    if set(chosen) - set(LIBRARIES):
        parser.error(f"libraries must be among {', '.join(LIBRARIES)}, got {' '.join(chosen)}")
    torch.set_num_threads(1)
    print(describe_facts(describe()), f"one thread; load {os.getloadavg()[0]:.1f}")
    for name in chosen:
        package, rows = LIBRARIES[name]
        if importlib.util.find_spec(package) is None:
            print(f"\n{name}: not installed")
            continue
        for i, row in enumerate(rows()):
            taken = milliseconds(row)
            if not i:
                print(f"\n| {name} | {' | '.join(taken)} |\n|---|{'---:|' * len(taken)}")
            cells = " | ".join(f"{ms:.3g} ms" for ms in taken.values())
            print(f"| {row.what} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
