"""What the benchmarks share: their options, the clock, the line that says where a figure comes from, and their rows."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TypeVar

K = TypeVar("K")


@dataclass(frozen=True)
class Row:
    """A line of the table of `make bench`.

    ours, peer  in `unit`, of which less is better unless `more`; peer None: it is not installed
    goal        of ours / peer, None where there is none
    """

    what: str
    ours: float
    peer: float | None
    goal: float | None = None
    more: bool = False
    unit: str = "ms"

    @property
    def ratio(self) -> float | None:
        return self.ours / self.peer if self.peer else None

    @property
    def reached(self) -> bool | None:
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal if self.more else self.ratio <= self.goal

    def text(self) -> str:
        goal = "-" if self.goal is None else f"{'>=' if self.more else '<='} {self.goal:g}"
        reached = {None: "-", True: "yes", False: "no"}[self.reached]
        peer, ratio = ("-" if n is None else f"{n:.4g}" for n in (self.peer, self.ratio))
        return f"| {self.what} | {self.ours:.4g} | {peer} | {self.unit} | {ratio} | {goal} | {reached} |"


HEADER = "| what | ours | peer | unit | ratio | goal | reached |\n|---|---|---|---|---|---|---|"


def arguments(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """A parser with what all have: --rounds, --quick, --json."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds)
    common_options(parser)
    return parser


def common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: does it run?")
    parser.add_argument("--json", type=Path, help="write the rows here, too")


def head(args: argparse.Namespace, *packages: str, what: str) -> None:
    """Set one thread, and print versions, machine, load and date."""
    import torch  # here: what measures imports and memory begins without it

    torch.set_num_threads(1)
    if args.quick:
        args.rounds = 1
    print(f"{where(*packages)}; {what}, medians of {args.rounds}", flush=True)


def where(*packages: str) -> str:
    known = ", ".join(f"{name} {_version(name)}" for name in ("torch", *packages))
    machine = platform.processor() or platform.machine()
    return f"{known}, {machine}, 1 thread, load {os.getloadavg()[0]:.1f}, {time.strftime('%Y-%m-%d')}"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "(not installed)"


def alternate(works: Mapping[K, Callable[[], object]], args: argparse.Namespace) -> dict[K, float]:
    """Median milliseconds of process CPU time of each, after a warm-up round; they take turns."""
    times: dict[K, list[float]] = {key: [] for key in works}
    for i in range(args.rounds + 1):
        for key, work in works.items():
            start = time.process_time()
            work()
            if i:
                times[key].append(1000 * (time.process_time() - start))
    return {key: median(values) for key, values in times.items()}


def finish(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Print the rows, and write them for `bench.py`."""
    print("\n" + HEADER)
    for row in rows:
        print(row.text())
    print(f"load at the end {os.getloadavg()[0]:.1f}")
    save(rows, args.json)


def save(rows: Sequence[Row], file: Path | None) -> None:
    if file is not None:
        file.write_text(json.dumps([asdict(r) for r in rows], indent=1), encoding="utf-8")
