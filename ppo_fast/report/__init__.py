"""One HTML page of one or more runs: `ppo-fast report RUN [RUN ...]`."""

from ppo_fast.report.page import write_report
from ppo_fast.report.runs import RunError

__all__ = ["RunError", "write_report"]
