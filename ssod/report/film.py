"""The film of pseudo labels: the same unlabelled images at each recorded step, and pairs of weak and strong views.

The boxes go into the page as numbers, which its script draws over the thumbnails; the last step is drawn beforehand, so
that a page without script has it, too.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ssod.report.charts import hue
from ssod.report.pictures import Picture, embed_file, rectangle
from ssod.report.sound import Record, flaw

FRAMES = 24  # recorded steps in a page, at most
IMAGES = 16
KEPT, DROPPED = 60, 25  # boxes of an image at a step, at most, the surest first
PAIRS = 12
THUMB, PAIR = 320, 720  # pixels, the longest side in the page
BINS = 20  # of a score histogram


@dataclass
class Film:
    """steps: recorded, rising; images: thumbnails with the boxes of the last step; data: what the script draws.

    counts      a (step, kept, dropped) each, with the boxes that the files only count
    scores      {class: bins (low, high, n, kept)} at the last step; taus: {class: threshold} then
    notes       sentences about what was left out
    """

    steps: list[int]
    images: list[Picture]
    data: dict[str, Any]
    counts: list[tuple[int, int, int]]
    scores: dict[str, list[tuple[float, float, int, int]]]
    taus: dict[str, float]
    notes: list[str]


def read_film(folder: Path) -> Film | None:
    """The film in a run's folder `pseudo`; None where there is none that can be read."""
    notes: list[str] = []
    records, left_out = _records(folder)
    if left_out:
        notes.append(f"Could not be read and left out: {', '.join(left_out)}.")
    if not records:
        return None
    counts = [(r["info"]["step"], *_count(r)) for r in records]
    if len(records) > FRAMES:
        notes.append(f"{FRAMES} of {len(records)} recorded steps are shown.")
        records = [records[round(i * (len(records) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    last = records[-1]
    names = {c["id"]: str(c["name"]) for c in last["categories"]}
    order = {cid: i for i, cid in enumerate(names)}
    images, frames, totals, cut, reasons = [], [], [], 0, dict[str, int]()
    for image in last["images"][:IMAGES]:
        thumb = embed_file(folder / "images" / f"{image['id']}.jpg", THUMB)
        if thumb is None:
            notes.append(f"The thumbnail of {image['file_name']} cannot be read.")
            continue
        per_step, sums = [], []
        for record in records:
            boxes, kept, dropped = _boxes(record, image["id"])
            cut += kept + dropped - len(boxes)
            per_step.append([_packed(a, order, reasons) for a in boxes])
            sums.append((kept, dropped))
        frames.append(per_step)
        totals.append(sums)
        images.append(_picture(image, thumb[0], boxes, sums[-1], order, names))
    if cut:
        notes.append(
            f"Of an image at most the {KEPT} surest kept and {DROPPED} surest dropped boxes are drawn; all are counted."
        )
    if less := sum(_left_out(last).values()):
        notes.append(f"Scores at step {last['info']['step']} are without {less} dropped boxes, the least sure ones.")
    data = {
        "steps": [r["info"]["step"] for r in records],
        "names": list(names.values()),
        "hues": [hue(i) for i in range(len(names))],
        "reasons": list(reasons),
        "images": frames,
        "totals": totals,
    }
    return Film(data["steps"], images, data, counts, _histograms(last, names), _taus(last, names), notes)


def _records(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    out, left_out = [], []
    for path in sorted(folder.glob("step*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            record = None
        if flaw(Record, record) is not None or not _fits(record):
            left_out.append(path.name)
        else:
            out.append(record)
    return sorted(out, key=lambda r: int(r["info"]["step"])), left_out


def _fits(record: dict[str, Any]) -> bool:
    """Whether every box is of a class and an image that the record has, once each."""
    classes, images = ([entry["id"] for entry in record[k]] for k in ("categories", "images"))
    once = len(set(classes)) == len(classes) > 0 and len(set(images)) == len(images)
    return once and all(a["category_id"] in classes and a["image_id"] in images for a in record["annotations"])


def _count(record: dict[str, Any]) -> tuple[int, int]:
    kept = sum(bool(a["kept"]) for a in record["annotations"])
    return kept, len(record["annotations"]) - kept + sum(_left_out(record).values())


def _left_out(record: dict[str, Any]) -> dict[int, int]:
    """{image id: dropped boxes that the file counts and does not hold}."""
    return {i["id"]: int(i.get("left_out", 0)) for i in record["images"]}


def _boxes(record: dict[str, Any], image: int) -> tuple[list[dict[str, Any]], int, int]:
    """The boxes of an image worth drawing, dropped ones first so that kept ones lie above; how many were kept and
    dropped in all."""
    own = sorted((a for a in record["annotations"] if a["image_id"] == image), key=lambda a: -(a.get("score") or 0))
    kept, dropped = [a for a in own if a["kept"]], [a for a in own if not a["kept"]]
    return [*dropped[:DROPPED], *kept[:KEPT]], len(kept), len(dropped) + _left_out(record).get(image, 0)


def _packed(a: dict[str, Any], order: dict[int, int], reasons: dict[str, int]) -> list[float | int]:
    """x, y, w, h, class, score in percent, kept, reason: numbers for the script."""
    reason = reasons.setdefault(str(a.get("reason") or ""), len(reasons))
    box = [round(v, 1) for v in a["bbox"]]
    return [*box, order[a["category_id"]], round(100 * (a.get("score") or 0)), int(a["kept"]), reason]


def _picture(
    image: dict[str, Any],
    url: str,
    boxes: list[dict[str, Any]],
    total: tuple[int, int],
    order: dict[int, int],
    names: dict[int, str],
) -> Picture:
    drawn = []
    for a in boxes:
        x, y, w, h = a["bbox"]
        title = f"{names[a['category_id']]} {a.get('score') or 0:.2f}: {a.get('reason') or ''}"
        kind = "solid" if a["kept"] else "dashed"
        drawn.append(rectangle((x, y, x + w, y + h), order[a["category_id"]], kind, title))
    name = str(image["file_name"]).rsplit("/", 1)[-1]
    alt = f"{name}: {total[0]} pseudo boxes kept, {total[1]} dropped at the last recorded step"
    return Picture(url, image["width"], image["height"], alt, name, "", Markup("".join(drawn)))


def _histograms(record: dict[str, Any], names: dict[int, str]) -> dict[str, list[tuple[float, float, int, int]]]:
    out = {}
    for cid, name in names.items():
        own = [a for a in record["annotations"] if a["category_id"] == cid and a.get("score") is not None]
        bins = [[0, 0] for _ in range(BINS)]
        for a in own:
            slot = bins[min(BINS - 1, int(a["score"] * BINS))]
            slot[0] += 1
            slot[1] += bool(a["kept"])
        if own:
            out[name] = [(i / BINS, (i + 1) / BINS, n, kept) for i, (n, kept) in enumerate(bins)]
    return out


def _taus(record: dict[str, Any], names: dict[int, str]) -> dict[str, float]:
    tau = record["info"].get("tau")
    if isinstance(tau, dict):
        return {k: v for k, v in tau.items() if v is not None}
    return {} if tau is None else dict.fromkeys(names.values(), float(tau))


def read_pairs(folder: Path) -> list[Picture]:
    """Weak and strong views side by side: PAIRS of them, spread over the recorded steps, the last one among them."""
    by_step: dict[int, list[Path]] = {}
    for path in sorted((folder / "views").glob("step*-*.jpg")):
        if found := re.fullmatch(r"step(\d+)-(\d+)", path.stem):
            by_step.setdefault(int(found[1]), []).append(path)
    steps = sorted(by_step)
    if not steps:
        return []
    each = min(3, max(len(found) for found in by_step.values()))  # of a step, so that there are several steps
    wanted = min(len(steps), PAIRS // each)
    chosen = [steps[round((i + 1) * len(steps) / wanted) - 1] for i in range(wanted)]
    out = []
    for step, path in chain.from_iterable([(s, p) for p in by_step[s][:each]] for s in chosen):
        if (read := embed_file(path, PAIR)) is not None:
            url, width, height = read
            alt = f"step {step}: the teacher's weak view with its boxes, and the student's strong view beside it"
            out.append(Picture(url, width, height, alt, f"step {step}"))
    return out
