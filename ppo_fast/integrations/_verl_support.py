"""Kept ids of verl's samples: from an agent loop's extra fields to the engine's log-probabilities.

verl's trainers hand an agent loop's `extra_fields` on with each sample, and its FSDP engine has
them where it takes log-probabilities and entropies from the logits of a packed micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import ppo_fast
from ppo_fast import Support
from ppo_fast.integrations._errors import Uncovered
from ppo_fast.integrations._patch import Arguments

IDS, OFFSETS = "support_ids", "support_offsets"
_EXTRA = "extra_fields"  # of the trainer over TransferQueue, which keeps them in one field
# Options of a micro-batch, what they must be, and verl's default.
_COVERED = {
    "use_remove_padding": (True, True),
    "use_fused_kernels": (False, False),
    "calculate_sum_pi_squared": (False, False),
    "distillation_use_topk": (False, False),
    "distillation_only": (False, False),
}
Kept = tuple[list[int], list[int]]


def model_outputs(
    self: Any,
    output: Any,
    output_args: dict[str, Any],
    micro_batch: Any,
    logits_processor_func: Any,
) -> dict[str, Tensor]:
    """`FSDPEngineWithLMHead.prepare_model_outputs`, over each response token's kept ids."""
    kept = _covered(self, micro_batch)
    logits = output.logits.squeeze(0)
    if hasattr(logits, "full_tensor"):
        logits = logits.full_tensor()
    ends = micro_batch["input_ids"].offsets()
    support = None if kept is None else _support(kept, micro_batch, ends, logits)
    found = ppo_fast.token_logprobs(
        logits,
        output_args["input_ids_rmpad_rolled"],
        temperature=output_args["temperature_rmpad"],
        support=support,
    )
    count = int(logits.shape[0]) - int(output_args.get("pad_size", 0))  # always there from 0.9.0
    names = (
        ["log_probs", "entropy"] if _option(micro_batch, "calculate_entropy") else ["log_probs"]
    )
    return {
        name: torch.nested.nested_tensor_from_jagged(x[:count], ends)
        for name, x in zip(names, found, strict=False)
    }


def _covered(engine: Any, micro_batch: Any) -> list[Kept | None] | None:
    """Every sample's ids; ValueError where an option would have verl pass over them."""
    kept, reason = _kept(micro_batch), _uncovered(engine, micro_batch)
    if reason is None:
        return kept
    if kept is None:
        raise Uncovered(reason)
    raise ValueError(f"verl: {IDS} cannot be used with {reason}")


def _option(micro_batch: Any, name: str, default: bool = False) -> Any:
    names = micro_batch.keys()  # a TensorDict refuses `in`
    return micro_batch[name] if name in names else default


def _uncovered(engine: Any, micro_batch: Any) -> str | None:
    """The first option that is not covered, and its value."""
    if getattr(engine, "use_ulysses_sp", False):
        return f"ulysses_sequence_parallel_size {engine.ulysses_sequence_parallel_size}"
    for name, (wanted, default) in _COVERED.items():
        value = _option(micro_batch, name, default)
        if value != wanted:
            return f"{name} {value}"
    return None


def _kept(micro_batch: Any) -> list[Kept | None] | None:
    """Every sample's ids and offsets; None where no sample has any."""
    keys = micro_batch.keys()
    if IDS in keys or OFFSETS in keys:
        found = list(zip(micro_batch[IDS], micro_batch[OFFSETS], strict=True))
    elif _EXTRA in keys:
        found = [(fields.get(IDS), fields.get(OFFSETS)) for fields in micro_batch[_EXTRA]]
    else:
        return None
    for i, pair in enumerate(found):
        if (pair[0] is None) != (pair[1] is None):
            raise ValueError(
                f"verl: {IDS} and {OFFSETS} must come together, got one in sample {i}"
            )
    if all(ids is None for ids, _ in found):
        return None
    return [None if ids is None else (list(ids), list(offsets)) for ids, offsets in found]


def _support(kept: list[Kept | None], micro_batch: Any, ends: Tensor, logits: Tensor) -> Support:
    """The support of the packed rows: those that predict no response token keep nothing."""
    counts = torch.zeros(logits.shape[0], dtype=torch.int64)
    every: list[int] = []
    stops, lengths = ends.tolist()[1:], _response_lengths(micro_batch)
    for i, (pair, stop, length) in enumerate(zip(kept, stops, lengths, strict=True)):
        if pair is None:
            if bool(micro_batch["response_mask"][i].any()):
                raise ValueError(f"verl: {IDS} must be given for every sample, got none for {i}")
            continue
        ids, offsets = pair
        if len(offsets) != length + 1:
            raise ValueError(
                f"verl: {OFFSETS} must have a number more than the response has tokens,"
                f" {length + 1}, got {len(offsets)} in sample {i}"
            )
        if offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(
                f"verl: {OFFSETS} must rise from 0 to the number of {IDS}, {len(ids)}, got"
                f" {offsets[0]} to {offsets[-1]} in sample {i}"
            )
        # The last row of a sequence predicts nothing of it.
        counts[stop - 1 - length : stop - 1] = torch.tensor(offsets).diff()
        every += ids
    flat = torch.tensor(every, dtype=torch.int64, device=logits.device)
    rows = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return Support(flat, rows.to(logits.device))


def _response_lengths(micro_batch: Any) -> list[int]:
    """Tokens of each response, its tools' too."""
    mask = micro_batch["response_mask"]
    if mask.is_nested:
        return [int(n) for n in mask.offsets().diff()]
    return [int(n) for n in micro_batch["attention_mask"][:, -mask.shape[1] :].sum(1)]


def without_support(arguments: Arguments) -> Arguments:
    """The first call's comparison: over the whole vocabulary, as verl's own is."""
    micro_batch = arguments["micro_batch"]
    _covered(arguments["self"], micro_batch)
    names = micro_batch.keys()
    dropped = [name for name in (IDS, OFFSETS, _EXTRA) if name in names]
    return arguments | {"micro_batch": micro_batch.exclude(*dropped)}


class _Copies:
    """A model's output whose logits are a copy at each access."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    @property
    def logits(self) -> Tensor:
        return self._logits.detach().clone()


def of_copied_logits(arguments: Arguments) -> Arguments:
    """The same where verl divides the logits in place: the step's own would be other ones."""
    return without_support(arguments) | {"output": _Copies(arguments["output"].logits)}


def packed(arguments: Arguments, result: dict[str, Tensor]) -> dict[str, Tensor]:
    """The results' values, without their nesting."""
    return {name: x.values() for name, x in result.items()}
