"""COCO evaluation of drawn detections: ours (`ssod.engine.evaluate`) against pycocotools alone.

    python tests/bench/bench_eval.py [--images 5000] [--classes 80] [--per-image 100] [--rounds 3]

The same annotations and the same detections, made before the clock starts: pycocotools gets the dictionary and the rows
that its own `loadRes` takes, and ours what `evaluate` gives it, with whatever is installed. Both alternate in one
process; medians of its CPU time. The twelve figures have to be the same.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
from common import Row, alternate, arguments, finish, head

from ssod.engine.evaluate import FIGURES, coco_metrics

GOAL = 0.13
WIDTH, HEIGHT = 640, 480


def truth(images: int, classes: int, rng: np.random.Generator) -> dict[str, Any]:
    """About seven boxes an image, as COCO has, a few of them crowds."""
    annotations: list[dict[str, Any]] = []
    for image in range(1, images + 1):
        for _ in range(int(rng.poisson(7))):
            side = rng.uniform(8, 240, 2)
            x, y = rng.uniform(0, [WIDTH - 8, HEIGHT - 8])
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": int(rng.integers(classes)) + 1,
                    "bbox": [x, y, *side.tolist()],
                    "area": float(side.prod()),
                    "iscrowd": int(rng.random() < 0.01),
                }
            )
    shapes = [{"id": i + 1, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"} for i in range(images)]
    names = [{"id": k + 1, "name": f"class {k}"} for k in range(classes)]
    return {"images": shapes, "annotations": annotations, "categories": names}


def found(truth: dict[str, Any], classes: int, per_image: int, rng: np.random.Generator) -> np.ndarray:
    """Rows [M, 7] of image, x, y, w, h, score, class: every object once, moved a little, and other boxes beside."""
    own = np.array([[a["image_id"], *a["bbox"], 0, a["category_id"]] for a in truth["annotations"]], np.float64)
    own[:, 1:5] *= rng.normal(1, 0.08, (len(own), 4))
    count = max(0, per_image * len(truth["images"]) - len(own))
    other = np.zeros((count, 7))
    other[:, 0] = rng.integers(len(truth["images"]), size=count) + 1
    other[:, 1:3] = rng.uniform(0, [WIDTH - 8, HEIGHT - 8], (count, 2))
    other[:, 3:5] = rng.uniform(8, 240, (count, 2))
    other[:, 6] = rng.integers(classes, size=count) + 1
    own[:, 5], other[:, 5] = rng.beta(4, 2, len(own)), rng.beta(1, 4, count)
    return np.concatenate([own, other])


def pycocotools_alone(truth: dict[str, Any], rows: np.ndarray) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = truth
        gt.createIndex()
        ev = COCOeval(gt, gt.loadRes(rows), "bbox")
        ev.evaluate()
        ev.accumulate()
        ev.summarize()
    return [float(s) for s in ev.stats]


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--per-image", type=int, default=100, help="detections an image")
    args = parser.parse_args()
    if args.quick:
        args.images, args.per_image = 60, 20
    rng = np.random.default_rng(0)
    annotated = truth(args.images, args.classes, rng)
    rows = found(annotated, args.classes, args.per_image, rng)
    head(
        args, "pycocotools", "faster-coco-eval", what=f"{args.images} images, {args.classes} classes, {len(rows)} boxes"
    )
    figures: dict[str, list[float]] = {}

    def ours() -> None:
        metrics = coco_metrics(annotated, rows)
        figures["ours"] = [metrics.figures[n] for n in FIGURES]

    def theirs() -> None:
        figures["theirs"] = pycocotools_alone(annotated, rows)

    times = alternate({"ours": ours, "theirs": theirs}, args)
    assert np.allclose(figures["ours"], figures["theirs"], atol=1e-12), figures
    finish([Row("COCO evaluation / pycocotools", times["ours"], times["theirs"], GOAL)], args)


if __name__ == "__main__":
    main()
