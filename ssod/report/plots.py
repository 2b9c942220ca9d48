"""Pictures of a run: curves, and predictions beside annotations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ssod.data.draw import draw_boxes, fit, sheet
from ssod.data.image import read_image
from ssod.data.samples import Sample
from ssod.deploy.predictor import Predictor
from ssod.report.table import Table

matplotlib.use("Agg")  # files only: no display is needed
TILE = 320  # pixels, long side of a drawn image
NAMED = 10  # classes with a colour and a name in a plot
COLORS = {"student": "#1f6fb4", "teacher": "#d95f02", "sup": "#1f6fb4", "unsup": "#d95f02"}


def plot_run(folder: Path, table: Table, burn_in: int | None) -> Path:
    """results.png: losses, AP of student and teacher, and what the teacher taught. burn_in: its last step."""
    teaches = "pseudo/per_image" in table.columns
    figure = Figure(figsize=(15 if teaches else 10, 4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, 3 if teaches else 2))
    _losses(axes[0], table)
    _scores(axes[1], table)
    if teaches:
        _pseudo(axes[2], table)
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
        if burn_in is not None and burn_in > 0:
            ax.axvline(burn_in, color="gray", linestyle=":", linewidth=1, label="end of burn-in")
        ax.legend(fontsize=8)
    path = folder / "results.png"
    figure.savefig(path, dpi=110)
    return path


def plot_by_class(folder: Path, history: Sequence[dict[str, Any]]) -> Path | None:
    """by_class.png: a curve a class for each of the numbers that a strategy keeps by class; None where it keeps none.

    history  one entry a validation, of them those with "by_class": {number: {class: value}}
    """
    entries = [h for h in history if "by_class" in h]
    if not entries:
        return None
    last: dict[str, dict[str, float]] = entries[-1]["by_class"]
    steps = [h["step"] for h in entries]
    first = next(iter(last.values()))
    order = sorted(first, key=first.__getitem__, reverse=True)
    named = order if len(order) <= NAMED else [*order[: NAMED // 2], *order[-(NAMED // 2) :]]
    figure = Figure(figsize=(4.5 * len(last) + 1.5, 4), layout="constrained")
    axes: list[Axes] = list(figure.subplots(1, len(last), squeeze=False)[0])
    for ax, number in zip(axes, last, strict=True):
        for name in order:
            values = [h["by_class"][number][name] for h in entries]
            if name in named:
                ax.plot(steps, values, marker=".", label=name, color=f"C{named.index(name)}")
            else:
                ax.plot(steps, values, color="lightgray", linewidth=1, zorder=0)
        if max(last[number].values()) > 10 * min(last[number].values()):
            ax.set_yscale("symlog", linthresh=0.1)
        ax.set_title(f"{number} by class")
        ax.set_xlabel("step")
        ax.grid(alpha=0.3)
    lines, labels = axes[0].get_legend_handles_labels()
    title = "classes" if named is order else f"of {len(order)} classes the\n{NAMED // 2} highest, {NAMED // 2} lowest"
    figure.legend(lines, labels, loc="outside right upper", fontsize=8, title=title)
    path = folder / "by_class.png"
    figure.savefig(path, dpi=110)
    return path


def _losses(ax: Axes, table: Table) -> None:
    for kind, label in (("sup", "labelled images"), ("unsup", "unlabelled images")):
        names = [c for c in table.columns if c.startswith(f"{kind}/")]
        if names:
            series = [table.series(n) for n in names]
            steps = series[0][0]
            ax.plot(steps, np.sum([v for _, v in series], axis=0), color=COLORS[kind], label=label)
    ax.set_title("loss")
    ax.set_ylim(bottom=0)


def _scores(ax: Axes, table: Table) -> None:
    for name in ("student", "teacher"):
        for figure, style in (("AP", "-"), ("AP50", "--")):
            steps, values = table.series(f"val/{name}/{figure}")
            if steps:
                ax.plot(steps, values, style, marker=".", color=COLORS[name], label=f"{name} {figure}")
    ax.set_title("validation")
    ax.set_ylim(bottom=0)


def _pseudo(ax: Axes, table: Table) -> None:
    ax.plot(*table.series("pseudo/per_image"), color=COLORS["unsup"], label="pseudo boxes an image")
    ax.plot(*table.series("pseudo/labeled_per_image"), color=COLORS["sup"], label="annotated boxes an image")
    ax.set_title("what the teacher draws")
    ax.set_ylim(bottom=0)
    tau = ax.twinx()
    tau.plot(*table.series("pseudo/tau"), color="gray", linewidth=1)
    tau.set_ylabel("mean threshold (gray)")
    tau.set_ylim(0, 1)


def draw_predictions(path: Path, model: Path, samples: Sequence[Sample], conf: float = 0.3) -> Path:
    """A sheet of images: predictions with scores, annotations dashed without captions."""
    predictor = Predictor(model, device="cpu", conf=conf)
    tiles, titles = [], []
    by_path = {str(s.path): s for s in samples}
    for result in predictor([str(s.path) for s in samples]):
        sample = by_path[str(result.path)]
        image, scale = fit(read_image(sample.path), TILE)
        image = draw_boxes(image, sample.boxes * scale, sample.labels.tolist(), [""] * len(sample.boxes), dashed=True)
        captions = [f"{r['name']} {r['confidence']:.2f}" for r in result.summary()]
        titles.append(f"{sample.path.name}: {len(sample.boxes)} annotated (dashed), {len(result)} predicted")
        tiles.append(draw_boxes(image, result.boxes.xyxy.numpy() * scale, result.boxes.cls.tolist(), captions))
    Image.fromarray(sheet(tiles, titles)).save(path)
    return path
