"""Several runs on one page: what each was and reached, their curves together, AP by class, the options that differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ssod.report.charts import Line, class_color, line_chart
from ssod.report.overview import COLORS, word
from ssod.report.page import render
from ssod.report.run import Run, differences

FIGURES = ("AP", "AP50", "AP75")
DASHES = ("", "6 3", "2 3", "10 3 2 3")
COLOURED = 12  # runs with a colour of their own in the charts: the best ones
NOT_COMPARED = ("project", "name", "exist_ok", "resume", "verbose", "plots")


def write_comparison(runs: Sequence[Run], out: Path) -> Path:
    """Write the page of several runs to `out`, the best AP first; a run without a validation comes last."""
    names = _names(runs)
    order = sorted(range(len(runs)), key=lambda i: -(_best(runs[i]).get("AP") or 0))
    runs, names = [runs[i] for i in order], [names[i] for i in order]
    context = {
        "title": f"{len(runs)} runs",
        "folder": str(out.resolve().parent),
        "rows": [_row(run, name, i) for i, (run, name) in enumerate(zip(runs, names, strict=True))],
        "figures": FIGURES,
        "charts": _charts(runs, names),
        "classes": _classes(runs, names),
        "options": _options(runs),
        "names": names,
        "damaged": [f"{name}: {text}" for run, name in zip(runs, names, strict=True) for text in run.damaged],
    }
    return render("many.html", context, out)


def _names(runs: Sequence[Run]) -> list[str]:
    """Folder names, with their parents where two are the same."""
    names = [r.name for r in runs]
    return [
        n if names.count(n) == 1 else str(Path(*r.folder.resolve().parts[-3:]))
        for n, r in zip(names, runs, strict=True)
    ]


def _best(run: Run) -> dict[str, Any]:
    best = run.best()
    return {} if best is None else {**best[2], "network": best[0], "step": best[1]}


def _row(run: Run, name: str, place: int) -> dict[str, Any]:
    best = _best(run)
    return {
        "name": name,
        "color": _color(place),
        "strategy": run.strategy,
        "detector": run.detector,
        "labels": run.summary.get("labeled", run.args.get("labeled")),
        "unlabeled": run.summary.get("unlabeled"),
        "seed": run.args.get("seed"),
        "steps": run.steps,
        "finished": bool(run.summary),
        "best": best,
        "figures": [best.get(f) for f in FIGURES],
        "minutes": run.minutes(),
        "alarms": len(run.diagnosis),
    }


def _color(place: int) -> str:
    return class_color(place) if place < COLOURED else "var(--soft)"


def _charts(runs: Sequence[Run], names: Sequence[str]) -> list[Markup]:
    """AP of student and teacher apart, a curve a run."""
    out = []
    for network in COLORS:
        lines = [
            Line(n, *r.scores(network), _color(i), DASHES[i // 3 % len(DASHES)], faint=i >= COLOURED, dots=i < COLOURED)
            for i, (r, n) in enumerate(zip(runs, names, strict=True))
        ]
        note = f"The {COLOURED} best of {len(runs)} runs have names." if len(runs) > COLOURED else ""
        out.append(line_chart(f"AP of the {network}", lines, close=True, note=note))
    return [c for c in out if c]


def _classes(runs: Sequence[Run], names: Sequence[str]) -> dict[str, Any] | None:
    """AP of each class at the best validation: {"names", "rows": [{"name", "values"}]}; None where no run has it."""
    by_run = [_best(r).get("per_class") or {} for r in runs]
    classes = list(dict.fromkeys(c for one in by_run for c in one))
    if not classes:
        return None
    rows = []
    for name in classes:
        values = [one.get(name) for one in by_run]
        top = max((v for v in values if v is not None), default=None)
        rows.append({"name": name, "cells": [{"v": v, "top": v is not None and v == top} for v in values]})
    return {"names": list(names), "rows": rows}


def _options(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Options that are not the same in all runs: {"key", "values"}, None where a run has the default."""
    own = [differences({k: v for k, v in r.args.items() if k not in NOT_COMPARED}) for r in runs]
    keys = list(dict.fromkeys(k for one in own for k in one))
    rows = []
    for key in keys:
        values = [word(one[key]) if key in one else None for one in own]
        if len(set(values)) > 1:
            rows.append({"key": key, "values": values})
    return rows
