"""Whether a run's memory grows."""

from __future__ import annotations

import statistics
from itertools import pairwise
from typing import NamedTuple

from ssod.report.run import Run

WARM = 0.25  # share of the log lines, from the start, that are not looked at: everything is loaded and used once there
LEAST = 10  # log lines that a slope is taken from


class Memory(NamedTuple):
    """Resident memory in MB of the first process at the end of a run, and how much 1,000 steps add to it, by a line
    through the steps from `first` to `last`; None where there are too few."""

    end: float
    first: int
    last: int
    slope: float | None

    def __str__(self) -> str:
        text = f"{self.end:.0f} MB of RAM at the end, in the first process"
        if self.slope is None:
            return text
        return f"{text}; from step {self.first} to {self.last} it changed by {self.slope:+.1f} MB in 1,000 steps"


def memory(run: Run) -> Memory | None:
    """Of the part since the run was resumed last, which is one process; None where results.csv does not say."""
    rows = [r for r in run.rows if r.get("memory/rss") and r.get("seconds")]
    begun = max(
        (i for i, (a, b) in enumerate(pairwise(rows), 1) if float(b["seconds"]) < float(a["seconds"])), default=0
    )
    steps = [int(r["step"]) for r in rows[begun:]]
    sizes = [float(r["memory/rss"]) for r in rows[begun:]]
    if not steps:
        return None
    warm = round(WARM * len(steps))
    slope = None
    if len(steps) - warm >= LEAST:
        slope = 1000 * statistics.linear_regression(steps[warm:], sizes[warm:]).slope
    return Memory(sizes[-1], steps[warm] if slope is not None else steps[0], steps[-1], slope)
