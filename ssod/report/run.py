"""A run folder, read for showing: whatever is there, and a sentence for each part that is not.

Nothing is written, so a run may be looked at while it trains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from ssod.config import load_config, read_yaml
from ssod.errors import UserError
from ssod.report.sound import Alarm, Args, AuditLine, Baseline, Form, Summary, flaw
from ssod.report.table import read_rows

NETWORKS = ("student", "teacher")  # of each validation; strategies may add others, such as an ensemble


@dataclass
class Run:
    """What a run folder holds. Files that are missing leave their part empty.

    args       args.yaml: every option
    env        lines of env.txt
    summary    metrics.json; {} while the run goes on
    rows       results.csv, a mapping a line
    history    a validation an entry: {"step", network: {"AP", ..., "per_class"?}, "by_class"?}
    diagnosis  alarms, audit  validations of the audited images, baseline  the control run: see docs/report.md
    damaged    a sentence for each file that could not be read as a whole
    """

    folder: Path
    args: dict[str, Any]
    env: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, str]] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    diagnosis: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    baseline: dict[str, Any] | None = None
    damaged: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def strategy(self) -> str:
        return named(self.args.get("strategy"))

    @property
    def detector(self) -> str:
        return named(self.args.get("detector"))

    @property
    def steps(self) -> int:
        """Steps done."""
        return max([int(r["step"]) for r in self.rows] + [int(self.summary.get("steps", 0))], default=0)

    @property
    def networks(self) -> list[str]:
        """Networks that were validated, student and teacher first."""
        found = dict.fromkeys(k for h in self.history for k, v in h.items() if isinstance(v, dict) and "AP" in v)
        return sorted(found, key=lambda n: (n not in NETWORKS, NETWORKS.index(n) if n in NETWORKS else 0))

    @property
    def names(self) -> list[str]:
        """Classes in the order of the data, as far as the metrics name them."""
        for entry in reversed(self.history):
            for network in self.networks:
                if per_class := entry.get(network, {}).get("per_class"):
                    return list(per_class)
        return []

    @property
    def burn_in(self) -> int | None:
        """Last step of the supervised start; None where the run has none, or never left it."""
        first = next((int(r["step"]) for r in self.rows if any(r.get(c) for c in r if c.startswith("unsup/"))), None)
        if first is None:
            return None
        given = self.args.get("burn_in", 0)
        total = self.args.get("iters") or self.summary.get("steps") or self.steps
        step = round(given * total) if isinstance(given, float) and given < 1 else int(given)
        return step if 0 < step <= first else None

    def series(self, column: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one column of results.csv."""
        return series(self.rows, column)

    def scores(self, network: str, figure: str = "AP") -> tuple[list[float], list[float]]:
        """(steps, values 0..1) of a figure of a network over the validations; those without the figure left out."""
        return scores(self.history, network, figure)

    def best(self) -> tuple[str, int, Mapping[str, Any]] | None:
        """(network, step, its figures) of the validation with the highest AP; None before the first."""
        every = [(h[n]["AP"], n, h) for h in self.history for n in NETWORKS if (h.get(n) or {}).get("AP") is not None]
        if not every:
            return None
        _, network, entry = max(every, key=lambda e: e[0])  # the first of equals, as best.pt is
        return network, int(entry["step"]), entry[network]

    def minutes(self) -> float | None:
        """Minutes of training with its validations, all parts of a resumed run together."""
        seconds = self.series("seconds")[1]
        if not seconds:
            return None
        return (seconds[-1] + sum(a for a, b in pairwise(seconds) if b < a)) / 60


def series(rows: Sequence[Mapping[str, str]], column: str) -> tuple[list[float], list[float]]:
    pairs = [(int(r["step"]), float(r[column])) for r in rows if r.get(column)]
    return [float(s) for s, _ in pairs], [v for _, v in pairs]


