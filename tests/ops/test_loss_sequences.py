"""Sequences are counted once and whole, wherever the kernels' tiles and blocks cut them."""

from __future__ import annotations

import itertools

import pytest
import torch

from ppo_fast import testing
from ppo_fast._results import STATS_FIELDS
from ppo_fast.testing import Call, run

# Around the tiles of 512 and 1024 tokens, and over several of them.
ROWS = [(1, 1), (1, 1023), (2, 1024), (3, 1025), (2, 5000), (700, 3), (9, 511), (1, 4097)]
CUTS = [(0, 3000), (1023, 1024, 1025), (1024, 2048), (5, 2900, 2900), (1, 2, 3, 1030, 1031)]
WIDTHS = (torch.int64, torch.int32)


def losses(
    keep: torch.Tensor, cu: torch.Tensor | None, reduction: str, device: str
) -> tuple[Call, Call]:
    """A policy and a value loss with this mask, of tokens that hold NaN where it is False."""
    rng = torch.Generator().manual_seed(keep.numel())
    x = torch.rand(keep.shape, generator=rng).masked_fill(~keep, torch.nan).to(device)
    shared = {"mask": keep.to(device)} | ({} if cu is None else {"cu_seqlens": cu.to(device)})
    options = {"reduction": reduction}
    if reduction.endswith("norm") and cu is not None:
        options["denom"] = 3.0
    one = {"loss": torch.tensor(1.0, device=device)}
    policy = {"logprobs": -x, "old_logprobs": -x * 0.9, "advantages": x} | shared
    value = {"values": x, "returns": x * 0.5} | shared
    return (
        Call("ppo_loss", policy, options, one),
        Call("value_loss", value, options | {"clip": None, "old_values": None}, one),
    )


def live_sequences(keep: torch.Tensor, cu: torch.Tensor | None) -> int:
    if cu is None:
        return int(keep.any(-1).sum())
    ends = cu.tolist()
    return sum(bool(keep[a:b].any()) for a, b in itertools.pairwise(ends))


def check(kernel: str, device: str, keep: torch.Tensor, cu: torch.Tensor | None) -> None:
    want = float(live_sequences(keep, cu))
    policy, value = losses(keep, cu, "seq-mean-token-sum", device)
    stats = run(policy, kernel)["stats"]
    for name, count in (("n_tokens", float(keep.sum())), ("n_seqs", want), ("loss_denom", want)):
        assert float(stats[STATS_FIELDS.index(name)]) == count, name
    stats = run(value, kernel)["stats"]
    assert float(stats[STATS_FIELDS.index("vf_loss_denom")]) == want


def interpreted(kernel: str, device: str) -> bool:
    """Triton's interpreter takes a second for what the others do in a millisecond."""
    return kernel == "triton" and device == "cpu"


def masks(shape: tuple[int, ...], few: bool) -> list[torch.Tensor]:
    """One token in all, sparse (`few`: these), dense and none."""
    rng = torch.Generator().manual_seed(0)
    last = torch.zeros(shape, dtype=torch.bool)
    last.view(-1)[-1:] = True
    chances = (0.002,) if few else (0.002, 0.3, 1.0, 0.0)
    return [last, *(torch.rand(shape, generator=rng) < p for p in chances)]


@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_rows(kernel: str, device: str, shape: tuple[int, int]) -> None:
    for keep in masks(shape, interpreted(kernel, device)):
        check(kernel, device, keep, None)


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_packed(kernel: str, device: str, cuts: tuple[int, ...]) -> None:
    few = interpreted(kernel, device)
    for i, keep in enumerate(masks((3100,), few)):
        check(kernel, device, keep, torch.tensor([0, *cuts, 3100], dtype=WIDTHS[i % 2]))
    for alone in (1024,) if few else (0, 1024, 2048, 3099):  # in a tile's first or last slot
        keep = torch.zeros(3100, dtype=torch.bool)
        keep[alone] = True
        check(kernel, device, keep, torch.tensor([0, *cuts, 3100]))


def test_many_short_sequences(kernel: str, device: str) -> None:
    """More sequences than a block has threads, most of them empty."""
    few = interpreted(kernel, device)
    rng = torch.Generator().manual_seed(1)
    crowd = torch.randint(0, 60, (100 if few else 3000,), generator=rng).sort()[0]
    cu = torch.cat([torch.zeros(1), crowd, torch.arange(61, 1500, 7), torch.tensor([1500.0])])
    for keep in masks((1500,), few):
        check(kernel, device, keep, cu.long())


@pytest.mark.parametrize("reduction", ["seq-mean-token-mean", "token-mean"])
def test_more_tiles_than_blocks(kernel: str, device: str, reduction: str) -> None:
    """A block takes several tiles, and sequences span blocks."""
    if interpreted(kernel, device):
        pytest.skip("the interpreter takes minutes for half a million tokens")
    n = 400_000
    cu = torch.tensor([0, 3, 1500, 2000, 150_000, 150_001, 390_000, n])
    keep = torch.zeros(n, dtype=torch.bool)
    keep[[1, 2, 1999, 149_000, 150_000, 389_990]] = True
    keep[390_000::3] = True
    check(kernel, device, keep, cu)
    rng = torch.Generator().manual_seed(2)
    cuts = torch.randint(0, n, (300,), generator=rng).sort()[0].tolist()
    check(kernel, device, torch.rand(n, generator=rng) < 1e-3, torch.tensor([0, *cuts, n]))
    for call in losses(keep, cu, reduction, device):
        testing.assert_agrees(call, kernel)


@pytest.mark.parametrize("shape", [(3, 1500), (2, 512), (2, 513), (40, 3)], ids=str)
def test_terms_of_whole_sequences(kernel: str, device: str, shape: tuple[int, int]) -> None:
    """Short and long rows, whose ratios and weights take a warp or a block to find."""
    for mask in ("right", None):
        call = testing.ppo_call(
            shape, variant="gspo", reduction="seq-mean-token-mean", mask=mask, device=device
        )
        testing.assert_agrees(call, kernel)
