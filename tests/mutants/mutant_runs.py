"""Seeded mistakes in options and run folders."""

from __future__ import annotations

from mutant import Mutant

RUNS = (
    Mutant(
        "an option given at its default is replaced",
        "ppo_fast/loop/config.py",
        "for name, value in own.items() if name not in given",
        "for name, value in own.items() if getattr(self, name) == getattr(TrainConfig, name)",
        "loop_options",
        "given",
    ),
    Mutant(
        "dataclasses.replace forgets what it was given",
        "ppo_fast/loop/config.py",
        "names = [*carried, *names[",
        "names = [*carried, *names[:0][",
        "loop_options",
        "given",
    ),
    Mutant(
        "options are checked in fp64",
        "ppo_fast/loop/config.py",
        "_FP32.tiny <= abs(value) <= _FP32.max",
        "0 < abs(value) < float('inf')",
        "loop_options",
        "fp32",
    ),
    Mutant(
        "two runs share a folder's lock",
        "ppo_fast/loop/log/lock.py",
        "fcntl.flock(file, fcntl.LOCK_EX |",
        "fcntl.flock(file, fcntl.LOCK_SH |",
        "loop_lock",
        "another_process",
    ),
    Mutant(
        "a run does not look whose folder it is",
        "ppo_fast/loop/log/lock.py",
        "if last != self._claim:",
        "if not last:",
        "loop_lock",
        "two_trainers",
    ),
    Mutant(
        "a refused resume writes its options down",
        "ppo_fast/loop/run.py",
        "self.ranks.from_first(self._take_folder)\n",
        "self.ranks.from_first(self._take_folder); self.recorder._describe(None)\n",
        "loop_folder",
        "refused_resume",
    ),
    Mutant(
        "paths move with the process",
        "ppo_fast/loop/config.py",
        "k: Path(v).absolute() for",
        "k: Path(v) for",
        "loop_folder",
        "working_folder",
    ),
    Mutant(
        "a former model is dropped between two renames",
        "ppo_fast/loop/model/export.py",
        "if not folder.exists() and former.exists():  # a kill",
        "if False:  # a kill",
        "loop_folder",
        "renames",
    ),
)
