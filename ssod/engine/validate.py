"""`ssod val`: a model of any format on a split of a data set, scored and written down."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.samples import Sample
from ssod.deploy.asked import asked
from ssod.deploy.exported import load_model
from ssod.engine.evaluate import coco_metrics, coco_rows, coco_truth, detect
from ssod.engine.run import new_run, unlock_run
from ssod.engine.setup import load_split
from ssod.engine.voc_metric import voc_metrics
from ssod.errors import UserError
from ssod.modes import ValConfig


@dataclass(frozen=True)
class Validation:
    """What a model scores on a split. All figures lie in 0 .. 1, NaN where no box of that kind exists.

    figures     "AP", "AP50", "AP75", ... of COCO and, of Pascal VOC data, those of VOC beside them
    per_class   {class: AP}; voc  {class: VOC's AP50}, empty for other data
    unreadable  (path, reason) of images that counted as without detections
    folder      the run folder, with metrics.json
    """

    figures: dict[str, float]
    per_class: dict[str, float]
    images: int
    detections: int
    folder: Path
    voc: dict[str, float] = field(default_factory=dict)
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def ap(self) -> float:
        """COCO's AP: the mean over IoU 0.5 .. 0.95 and classes."""
        return self.figures["AP"]

    def text(self) -> str:
        lines = ["  ".join(f"{k} {v:.4f}" for k, v in self.figures.items())]
        for name, ap in self.per_class.items():
            lines.append(f"  {name:<20} AP {ap:.4f}" + (f"  VOC_AP50 {self.voc[name]:.4f}" if self.voc else ""))
        lines.append(f"{self.images} images, {self.detections} detections; run folder {self.folder}")
        return "\n".join(lines)


def validate(config: ValConfig, say: Callable[[str], None] = print) -> Validation:
    """Score `config.model` on `config.split` and write metrics.json (and detections.json) into a run folder.

    Raises UserError for a model or data that cannot be used, and where their classes differ.
    """
    model = load_model(config.model, config.weights, config.device)
    data = load_split(config.data, config.split, config.data_path, config.strict)
    if model.names != data.names:
        raise UserError(
            f"the model knows the classes {', '.join(model.names)} and the data {', '.join(data.names)}. "
            "Give data with the model's classes."
        )
    wanted = asked(model.card, model.path, **config.given_limits(), default_conf=config.conf)
    how = model.how(wanted, config.imgsz, config.batch, config.workers)
    say(data.summary())
    if wanted.conf > config.conf:
        _warn(f"{model.path} gives no score below {wanted.conf:g}, so AP is lower than it would be.")
    bad: list[tuple[str, str]] = []
    rows = coco_rows(detect(model.detector, data.samples, how, bad))
    for path, reason in bad:
        _warn(f"{path} cannot be read ({reason}); it counts as without detections.")
    metrics = coco_metrics(coco_truth(data.samples, data.names), rows)
    figures, by_class = metrics.figures, {}
    report: dict[str, Any] = {"figures": figures, "per_class": metrics.per_class}
    if config.metric == "voc" or (config.metric == "auto" and data.format == "VOC"):
        voc = voc_metrics(data.samples, data.names, rows)
        figures, by_class = figures | voc.figures, voc.per_class
        report |= {"figures": figures, "voc": by_class}
    folder = new_run(config.project, "val", config.name, config.exist_ok)
    try:
        (folder / "metrics.json").write_text(json.dumps(report))
        if config.save_json:
            (folder / "detections.json").write_text(json.dumps(_coco_results(rows, data.samples)))
    finally:
        unlock_run(folder)
    return Validation(figures, metrics.per_class, metrics.images, metrics.detections, folder, by_class, bad)


def _warn(text: str) -> None:
    print(f"ssod: {text}", file=sys.stderr)


def _coco_results(rows: np.ndarray, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Detections in COCO results format, with the image ids of the data set."""
    return [
        {
            "image_id": samples[int(r[0]) - 1].image_id,
            "file_name": samples[int(r[0]) - 1].path.name,
            "category_id": int(r[6]),
            "bbox": [round(v, 3) for v in r[1:5]],
            "score": round(r[5], 5),
        }
        for r in rows.tolist()
    ]
