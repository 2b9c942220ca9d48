"""report.html: one page about one run, whole in itself. It asks nothing of any network; its policy forbids it to."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssod.files import replacing
from ssod.report import overview
from ssod.report.audit import audit_section
from ssod.report.charts import Line, class_color, histogram, line_chart
from ssod.report.compare_runs import Comparison
from ssod.report.film import Film, read_film, read_pairs
from ssod.report.findings import Findings
from ssod.report.run import Run, differences
from ssod.report.validation import validation_section

TEMPLATES = Path(__file__).parent / "templates"
HISTOGRAMS = 12  # classes


@dataclass(frozen=True)
class Seen:
    """What best.pt finds on the validation images.

    findings  None where that is not known; paths: the images in its order, None where they cannot be had
    why       the reason for what is None, a sentence
    """

    findings: Findings | None
    paths: Sequence[Path] | None
    why: str


def write_page(run: Run, out: Path, comparison: Comparison | None, seen: Seen) -> Path:
    """Write the page of `run` to `out`. What the run has not is left out, with a sentence in its place."""
    film = read_film(run.folder / "pseudo")
    context = {
        "title": run.name,
        "run": run,
        "finished": bool(run.summary),
        "tiles": overview.tiles(run, comparison),
        "verdict": overview.verdict(run, comparison),
        "facts": overview.facts(run),
        "command": overview.command(run.args),
        "ap_charts": overview.ap_charts(run, comparison),
        "loss_charts": overview.loss_charts(run),
        "classes": overview.class_table(run, comparison),
        "comparison": comparison,
        "alarms": run.diagnosis,
        "pseudo_charts": overview.pseudo_charts(run),
        "by_class_charts": overview.by_class_charts(run),
        "film": film,
        "film_charts": film_charts(film, run),
        "film_data": None if film is None else script_data(film.data),
        "pairs": read_pairs(run.folder / "pseudo"),
        "audit": audit_section(run),
        "validation": None if seen.findings is None else validation_section(seen.findings, seen.paths),
        "why": seen.why,
        "changed": [(k, overview.word(v)) for k, v in differences(run.args).items()],
        "args": yaml.safe_dump(run.args, sort_keys=False, allow_unicode=True),
    }
    return render("run.html", context, out)


def film_charts(film: Film | None, run: Run) -> list[Markup]:
    """Kept and dropped boxes over the recorded steps; score histograms of the last one, of classes with the most."""
    if film is None:
        return []
    steps = [float(s) for s, _, _ in film.counts]
    lines = [
        Line("kept", steps, [float(k) for _, k, _ in film.counts], "var(--teacher)", dots=True),
        Line("dropped", steps, [float(d) for _, _, d in film.counts], "var(--other)", "6 3", dots=True),
    ]
    out = [line_chart("Boxes of the film’s images", lines, marks=overview.burn_in_mark(run))]
    names = film.data["names"]
    for name in sorted(film.scores, key=lambda n: -sum(b[2] for b in film.scores[n]))[:HISTOGRAMS]:
        tau = film.taus.get(name)
        mark = None if tau is None else (tau, "threshold")
        color = class_color(names.index(name))
        title = f"{name}: scores at step {film.steps[-1]}"
        out.append(histogram(title, film.scores[name], color=color, names=("kept", "dropped"), mark=mark))
    return [c for c in out if c]


def script_data(value: Any) -> Markup:
    """JSON that may stand in a `<script>`: no character of it can end the element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def render(template: str, context: Mapping[str, Any], out: Path) -> Path:
    """Fill a template and write it. Everything but Markup is escaped."""
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["f3"] = lambda v, sign="": "–" if v is None else f"{v:{sign}.3f}"
    env.filters["percent"] = lambda v: "–" if v is None else f"{100 * v:.0f} %"
    script = (TEMPLATES / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = env.get_template(template).render(
        **context,
        style=Markup((TEMPLATES / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=digest,
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(text.encode())
    return out
