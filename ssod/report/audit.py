"""How right the pseudo labels are, from the audited images (audit.jsonl)."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from ssod.report.charts import Line, class_color, histogram, line_chart
from ssod.report.overview import burn_in_mark, class_lines
from ssod.report.run import Run

HISTOGRAMS = 12  # classes with a histogram: those with the most detections
KEYS = (("precision", "precision", ""), ("recall", "recall", "6 3"), ("iou", "mean IoU", "2 3"))


def audit_section(run: Run) -> dict[str, Any] | None:
    """{"network", "images", "step", "charts", "histograms", "rows", "suggestion"}; None without an audit."""
    entries = [a for a in run.audit if isinstance(a.get("classes"), dict) and "step" in a]
    if not entries:
        return None
    network = "teacher" if any(a.get("network") == "teacher" for a in entries) else entries[-1].get("network")
    entries = [a for a in entries if a.get("network") == network]
    last = entries[-1]
    names = list(last["classes"])
    rows = [{"name": n, "color": class_color(i), **last["classes"][n]} for i, n in enumerate(names)]
    suggested = {r["name"]: r["suggested_tau"] for r in rows if r.get("suggested_tau") is not None}
    return {
        "network": network,
        "images": last.get("images"),
        "step": last["step"],
        "charts": _charts(run, entries, names),
        "histograms": _histograms(rows, str(network)),
        "rows": rows,
        "all": last.get("all") or {},
        "suggested": suggested,
    }


def _charts(run: Run, entries: list[dict[str, Any]], names: list[str]) -> list[Markup]:
    steps = [float(e["step"]) for e in entries]
    marks = burn_in_mark(run)

    def over(key: str, name: str | None = None) -> tuple[list[float], list[float]]:
        values = [(e.get("all") or {}) if name is None else e["classes"].get(name, {}) for e in entries]
        pairs = [(s, v[key]) for s, v in zip(steps, values, strict=True) if v.get(key) is not None]
        return [s for s, _ in pairs], [v for _, v in pairs]

    total = [Line(name, *over(key), f"var(--part{i})", dash, dots=True) for i, (key, name, dash) in enumerate(KEYS)]
    charts = [line_chart("Kept pseudo boxes, all classes", total, marks=marks, y_range=(0.0, 1.0))]
    for key, title in (("precision", "Precision by class"), ("tau", "Threshold by class")):
        lines, note = class_lines(names, {n: over(key, n) for n in names}, dots=True)
        charts.append(line_chart(title, lines, marks=marks, y_range=(0.0, 1.0), note=note))
    return [c for c in charts if c]


def _histograms(rows: list[dict[str, Any]], network: str) -> list[Markup]:
    chosen = sorted((r for r in rows if r.get("calibration")), key=lambda r: -(r.get("found") or 0))[:HISTOGRAMS]
    out = []
    for row in chosen:
        bins = [(float(b["low"]), float(b["high"]), int(b["n"]), int(b["right"])) for b in row["calibration"]]
        mark = None if row.get("tau") is None else (row["tau"], "threshold")
        title = f"{row['name']}: scores of the {network}"
        out.append(histogram(title, bins, color=row["color"], names=("right", "wrong"), mark=mark))
    return [h for h in out if h]
