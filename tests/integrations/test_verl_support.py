"""verl: an agent loop's kept ids, up to the FSDP engine's log-probabilities."""

from __future__ import annotations

import importlib
import os
import sys
import types
import warnings
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from trainers import needs

needs("verl")
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"  # the tests say when it is patched

from transformers.modeling_flash_attention_utils import _unpad_input
from verl import DataProto
from verl.utils import attention_utils
from verl.utils import tensordict_utils as tu
from verl.utils.torch_functional import entropy_from_logits
from verl.workers.utils.padding import left_right_2_no_padding, no_padding_2_padding

from ppo_fast.integrations import verl

V, TEMPERATURE = 11, 0.7
PROMPTS = [[1, 2], [3], [4, 5, 6]]
RESPONSES = [[7, 8, 9], [2, 10], [5]]
MASKS = [[1, 0, 1], [1, 1], [1]]  # the second token of the first is a tool's
# Of every response token; the tool's has none, nor has the last of the second.
KEPT = [[[7, 1], [], [9, 0, 4]], [[2], []], [[3, 5]]]
FIELDS = [
    {
        "support_ids": [i for row in rows for i in row],
        "support_offsets": np.cumsum([0, *map(len, rows)]).tolist(),
    }
    for rows in KEPT
]


def imported(module: str) -> Any:
    """A module of verl's; packages that it imports, is without and needs for nothing here (peft,
    fastapi, ...) are stand-ins while it is imported."""
    absent: list[str] = []
    try:
        while True:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of engines for other frameworks
                    return importlib.import_module(module)
            except ModuleNotFoundError as error:
                name = error.name or "verl"
                if name.startswith("verl") or name in absent:
                    raise
                absent.append(name)
                sys.modules[name] = mock.MagicMock()
    finally:
        for name in absent:
            del sys.modules[name]


AgentLoopOutput = imported("verl.experimental.agent_loop.agent_loop").AgentLoopOutput
Engine = imported("verl.workers.engine.fsdp.transformer_impl").FSDPEngineWithLMHead


@pytest.fixture(autouse=True)
def unpad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-attn's function, which 0.8.0 cannot be without, as transformers has it."""
    if not hasattr(attention_utils, "_fallback_unpad_input"):
        found = (None, None, None, _unpad_input)
        monkeypatch.setattr(attention_utils, "_get_attention_functions", lambda: found)


@pytest.fixture
def engine() -> Any:
    """One without a model or a process group."""
    made = object.__new__(Engine)
    made.use_ulysses_sp, made.ulysses_sequence_parallel_size = False, 1
    made.pad_to_length, made.pad_to_length_bucket = False, 8
    made.compute_entropy_from_logits = entropy_from_logits
    made.engine_config = types.SimpleNamespace(
        entropy_checkpointing=False, entropy_from_logits_with_chunking=False
    )
    return made


def of_the_ray_trainer(fields: list[Any], **options: Any) -> Any:
    """Padded samples as `RayPPOTrainer` sends them: a field of objects for each extra field."""
    wide, long = max(map(len, PROMPTS)), max(map(len, RESPONSES))
    ids, mask, response = (torch.zeros(3, wide + long, dtype=torch.int64) for _ in range(3))
    for i, (p, r, m) in enumerate(zip(PROMPTS, RESPONSES, MASKS, strict=True)):
        ids[i, wide - len(p) : wide + len(r)] = torch.tensor([*p, *r])
        mask[i, wide - len(p) : wide + len(r)] = 1
        response[i, wide : wide + len(r)] = torch.tensor(m)
    objects = {}
    for name in ("support_ids", "support_offsets"):
        objects[name] = np.empty(3, dtype=object)
        objects[name][:] = [None if f is None else f[name] for f in fields]
    batch = DataProto.from_dict(
        tensors={
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "response_mask": response[:, wide:],
        },
        non_tensors=objects,
    )
    data = left_right_2_no_padding(batch.to_tensordict())
    tu.assign_non_tensor(data, temperature=TEMPERATURE, calculate_entropy=True, **options)
    return data


def of_the_transfer_queue(fields: list[Any], **options: Any) -> Any:
    """Samples as the agent loop of the trainer over TransferQueue stores them."""
    rows = []
    for p, r, m, extra in zip(PROMPTS, RESPONSES, MASKS, fields, strict=True):
        output = AgentLoopOutput(
            prompt_ids=p,
            response_ids=r,
            response_mask=m,
            num_turns=2,
            metrics={},
            extra_fields={} if extra is None else dict(extra),
        )
        ids = torch.tensor([*p, *r])
        more = {"input_ids": ids, "position_ids": torch.arange(len(ids))}
        rows.append(output.as_dict() | more)
    data = tu.list_of_dict_to_tensordict(rows)
    tu.assign_non_tensor(data, temperature=TEMPERATURE, calculate_entropy=True, **options)
    return data


