"""The best network on the validation images: curves, the confusion matrix, and its worst mistakes as crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssod.report.charts import class_color, line_chart
from ssod.report.findings import (
    GRID,
    Curves,
    Findings,
    confusion,
    curves,
    match,
    worst_false_negatives,
    worst_false_positives,
)
from ssod.report.overview import class_lines
from ssod.report.pictures import crops

CROPS = 12  # of each kind of mistake
CLASSES = 20  # of a confusion matrix: those annotated most
PAIRS = 8  # of classes taken for each other


def validation_section(findings: Findings, paths: Sequence[Path] | None) -> dict[str, Any]:
    """What the template shows of `findings`; paths: of the images, None where they cannot be had."""
    matches = match(findings)
    found = curves(findings, matches)
    matrix = confusion(findings, found.best)
    out: dict[str, Any] = {
        "about": findings.about,
        "images": len(findings.images),
        "conf": found.best,
        "rows": [row | {"color": class_color(i)} for i, row in enumerate(found.table)],
        "charts": _charts(findings, found),
        "matrix": _matrix(findings.names, matrix),
        "pairs": _pairs(findings.names, matrix),
        "positives": [],
        "negatives": [],
    }
    if paths is not None:
        wrong = worst_false_positives(findings, matches, CROPS)
        missed = worst_false_negatives(findings, matches, found.best, CROPS)
        out["positives"] = crops(findings, paths, wrong, found.best)
        out["negatives"] = crops(findings, paths, missed, found.best)
    return out


def _charts(findings: Findings, found: Curves) -> list[Any]:
    names = findings.names
    grid = GRID.tolist()
    annotated = [i for i in range(len(names)) if not np.isnan(found.f1[i, 0])]
    mean = found.f1[annotated].mean(0).tolist() if annotated else []
    mark = [(found.best, f"best mean F1: {max(mean):.2f} at {found.best:.2f}")] if mean else []
    pr, pr_note = class_lines(names, {names[i]: (grid, found.precision[i].tolist()) for i in annotated})
    f1, f1_note = class_lines(names, {names[i]: (grid, found.f1[i].tolist()) for i in annotated})
    whole = (0.0, 1.0)
    return [
        line_chart("Precision over recall (IoU 0.5)", pr, x_name="recall", x_range=whole, y_range=whole, note=pr_note),
        line_chart(
            "F1 over the confidence", f1, marks=mark, x_name="confidence", x_range=whole, y_range=whole, note=f1_note
        ),
    ]


def _matrix(names: Sequence[str], matrix: np.ndarray) -> dict[str, Any]:
    """{"names", "rows": [{"name", "cells": [{"n", "share"}]}], "cut"}; share: of the row, 0..1."""
    k = len(names)
    order = sorted(np.argsort(-matrix[:k].sum(1), kind="stable")[:CLASSES].tolist()) if k > CLASSES else range(k)
    chosen = [*order, k]
    labels = [names[i] if i < k else "not annotated" for i in chosen]
    rows = []
    for i, name in zip(chosen, labels, strict=True):
        total = max(1, matrix[i].sum())
        cells = [{"n": int(matrix[i, j]), "share": float(matrix[i, j] / total), "same": i == j} for j in chosen]
        rows.append({"name": name, "cells": cells})
    return {"names": [*labels[:-1], "not found"], "rows": rows, "cut": k if k > CLASSES else 0}


def _pairs(names: Sequence[str], matrix: np.ndarray) -> list[tuple[str, str, int]]:
    """(annotated, found as, how often), most frequent first."""
    k = len(names)
    apart = [(int(matrix[i, j]), i, j) for i in range(k) for j in range(k) if i != j and matrix[i, j]]
    return [(names[i], names[j], n) for n, i, j in sorted(apart, key=lambda p: -p[0])[:PAIRS]]
