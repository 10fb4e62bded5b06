"""Arrays whose meaning DLPack does not carry are refused by name, not read without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ppo_fast
from ppo_fast import compat

VALUES = np.ones((2, 3), np.float32)
MASKED = np.ma.masked_array(VALUES, mask=[[False, True, False], [False, False, True]])


class Sub(np.ma.MaskedArray):
    """A class of someone's own."""


@pytest.mark.parametrize(
    "array",
    [MASKED, np.ma.masked_array(VALUES), MASKED.view(Sub), MASKED[0, 1], MASKED[0]],
    ids=["masked", "nothing masked", "subclass", "the constant", "row"],
)
def test_a_masked_array_is_refused(array: Any) -> None:
    message = f"array must not be masked, got {type(array).__name__}: its mask would be lost"
    with pytest.raises(TypeError, match=message):
        compat.to_tensor(array)


def test_a_masked_array_is_refused_wherever_it_stands() -> None:
    gae = compat.arrays(ppo_fast.gae)
    for call in (
        lambda: gae(MASKED, VALUES, gamma=0.9),
        lambda: gae(VALUES, MASKED, gamma=0.9),
        lambda: gae(VALUES, VALUES, gamma=0.9, mask=MASKED > 0),
    ):
        with pytest.raises(TypeError, match="array must not be masked, got MaskedArray"):
            call()
    want = gae(VALUES, VALUES, gamma=0.9, mask=~np.ma.getmaskarray(MASKED))
    assert want.advantages[0, 1] == 0.0


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (VALUES.astype(">f4"), ">f4"),
        (VALUES.astype(object), "object"),
        (np.zeros((2, 3), [("a", "f4")]), r"\[\('a', '<f4'\)\]"),
        (np.zeros(6, np.dtype([("x", "u1"), ("a", "f4")]))["a"].reshape(2, 3), "float32"),
        (VALUES.astype("M8[s]"), r"datetime64\[s\]"),
        (VALUES[:, ::-1], "float32"),
    ],
    ids=["big-endian", "object", "structured", "packed field", "dates", "backwards"],
)
def test_kinds_that_dlpack_has_no_name_for(array: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"array of {kind} cannot be shared through DLPack"):
        compat.arrays(ppo_fast.whiten)(array)


def test_complex_numbers_and_lists_are_refused_by_the_op() -> None:
    with pytest.raises(TypeError, match=r"whiten: .* got torch.complex64"):
        compat.arrays(ppo_fast.whiten)(VALUES.astype(np.complex64))
    with pytest.raises(TypeError, match="gae: values must be a tensor, got list"):
        compat.arrays(ppo_fast.gae)(VALUES, [[1.0], [1.0, 2.0]], gamma=0.9)


def test_read_only_and_broadcast_arrays_are_read() -> None:
    fixed = VALUES.copy()
    fixed.flags.writeable = False
    wide = np.broadcast_to(np.float32(1), (2, 3))
    gae = compat.arrays(ppo_fast.gae)
    want = gae(VALUES, VALUES, gamma=0.9).advantages
    assert gae(fixed, wide, gamma=0.9).advantages.tobytes() == want.tobytes()


def test_arrow_arrays_with_nulls_are_refused() -> None:
    pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
    with pytest.raises(TypeError, match="null"):
        compat.to_tensor(pa.array([1.0, None]))
    assert compat.to_tensor(pa.array([1.0, 2.0])).tolist() == [1.0, 2.0]
