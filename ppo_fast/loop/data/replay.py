"""Stored transitions as batches, in a seeded order, and a writer of own samples."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from ppo_fast import Support
from ppo_fast.loop.data.experience import Experience
from ppo_fast.loop.data.sequences import Rollout, Scores, Sequences, context_of, support_of
from ppo_fast.loop.data.transitions import Limits, Transition, TransitionsError, read_transitions
from ppo_fast.loop.files import naming, replace


class Passes(Sampler[int]):
    """Endless indices of `n` rows, each once per pass, in a fresh order where they are shuffled.

    A pass's order is a function of seed and pass, so that a position is two numbers.
    """

    def __init__(self, n: int, seed: int, shuffle: bool) -> None:
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self.done, self.taken = 0, 0

    def __iter__(self) -> Iterator[int]:
        while True:
            order = self._order()
            while self.taken < self.n:
                self.taken += 1
                yield order[self.taken - 1]
            self.done, self.taken = self.done + 1, 0

    def _order(self) -> list[int]:
        if not self.shuffle:
            return list(range(self.n))
        # Two runs whose seeds are neighbours share no pass.
        mixed = hashlib.sha256(f"{self.seed} {self.done}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "little"))
        return torch.randperm(self.n, generator=generator).tolist()


class TransitionStream:
    """Endless batches of stored transitions, through a DataLoader, as what a rollout gives.

    `decode` makes text of tokens; `pad` stands where there is no token.
    """

    def __init__(
        self,
        rows: list[Transition],
        batch: int,
        seed: int,
        *,
        shuffle: bool,
        decode: Any,
        pad: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not rows:
            raise TransitionsError("transitions must not be empty, got 0 rows")
        self._rows, self._decode, self._pad = rows, decode, pad
        # One row's ids suffice for all batches to have a support, and for all updates to log it.
        self.supported = any(row.support is not None for row in rows)
        self._dtype, self._device = dtype, device
        self._passes = Passes(len(rows), seed, shuffle)
        self._batch = batch
        self._batches = self._loader()

    def next(self, n: int) -> Experience:
        """The next `n` transitions; `n` is the batch this stream was made for."""
        if n != self._batch:
            raise ValueError(f"n must be the stream's batch, {self._batch}, got {n}")
        return next(self._batches)

    def digest(self) -> str:
        """The sha256 of all rows."""
        found = hashlib.sha256(json.dumps([row[:-1] for row in self._rows]).encode())
        for i, row in enumerate(self._rows):
            if row.support is not None:
                found.update(f" {i} {row.support.offsets.tolist()} ".encode())
                found.update(row.support.ids.tobytes())
        return found.hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Position of the next batch: passes done, and rows taken of this one."""
        return {"done": self._passes.done, "taken": self._passes.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, of the same rows."""
        self._passes.done, self._passes.taken = state["done"], state["taken"]
        self._batches = self._loader()

    def _loader(self) -> Iterator[Experience]:
        # In this process: a worker would draw ahead, and the position would be its own.
        loader: DataLoader[Experience] = DataLoader(
            self._rows,  # type: ignore[arg-type]  # a list is a map-style data set
            self._batch,
            sampler=self._passes,
            collate_fn=self.collate,
            generator=torch.Generator(),  # its own: it would draw a number of the global one
        )
        return iter(loader)

    def collate(self, rows: list[Transition]) -> Experience:
        """Left-padded prompts and right-padded responses of `rows`, with log-probs and rewards."""
        before = max(len(r.prompt_tokens) for r in rows)
        after = max(len(r.tokens) for r in rows)
        tokens = [
            [self._pad] * (before - len(r.prompt_tokens))
            + r.prompt_tokens
            + _padded(r.tokens, after, self._pad)
            for r in rows
        ]
        attention = [
            [0] * (before - len(r.prompt_tokens))
            + [1] * len(r.prompt_tokens)
            + _padded([1] * len(r.tokens), after, 0)
            for r in rows
        ]
        attended = torch.tensor(attention, device=self._device)
        seqs = Sequences(
            torch.tensor(tokens, device=self._device),
            attended,
            attended[:, before:].bool(),
            self._support(rows, after) if self.supported else None,
        )
        logprobs, rewards = (
            torch.tensor([_padded(x, after, 0.0) for x in column], dtype=self._dtype)
            for column in ([r.logprobs for r in rows], [r.rewards for r in rows])
        )
        texts = [self._decode(r.tokens) for r in rows]
        prompts = [r.prompt or self._decode(r.prompt_tokens) for r in rows]
        return Experience(
            prompts,
            texts,
            Rollout(seqs, logprobs.to(self._device)),
            Scores([sum(r.rewards) for r in rows]),
            [not r.truncated for r in rows],
            rewards.to(self._device),
        )

    def _support(self, rows: list[Transition], width: int) -> Support:
        """The support of the (B, R) slots."""
        counts = torch.zeros(len(rows), width, dtype=torch.int64)
        ids = array("i")
        for i, drawn in enumerate(row.support for row in rows):
            if drawn is not None:
                offsets = torch.tensor(drawn.offsets)
                counts[i, : len(offsets) - 1] = offsets.diff()
                ids.extend(drawn.ids)
        flat = torch.tensor(ids, dtype=torch.int32)
        return support_of(flat.to(self._device), counts.to(self._device))


class TransitionWriter:
    """Writes the samples of each update as lines of JSON that `read_transitions` reads back.

    Samples without a reward are left out. A resumed run goes on after the updates that it keeps.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def write(self, update: int, sample: Experience) -> None:
        """Append the samples of one update."""
        if not self._begun:
            earlier = _lines_before(self._path, update) if update else []
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace(self._path, "".join(earlier).encode())
            self._begun = True
        with naming(self._path), self._path.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps(row, allow_nan=False) + "\n" for row in self._rows(update, sample)
            )

    def _rows(self, update: int, sample: Experience) -> Iterator[dict[str, Any]]:
        seqs, scores = sample.rollout.seqs, sample.scores
        width = seqs.prompt_width
        columns = (seqs.tokens, seqs.attention.bool(), seqs.mask, sample.rollout.logprobs)
        rows = zip(*(x.cpu() for x in columns), strict=True)
        supports = _supports(seqs)
        for i, (tokens, attended, mask, logprobs) in enumerate(rows):
            if i in scores.faults:
                continue
            yield {
                "update": update,
                "prompt": sample.prompts[i],
                "prompt_tokens": tokens[:width][attended[:width]].tolist(),
                "tokens": tokens[width:][mask].tolist(),
                "logprobs": logprobs[mask].tolist(),
                "reward": scores.values[i],
                "truncated": not sample.ended[i],
                **({} if supports is None else supports[i]),
            }


