"""COCO metrics of a detector on a list of samples. The reference is pycocotools; where faster-coco-eval is
installed (extra `fast`) it computes the same twelve figures several times faster."""

from __future__ import annotations

import contextlib
import gc
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssod import dist
from ssod.data.samples import Sample
from ssod.deploy.exported import Exported
from ssod.deploy.infer import Inference, detect
from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.structures import Instances

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass
class Metrics:
    """figures: FIGURES in 0..1, NaN where no box of that kind exists; per_class: AP of each class, likewise."""

    figures: dict[str, float]
    per_class: dict[str, float]
    images: int
    detections: int

    @property
    def ap(self) -> float:
        return self.figures["AP"]


def coco_truth(samples: Sequence[Sample], names: Sequence[str]) -> dict[str, Any]:
    """Annotations as a COCO dictionary; ids count from 1, since pycocotools takes id 0 for "no match"."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, s in enumerate(samples):
        images.append({"id": index + 1, "width": s.width, "height": s.height, "file_name": s.path.name})
        x1, y1, x2, y2 = s.boxes.T
        areas = s.areas if s.areas is not None else (x2 - x1) * (y2 - y1)
        rows = (s.boxes.tolist(), s.labels.tolist(), s.crowd.tolist(), areas.tolist())
        for (left, top, right, bottom), label, crowd, area in zip(*rows, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
    categories = [{"id": i + 1, "name": n} for i, n in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_rows(found: Iterable[tuple[int, Instances]]) -> np.ndarray:
    """Detections as float64 rows [M, 7]: image id, x, y, w, h, score, category id."""
    rows = [np.zeros((0, 7))]
    for index, d in found:
        assert d.scores is not None
        boxes = d.boxes.double().numpy()
        size = boxes[:, 2:] - boxes[:, :2]
        ids = np.full((len(d), 1), index + 1.0)
        rows.append(
            np.hstack([ids, boxes[:, :2], size, d.scores.double().numpy()[:, None], d.labels.numpy()[:, None] + 1.0])
        )
    return np.concatenate(rows)


def coco_metrics(truth: dict[str, Any], rows: np.ndarray, backend: str | None = None) -> Metrics:
    """The twelve COCO figures and AP per class. backend: "pycocotools", "faster" or None (the fastest installed).

    With no detections every figure is 0 (NaN where nothing is annotated).
    Raises UserError for a score or box that is not finite: pycocotools would rank NaN first and score AP 1.0.
    """
    if not np.isfinite(rows).all():
        bad = int((~np.isfinite(rows).all(1)).sum())
        raise UserError(
            f"{bad} of {len(rows)} detections have a score or box that is not finite: the network has diverged. "
            "Start again from an earlier checkpoint with a lower lr0."
        )
    names = [c["name"] for c in truth["categories"]]
    coco_class, eval_class = _backend(backend)
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()), _without_collector():
        if len(rows) == 0:
            return _nothing_found(truth, names)
        ev = eval_class(_indexed(coco_class, truth), _indexed(coco_class, _results(truth, rows)), "bbox")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    stats = [float("nan") if s < 0 else float(s) for s in ev.stats[:12]]
    precision = ev.eval["precision"]  # [IoU, recall, class, area, maxDets]
    per_class = {}
    for k, name in enumerate(names):
        p = precision[:, :, k, 0, -1]
        per_class[name] = float(p[p > -1].mean()) if (p > -1).any() else float("nan")
    return Metrics(dict(zip(FIGURES, stats, strict=True)), per_class, len(truth["images"]), len(rows))


def _indexed(coco_class: Any, dataset: dict[str, Any]) -> Any:
    coco = coco_class()
    coco.dataset = dataset
    coco.createIndex()
    return coco


def _results(truth: dict[str, Any], rows: np.ndarray) -> dict[str, Any]:
    """What `loadRes(rows)` would hold for boxes: it takes row after row out of the array, number by number, and draws a
    polygon around each box, which took a quarter of an evaluation."""
    image_ids, category_ids = rows[:, 0].astype(int).tolist(), rows[:, 6].astype(int).tolist()
    boxes, areas, scores = rows[:, 1:5].tolist(), (rows[:, 3] * rows[:, 4]).tolist(), rows[:, 5].tolist()
    annotations = [
        {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "score": score, "iscrowd": 0}
        for i, (image, category, box, area, score) in enumerate(
            zip(image_ids, category_ids, boxes, areas, scores, strict=True), start=1
        )
    ]
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """The garbage collector would look again and again through a million dictionaries that hold no cycle: a quarter of
    the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _backend(name: str | None) -> tuple[Any, Any]:
    if name != "pycocotools":
        try:
            from faster_coco_eval import COCO, COCOeval_faster

            return COCO, COCOeval_faster
        except ImportError:
            if name == "faster":
                raise UserError("faster-coco-eval is not installed: pip install 'ssod[fast]'.") from None
    from pycocotools.coco import COCO as Reference
    from pycocotools.cocoeval import COCOeval

    return Reference, COCOeval


def _nothing_found(truth: dict[str, Any], names: list[str]) -> Metrics:
    present = {a["category_id"] for a in truth["annotations"] if not a["iscrowd"]}
    per_class = {n: 0.0 if i + 1 in present else float("nan") for i, n in enumerate(names)}
    figures = dict.fromkeys(FIGURES, 0.0 if present else float("nan"))
    for suffix, low, high in (("s", 0, 32**2), ("m", 32**2, 96**2), ("l", 96**2, 1e10)):
        if not any(low <= a["area"] <= high and not a["iscrowd"] for a in truth["annotations"]):
            figures["AP" + suffix] = figures["AR" + suffix] = float("nan")
    return Metrics(figures, per_class, len(truth["images"]), 0)


def evaluate(
    detector: Detector | Exported,
    samples: Sequence[Sample],
    names: Sequence[str],
    how: Inference,
    bad: list[tuple[str, str]] | None = None,
) -> Metrics:
    """Detect on `samples` and score against their annotations, in source image pixels.

    An image that cannot be read counts as one without detections; `bad` receives its (path, reason). Of several ranks
    each looks at its share of the images; all have the result.

    Raises UserError when the detector has another number of classes (pycocotools would score -1), or is not finite.
    """
    if detector.num_classes != len(names):
        raise UserError(
            f"the model knows {detector.num_classes} classes and the data have {len(names)} ({', '.join(names)})."
        )
    rows = detections(detector, samples, how, bad)
    return dist.from_main(lambda: coco_metrics(coco_truth(samples, names), rows))


def detections(
    detector: Detector | Exported,
    samples: Sequence[Sample],
    how: Inference,
    bad: list[tuple[str, str]] | None = None,
) -> np.ndarray:
    """Rows of `coco_rows` of all samples, on every rank; each rank has looked at its share of them."""
    own = range(dist.rank(), len(samples), dist.world())
    unread: list[tuple[str, str]] = []
    found = detect(detector, [samples[i] for i in own] if dist.world() > 1 else samples, how, unread)
    parts = dist.gather((coco_rows((own[i], d) for i, d in found), unread))
    if bad is not None:
        bad += [b for _, more in parts for b in more]
    return np.concatenate([r for r, _ in parts])
