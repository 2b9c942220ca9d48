"""Does the certainty of a trained model tell how well its boxes sit, and do rare classes gain?

    python tests/bench/mechanism.py --data bccd.yaml --data-path DIR --models runs/bccd10/train/rpl-*/weights/last.pt
    ... --without runs/bccd10/train/rpl_no_gamma-*/weights/last.pt     # recall of each class, gammas on against off

For every model (one a seed), on a labelled split:
- rank correlation of class probability and localisation quality with the true IoU, of all detections and of those on an
  object (RPL: v; LER: s_loc, Fig. 3);
- precision of pseudo boxes at IoU 0.5, 0.75 and 0.9 when p, v or p*v ranks them and equally many are kept;
- the same for fixed thresholds, with what each keeps.
Brackets hold the middle 95 % of draws of whole images. All figures go to --out as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mechanism_stats import (
    ON_OBJECT,
    Interval,
    Judged,
    class_recall,
    correlations,
    hits,
    judge,
    most_certain,
    precision,
)

from ssod.data.samples import Dataset
from ssod.deploy.infer import Inference, detect
from ssod.deploy.predictor import load_detector
from ssod.detectors.base import Detector
from ssod.engine.evaluate import coco_metrics, coco_rows, coco_truth
from ssod.engine.setup import load_split
from ssod.errors import UserError

IOUS = (0.5, 0.75, 0.9)
TAUS = (0.5, 0.7, 0.9)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="data YAML, or shapes")
    parser.add_argument("--data-path")
    parser.add_argument("--split", default="val", choices=("train", "val", "test"))
    parser.add_argument("--models", nargs="+", required=True, type=Path, help="checkpoints of one setting, one a seed")
    parser.add_argument("--without", nargs="*", default=[], type=Path, help="the same seeds with gammas off")
    parser.add_argument("--network", default="teacher", help="which network's boxes are judged; recall: the student's")
    parser.add_argument("--conf", type=float, default=0.05, help="lowest score that is looked at")
    parser.add_argument("--out", type=Path, help="JSON with all figures")
    args = parser.parse_args()
    try:
        data = load_split(args.data, args.split, args.data_path, False)
        report: dict[str, Any] = {"split": args.split, "images": len(data.samples), "network": args.network}
        report["models"] = {str(path): about(judged_by(path, args.network, data, args.conf)[0]) for path in args.models}
        if args.without:
            report["classes"] = by_class(args.models, args.without, data, args.conf)
    except UserError as error:
        print(f"mechanism: {error}", file=sys.stderr)
        return 2
    print(f"{len(data.samples)} images of {args.split}, network: {args.network}\n")
    print(text(report))
    if args.out:
        args.out.write_text(json.dumps(plain(report), indent=1), encoding="utf-8")
    return 0


def judged_by(path: Path, network: str, data: Dataset, conf: float) -> tuple[Judged, dict[str, float]]:
    """A checkpoint's detections beside the truth, and AP of each class."""
    detector, content = load_detector(path, network)
    if content["names"] != data.names:
        raise UserError(f"{path} knows the classes {', '.join(content['names'])}, the data {', '.join(data.names)}.")
    how = Inference(imgsz=content["imgsz"], device=torch.device("cpu"), conf=conf)
    found = list(detect(detector, data.samples, how))
    per_class = coco_metrics(coco_truth(data.samples, data.names), coco_rows(found)).per_class
    return judge(found, data.samples, len(data.names), by_root(detector)), per_class


def by_root(detector: Detector) -> bool:
    """Whether the score is sqrt(p * quality)."""
    options: dict[str, Any] = detector.spec["options"]
    centerness = detector.spec["name"] == "fcos" and options["codec"] in ("l1", "giou")
    return bool(options.get("rank_by_quality") or centerness)


def about(judged: Judged) -> dict[str, Any]:
    everywhere, on_object = np.ones(len(judged.p), bool), judged.iou >= ON_OBJECT
    choices = judged.certainties()
    right = {name: {t: hits(judged, values, t) for t in IOUS} for name, values in choices.items()}
    equal, fixed = [], []
    for tau in TAUS:
        count = int((judged.p >= tau).sum())
        for name, values in choices.items():
            keep = most_certain(values, count)
            cells = {str(t): precision(judged, keep, right[name][t]) for t in IOUS}
            equal.append({"kept": count, "as_many_as_p_from": tau, "by": name, "precision": cells})
    choices = choices if judged.quality is None else choices | {"sqrt(p*v)": np.sqrt(judged.p * judged.quality)}
    for tau in TAUS[:2]:
        for name, values in choices.items():
            keep = values >= tau
            order = "p*v" if name == "sqrt(p*v)" else name
            cells = {str(t): precision(judged, keep, right[order][t]) for t in IOUS}
            found = (keep & right[order][0.5]).sum() / max(1, judged.truth.sum())
            per_image = keep.sum() / len(judged.truth)
            row = {"tau": tau, "by": name, "per_image": per_image, "recall50": found, "precision": cells}
            fixed.append(row)
    return {
        "detections": len(judged.p),
        "correlation": {
            "all": correlations(judged, everywhere),
            f"IoU >= {ON_OBJECT}": correlations(judged, on_object),
        },
        "equal_numbers": equal,
        "thresholds": fixed,
    }


