"""What one finished training run gained over another: figures, differences, and why they may not be comparable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssod.config import read_yaml
from ssod.errors import UserError
from ssod.report.run import named
from ssod.report.sound import Args, Summary, flaw

SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl")
Figures = dict[str, float | None]  # 0..1, or a difference of such; None where no box of that kind exists

# What makes two runs incomparable: keys of args.yaml that are one question, and how a person says it.
MATTERS = {
    "other data": ("data", "data_path"),
    "other labelled images": ("labeled", "audit"),
    "another image size": ("imgsz",),
    "another seed": ("seed",),
    "another detector": ("detector", "backbone", "caffe_stride", "frozen_norm", "freeze"),
    "other weights to start from": ("weights",),
    "another batch": ("batch", "accumulate"),
    "another optimizer or schedule": (
        *("optimizer", "lr0", "lr_backbone", "momentum", "weight_decay"),
        *("schedule", "milestones", "warmup_iters", "clip_grad"),
    ),
    "other limits of a detection": ("conf", "iou", "max_det"),
}
COUNTS = {"steps": "steps", "labeled": "labelled images", "val": "validation images"}  # of metrics.json


@dataclass(frozen=True)
class Run:
    """A finished run, of the network that best.pt says is to be deployed.

    network     "student" or "teacher"
    final       SHOWN of that network at the last validation, which nothing has selected
    best        the same at the validation that best.pt was written at: the highest AP of all of them
    best_step   steps done then
    per_class   {class: AP} at the last validation; best_per_class at the best one
    """

    folder: Path
    strategy: str
    steps: int
    network: str
    final: Figures
    best: Figures
    best_step: int
    per_class: Figures
    best_per_class: Figures
    history: list[dict[str, Any]]
    settings: dict[str, Any]  # args.yaml
    counts: dict[str, int]  # images, by the keys of COUNTS


@dataclass(frozen=True)
class Comparison:
    """Differences are run minus baseline, in AP 0..1; None where one of the two has no such figure.

    warnings  sentences: in what the two differ besides the strategy
    """

    run: Run
    baseline: Run
    gain: Figures  # at the end
    best_gain: Figures  # of the two best.pt
    per_class: Figures  # at the end
    warnings: list[str]

    def text(self) -> str:
        """A table for the console, and the warnings under it."""
        columns = (self.run, self.baseline)
        names = [f"{r.strategy} {r.network}" for r in columns]
        width = max(20, *(len(n) + 2 for n in names))
        lines = [f"{'':<24}" + "".join(f"{n:>{width}}" for n in names) + f"{'gain':>10}"]
        rows = [(f"{key}, end", self.run.final[key], self.baseline.final[key], self.gain[key]) for key in SHOWN]
        rows.append(("AP, best", self.run.best["AP"], self.baseline.best["AP"], self.best_gain["AP"]))
        rows += [
            (f"AP of {c}, end", self.run.per_class.get(c), self.baseline.per_class.get(c), g)
            for c, g in self.per_class.items()
        ]
        for label, own, other, gain in rows:
            lines.append(f"{label:<24}{_shown(own):>{width}}{_shown(other):>{width}}{_shown(gain, sign='+'):>10}")
        lines.append(f"{'steps':<24}{self.run.steps:>{width}}{self.baseline.steps:>{width}}")
        return "\n".join(lines + [f"WARNING: {warning}" for warning in self.warnings])


def compare_runs(run: Path, baseline: Path) -> Comparison:
    """Read two run folders of `ssod train` (args.yaml and metrics.json) and hold the first against the second.

    Raises UserError where a folder is no finished run.
    """
    own, other = read_run(run), read_run(baseline)
    return Comparison(
        own,
        other,
        differences(own.final, other.final),
        differences(own.best, other.best),
        differences(own.per_class, other.per_class),
        doubts(own, other),
    )


def read_run(folder: Path) -> Run:
    """Raises UserError where the folder has no metrics.json of a finished training run."""
    folder = Path(folder)
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        settings = read_yaml(folder / "args.yaml")
        if wrong := flaw(Args, settings):
            raise UserError(f"{folder / 'args.yaml'} is not what a training run writes: {wrong}.")
        if flaw(Summary, metrics) is not None:
            raise TypeError
        history, best = metrics["history"], metrics["best"]
        at_best = next(h for h in history if h["step"] == best["step"])
        final, chosen = history[-1][best["use"]], at_best[best["use"]]
        if given := settings.get("teacher_weights"):  # what the run starts from, whichever way it was said
            settings["weights"] = given[0] if isinstance(given, list) else given
        counts = {key: int(metrics[key]) for key in COUNTS}
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        what = "there is no such folder" if not folder.is_dir() else f"it has no {missing}"
        raise UserError(
            f"{folder} is no finished training run: {what}. Give a folder such as runs/train/exp."
        ) from None
    except (KeyError, StopIteration, IndexError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{folder / 'metrics.json'} is not of a finished training run with a validation; give the folder of one."
        ) from None
    return Run(
        folder,
        named(settings.get("strategy", "?")),
        counts["steps"],
        best["use"],
        {key: final.get(key) for key in SHOWN},
        {key: chosen.get(key) for key in SHOWN},
        best["step"],
        dict(final["per_class"]),
        dict(chosen["per_class"]),
        history,
        settings,
        counts,
    )


def differences(own: Mapping[str, float | None], other: Mapping[str, float | None]) -> Figures:
    """own - other of every key of both, in the order of `own`; None where either has no number."""
    out: Figures = {}
    for key in [*own, *(k for k in other if k not in own)]:
        a, b = own.get(key), other.get(key)
        out[key] = None if a is None or b is None else a - b
    return out


def doubts(own: Run, other: Run) -> list[str]:
    """In what two runs differ that makes their difference say less about the strategy."""
    found = []
    if list(own.per_class) != list(other.per_class):
        found.append(f"other classes: {', '.join(own.per_class)} against {', '.join(other.per_class)}")
    for key, what in COUNTS.items():
        if own.counts[key] != other.counts[key]:
            found.append(f"{own.counts[key]} {what} against {other.counts[key]}")
    for what, keys in MATTERS.items():
        apart = [line for k in keys for line in _apart(k, own.settings.get(k), other.settings.get(k))]
        if apart:
            found.append(f"{what}: {'; '.join(apart)}")
    return [f"the two runs differ in more than the strategy, {one}." for one in found]


def _apart(key: str, own: Any, other: Any) -> list[str]:
    """ "imgsz=320 against 640"; of sections a line for each option that differs."""
    if isinstance(own, dict) and isinstance(other, dict):
        return [line for k in {**own, **other} for line in _apart(f"{key}.{k}", own.get(k), other.get(k))]
    return [] if own == other else [f"{key}={own} against {other}"]


def _shown(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
