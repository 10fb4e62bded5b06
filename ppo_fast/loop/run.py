"""Run around the algorithm: its folder, checkpoints, progress, Ctrl-C and export.

Every file that the loop writes or removes is one of a run, and `Trainer.begin` is the first to
touch any.
"""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from ppo_fast.loop import distill, preflight, rewards, tasks
from ppo_fast.loop.checkpoint.checkpoints import Checkpoints
from ppo_fast.loop.config import TrainConfig
from ppo_fast.loop.data.chat import rendered
from ppo_fast.loop.data.prompts import columns_of
from ppo_fast.loop.data.replay import TransitionStream, TransitionWriter, open_transitions
from ppo_fast.loop.log import progress, recorder
from ppo_fast.loop.log.history import History, Record, fifths
from ppo_fast.loop.log.lock import RunLock
from ppo_fast.loop.model import export
from ppo_fast.loop.model.layers import vocabulary
from ppo_fast.loop.model.load import from_outside, load_tokenizer, load_weights
from ppo_fast.loop.ppo import PPO
from ppo_fast.loop.ranks.ranks import RankFailedError, Ranks, device_of
from ppo_fast.loop.sampling.sampler import check_lengths
from ppo_fast.loop.sampling.truncate import Truncation, held_at_most

Say = Callable[[str], None]


@dataclass
class Outcome:
    """End of a run. `first` and `last` are the mean rewards of its outer fifths.

    `model` is None where no optimiser step was made.
    """

    rewards: list[float]
    first: float
    last: float
    kl: float
    interrupted: bool
    plot: Path | None
    model: Path | None


