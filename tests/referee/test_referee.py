"""The referee on a toy trainer, its planted faults, the ops, and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ppo_fast.__main__ import main
from ppo_fast.referee import cases
from ppo_fast.referee.trainers import TRAINERS, adapter
from ppo_fast.referee.verify import NotRunError, Report, load, read_options, verify

TOY = Path(__file__).parent / "toy_trainer.py"
OPTIONS: dict[str, Any] = {
    "dual_clip": 2.0,
    "clip_high": 0.28,
    "kl_coef": 0.05,
    "entropy_coef": 0.01,
}
PARTS = [
    "policy_loss",
    "value_loss",
    "kl",
    "logprobs",
    "entropy",
    "whiten",
    "gae",
    "step_gae",
    "group_advantages",
]


def judged(path: Path, part: str, **more: Any) -> Report:
    return verify("plain", OPTIONS, function=load(f"{path}:{part}"), like=part, **more)


def keys(report: Report) -> set[str]:
    return {finding.key for finding in report.findings}


@pytest.mark.parametrize("part", PARTS)
def test_a_faithful_trainer_differs_nowhere(part: str) -> None:
    report = judged(TOY, part)
    (found,) = report.parts
    assert report.status == 0 and not report.findings and not found.raised
    assert set(found.agree) | set(found.left_out) in [set(x) for x in cases.NAMES.values()]


PLANTED: dict[str, tuple[str, str, str, set[str]]] = {
    "denominator of the micro-batch": (
        "policy_loss",
        "loss, 0.0).sum() / tokens * ranks",
        "loss, 0.0).sum() / mask.sum()",
        {"denominator.summed"},
    ),
    "ranks that are not made up for": (
        "policy_loss",
        "loss, 0.0).sum() / tokens * ranks",
        "loss, 0.0).sum() / tokens",
        {"denominator.local"},
    ),
    "a mean over padding": (
        "policy_loss",
        "torch.where(mask, loss, 0.0).sum() / tokens * ranks",
        "torch.where(mask, loss, 0.0).sum() / mask.numel() / micro_batches",
        {"denominator.micro-batch", "denominator.slot-mean"},
    ),
    "an unmasked token": (
        "policy_loss",
        "    old, ref, a, h = (",
        ("    mask = mask | torch.nn.functional.pad(mask, (1, -1))\n    old, ref, a, h = ("),
        {"mask.longer"},
    ),
    "a last token that is lost": (
        "value_loss",
        "    old, target = torch.where(mask,",
        (
            "    mask = mask & torch.nn.functional.pad(mask, (-1, 1))\n"
            "    old, target = torch.where(mask,"
        ),
        {"mask.shorter"},
    ),
    "a mask that is ignored": (
        "value_loss",
        (
            "    old, target = torch.where(mask, old_values, 0.0), torch.where(mask,"
            " returns, 0.0)\n"
        ),
        (
            "    old, target, tokens = old_values, returns, mask.numel() * micro_batches *"
            " ranks\n"
            "    mask = torch.ones_like(mask)\n"
        ),
        {"denominator.micro-batch", "mask.ignored"},
    ),
    "a mask that is multiplied": (
        "value_loss",
        ("old, target = torch.where(mask, old_values, 0.0), torch.where(mask, returns, 0.0)"),
        "old, target, error_mask = old_values, returns, mask",
        {"mask.late"},
    ),
    "a loss with its sign turned": (
        "policy_loss",
        "loss = loss + kl_coef",
        "loss = -loss + kl_coef",
        {"sign"},
    ),
    "a k3 with its sign turned": (
        "policy_loss",
        "gap = torch.where(mask, ref - logprobs, 0.0)",
        "gap = torch.where(mask, logprobs - ref, 0.0)",
        {"kl.-k3"},
    ),
    "a KL that is subtracted": (
        "policy_loss",
        "loss + kl_coef *",
        "loss - kl_coef *",
        {"kl.sign"},
    ),
    "k2 for k3": ("policy_loss", "(torch.exp(gap) - 1 - gap)", "(gap**2 / 2)", {"kl.k2"}),
    "a KL's value turned": (
        "kl",
        "gap = ref_logprobs - logprobs",
        "gap = logprobs - ref_logprobs",
        {"kl.-k3"},
    ),
    "k1 for k3": ("kl", "return torch.exp(gap) - 1 - gap", "return -gap", {"kl.k1"}),
    "a gradient of k2": (
        "kl",
        "return torch.exp(gap) - 1 - gap",
        ("k2 = gap**2 / 2\n    return k2 - k2.detach() + (torch.exp(gap) - 1 - gap).detach()"),
        {"kl.gradient"},
    ),
    "a dual clip of positive advantages": (
        "policy_loss",
        "torch.where(a < 0, torch.minimum",
        "torch.where(a > 0, torch.minimum",
        {"dual-clip.positive"},
    ),
    "no dual clip": (
        "policy_loss",
        "torch.minimum(loss, -a * dual_clip)",
        "loss",
        {"dual-clip.none"},
    ),
    "a dual clip at another bound": ("policy_loss", "-a * dual_clip", "-a * 3.0", {"dual-clip"}),
    "clip bounds that change places": (
        "policy_loss",
        "1 - clip_low, 1 + clip_high",
        "1 - clip_high, 1 + clip_low",
        {"clip.swapped"},
    ),
    "an upper bound that is forgotten": (
        "policy_loss",
        "1 - clip_low, 1 + clip_high",
        "1 - clip_low, 1 + clip_low",
        {"clip.high"},
    ),
    "the smaller of both losses": (
        "policy_loss",
        "loss = torch.maximum(",
        "loss = torch.minimum(",
        {"clip.min"},
    ),
    "a ratio upside down": (
        "policy_loss",
        "torch.where(mask, logprobs - old, 0.0)",
        "torch.where(mask, old - logprobs, 0.0)",
        {"ratio"},
    ),
    "entropy over padding": (
        "policy_loss",
        (
            "loss = loss - entropy_coef * h\n"
            "    return torch.where(mask, loss, 0.0).sum() / tokens * ranks"
        ),
        (
            "return torch.where(mask, loss, 0.0).sum() / tokens * ranks - entropy_coef *"
            " entropies.mean() / micro_batches"
        ),
        {"entropy.mask", "entropy.micro-batch"},
    ),
    "an entropy that is a penalty": (
        "policy_loss",
        "loss - entropy_coef * h",
        "loss + entropy_coef * h",
        {"entropy.sign"},
    ),
    "a value loss without its half": (
        "value_loss",
        "0.5 * torch.where",
        "torch.where",
        {"value.factor"},
    ),
    "the clipped value alone": (
        "value_loss",
        "torch.maximum((values - target) ** 2, (near - target) ** 2)",
        "(near - target) ** 2",
        {"value.larger"},
    ),
    "a biased whitening": ("whiten", "unbiased=True", "unbiased=False", {"whiten.biased"}),
    "moments over padding": (
        "whiten",
        "kept = rewards[mask]",
        "kept = rewards.flatten()",
        {"mask.ignored"},
    ),
    "tool tokens that are steps": (
        "gae",
        "keep = mask[:, t]",
        "keep = torch.ones_like(mask[:, t])",
        {"gae.step", "mask.multiply"},
    ),
    "λ that is 1": ("gae", "gamma * lam * advantage", "gamma * advantage", {"gae.lam"}),
    "a bootstrap from the last value": (
        "gae",
        "following, advantage = torch.zeros(len(mask))",
        "following, advantage = values[:, -1]",
        {"gae.end"},
    ),
    "a truncation that terminates": (
        "step_gae",
        "next_values[t] * ~terminated[t]",
        "next_values[t] * ~(terminated | truncated)[t]",
        {"gae.truncation"},
    ),
    "a biased deviation of groups": (
        "group_advantages",
        "scores[own].std()",
        "scores[own].std(unbiased=False)",
        {"group.biased"},
    ),
    "a temperature that multiplies": (
        "logprobs",
        ("logits / temperature, -1)\n    return"),
        ("logits * temperature, -1)\n    return"),
        {"temperature"},
    ),
    "an entropy of −inf": (
        "entropy",
        (
            "scores = torch.where(logits > -torch.inf, scores, 0.0)\n"
            "    return -torch.where(logits > -torch.inf, scores.exp() * scores, 0.0).sum(-1)"
        ),
        "return -(scores.exp() * scores).sum(-1)",
        {"entropy.inf"},
    ),
}


def planted(folder: Path, before: str, after: str) -> Path:
    text = TOY.read_text()
    assert text.count(before) == 1, before
    text = text.replace(before, after)
    if "micro_batches" in after:
        text = text.replace("    ranks: int,\n", "    ranks: int,\n    micro_batches: int,\n")
    path = folder / "planted.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found_and_named(name: str, tmp_path: Path) -> None:
    part, before, after, wanted = PLANTED[name]
    report = judged(planted(tmp_path, before, after), part)
    assert report.status == 1
    assert keys(report) == wanted


@pytest.mark.parametrize("variant", ["clip", "gspo", "cispo", "sapo"])
@pytest.mark.parametrize("reduction", ["token-mean", "seq-mean-token-mean"])
def test_the_ops_differ_nowhere(variant: str, reduction: str) -> None:
    report = verify("ppo_fast", {"variant": variant, "reduction": reduction}, seed=1)
    assert report.status == 0 and not report.findings
    assert len(report.parts) == 8 and all(len(part.agree) >= 4 for part in report.parts)


def test_two_faults_are_both_named(tmp_path: Path) -> None:
    path = planted(
        tmp_path, "loss, 0.0).sum() / tokens", "loss, 0.0).sum() / micro_batches / mask.sum()"
    )
    path.write_text(
        path.read_text().replace(
            "torch.where(mask, ref - logprobs", "torch.where(mask, logprobs - ref"
        )
    )
    path.write_text(path.read_text().replace("mask.sum() * ranks", "mask.sum()"))
    assert keys(judged(path, "policy_loss")) == {"denominator.micro-batch", "kl.-k3"}


def test_a_function_that_raises_is_told(tmp_path: Path) -> None:
    path = planted(tmp_path, "gap = ref_logprobs - logprobs", "raise ZeroDivisionError('no')")
    report = judged(path, "kl")
    assert report.status == 2 and not report.findings
    assert set(report.parts[0].raised.values()) == {"ZeroDivisionError: no"}


def test_a_wrong_shape_is_told(tmp_path: Path) -> None:
    path = planted(tmp_path, "return torch.exp(gap) - 1 - gap", "return gap.sum()")
    assert judged(path, "kl").status == 2


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = main(["verify", *words])
    out, err = capsys.readouterr()
    return status, out, err


def faulty(folder: Path) -> list[str]:
    path = planted(folder, "return torch.exp(gap) - 1 - gap", "return -gap")
    return [f"{path}:kl", "--like", "plain.kl"]


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The schema of docs/verify.md; no number that JSON does not have."""
    status, out, _ = run(capsys, *faulty(tmp_path), "--json", "--cases", "random", "nan-masked")
    found = json.loads(out, parse_constant=lambda name: pytest.fail(name))
    assert status == found["status"] == 1
    assert found.keys() == {
        "schema", "trainer", "version", "options", "seed", "status", "findings", "parts", "not_run"
    }  # fmt: skip
    (one,), (part,) = found["findings"], found["parts"]
    assert one.keys() == {
        "name", "part", "reading", "key", "place", "paper", "cases", "worst", "documented"
    }  # fmt: skip
    assert one["key"] == "kl.k1" and one["cases"] == ["random", "nan-masked"]
    assert one["worst"].keys() == {"case", "output", "given", "exact", "absolute", "relative"}
    assert part.keys() == {
        "name", "part", "place", "formula", "dtype", "agree", "left_out", "raised",
        "taken_as_given",
    }  # fmt: skip
    assert one["place"].startswith("planted.kl (planted.py:")


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, *faulty(tmp_path))
    assert status == 1
    assert "≠ KL: k1, log(new/ref)" in out and "1 difference" in out
    assert max(map(len, out.splitlines())) <= 99
    status, out, _ = run(capsys, f"{TOY}:kl", "--like", "plain.kl")
    assert status == 0 and "no difference" in out


