"""What a page says first: what was run, how good it became, what the teacher gave, what went wrong, what it cost."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from ssod.report.charts import Line, class_color, line_chart
from ssod.report.compare_runs import Comparison
from ssod.report.memory import memory
from ssod.report.run import Run, differences, scores

NAMED = 10  # classes with a name in a chart; of more, the highest and the lowest half of that
COLORS = {"student": "var(--student)", "teacher": "var(--teacher)"}
PLACES = ("project", "name", "exist_ok", "resume", "device", "workers", "verbose")  # not what was learnt, but where


def command(args: Mapping[str, Any]) -> str:
    """`ssod train` with every option that is not at its default: it repeats the run."""
    words = ["ssod", "train"]
    for key, value in differences({k: v for k, v in args.items() if k not in PLACES}).items():
        words.append(f"{key}={word(value)}")
    return " ".join(shlex.quote(w) for w in words)


def word(value: Any) -> str:
    """A value as the command line reads it."""
    try:
        if isinstance(value, str) and yaml.safe_load(value) == value:
            return value
    except yaml.YAMLError:  # such as a quote at its beginning, which needs quotes around it
        pass
    return yaml.safe_dump(value, default_flow_style=True, width=10**9, sort_keys=False).split("\n")[0]


def facts(run: Run) -> list[tuple[str, str]]:
    """(what, value) lines about the run."""
    args, summary = run.args, run.summary
    detector = f"{run.detector} on {args.get('backbone')}"
    out = [("Data", str(args.get("data"))), ("Detector", detector), ("Strategy", run.strategy)]
    if summary:
        images = f"{summary.get('labeled')} labelled, {summary.get('unlabeled')} unlabelled, {summary.get('val')} val"
        out.append(("Images", images))
    else:
        out.append(("Labels", str(args.get("labeled"))))
    total = args.get("iters") or run.steps
    length = f"{run.steps}" if run.steps >= total else f"{run.steps} of {total}"
    out.append(("Steps", length + (f", {run.burn_in} of them supervised first" if run.burn_in else "")))
    out.append(("Image size", f"{args.get('imgsz')} pixels"))
    if args.get("weights"):
        out.append(("Started from", Path(str(args["weights"])).name))
    return [*out, *cost(run)]


def cost(run: Run) -> list[tuple[str, str]]:
    """Minutes, memory, and images a second of the two parts of the run."""
    out = []
    if (minutes := run.minutes()) is not None:
        out.append(("Time", f"{minutes:.1f} minutes with validation"))
    if (found := memory(run)) is not None:
        out.append(("Memory", str(found)))
    speeds = []
    for name, value in zip(("supervised", "with unlabelled images"), images_per_second(run), strict=True):
        if value is not None:
            speeds.append(f"{value:.1f} {name}")
    return [*out, ("Images a second", ", ".join(speeds))] if speeds else out


def images_per_second(run: Run) -> tuple[float | None, float | None]:
    """Medians over the log lines of the supervised part and of the part with unlabelled images."""
    args = run.args
    batch, accumulate = args.get("batch", 0), args.get("accumulate", 1)
    unlabeled = args.get("batch_unlabeled")
    both = batch + (batch if unlabeled is None else unlabeled)
    parts: tuple[list[float], list[float]] = ([], [])
    logged = [r for r in run.rows if r.get("seconds")]
    for before, row in pairwise(logged):
        seconds = float(row["seconds"]) - float(before["seconds"])
        if seconds > 0:
            semi = any(v and k.startswith("unsup/") for k, v in row.items())
            steps = int(row["step"]) - int(before["step"])
            parts[semi].append(steps * accumulate * (both if semi else batch) / seconds)
    alone, semi_speed = (statistics.median(p) if p else None for p in parts)
    return alone, semi_speed


def verdict(run: Run, comparison: Comparison | None) -> list[str]:
    """Whether it helped, in sentences, with what can and what cannot be said."""
    best = run.best()
    if best is None:
        return ["No validation has been done yet."]
    network, step, figures = best
    out = [
        f"The best validation is the {network}’s at step {step}: AP {_f(figures['AP'])}, AP50 {_f(figures['AP50'])}."
    ]
    gain, against = _gain(run, comparison)
    start = (run.summary.get("burn_in") or {}).get("AP")
    if gain is not None:
        way = "more" if gain >= 0 else "less"
        out.append(f"At the end that is {_f(abs(gain))} AP {way} than {against}.")
    elif start is not None:
        rise = figures["AP"] - start
        out.append(
            f"That is {_f(abs(rise))} {'above' if rise >= 0 else 'below'} the end of the supervised start (AP "
            f"{_f(start)} at step {run.burn_in}). A supervised run of the same length may rise as much: baseline=auto "
            "trains that control."
        )
    return out


def _gain(run: Run, comparison: Comparison | None) -> tuple[float | None, str]:
    if comparison is not None:
        return comparison.gain["AP"], f"the baseline {comparison.baseline.folder.name}"
    if run.baseline is not None:
        return (run.baseline.get("gain") or {}).get("AP"), "its supervised control of the same length"
    return None, ""


def tiles(run: Run, comparison: Comparison | None) -> list[dict[str, str]]:
    """The few numbers of the head: {"name", "value", "note"}."""
    out = []
    if best := run.best():
        network, step, figures = best
        out.append({"name": "AP", "value": _f(figures["AP"]), "note": f"best, {network} at step {step}"})
        out.append({"name": "AP50", "value": _f(figures["AP50"]), "note": "of the same network"})
        gain, against = _gain(run, comparison)
        start = (run.summary.get("burn_in") or {}).get("AP")
        if gain is not None:
            out.append({"name": "Gain in AP", "value": _f(gain, "+"), "note": f"over {against}"})
        elif start is not None:
            out.append({"name": "Since burn-in", "value": _f(figures["AP"] - start, "+"), "note": "AP, not a control"})
    given, wanted = run.series("pseudo/per_image")[1], run.series("pseudo/labeled_per_image")[1]
    if given and wanted:
        note = f"annotated: {_short(wanted[-1])} an image"
        out.append({"name": "Pseudo boxes an image", "value": _short(given[-1]), "note": note})
    if run.summary:
        value = f"{run.summary.get('labeled')} + {run.summary.get('unlabeled')}"
        out.append({"name": "Images", "value": value, "note": "labelled + unlabelled"})
    if (minutes := run.minutes()) is not None:
        out.append({"name": "Minutes", "value": f"{minutes:.1f}", "note": f"{run.steps} steps"})
    return out


def ap_charts(run: Run, comparison: Comparison | None) -> list[Markup]:
    marks = burn_in_mark(run)
    out = []
    for figure in ("AP", "AP50"):
        lines = [
            Line(n, *run.scores(n, figure), COLORS.get(n, "var(--other)"), "6 3" if n == "teacher" else "", dots=True)
            for n in run.networks
        ]
        control = _control(run, comparison)
        if control is not None:
            history, network, name = control
            lines.append(Line(name, *scores(history, network, figure), "var(--baseline)", "2 3", dots=True))
        out.append(line_chart(f"{figure} on the validation images", lines, marks=marks, close=True))
    return [c for c in out if c]


def _control(run: Run, comparison: Comparison | None) -> tuple[Sequence[Mapping[str, Any]], str, str] | None:
    """(validations, network, name) of the baseline's curve."""
    if comparison is not None:
        return comparison.baseline.history, comparison.baseline.network, f"baseline {comparison.baseline.folder.name}"
    if run.baseline is not None and run.baseline.get("history"):
        history = run.baseline["history"]
        network = next((n for n in ("student", "teacher") if (history[-1].get(n) or {}).get("AP") is not None), "")
        return history, network, "baseline (supervised)"
    return None