def scores(history: Sequence[Mapping[str, Any]], network: str, figure: str) -> tuple[list[float], list[float]]:
    pairs = [(float(h["step"]), h[network][figure]) for h in history if (h.get(network) or {}).get(figure) is not None]
    return [s for s, _ in pairs], [v for _, v in pairs]


def named(component: Any) -> str:
    """The name of a detector or strategy as args.yaml has it."""
    return str(component.get("name", "?")) if isinstance(component, dict) else str(component)


def is_run(folder: Path) -> bool:
    return (folder / "args.yaml").is_file()


def read_run(folder: Path) -> Run:
    """Read a run folder. Raises UserError where it is none; a damaged file in it is said in `damaged`."""
    if not is_run(folder):
        raise UserError(
            f"{folder} is no folder of a training run: it has no args.yaml. Give one such as runs/train/exp."
        )
    defaults = load_config("train")
    run = Run(folder, {"data": defaults.data, "labeled": defaults.labeled} | read_yaml(folder / "args.yaml"))
    if wrong := flaw(Args, run.args):
        raise UserError(f"{folder / 'args.yaml'} is not what a training run writes: {wrong}.")
    if (folder / "env.txt").is_file():
        run.env = (folder / "env.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    run.rows = _rows(folder / "results.csv", run.damaged)
    run.summary = _mapping(folder / "metrics.json", Summary, run.damaged) or {}
    run.baseline = _mapping(folder / "baseline.json", Baseline, run.damaged)
    run.diagnosis = _lines(folder / "diagnosis.jsonl", Alarm, run.damaged)
    run.audit = _lines(folder / "audit.jsonl", AuditLine, run.damaged)
    run.history = run.summary.get("history") or _history(run.rows)
    return run


def _rows(path: Path, damaged: list[str]) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    good, bad = read_rows(path)
    if bad:
        damaged.append(f"{path.name}: {bad} lines are not whole and were left out.")
    return good


def _mapping(path: Path, form: type[Form], damaged: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        damaged.append(f"{path.name} is not whole JSON and was left out: {error}.")
        return None
    if wrong := flaw(form, content):
        damaged.append(f"{path.name} is not what a run writes and was left out: {wrong}.")
        return None
    return content


def _lines(path: Path, form: type[Form], damaged: list[str]) -> list[dict[str, Any]]:
    """A JSON mapping a line; a line that is half written is left out and said."""
    out: list[dict[str, Any]] = []
    if not path.is_file():
        return out
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            entry = "bad"
        if isinstance(entry, dict) and flaw(form, entry) is None:
            out.append(entry)
        else:
            bad += entry is not None
    if bad:
        damaged.append(f"{path.name}: {bad} lines are not whole and were left out.")
    return out


def _history(rows: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """The validations as results.csv has them, of a run that has not ended: without the classes."""
    out: list[dict[str, Any]] = []
    for row in rows:
        entry: dict[str, Any] = {}
        for column, value in row.items():
            if column.startswith("val/") and value and value != "nan":
                _, network, figure = column.split("/", 2)
                entry.setdefault(network, {})[figure] = float(value)
        if entry:
            out.append({"step": int(row["step"]), **entry})
    return out


def differences(args: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are not at their default, flat: {"strategy.tau": 0.7}. A component's options all count, since their
    defaults are its own."""
    defaults = load_config("train").model_dump()
    out: dict[str, Any] = {}
    for key, value in args.items():
        if key in ("detector", "strategy") and isinstance(value, dict):
            if value.get("name") != defaults[key]["name"] or len(value) > 1:
                out[key] = value.get("name")
            out |= {f"{key}.{k}": v for k, v in value.items() if k != "name"}
        elif key == "augment" and isinstance(value, dict):
            out |= {f"augment.{k}": v for k, v in value.items() if v != defaults["augment"].get(k)}
        elif key not in defaults or value != defaults[key]:
            out[key] = value
    return out