def test_seeds_give_other_batches(tmp_path: Path) -> None:
    path = planted(tmp_path, "return torch.exp(gap) - 1 - gap", "return -gap")
    worst = {
        judged(path, "kl", seed=seed, only=["random"]).findings[0].worst.given
        for seed in (0, 0, 1)
    }
    assert len(worst) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "trainer must be one of plain, ppo_fast, trl"),
        (["file.py:loss"], "a function of your own needs --like"),
        (["plain"], "plain needs FILE.py:function"),
        (["ppo_fast", "--config", "clip_hig=0.2"], "no option 'clip_hig' that is checked here"),
        (["ppo_fast", "--config", "clip_hig=0.2"], "did you mean clip_high?"),
        (["ppo_fast", "--config", "none.yaml"], "an existing file, got none.yaml"),
        (["ppo_fast", "--cases", "randm"], "got 'randm'"),
        ([f"{TOY}:los", "--like", "plain.policy_loss"], "has no 'los'"),
        ([f"{TOY}:kl", "--like", "plain.k"], "like must name one of plain.policy_loss"),
        (["nowhere.py:kl", "--like", "plain.kl"], "an existing file, got 'nowhere.py'"),
        ([str(TOY), "--like", "plain.kl"], "target must be FILE.py:function"),
        (["no_such_module:kl", "--like", "plain.kl"], "No module named 'no_such_module'"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *words)
    assert status == 2 and not out and message in err


