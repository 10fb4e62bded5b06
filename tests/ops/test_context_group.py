"""Sequences split over two and four gloo processes: the results of one process."""

from __future__ import annotations

import functools
import itertools
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from context_parts import LAYOUTS, Results, joined, part
from test_head_parallel import LAYOUTS as SHARES
from test_head_parallel import SHARE, VOCAB, share
from torch import Tensor
from torch.autograd import forward_ad

import ppo_fast
from ppo_fast import Correction, Surrogate, TokenTerms, surrogates, testing
from ppo_fast._boundary.schema import REDUCTIONS, VARIANTS
from ppo_fast._sequences import Sequences
from ppo_fast.testing import Call, linear_ppo_call, logits_ppo_call, ppo_call, same_bits

WORLD = 4
EXTRAS = ("entropy", "ref_logprobs", "is_weights", "advantage_moments")
# fp64 sums of a hundred terms of order 1, and a few exponentials: 1e-16 times some hundred.
CLOSE = {"rtol": 1e-12, "atol": 1e-13}


def loss(packed: bool, reduction: str, **options: Any) -> Call:
    """`ppo_loss` of four sequences: rows with holes, or segments of which one is empty."""
    if packed and reduction.endswith("norm"):
        options["denom"] = 31.0
    return ppo_call((37,) if packed else (4, 9), packed=packed, reduction=reduction, **options)


def single() -> dict[str, Call]:
    """Every reduction and variant that has kernels, in fp32."""
    out = {
        f"{variant} {reduction}{' packed' * packed}": loss(packed, reduction, variant=variant)
        for variant, reduction, packed in itertools.product(VARIANTS, REDUCTIONS, (False, True))
    }
    weighted = {"extras": (*EXTRAS, "sequence_weights")}
    out["sequence weights"] = loss(False, "seq-mean-token-mean", **weighted)
    out["sequence weights packed"] = loss(True, "token-mean", **weighted)
    out["nothing kept"] = loss(False, "seq-mean-token-mean", mask="empty")
    out["an empty row"] = loss(False, "seq-mean-token-mean", mask="row", variant="gspo")
    out["dual clip"] = loss(True, "token-mean", variant="gspo", dual_clip=1.5)
    out["own denom"] = loss(False, "seq-mean-token-mean", denom=3.0)
    call = loss(False, "seq-mean-token-mean", variant="gspo", mask="all")
    masked = call.tensors["mask"].clone()
    masked[:, :5] = False  # all that the first of two ranks has
    out["a part is masked"] = call.replace(mask=masked)
    out["flat"] = ppo_call((37,))
    out["no gradient"] = loss(True, "seq-mean-token-mean", variant="gspo")._replace(cotangents={})
    return out


def heads() -> dict[str, Call]:
    """The losses of a head and of logits, in one pass and in two, fp32."""
    shape, taught = (3, 7), {"kind": "jsd", "coef": 0.5}
    by_sequence = {"reduction": "seq-mean-token-mean"}
    out = {f"head {v}": linear_ppo_call(shape, variant=v, **by_sequence) for v in VARIANTS}
    out |= {f"logits {v}": logits_ppo_call(shape, variant=v, **by_sequence) for v in VARIANTS}
    rows = {"head_extras": ("bias", "row_index")}
    out["head rows"] = linear_ppo_call(shape, **rows, **by_sequence)
    of_one = (torch.arange(21) % 7).nonzero()[:, 0]  # all but the first column
    out["head rows of one"] = out["head rows"].replace(row_index=of_one)
    out["head rows gspo"] = linear_ppo_call(shape, variant="gspo", **rows)
    for variant in ("clip", "gspo"):
        out[f"head teacher {variant}"] = linear_ppo_call(
            shape, teacher=taught, z_loss_coef=0.25, softcap=4.0, variant=variant, **by_sequence
        )
    out["head packed"] = linear_ppo_call((23,), packed=True, **by_sequence)
    out["head packed gspo"] = linear_ppo_call((23,), packed=True, variant="gspo", **by_sequence)
    out["head no gradient"] = linear_ppo_call(shape)._replace(cotangents={})
    return out