def _supports(seqs: Sequences) -> list[dict[str, list[int]]] | None:
    """The ids and offsets of each sequence's kept tokens, as transitions have them."""
    support = seqs.flat_support()
    if support is None:
        return None
    ids, offsets, ends = (x.cpu() for x in (support.ids, support.offsets, seqs.cu_seqlens()))
    found = []
    for first, last in itertools.pairwise(ends.tolist()):
        own = offsets[first : last + 1]
        kept = ids[int(own[0]) : int(own[-1])]
        found.append({"support_ids": kept.tolist(), "support_offsets": (own - own[0]).tolist()})
    return found


def _lines_before(path: Path, update: int) -> list[str]:
    """The lines of updates before `update`; a line that a kill cut short is none of them."""
    if not path.exists():  # a resumed run may be given another file
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [x for x in lines if x.endswith("\n") and _update(path, x) < update]


def _update(path: Path, line: str) -> int:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    found = entry.get("update") if isinstance(entry, dict) else None
    if type(found) is not int:
        raise TransitionsError(f"{path}: a line has no update, got {line!r:.60}")
    return found


def open_transitions(
    path: Path,
    batch: int,
    seed: int,
    *,
    shuffle: bool,
    keep_truncated: bool,
    model: Any,
    context: int | None = None,
    tokenizer: Any,
    report: Callable[[str], None],
) -> TransitionStream:
    """The transitions in `path` for `model`; `report` gets lines on dropped and kept rows.

    They fit `context`, or the model's own where that is None.
    """
    context = context_of(model.config) if context is None else context
    limits = Limits(model.get_input_embeddings().num_embeddings, context)
    found = read_transitions(
        path, lambda text: tokenizer(text)["input_ids"] or [tokenizer.eos_token_id], limits
    )
    for fault in found.faults:
        report(f"dropped {fault}")
    rows = [r for r in found.rows if keep_truncated or not r.truncated]
    cut = len(found.rows) - len(rows)
    if not rows:
        raise TransitionsError(f"transitions {path}: all {cut} good rows are truncated")
    weight = model.get_output_embeddings().weight
    drawn = [r.support for r in rows if r.support is not None]
    passes = -(-len(rows) // batch)
    report(
        f"{path}: {len(rows)} transitions, {len(found.faults)} bad rows and {cut} truncated ones"
        f" left out; a pass takes {passes} updates of {batch}"
    )
    if drawn:
        ids = sum(len(support.ids) for support in drawn)
        report(
            f"{path}: {len(drawn)} transitions have the ids that their tokens were drawn from,"
            f" {ids} in {4 * ids / 1e6:.1f} MB; {len(rows) - len(drawn)} take the whole vocabulary"
        )
    return TransitionStream(
        rows,
        batch,
        seed,
        shuffle=shuffle,
        pad=tokenizer.pad_token_id or 0,
        dtype=torch.promote_types(weight.dtype, torch.float32),
        device=weight.device,
        decode=lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
    )


def _padded(row: list[Any], width: int, value: float) -> list[Any]:
    return row + [value] * (width - len(row))
