"""Seeded mistakes of the referee, of a run's report and alarms, and of the site."""

from __future__ import annotations

from mutant import Mutant
from mutant_referee import REFEREE

REPORT = (
    *REFEREE,
    Mutant(
        "the site's anchors lose what is not ASCII",
        "docs/site_hooks.py",
        r're.sub(r"[^\w\- ]"',
        r're.sub(r"[^a-z0-9_\- ]"',
        "site",
        "anchors_are",
    ),
    Mutant(
        "a page of the site may load over http",
        "docs/site_hooks.py",
        '"(?:https?:)?//',
        '"(?:https:)?//',
        "site",
        "network",
    ),
    Mutant(
        "a mean that overflows is infinite",
        "ppo_fast/loop/log/history.py",
        "if math.isfinite(total):",
        "if True:",
        "report_numbers",
    ),
    Mutant(
        "a rolling mean that overflows",
        "ppo_fast/loop/log/alarms.py",
        "_SCALE = 2.0**-40",
        "_SCALE = 1.0",
        "loop_alarms",
        "large or scale",
    ),
    Mutant(
        "a start without entropy silences its alarm",
        "ppo_fast/loop/log/alarms.py",
        "start = _first(entropy)",
        "start = entropy[4] if len(entropy) > 4 else np.nan",
        "loop_alarms",
        "start",
    ),
    Mutant(
        "noise across updates without a reward is none",
        "ppo_fast/loop/log/alarms.py",
        "steps[at[1:]] = np.diff(rewards[at] * _SCALE)",
        "steps[1:] = np.nan_to_num(np.diff(rewards * _SCALE))",
        "loop_alarms",
        "noise",
    ),
    Mutant(
        "a count of zero halves the KL",
        "ppo_fast/loop/log/alarms.py",
        "np.where(below > 0, below, np.nan)",
        "below",
        "loop_alarms",
        "divided",
    ),
    Mutant(
        "a number that is not finite is no alarm",
        "ppo_fast/loop/log/alarms.py",
        "holds[list(lost)] = True",
        "holds[list(lost)] = False",
        "loop_alarms",
        "finite",
    ),
    Mutant(
        "a text counts as the number in it",
        "ppo_fast/loop/log/fields.py",
        "isinstance(value, bool) or not isinstance(value, Real)",
        "not isinstance(value, (Real, str))",
        "report_faults",
    ),
    Mutant(
        "what is not finite is left out without a word",
        "ppo_fast/report/runs.py",
        "    notes += _left_out(list(records.values()))\n",
        "",
        "report_numbers",
    ),
    Mutant(
        "a run that is given twice counts twice",
        "ppo_fast/report/runs.py",
        "os.path.realpath(folder)",
        "str(folder)",
        "report_numbers",
    ),
    Mutant(
        "rounding takes the largest floats to infinity",
        "ppo_fast/report/charts.py",
        "return found if math.isfinite(found) else value",
        "return found",
        "report_numbers",
    ),
    Mutant(
        "the page goes over a run's log",
        "ppo_fast/report/page.py",
        "        _spare(folders, out)\n",
        "",
        "report_faults",
    ),
)
