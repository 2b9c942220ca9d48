"""The doctor's report as one page of text, or as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from ssod.data.check.doctor import Report, SplitReport
from ssod.data.check.findings import LEVELS, Finding, findings

_EXAMPLES = 3  # of every finding; JSON holds all
_CLASSES = 20  # more are shown by their ends

# COCO's ranges of box areas in pixels
_SMALL, _MEDIUM = 32**2, 96**2
_SIZES = {"small": (0, _SMALL), "medium": (_SMALL, _MEDIUM), "large": (_MEDIUM, np.inf)}


def passed(report: Report, strict: bool = False) -> bool:
    """False where there is an error, or with `strict` where there is a warning."""
    levels = {finding.level for finding in findings(report)}
    return "error" not in levels and not (strict and "warning" in levels)


def page(report: Report) -> str:
    """The report for a terminal: findings worst first, then the numbers, then the verdict."""
    found = findings(report)
    parts = [f"Data {report.yaml}, in {report.root}", *map(_finding, found)]
    if report.splits:
        parts.append(_table(_numbers(report)))
    if any(r.labeled for r in report.splits.values()):
        parts.append(_table(_classes(report)))
    return "\n\n".join([*parts, _verdict(report, found)]) + "\n"


def _finding(finding: Finding) -> str:
    lines = [f"{finding.level.upper():<8} {finding.split}: {finding.what}"]
    lines += [f"         {place}" for place in finding.where[:_EXAMPLES]]
    if len(finding.where) > _EXAMPLES:
        lines.append(f"         and {len(finding.where) - _EXAMPLES} more (json=true lists all)")
    if finding.fix:
        lines.append(f"      -> {finding.fix}")
    return "\n".join(lines)


def _numbers(report: Report) -> list[list[str]]:
    """Rows of cells, a column a split."""
    reports = list(report.splits.values())

    def row(title: str, cell: Callable[[SplitReport], str]) -> list[str]:
        return [title, *(cell(r) if r.labeled else "-" for r in reports)]

    rows = [["", *report.splits], ["format", *(r.dataset.format for r in reports)]]
    rows.append(["images", *(str(len(r.dataset)) for r in reports)])
    rows.append(["  commonest size", *(_commonest(r) for r in reports)])
    rows.append(["  long side", *(_spread([max(size) for size in r.sizes]) for r in reports)])
    if any(r.partial for r in reports):
        rows.append(row("  partly labelled", lambda r: str(r.partial)))
    rows.append(row("  without boxes", lambda r: str(len(r.empty))))
    if not all(r.labeled for r in reports):
        rows.append(["  labels, never read", *("-" if r.labeled else str(r.hidden or "none") for r in reports)])
    rows.append(row("boxes", lambda r: str(len(r.sides))))
    if any(r.crowd for r in reports):
        rows.append(row("  crowd, besides", lambda r: str(r.crowd)))
    rows.append(row("  an image, mean", lambda r: f"{r.per_image.mean():.1f}"))
    rows.append(row("  an image, most", lambda r: str(r.per_image.max())))
    rows.append(row("  at the border", lambda r: f"{100 * r.touching / len(r.sides):.0f} %"))
    for title, (low, high) in _SIZES.items():
        rows.append(row(f"  {title}", lambda r, low=low, high=high: f"{100 * _share(r, low, high):.0f} %"))  # type: ignore[misc]
    for title, q in (("box side, 5 % below", 0.05), ("  half below", 0.5), ("  95 % below", 0.95)):
        rows.append(
            row(title, lambda r, q=q: f"{np.quantile(r.sides, q):.0f} px, {100 * np.quantile(r.relative, q):.0f} %")  # type: ignore[misc]
        )
    return rows


def _commonest(report: SplitReport) -> str:
    (size, count), *others = report.sizes.most_common()
    return f"{size[0]}x{size[1]}" + (f" ({100 * count / len(report.dataset):.0f} %)" if others else "")


def _spread(values: list[int]) -> str:
    return f"{min(values)} px" if min(values) == max(values) else f"{min(values)}..{max(values)} px"


def _share(report: SplitReport, low: float, high: float) -> float:
    areas = report.sides**2
    return float(((areas >= low) & (areas < high)).mean())


def _classes(report: Report) -> list[list[str]]:
    labeled = {split: r for split, r in report.splits.items() if r.labeled}
    rows = [["class", *labeled]]
    shown = list(range(len(report.names)))
    if len(shown) > _CLASSES:  # the ends of the first split's list
        order = np.argsort(-next(iter(labeled.values())).counts, kind="stable").tolist()
        shown = [*order[: _CLASSES // 2], -1, *order[-_CLASSES // 2 :]]
    for k in shown:
        if k < 0:
            rows.append([f"... {len(report.names) - _CLASSES} more (json=true lists all)", *("" for _ in labeled)])
            continue
        cells = [f"{r.counts[k]} ({100 * r.counts[k] / max(1, r.counts.sum()):2.0f} %)" for r in labeled.values()]
        rows.append([f"{k} {report.names[k]}", *cells])
    return rows


def _verdict(report: Report, found: list[Finding]) -> str:
    images = sum(len(r.dataset) for r in report.splits.values())
    decoded = sum(r.decoded for r in report.splits.values())
    looked = f"{decoded} of {images} images decoded" if decoded else f"headers of {images} images read"
    counts = [sum(f.level == level for f in found) for level in LEVELS]
    told = ", ".join(f"{n} {level}{'' if n == 1 else 's'}" for n, level in zip(counts, LEVELS, strict=True))
    between = [o for o in report.overlaps if o.a != o.b]
    unseen = "splits overlap" if any(not o.near for o in between) else "splits have images that look alike"
    unseen = unseen if between else "no image in two splits"
    return f"{'NOT OK' if counts[0] else 'OK'}: {looked}; {told}; {unseen}."


def _table(rows: list[list[str]]) -> str:
    """Rows of cells as text; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(report: Report, strict: bool = False) -> str:
    """The whole report; every place of every finding is in it."""
    content = {
        "data": str(report.yaml),
        "root": str(report.root),
        "ok": passed(report, strict),
        "names": report.names,
        "splits": {split: _split_dict(report, r) for split, r in report.splits.items()},
        "findings": [
            {
                "level": f.level,
                "kind": f.kind,
                "split": f.split,
                "what": f.what,
                "where": f.where,
                "fix": f.fix,
            }
            for f in findings(report)
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False)


def _split_dict(report: Report, numbers: SplitReport) -> dict[str, Any]:
    out: dict[str, Any] = {
        "format": numbers.dataset.format,
        "images": len(numbers.dataset),
        "decoded": numbers.decoded,
        "labeled": numbers.labeled,
        "image_sizes": [{"width": w, "height": h, "images": n} for (w, h), n in numbers.sizes.most_common()],
        "file_kinds": dict(numbers.traits.most_common()),
    }
    if not numbers.labeled:
        return out | {"images_with_labels_not_read": numbers.hidden}
    names = report.names
    return out | {
        "images_partly_labeled": numbers.partial,
        "images_without_boxes": len(numbers.empty),
        "boxes": len(numbers.sides),
        "crowd": numbers.crowd,
        "boxes_at_the_border": numbers.touching,
        "boxes_an_image": _quantiles(numbers.per_image),
        "box_side_pixels": _quantiles(numbers.sides),
        "box_side_of_image": _quantiles(numbers.relative),
        "box_areas": {title: round(_share(numbers, *limits), 4) for title, limits in _SIZES.items()},
        "boxes_of_class": dict(zip(names, numbers.counts.tolist(), strict=True)),
        "images_of_class": dict(zip(names, numbers.images.tolist(), strict=True)),
    }


def _quantiles(values: np.ndarray) -> dict[str, float]:
    """Smallest, mean and largest value, and those below which 5, 50 and 95 % lie."""
    points = {"min": 0, "5%": 0.05, "50%": 0.5, "95%": 0.95, "max": 1}
    return {"mean": round(float(values.mean()), 4)} | {
        name: round(float(np.quantile(values, q)), 4) for name, q in points.items()
    }
