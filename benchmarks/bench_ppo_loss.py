"""`ppo_loss` with a k3 term, an entropy bonus and every statistic, forward and backward."""

from __future__ import annotations

from benchmarks import shapes
from benchmarks.conftest import Record
from benchmarks.providers import Provider
from benchmarks.rows import rows


@rows(shapes.PPO_LOSS_BOTH)
def test_ppo_loss(case: shapes.Case, provider: Provider, record: Record) -> None:
    record(case, provider)
