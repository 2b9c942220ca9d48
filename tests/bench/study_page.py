"""What a study's records say: a table of means and spreads, paired differences, curves; one page of docs/results.

Figures are those of the last step, times 100. Spreads are sample standard deviations over the seeds.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from scipy.stats import t as student_t
from study_grid import Grid

matplotlib.use("Agg")  # files only: no display is needed
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
MANY = 4  # arms, above which a plot shows less of each
BEGIN, END = "<!-- written by study.py: begin -->", "<!-- written by study.py: end -->"

Record = Mapping[str, Any]


def summary_text(records: Sequence[Record], control: str) -> str:
    """The tables of a study in Markdown; records of one setting an arm."""
    parts = [figures_table(records)]
    if control and any(r["arm"] == control for r in records) and len(arms_of(records)) > 1:
        parts.append(differences_table(records, control))
    return "\n".join([*parts, cost_table(records)])


def figures_table(records: Sequence[Record]) -> str:
    """A row an arm and network: mean ± spread over the seeds, and AP of each seed."""
    lines = _head("arm", "network", "seeds", *FIGURES, "AP, seed by seed")
    for arm, runs in arms_of(records).items():
        starts = [r["burn_in"] for r in runs if r["burn_in"]]
        if len(starts) == len(runs):
            lines.append(_figures_row(arm, "student, end of burn-in", starts))
        for network in _networks(runs):
            lines.append(_figures_row(arm, network, [r["final"][network] for r in runs]))
    return "\n".join(lines) + "\n"


def differences_table(records: Sequence[Record], control: str) -> str:
    """A row an arm and network: differences to the same network of the control, seed by seed.

    The interval is Student's t for the mean of the paired differences of AP; with 3 seeds it is wide, honestly so.
    """
    lines = _head(f"against {control}", "network", "pairs", *FIGURES, "AP, 95 % interval", "AP, seed by seed")
    arms = arms_of(records)
    base = {r["seed"]: r for r in arms[control]}
    for arm, runs in arms.items():
        pairs = [(r, base[r["seed"]]) for r in runs if r["seed"] in base]
        if arm == control or not pairs:
            continue
        for network in _networks([r for pair in pairs for r in pair]):
            rows = [_minus(r["final"][network], c["final"][network]) for r, c in pairs]
            each = [100 * row["AP"] for row in rows if row["AP"] is not None]
            cells = [_cell([row[f] for row in rows], "+.1f") for f in FIGURES]
            named = ", ".join(f"{v:+.1f}" for v in each)
            lines.append(_row(arm, network, len(rows), *cells, _interval(each), named))
    return "\n".join(lines) + "\n"


def cost_table(records: Sequence[Record]) -> str:
    lines = _head("arm", "steps", "minutes a run", "labelled / unlabelled / val images")
    for arm, runs in arms_of(records).items():
        minutes = [r["seconds"] / 60 for r in runs]
        steps, images = (
            ", ".join(dict.fromkeys(f(r) for r in runs))
            for f in (lambda r: str(r["steps"]), lambda r: f"{r['labeled']} / {r['unlabeled']} / {r['val']}")
        )
        lines.append(_row(arm, steps, f"{statistics.mean(minutes):.1f}", images))
    return "\n".join(lines) + "\n"


def write_page(path: Path, grid: Grid, records: Sequence[Record], wanted: int, words: Sequence[str]) -> None:
    """Write PATH.md and PATH.png. What people wrote around the marked part of an older page stays."""
    plot(records, path.with_suffix(".png"))
    missing = wanted - len(records)
    lines = [
        BEGIN,
        f"- Command: `python tests/bench/study.py {shlex.join(_without_places(words))}`",
        f"- Commits: {_listed(records, lambda r: ', '.join(r['commit']))}. A + marks a checkout with changes.",
        f"- Machine: {_listed(records, lambda r: r['device'] + ', torch ' + r['versions']['torch'])}.",
        f"- {len(records)} of {wanted} runs"
        + (f"; **{missing} missing**, the tables hold what there is." if missing else "."),
        "- Figures of the last step, times 100; mean ± sample standard deviation over the seeds.",
        "",
        summary_text(records, grid.control),
        f"![AP against the step]({path.with_suffix('.png').name})",
        END,
    ]
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {grid.title}\n\n{BEGIN}{END}\n"
    if BEGIN not in text or END not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}{END}\n"
    before, after = text.split(BEGIN, 1)[0], text.split(END, 1)[1]
    path.write_text(before + "\n".join(lines) + after, encoding="utf-8")


def plot(records: Sequence[Record], path: Path) -> None:
    """Validation AP against the step: a thin line a run, a thick one for the mean over seeds.

    Of more than MANY arms the means of the students alone, which is as much as a picture can hold.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    ax = figure.subplots()
    arms = arms_of(records)
    for number, (arm, runs) in enumerate(arms.items()):
        for network in _networks(runs)[: 1 if len(arms) > MANY else None]:
            style = "-" if network == "teacher" else "--"
            curves = [{point[0]: 100 * point[1] for point in r["curve"][network]} for r in runs]
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            for curve in curves if len(arms) <= MANY else []:
                ax.plot(steps, [curve[s] for s in steps], style, color=f"C{number}", linewidth=0.5, alpha=0.4)
            means = [statistics.mean(c[s] for c in curves) for s in steps]
            ax.plot(steps, means, style, color=f"C{number}", linewidth=2, marker=".", label=f"{arm}, {network}")
    ax.set_xlabel("step")
    ax.set_ylabel("AP")
    ax.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=110)


def arms_of(records: Sequence[Record]) -> dict[str, list[Record]]:
    arms: dict[str, list[Record]] = {}
    for record in records:
        arms.setdefault(record["arm"], []).append(record)
    return arms


def _networks(runs: Sequence[Record]) -> list[str]:
    """Networks that every run has, in the order of the first."""
    return [n for n in runs[0]["final"] if all(n in r["final"] for r in runs)]


def _figures_row(arm: str, network: str, figures: Sequence[Mapping[str, float | None]]) -> str:
    cells = [_cell([f[name] for f in figures], ".1f") for name in FIGURES]
    each = ", ".join("-" if f["AP"] is None else f"{100 * f['AP']:.1f}" for f in figures)
    return _row(arm, network, len(figures), *cells, each)


def _cell(values: Sequence[float | None], form: str) -> str:
    """mean ± spread, times 100; - where no box of that kind exists."""
    known = [100 * v for v in values if v is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):{form}}{spread}"


def _interval(values: Sequence[float]) -> str:
    n = len(values)
    if n < 2:
        return "-"
    reach = float(student_t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5
    return f"{statistics.mean(values) - reach:+.1f} .. {statistics.mean(values) + reach:+.1f}"


def _minus(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> dict[str, float | None]:
    out: dict[str, float | None] = {}
    for name in FIGURES:
        x, y = a[name], b[name]
        out[name] = None if x is None or y is None else x - y
    return out


def _head(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return "| " + " | ".join(str(c) for c in cells) + " |"


def _listed(records: Sequence[Record], what: Callable[[Record], str]) -> str:
    return "; ".join(dict.fromkeys(what(r) for r in records))


def _without_places(words: Sequence[str]) -> list[str]:
    """The command without the folders of one machine: an absolute path keeps its last part."""
    out = []
    for word in words:
        key, equals, value = word.rpartition("=")
        out.append(f"{key}{equals}.../{Path(value).name}" if Path(value).is_absolute() else word)
    return out