def spread_terms(t: TokenTerms) -> Tensor:
    """A surrogate of all that `TokenTerms.sequences` has."""
    seqs: Any = t.sequences
    far = seqs.spread(seqs.max(t.log_ratio) - seqs.min(t.log_ratio).clamp(min=-5.0))
    far = torch.where(t.mask, far, 0.0)
    return -t.advantages * t.ratio * (1 + 0.1 * seqs.spread(seqs.mean(t.log_ratio))) + 0.1 * far


SURROGATES: dict[str, Any] = {
    "sapo": {"variant": "sapo"},
    "dppo-tv": {"variant": "dppo-tv", "clip_low": 0.02, "clip_high": 0.03},
    "dppo-kl": {"variant": "dppo-kl", "clip_low": 0.01, "clip_high": 0.01},
    "reinforce": {"variant": "reinforce", "ratio_cap": 1.2},
    "dro": {"variant": surrogates.dro(0.3)},
    "gmpo": {"variant": surrogates.gmpo(), "log_ratio_clamp": None},
    "vespo": {"variant": surrogates.vespo()},
    "own": {"variant": Surrogate(spread_terms, couples=True)},
    "cispo sequence": {"variant": "cispo", "ratio_level": "sequence"},
    "sapo sequence-token": {"variant": "sapo", "ratio_level": "sequence-token"},
}
KL: dict[str, dict[str, Any]] = {
    "ratio": {"kl_weight": "ratio"},
    "score": {"kl_weight": "score"},
    "bounded": {"kl_estimator": "k3+", "kl_ratio_clip": 1.1},
}
FORMS: dict[str, dict[str, Any]] = {
    "token": {"level": "token", "high": 1.2},
    "sequence": {"level": "sequence", "high": 2.0},
    "geometric": {"level": "geometric", "form": "mask", "low": 0.95, "high": 1.05},
    "token-ratio": {"level": None, "reject": {"token-ratio": (0.7, 1.4)}},
    "seq-sum": {"level": "token", "high": 1.3, "reject": {"seq-sum-k2": 0.4}},
    "seq-mean": {"level": None, "reject": {"seq-mean-k1": 1.05}},
    "seq-min": {"level": None, "reject": {"seq-min-ratio": (0.6, 9.0)}},
    "seq-max": {"level": "sequence", "high": 2.0, "reject": {"seq-max-k3": 0.2}},
}


def double(call: Call) -> Call:
    """The call in fp64, its log-ratios of about 0.3, with a sampler's log-probabilities."""
    call = testing.promoted(call)
    g = torch.Generator().manual_seed(3)
    old = call.tensors["old_logprobs"]
    near = [old + 0.3 * torch.randn(old.shape, generator=g, dtype=old.dtype) for _ in range(2)]
    if "logprobs" in call.tensors:
        call = call.replace(logprobs=near[1])
    return call.replace(rollout_logprobs=near[0])


def exact() -> dict[str, Call]:
    """Surrogates, ratios of the sequence, corrections; fp64."""
    out, turn = {}, itertools.cycle(REDUCTIONS)
    flip = itertools.cycle((False, False, True))

    def add(name: str, **options: Any) -> None:
        out[name] = double(loss(next(flip), next(turn), **options))

    for name, options in SURROGATES.items():
        for _ in range(2):
            add(f"{name}, {len(out)}", **options)
    for level, kl in itertools.product(("sequence", "sequence-token"), KL):
        add(f"clip {level}, kl {kl}", ratio_level=level, **KL[kl])
    kinds = itertools.product(FORMS, ("policy", "all"), ("all", "kept"), ("old", "current"))
    for form, drops, count, ratio in kinds:
        c = Correction(**FORMS[form], drops=drops, count=count, ratio=ratio)
        variant = "gspo" if len(out) % 3 == 0 else "clip"
        add(f"{form}, {drops}, {count}, {ratio}", variant=variant, correction=c)
    for form in FORMS:
        c = Correction(**FORMS[form], drops="all", count="kept")
        name = f"{form}, bypass"
        add(name, correction=c)
        out[name] = out[name].replace(old_logprobs=None).option(old_logprobs=None)
        for ratio in ("old", "current"):
            c = Correction(**FORMS[form], drops="all", count="kept", ratio=ratio)
            head = linear_ppo_call((3, 7), reduction=next(turn), correction=c, z_loss_coef=0.1)
            out[f"{form}, head, {ratio}"] = double(head)
    for sparse in (True, False):
        out[f"support, sparse {sparse}"] = double(linear_ppo_call((3, 7), kept=12, sparse=sparse))
    return out