WAYS = pytest.mark.parametrize("way", [of_the_ray_trainer, of_the_transfer_queue])


def run(engine: Any, data: Any, logits: Tensor | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The engine's outputs for logits of the packed micro-batch."""
    _, args = engine.prepare_model_inputs(data)
    rows = args["input_ids_rmpad_rolled"].shape[0]
    if logits is None:
        logits = torch.randn(1, rows, V, generator=torch.Generator().manual_seed(5)).double()
    logits.requires_grad_()
    # As a model gives them: 0.8.0 divides them in place.
    output = types.SimpleNamespace(logits=logits * 1.0)
    out = engine.prepare_model_outputs(output, args, data, None)
    return out, logits


def by_hand(logits: Tensor, kept: list[list[list[int]]]) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and entropies of each response, of all ids where none are kept."""
    logprobs, entropies, start = [], [], 0
    for p, r, rows in zip(PROMPTS, RESPONSES, kept, strict=True):
        found = []
        for t, (token, ids) in enumerate(zip(r, rows, strict=True)):
            z = logits[0, start + len(p) - 1 + t] / TEMPERATURE
            every = ids or list(range(V))
            logp = z[every].log_softmax(0)
            found.append((logp[every.index(token)], -(logp.exp() * logp).sum()))
        logprobs.append(torch.stack([x for x, _ in found]))
        entropies.append(torch.stack([x for _, x in found]))
        start += len(p) + len(r)
    return logprobs, entropies


def responses(nested: Tensor) -> list[Tensor]:
    """Each response's numbers, as verl cuts them out: the row before a token predicts it."""
    return [
        x[len(p) - 1 : len(p) - 1 + len(r)]
        for x, p, r in zip(nested.unbind(), PROMPTS, RESPONSES, strict=True)
    ]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    # verl holds the temperature in fp32: some roundings of it, of numbers up to 2^3.
    for a, b in zip(got, want, strict=True):
        assert bool(((a - b).abs() <= 64 * torch.finfo(torch.float32).eps).all())


@WAYS
@pytest.mark.parametrize("padded", [False, True])
def test_log_probabilities_over_the_kept_ids(engine: Any, way: Any, padded: bool) -> None:
    """Values, entropies and gradients of every response token; the first call is compared."""
    engine.pad_to_length = padded
    with verl.patched(("support",)) as calls:
        out, logits = run(engine, way(FIELDS))
        assert (calls["support"].fused, calls["support"].left) == (1, 0)
    logprobs, entropies = by_hand(logits, KEPT)
    assert_close(responses(out["log_probs"]), logprobs)
    assert_close(responses(out["entropy"]), entropies)
    (got,) = torch.autograd.grad(sum(x.sum() for x in responses(out["log_probs"])), logits)
    (want,) = torch.autograd.grad(sum(x.sum() for x in logprobs), logits)
    assert_close([got], [want])
    assert not bool(got[0, 1, [0, 2, 3]].any())  # the first response token keeps 1 and 7
    assert float(out["log_probs"].values()[3]) < -0.01  # over the whole vocabulary elsewhere


@WAYS
def test_micro_batches_keep_their_samples_ids(engine: Any, way: Any) -> None:
    """Cut as verl cuts a batch: each part has its samples' rows."""
    with verl.patched(("support",)):
        out, logits = run(engine, way(FIELDS))
        first = sum(len(p) + len(r) for p, r in zip(PROMPTS[:1], RESPONSES[:1], strict=True))
        parts = [logits[:, :first], logits[:, first:]]
        for index, part in zip(([0], [1, 2]), parts, strict=True):
            data = tu.index_select_tensor_dict(way(FIELDS), index)
            got, _ = run(engine, data, part.detach().clone())
            want = [out["log_probs"].unbind()[i] for i in index]
            # The labels that roll over a sequence's end are another sequence's.
            pairs = zip(got["log_probs"].unbind(), want, strict=True)
            assert all(torch.equal(a[:-1], b[:-1]) for a, b in pairs)


@WAYS
def test_without_ids_it_is_verls_own(engine: Any, way: Any) -> None:
    data = way([None] * 3)
    theirs, logits = run(engine, data)
    with verl.patched(("support",)) as calls:
        ours, _ = run(engine, data, logits.detach().clone())
        assert calls["support"].fused == 1
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        assert_close([ours[name].values()], [x.values()])


def test_what_verl_makes_of_them_afterwards(engine: Any) -> None:
    """`no_padding_2_padding` gives (B, R) log-probabilities, as the trainer's losses take them."""
    data = of_the_ray_trainer(FIELDS)
    with verl.patched(("support",)):
        out, logits = run(engine, data)
    data["prompts"] = torch.nested.as_nested_tensor(
        [torch.tensor(p) for p in PROMPTS], layout=torch.jagged
    )
    data["responses"] = torch.nested.as_nested_tensor(
        [torch.tensor(r) for r in RESPONSES], layout=torch.jagged
    )
    wide = no_padding_2_padding(out["log_probs"], data)
    for row, want in zip(wide, by_hand(logits, KEPT)[0], strict=True):
        assert_close([row[: len(want)]], [want])


OPTIONS = {
    "use_remove_padding False": {"use_remove_padding": False},
    "use_fused_kernels True": {"use_fused_kernels": True},
    "distillation_only True": {"distillation_only": True},
    "calculate_sum_pi_squared True": {"calculate_sum_pi_squared": True},
}


@pytest.mark.parametrize("what", OPTIONS)
def test_options_that_would_ignore_them_are_refused(engine: Any, what: str) -> None:
    """On the first call too, whose comparison is without ids."""
    data = of_the_ray_trainer(FIELDS)
    args = engine.prepare_model_inputs(data)[1]
    tu.assign_non_tensor(data, **OPTIONS[what])
    output = types.SimpleNamespace(logits=torch.zeros(1, 12, V))
    verl.apply(("support",))
    try:
        with pytest.raises(ValueError, match=f"verl: support_ids cannot be used with {what}"):
            engine.prepare_model_outputs(output, args, data, None)
    finally:
        verl.integration._restore()


def test_an_option_without_ids_is_left_to_verl(engine: Any) -> None:
    """Its own numbers, with a warning that says why."""
    data = of_the_ray_trainer([None] * 3, calculate_sum_pi_squared=True)
    theirs, logits = run(engine, data)
    with (
        verl.patched(("support",)) as calls,
        pytest.warns(RuntimeWarning, match="left to verl: calculate_sum_pi_squared True"),
    ):
        ours, _ = run(engine, data, logits.detach().clone())
        assert (calls["support"].fused, calls["support"].left) == (0, 1)
    assert "sum_pi_squared" in ours
    assert all(torch.equal(ours[k].values(), x.values()) for k, x in theirs.items())


def test_sequence_parallelism_is_refused(engine: Any) -> None:
    data = of_the_ray_trainer(FIELDS)
    args = engine.prepare_model_inputs(data)[1]
    engine.use_ulysses_sp, engine.ulysses_sequence_parallel_size = True, 2
    output = types.SimpleNamespace(logits=torch.zeros(1, 12, V))
    verl.apply(("support",))
    try:
        with pytest.raises(ValueError, match="ulysses_sequence_parallel_size 2"):
            engine.prepare_model_outputs(output, args, data, None)
    finally:
        verl.integration._restore()


BAD = {
    "none for 1": [FIELDS[0], None, FIELDS[2]],
    "3, got 2 in sample 1": [FIELDS[0], {"support_ids": [], "support_offsets": [0, 0]}, FIELDS[2]],
    "1, got 0 to 3 in sample 2": [
        *FIELDS[:2],
        {"support_ids": [5], "support_offsets": [0, 3]},
    ],
    "must not fall, got 1 after 2": [
        {"support_ids": [1, 2, 3], "support_offsets": [0, 2, 1, 3]},
        *FIELDS[1:],
    ],
}


@WAYS
@pytest.mark.parametrize("text", BAD)
def test_bad_fields_are_named(engine: Any, way: Any, text: str) -> None:
    data = way(BAD[text])
    args = engine.prepare_model_inputs(data)[1]
    output = types.SimpleNamespace(logits=torch.zeros(1, 12, V))
    verl.apply(("support",))
    try:
        with pytest.raises(ValueError, match=text):
            engine.prepare_model_outputs(output, args, data, None)
    finally:
        verl.integration._restore()


def test_a_sample_that_nothing_is_learnt_from_needs_none(engine: Any) -> None:
    """As verl fills up a batch: no token of it is in the loss."""
    data = of_the_ray_trainer([FIELDS[0], FIELDS[1], None])
    data["response_mask"][2] = 0
    with verl.patched(("support",)):
        out, logits = run(engine, data)
    logprobs, _ = by_hand(logits, [*KEPT[:2], [[]]])
    assert_close(responses(out["log_probs"]), logprobs)


def test_it_is_patched_on_request_alone() -> None:
    assert "support" in verl.integration.ops and verl.integration.on_request == ("support",)