def test_a_trainer_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapter("openrlhf"), "PACKAGE", "no_such_package")
    status, out, err = run(capsys, "openrlhf")
    assert status == 2 and not out and "the package no_such_package is not installed" in err


def test_a_function_of_another_package_is_not_taken_for_the_trainers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where something has patched it before."""
    monkeypatch.setattr(adapter("ppo_fast"), "PACKAGE", "numpy")
    with pytest.raises(NotRunError, match="is not numpy's own any more"):
        verify("ppo_fast")


def test_options_of_files_and_words(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"beta": 0.1, "loss_type": "grpo"}')
    (tmp_path / "b.yaml").write_text("beta: 0.2\ndelta: null\n")
    words = [str(tmp_path / "a.json"), str(tmp_path / "b.yaml"), "epsilon=0.3", "loss_type=dapo"]
    assert read_options(words) == {"beta": 0.2, "loss_type": "dapo", "delta": None, "epsilon": 0.3}


def test_every_adapter_can_be_imported_without_its_trainer() -> None:
    """And importing the referee loads no trainer."""
    code = (
        "import sys; from ppo_fast.referee.trainers import TRAINERS, adapter;"
        "[adapter(name) for name in TRAINERS];"
        "print(sorted({'trl', 'verl', 'openrlhf', 'torchrl', 'tianshou', 'transformers', 'numba'}"
        " & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and len(TRAINERS) == 11