class Split(NamedTuple):
    """A call that is split, how, and over how many ranks."""

    call: Call
    layout: str
    backend: str
    worlds: tuple[int, ...] = (2, 4)


@functools.cache
def runs() -> dict[str, Split]:
    """Every call that is split, by name; every second one in fp64 on the reference too."""
    layouts, out = itertools.cycle(LAYOUTS), {}
    for name, call in (single() | heads()).items():
        out[name] = Split(call, next(layouts), "cpu")
    for at, (name, call) in enumerate(exact().items()):
        out[name] = Split(call, next(layouts), "cpu", (4,))
        if at % 2:
            out[f"{name}, reference"] = Split(call, next(layouts), "reference", (2,))
    for name in ("clip token-mean packed", "gspo seq-mean-token-mean"):
        out[f"{name}, triton"] = Split(single()[name], next(layouts), "triton", (2,))
    return out


def refused(**changes: Any) -> str:
    """The error's text of a call of three rows, or of other tensors and options."""
    call = ppo_call((3, 5), reduction="seq-mean-token-mean", extras=())
    options = {"context_group": dist.group.WORLD} | changes.pop("options", {})
    try:
        testing.run(call.replace(**changes).option(**options), "cpu")
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def errors(rank: int, pair: Any) -> list[str]:
    rows = {k: x[: 2 + (rank != 1)] for k, x in ppo_call((3, 5), extras=()).tensors.items()}
    flat = {k: x.view(-1) for k, x in ppo_call((3, 5), extras=()).tensors.items()}
    by_token: dict[str, Any] = {"reduction": "token-mean"}
    return [
        refused(**rows),
        refused(options={"reduction": "token-mean" if rank == 2 else "token-sum"}),
        refused(old_logprobs=None, options={"old_logprobs": None}) if rank == 3 else refused(),
        refused(options={"context_group": pair}),
        refused(**flat, options=by_token | {"variant": surrogates.gmpo()}),
        refused(options={"variant": surrogates.kl_cov()}),
        refused(options={"variant": surrogates.clip_cov()}),
    ]


def gathers(call: Call) -> int:
    """Exchanges of a call with its gradient."""
    count, plain = 0, dist.all_gather

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return plain(*args, **kwargs)

    dist.all_gather = counted
    try:
        testing.run(call.option(context_group=dist.group.WORLD), "cpu")
    finally:
        dist.all_gather = plain
    return count


COUNTED = {
    "clip": (ppo_call((3, 5), reduction="seq-mean-token-sum-norm"), 2),
    "gspo": (ppo_call((3, 5), variant="gspo"), 3),
    "sequence": (ppo_call((3, 5), ratio_level="sequence"), 4),
    "gmpo": (ppo_call((3, 5), variant=surrogates.gmpo()), 6),
    "head": (linear_ppo_call((3, 5), reduction="seq-mean-token-mean"), 3),
    "head, teacher": (linear_ppo_call((3, 5), teacher={"kind": "reverse"}), 3),
    "logits": (logits_ppo_call((3, 5)), 2),
}


def crossed() -> dict[str, Call]:
    """Heads whose vocabulary is split as well."""
    return {v: linear_ppo_call((3, 7), VOCAB, variant=v) for v in ("clip", "gspo")}


def drawn(rank: int) -> Tensor:
    """A rank's part of five sequences, (5, 8) float64."""
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def derivatives(rank: int) -> tuple[Tensor, Tensor]:
    """This rank's forward-mode derivative of its share, and its part of the gradient's product."""
    call = testing.promoted(ppo_call((3, 5), ratio_level="sequence"))
    given = call.tensors | call.options | {"context_group": dist.group.WORLD}
    x, g = given.pop("logprobs"), torch.Generator().manual_seed(rank)
    tangent = torch.randn(x.shape, generator=g, dtype=x.dtype)
    with forward_ad.dual_level(), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that the reference runs
        out = ppo_fast.ppo_loss(forward_ad.make_dual(x, tangent), **given)
        along = forward_ad.unpack_dual(out.loss).tangent.clone()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ppo_fast.ppo_loss(leaf, **given, backend="cpu").loss, leaf)
    return along, (grad * tangent).sum()