class Trainer(PPO):
    """PPO on one model, with a folder for its log, checkpoints and model.

    `model` is any transformers causal LM and is trained in place. `prompts` are texts, or rows of
    a `config.prompt_field`, a text or a list of messages, and of columns. `reward` is a function
    fn(prompts, completions, **columns) -> list[float], which gets the prompts as they are in the
    rows and those columns that its signature takes. Stored transitions in the place of prompts
    come with their rewards: nothing is sampled, and `reward` is not called. `held_out` are prompts
    too, to evaluate on every `config.eval_every` updates. `teacher` is the model that
    `config.distill` learns from, frozen in place; its tokens must be the model's.

    `run` does all updates, `step` one. Making a trainer touches no file: the first of the two
    takes the folder `config.out`.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: Any,
        tokenizer: Any,
        prompts: Iterable[Any] | TransitionStream,
        reward: rewards.RewardFn,
        ranks: Ranks | None = None,
        held_out: Iterable[Any] | None = None,
        teacher: Any = None,
    ) -> None:
        super().__init__(config, model, tokenizer, prompts, reward, ranks, held_out, teacher)
        self.begun = False
        self.lock = RunLock(self.config.out)
        self.recorder = recorder.Recorder(self.config, self.backend)
        self.checkpoints = Checkpoints(self.config, self.ranks, self.recorder.sync)
        path = self.config.save_transitions
        self.writer = None if path is None else TransitionWriter(path)

    def begin(self, say: Say = print) -> None:
        """Take the folder, and resume or start with an empty log; a resume is reported to `say`.

        Raises `RunLockedError` where another run goes on in the folder, `RunExistsError` where one
        is in it that is neither to be resumed nor overwritten, `CheckpointError` where the one to
        resume differs, and OSError where something else is in a file's place. Then nothing is
        changed. The lock is held on return; `close` releases it. A run that is overwritten stays
        until the first update is made.
        """
        self.ranks.from_first(self._take_folder)
        try:
            if self.config.resume:
                self.checkpoints.resume(self, say)
            if self.ranks.first and self.config.overwrite:
                self.recorder.track(say)
            elif self.ranks.first:
                self._open_log(say)
        except BaseException:
            self.lock.release()
            raise
        self.begun = True

    def step(self) -> Record:
        """One update, logged when it is finished.

        By hand, the folder is locked while the first step takes it, and not after.
        """
        if not self.begun:
            self.begin()
            self.lock.release()
        record, sample = self.iteration()
        if self.ranks.first:
            update = record["update"]
            if not self.recorder.open:
                self._open_log(print)
            if self.writer is not None:
                self.writer.write(update, sample)
            self.recorder.update(record)
            self.recorder.samples(update, sample.prompts, sample.texts, sample.scores)
        return record

    def run(self, console: Console) -> Outcome:
        """Train to the end, or to Ctrl-C. However it ends, log, plot and model are written.

        Only a model that no optimiser step has changed is not.
        """
        interrupted, plot, folder = False, None, None
        say = functools.partial(progress.say, console)
        if self.begun:
            self.ranks.from_first(self.lock.hold)
        else:
            self.begin(say)
        with deferred_signals(say, hold=self.ranks.size > 1) as stop:
            try:
                with progress.progress_bar(console, self.updates, self.config.updates) as show:
                    while self.updates < self.config.updates and not self.ranks.any(stop.asked):
                        record = self.step()
                        self.watch.tell(say)
                        _say_evaluation(self.config, record, say)
                        show(record, self.history, self.recorder.sampled)
                        self.checkpoints.after_step(self, say)
                interrupted = self.updates < self.config.updates
                self.checkpoints.finish(self)
            except KeyboardInterrupt:
                interrupted = True
            except RankFailedError as error:
                say(f"{error}; what there is will be written")
                raise
            finally:
                stop.ending = True
                try:
                    if self.agent.optimizer.state and (self.recorder.open or not self.ranks.first):
                        folder = export.export(self.agent, self.tokenizer, self.config.out)
                finally:
                    plot = self.close()
        means = self.history.column("reward").tolist()
        kl = fifths(self.history.column("kl").tolist())[1]
        return Outcome(means, *fifths(means), kl, interrupted, plot, folder)

    def close(self) -> Path | None:
        """Close the log, draw the reward curve and give the folder back.

        Returns the curve's path if there is any update.
        """
        try:
            return self.recorder.close(self.history) if self.ranks.first and self.begun else None
        finally:
            self.lock.release()

    def _take_folder(self) -> None:
        """Lock the folder, which must have room for this run."""
        preflight.require_places(self.config.out)
        self.lock.claim(lambda: preflight.require_new(self.config))

    def _open_log(self, say: Say) -> None:
        if not self.config.resume:
            self.recorder.begin(say)
            self.checkpoints.clear()
            return
        lines, lacking = self.recorder.resume(self.updates, say)
        self.history = History(lines)
        for text in lacking:
            say(f"warning: {text}")


def _say_evaluation(config: TrainConfig, record: Record, say: Say) -> None:
    """Tell the evaluations in a record: before the first update, and after this one."""
    done = f"after {record['update'] + 1} updates"
    for end, when in (("_before", "before the first update"), ("", done)):
        if f"eval_reward{end}" not in record:
            continue
        text = f"evaluation {when}: mean reward {record[f'eval_reward{end}']:+.3f}"
        if config.eval_samples > 1:
            text += f", best of {config.eval_samples} {record[f'eval_best{end}']:+.3f}"
        if lost := record.get(f"eval_dropped{end}"):
            text += f", {lost} without a reward"
        say(text)


class Stop:
    """State of a stop: `asked` for by a signal, and `ending` the run."""

    def __init__(self) -> None:
        self.asked = False
        self.ending = False


@contextmanager
def deferred_signals(say: Callable[[str], None], hold: bool = False) -> Iterator[Stop]:
    """Context in which the first Ctrl-C or SIGTERM sets `asked`, and a second one interrupts.

    Once `ending` is set, Ctrl-C interrupts at once, and SIGTERM waits for what is being written.
    `hold` keeps it waiting after an exception has left the block: torchrun sends it to every rank
    as soon as one has died, and the others still have to say why they stop. Outside the main
    thread, where Python delivers no signals, nothing changes.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stop.ending and number == signal.SIGTERM:
            return
        if stop.asked or stop.ending:
            raise KeyboardInterrupt
        stop.asked = True
        say("stops after this update; Ctrl-C again stops at once")

    former = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except BaseException:
        if hold:
            former[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in former.items():
            if handler is not None:  # None: one that is not Python's, which it cannot put back
                signal.signal(number, handler)


def load_trainer(
    config: TrainConfig, report: Callable[[str], None] = print, ranks: Ranks | None = None
) -> Trainer:
    """A trainer of what `config` names: model, prompts or transitions, and reward.

    What can be checked without the model's weights is checked before they are loaded. Raises
    OptionError, which names the option, and ModuleNotFoundError for a package that one needs.
    """
    config = config.resolved().absolute()
    device = device_of(config)
    context = preflight.check(config, device, ranks is None or ranks.first).context
    task = tasks.load_task(config, report)
    held = tasks.load_held_out(config, report)
    with from_outside("model", config.model):
        tokenizer = load_tokenizer(config.model, task.texts[:200])
    if config.transitions is None:
        limit = None if context is None else context - config.max_new_tokens
        texts = rendered([*task.rows, *(held or [])], tokenizer, config.chat, config.system)
        check_lengths(tokenizer, [prompt.text for prompt in texts], limit)
    reward = rewards.load_reward(config, task.reward, device)
    if config.transitions is None:
        rewards.taken(reward, columns_of(task.rows))  # raises for one that is not there
    if config.distill is not None:
        distill.check_tokenizer(config, tokenizer, task.texts[:200], report)
    torch.manual_seed(config.seed)
    report(f"loading {config.model}")
    with from_outside("model", config.model):
        model = load_weights(config.model, tokenizer, device)
    teacher = distill.load_teacher(config, tokenizer, device, report)
    if Truncation.of(config) is not None:
        report(held_at_most(config, vocabulary(model)))
    source = (
        task.rows
        if config.transitions is None
        else open_transitions(
            config.transitions,
            config.batch,
            config.seed,
            shuffle=config.shuffle,
            keep_truncated=config.keep_truncated,
            model=model,
            context=context,
            tokenizer=tokenizer,
            report=report,
        )
    )
    return Trainer(config, model, tokenizer, source, reward, ranks, held, teacher)


def train(
    config: TrainConfig, console: Console, ranks: Ranks | None = None
) -> tuple[Trainer, Outcome]:
    """Load what `config` names, train, and return the trainer with the outcome."""
    trainer = load_trainer(config, functools.partial(progress.say, console), ranks)
    return trainer, trainer.run(console)
