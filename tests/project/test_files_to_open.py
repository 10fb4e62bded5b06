"""Few files to open for one kernel: the bounds of files_to_open.py."""

from __future__ import annotations

from pathlib import Path

import files_to_open
import pytest

HELD = [
    ("kernels", "gae.py"),
    ("kernels", "logits_ppo_loss.py"),
    ("csrc/cpu", "gae.cpp"),
    ("csrc/cuda", "logits_ppo_loss.cu"),
]


@pytest.mark.parametrize("key", HELD, ids="/".join)
def test_a_reader_opens_few_files(key: tuple[str, str]) -> None:
    opened = files_to_open.to_open(files_to_open.bounded(*key))
    assert len(opened) <= files_to_open.BOUNDS[key], sorted(path.name for path in opened)


def test_includes_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the file, from the folder above, transitively, each once; foreign headers are not."""
    monkeypatch.setattr(files_to_open, "ROOT", tmp_path)
    room = tmp_path / "csrc/cpu"
    room.mkdir(parents=True)
    includes = '#include <vector>\n#include "b.h"\n#include "cpu/c.h"\n'
    (room / "a.cpp").write_text(includes + '#define PPO_KERNEL "a_simd.h"\n')
    (room / "a_simd.h").write_text("")
    (room / "b.h").write_text('#include "c.h"\n#include "top.h"\n')
    (room / "c.h").write_text('#include "b.h"\n#include "torch/foreign.h"\n')
    (tmp_path / "csrc/top.h").write_text("")
    opened = files_to_open.to_open(room / "a.cpp")
    assert {path.name for path in opened} == {"a.cpp", "a_simd.h", "b.h", "c.h", "top.h"}