def by_class(on: Sequence[Path], off: Sequence[Path], data: Dataset, conf: float) -> list[dict[str, Any]]:
    """Recall and AP of each class, rarest first, of the students trained with and without the gammas."""
    if len(on) != len(off):
        raise UserError(f"--models has {len(on)} checkpoints and --without {len(off)}; give the same seeds of both.")
    figures: dict[str, list[dict[str, np.ndarray]]] = {}
    for name, paths in (("on", on), ("off", off)):
        for path in paths:
            judged, per_class = judged_by(path, "student", data, conf)
            ap = np.array([per_class[n] for n in data.names])
            recalls = {"recall": class_recall(judged, 0.0), "recall from p 0.5": class_recall(judged, 0.5)}
            figures.setdefault(name, []).append(recalls | {"AP": ap})
            counts = judged.truth.sum(axis=0)
    rows = []
    for k in np.argsort(counts, kind="stable"):
        row: dict[str, Any] = {"class": data.names[k], "boxes": int(counts[k])}
        for measure in ("recall", "recall from p 0.5", "AP"):
            a, b = ([float(f[measure][k]) for f in figures[name]] for name in ("on", "off"))
            row[measure] = {"on": a, "off": b, "gain": [x - y for x, y in zip(a, b, strict=True)]}
        rows.append(row)
    return rows


def text(report: dict[str, Any]) -> str:
    """The report as Markdown tables: a row a model, then means over the models."""
    models: dict[str, Any] = report["models"]
    lines = ["| model | detections | over | p | v | v - p |", "|---|---|---|---|---|---|"]
    for name, m in models.items():
        for over, c in m["correlation"].items():
            cells = " | ".join(interval(c[k]) if k in c else "-" for k in ("p", "v", "v - p"))
            lines.append(f"| {short(name)} | {m['detections']} | {over} | {cells} |")
    if len(models) > 1:
        for over in next(iter(models.values()))["correlation"]:
            rows = [m["correlation"][over] for m in models.values()]
            shown = (spread([r[k][0] for r in rows], 1, 2) if k in rows[0] else "-" for k in ("p", "v", "v - p"))
            lines.append(f"| mean ± spread of {len(rows)} | | {over} | {' | '.join(shown)} |")
    lines += ["", f"| as many as p from | ranked by | kept | {' | '.join(f'precision at {t}' for t in IOUS)} |"]
    lines.append("|---|---|---|" + "---|" * len(IOUS))
    for rows in zip(*(m["equal_numbers"] for m in models.values()), strict=True):
        first, kept = rows[0], mean([r["kept"] for r in rows])
        lines.append(f"| {first['as_many_as_p_from']} | {first['by']} | {kept:.0f} | {precisions(rows)} |")
    lines += [
        "",
        f"| threshold | on | boxes an image | recall at 0.5 | {' | '.join(f'precision at {t}' for t in IOUS)} |",
    ]
    lines.append("|---|---|---|---|" + "---|" * len(IOUS))
    for rows in zip(*(m["thresholds"] for m in models.values()), strict=True):
        first = rows[0]
        cells = f"{mean([r['per_image'] for r in rows]):.1f} | {100 * mean([r['recall50'] for r in rows]):.1f}"
        lines.append(f"| {first['tau']} | {first['by']} | {cells} | {precisions(rows)} |")
    if "classes" in report:
        measures = ("recall", "recall from p 0.5", "AP")
        lines += ["", f"| class | boxes | {' | '.join(f'{m}: on, off, gain' for m in measures)} |"]
        lines.append("|---|---|" + "---|" * len(measures))
        for row in report["classes"]:
            cells = " | ".join(", ".join(spread(row[m][k]) for k in ("on", "off", "gain")) for m in measures)
            lines.append(f"| {row['class']} | {row['boxes']} | {cells} |")
    return "\n".join(lines) + "\n"


def precisions(rows: Sequence[dict[str, Any]]) -> str:
    """One model: value and interval; several: their mean and spread."""
    if len(rows) == 1:
        return " | ".join(interval(rows[0]["precision"][str(t)], 100, 1) for t in IOUS)
    return " | ".join(spread([r["precision"][str(t)][0] for r in rows]) for t in IOUS)


def interval(found: Interval, scale: float = 1, digits: int = 2) -> str:
    value, low, high = (scale * v for v in found)
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def spread(values: Sequence[float], scale: float = 100, digits: int = 1) -> str:
    known = [scale * v for v in values if math.isfinite(v)]
    if not known:
        return "-"
    about = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{about}"


def mean(values: Sequence[float]) -> float:
    return statistics.mean(values)


def short(path: str) -> str:
    """The run's name, for last.pt of a run folder; with the file's for another."""
    at = Path(path)
    run = at.parent.parent.name if at.parent.name == "weights" else ""
    return run if run and at.name == "last.pt" else f"{run} {at.name}".strip()


def plain(value: Any) -> Any:
    """For JSON: no NaN, no numpy."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