def burn_in_mark(run: Run) -> list[tuple[float, str]]:
    return [] if run.burn_in is None else [(run.burn_in, "end of burn-in")]


def loss_charts(run: Run) -> list[Markup]:
    """Supervised and unsupervised losses apart: their sums together, then the parts of each."""
    columns = list(dict.fromkeys(c for r in run.rows for c in r))
    marks, sums, parts = burn_in_mark(run), [], []
    for kind, what, color in (
        ("sup", "labelled images", "var(--student)"),
        ("unsup", "unlabelled images", "var(--teacher)"),
    ):
        names = [c for c in columns if c.startswith(f"{kind}/")]
        rows = [r for r in run.rows if any(r.get(n) for n in names)]
        if not rows:
            continue
        total = [sum(float(r[n]) for n in names if r.get(n)) for r in rows]
        steps = [float(r["step"]) for r in rows]
        sums.append(Line(what, steps, total, color, "6 3" if kind == "unsup" else ""))
        lines = [
            Line(n.split("/", 1)[1], *run.series(n), f"var(--part{i % 6})", ("", "6 3", "2 3")[i % 3])
            for i, n in enumerate(names)
        ]
        parts.append(line_chart(f"Loss of the {what}, by part", lines, marks=marks))
    if not sums:
        return []
    return [c for c in [line_chart("Loss", sums, marks=marks), *parts] if c]