def worker(rank: int, folder: str) -> None:
    rendezvous = f"file://{folder}/rendezvous"
    wait = {"timeout": timedelta(seconds=120)}  # an exchange that not all ranks make ends then
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD, **wait)
    torch.set_num_threads(1)
    pairs = [dist.new_group([0, 1], **wait), dist.new_group([2, 3], **wait)]
    across = [dist.new_group([0, 2], **wait), dist.new_group([1, 3], **wait)]
    groups = {2: pairs[rank // 2], 4: dist.group.WORLD}
    found: dict[str, Any] = {"runs": {}}
    for name, (call, layout, backend, worlds) in runs().items():
        for world in worlds:
            own = part(call, rank % world, world, layout).option(context_group=groups[world])
            found["runs"][name, world] = testing.run(own, backend)
    # The context is rank // 2 of the two, the vocabulary's share rank % 2.
    both = {"context_group": across[rank % 2], "process_group": pairs[rank // 2]}
    found["crossed"] = {
        name: testing.run(
            share(part(call, rank // 2, 2, "blocks"), SHARES["equal"], rank % 2).option(**both),
            "cpu",
        )
        for name, call in crossed().items()
    }
    x = drawn(rank)
    seqs = Sequences(x > -1.0, group=dist.group.WORLD)
    found["sums"] = torch.stack([seqs.sum(x), seqs.mean(x), seqs.min(x), seqs.max(x)])
    found["errors"] = errors(rank, pairs[1 - rank // 2])
    found["derivatives"] = derivatives(rank)
    found["gathers"] = {name: gathers(call) for name, (call, _) in COUNTED.items()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Each rank's findings."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, args=(str(folder),), nprocs=WORLD, start_method="spawn")
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def assert_same(got: Results, want: Results) -> None:
    """To fp64's rounding."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, equal_nan=True, **CLOSE)


def whole(ranks: list[Any], name: str, world: int) -> Results:
    """All ranks' results of a call as one's."""
    call, layout, *_ = runs()[name]
    return joined(call, [ranks[r]["runs"][name, world] for r in range(world)], layout)


@pytest.mark.case("I9")
@pytest.mark.parametrize(
    ("name", "world"), [(name, world) for name, x in runs().items() for world in x.worlds]
)
def test_parts_add_up_to_the_whole(ranks: list[Any], name: str, world: int) -> None:
    """fp32 within the budget of the fp64 reference, fp64 as one process."""
    call, _, backend, _ = runs()[name]
    got = whole(ranks, name, world)
    if call.tensors["advantages"].dtype == torch.float64:
        assert_same(got, testing.run(call, backend))
    else:
        testing.assert_agrees(call, backend, got)


BY_TOKEN = [name for name, call in single().items() if call.options.get("variant") != "gspo"]


@pytest.mark.case("I9")
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", BY_TOKEN)
def test_bits_of_a_loss_by_token(ranks: list[Any], name: str, world: int) -> None:
    """Gradients have the bits of one process, or with the product of two weights, which a kernel
    rounds elsewhere, two ulp; what is counted is exact."""
    call, got = single()[name], whole(ranks, name, world)
    want = testing.run(call, "cpu")
    twice = "sequence_weights" in call.tensors and call.options["reduction"] != "token-mean"
    for key in ("grad_logprobs", "grad_entropy"):
        ulp = torch.finfo(torch.float32).eps * want[key].abs()
        assert bool(((got[key] - want[key]).abs() <= 2 * twice * ulp).all()), key
    stats = [ppo_fast.Stats(x["stats"]) for x in (got, want)]
    for field in ("n_tokens", "n_seqs", "loss_denom", "clip_low", "clip_high", "ratio_max"):
        mine, one = (s.field(field) for s in stats)
        assert same_bits(mine, one), field


@pytest.mark.case("I9")
@pytest.mark.parametrize("name", crossed())
def test_beside_a_split_vocabulary(ranks: list[Any], name: str) -> None:
    """Two parts of the sequences times two of the vocabulary."""
    call, out = crossed()[name], []
    for share_of in range(2):
        every = [ranks[2 * context + share_of]["crossed"][name] for context in range(2)]
        out.append(joined(call, every, "blocks"))
    both = dict(out[0])
    for key in ("grad_weight", "grad_bias"):
        assert out[0][key].shape[0] == SHARE
        both[key] = torch.cat([x[key] for x in out])
    for key in ("loss", "stats", "grad_hidden"):
        assert same_bits(out[0][key], out[1][key]), key
    testing.assert_agrees(call, "cpu", both)


def test_every_rank_has_the_same_bits(ranks: list[Any]) -> None:
    """Of the sums over whole sequences."""
    for found in ranks[1:]:
        assert same_bits(found["sums"], ranks[0]["sums"])
    x = torch.cat([drawn(rank) for rank in range(WORLD)], 1)
    seqs = Sequences(x > -1.0)
    want = torch.stack([seqs.sum(x), seqs.mean(x), seqs.min(x), seqs.max(x)])
    torch.testing.assert_close(ranks[0]["sums"], want, **CLOSE)


@pytest.mark.parametrize("name", COUNTED)
def test_number_of_exchanges(ranks: list[Any], name: str) -> None:
    """Sizes, counts, a sum for each that the variant takes, and once more where it learns."""
    for found in ranks:
        assert found["gathers"][name] == COUNTED[name][1]


def test_forward_mode(ranks: list[Any]) -> None:
    """Shares' derivatives along all ranks' directions add up to the gradients' products."""
    pairs = zip(*(found["derivatives"] for found in ranks), strict=True)
    along, by_gradient = (torch.stack(x).sum() for x in pairs)
    torch.testing.assert_close(along, by_gradient, **CLOSE)


def compiled(rank: int, folder: str) -> None:
    """Calls under `torch.compile`, which breaks its graph at an exchange, and plain."""
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    out = []
    for level in ("token", "sequence"):
        call = ppo_call((3, 5), ratio_level=level, context_group=dist.group.WORLD)
        given = call.tensors | call.options
        plain = ppo_fast.ppo_loss(**given, backend="cpu")
        run = torch.compile(ppo_fast.ppo_loss, backend="eager")
        out.append((testing.output(run(**given, backend="cpu")), testing.output(plain)))
    torch.save(out, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.long
def test_under_compile(tmp_path: Path) -> None:
    mp.start_processes(compiled, args=(str(tmp_path),), nprocs=2, start_method="spawn")
    for rank in range(2):
        for got, want in torch.load(tmp_path / f"{rank}.pt"):
            assert all(same_bits(got[name], x) for name, x in want.items())


def test_statistics_count_a_sequence_once(ranks: list[Any]) -> None:
    """D and n_seqs of all ranks stand on the first."""
    name = "gspo seq-mean-token-mean"
    want = ppo_fast.Stats(testing.run(single()[name], "cpu")["stats"])
    for rank in range(WORLD):
        stats = ppo_fast.Stats(ranks[rank]["runs"][name, 4]["stats"])
        for field in ("n_seqs", "loss_denom"):
            assert float(stats.field(field)) == (float(want.field(field)) if rank == 0 else 0.0)


def test_bad_input_is_refused_on_every_rank(ranks: list[Any]) -> None:
    of = "ppo_loss: context_group must"
    for rank, found in enumerate(ranks):
        rows, options, tensors, other, flat, kl_cov, clip_cov = found["errors"]
        assert rows == f"ValueError: {of} have as many sequences on every rank, got [3, 2, 3, 3]"
        same = f"ValueError: {of} have the same options, dtypes and given tensors on every rank,"
        assert options == f"{same} got others than rank 0's on [2]"
        assert tensors == f"{same} got others than rank 0's on [3]"
        assert other.startswith(f"TypeError: {of} be a ProcessGroup that this rank is in"), rank
        assert flat.startswith("ValueError: ppo_loss: cu_seqlens must be given for flat inputs")
        for text, op in ((kl_cov, "kl_cov"), (clip_cov, "clip_cov")):
            assert text.startswith(f"ValueError: {op}: context_group must be None")