def pseudo_charts(run: Run) -> list[Markup]:
    """How much the teacher gives against how much is annotated, what share of its boxes is kept, the threshold."""
    marks = burn_in_mark(run)
    counts = [
        Line("pseudo boxes", *run.series("pseudo/per_image"), "var(--teacher)", "6 3"),
        Line("annotated boxes", *run.series("pseudo/labeled_per_image"), "var(--student)"),
        Line("mined boxes", *run.series("mined/per_image"), "var(--other)", "2 3"),
    ]
    shares = [
        Line("kept", *run.series("pseudo/kept"), "var(--teacher)", "6 3"),
        Line("mean threshold", *run.series("pseudo/tau"), "var(--other)"),
    ]
    charts = [
        line_chart("Boxes an image", counts, marks=marks),
        line_chart("Share of the boxes that is kept", shares, marks=marks, y_range=(0.0, 1.0)),
    ]
    return [c for c in charts if c]


def class_lines(
    names: Sequence[str], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], dots: bool = False
) -> tuple[list[Line], str]:
    """A line a class in its colour, and a note: of many classes the highest and lowest at the end have names."""
    last = {n: curves[n][1][-1] for n in names if n in curves and len(curves[n][1])}
    order = sorted(last, key=last.__getitem__, reverse=True)
    shown = order if len(order) <= NAMED else [*order[: NAMED // 2], *order[-(NAMED // 2) :]]
    lines = [
        Line(n, *curves[n], class_color(list(names).index(n)), faint=n not in shown, dots=dots and n in shown)
        for n in order
    ]
    cut = f"Of {len(order)} classes the {NAMED // 2} highest and the {NAMED // 2} lowest have names."
    return lines, cut if len(order) > NAMED else ""


def by_class_charts(run: Run) -> list[Markup]:
    """Each number that the strategy keeps of each class, over the validations."""
    entries = [h for h in run.history if h.get("by_class")]
    if not entries:
        return []
    out = []
    for number in entries[-1]["by_class"]:
        names = list(entries[-1]["by_class"][number])
        having = [h for h in entries if number in h["by_class"]]
        steps = [float(h["step"]) for h in having]
        curves = {n: (steps, [_real(h["by_class"][number].get(n)) for h in having]) for n in names}
        lines, note = class_lines(names, curves, dots=True)
        out.append(line_chart(f"{number} by class", lines, marks=burn_in_mark(run), note=note))
    return [c for c in out if c]


def _real(value: float | None) -> float:
    return float("nan") if value is None else value


def class_table(run: Run, comparison: Comparison | None) -> dict[str, Any] | None:
    """AP of each class at the last validation: {"networks", "rows": [{"name", "values", "baseline", "gain"}]}."""
    if not run.history or not run.names:
        return None
    last = run.history[-1]
    networks = [n for n in run.networks if last.get(n, {}).get("per_class")]
    rows = []
    for label, name in enumerate(run.names):
        values = [last[n]["per_class"].get(name) for n in networks]
        row: dict[str, Any] = {"name": name, "color": class_color(label), "values": values}
        if comparison is not None:
            row |= {"baseline": comparison.baseline.per_class.get(name), "gain": comparison.per_class.get(name)}
        rows.append(row)
    return {"networks": networks, "rows": rows, "against": comparison is not None, "step": last["step"]}


def _f(value: float | None, sign: str = "") -> str:
    return "–" if value is None else f"{value:{sign}.3f}"


def _short(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"
