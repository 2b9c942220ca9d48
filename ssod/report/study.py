"""Compare settings over seeds: runs every arm with every seed, then writes a table of means and spreads.

    python -m ssod.report.study out=runs/demo-full cfg=demo.yaml seeds=3 jobs=2 \\
        arm.supervised="strategy=supervised strategy.ema=true" arm.mean_teacher="strategy=mean_teacher"

Each run is a process of its own with one thread; `jobs` of them go side by side. A run that has finished is not
repeated, so a study that was cut off goes on when the same command is given again.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ssod.config import parse_words
from ssod.errors import UserError

FIGURES = ("AP", "AP50", "AP75")


def study(cfg: str, arms: Mapping[str, Sequence[str]], seeds: int, jobs: int, out: Path) -> str:
    """Run what has not run yet and return the table (Markdown); it is also written to out/table.md.

    arms: {name: words of the command line}. Raises UserError when a run fails.
    """
    runs = [(arm, seed) for seed in range(seeds) for arm in arms]
    with ThreadPoolExecutor(jobs) as pool:
        results = list(pool.map(lambda r: _run(cfg, arms[r[0]], r[0], r[1], out), runs))
    by_arm: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
    for (arm, _), result in zip(runs, results, strict=True):
        by_arm[arm].append(result)
    text = table(by_arm)
    (out / "table.md").write_text(text, encoding="utf-8")
    plot(by_arm, out / "curves.png")
    return text


def _run(cfg: str, words: Sequence[str], arm: str, seed: int, out: Path) -> dict[str, Any]:
    """One training run in its own process; returns its metrics.json."""
    folder = out / "train" / f"{arm}-{seed}"
    metrics = folder / "metrics.json"
    if not metrics.is_file():
        command = [sys.executable, "-m", "ssod", "train", f"cfg={cfg}", *words, f"seed={seed}"]
        command += [f"project={out}", f"name={folder.name}", "exist_ok=true"]
        out.mkdir(parents=True, exist_ok=True)
        log = out / f"{folder.name}.log"
        with open(log, "w") as file:
            done = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        if done.returncode:
            raise UserError(f"the run {folder.name} failed ({shlex.join(command)}); its output is in {log}.")
        print(f"done {folder.name}", flush=True)
    content: dict[str, Any] = json.loads(metrics.read_text())
    return content


def table(by_arm: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """One row an arm and network: mean and standard deviation over the seeds, figures of the last step, times 100."""
    lines = [
        "| arm | network | seeds | " + " | ".join(f"{f} at the end" for f in FIGURES) + " | AP, seed by seed |",
        "|---|---|---|" + "---|" * len(FIGURES) + "---|",
    ]
    for arm, results in by_arm.items():
        starts = [r["burn_in"] for r in results if r["burn_in"]]
        if starts:
            lines.append(_row(arm, "student, end of burn-in", starts))
        for network in results[0]["final"]:
            lines.append(_row(arm, network, [r["final"][network] for r in results]))
    return "\n".join(lines) + "\n"


def _row(arm: str, network: str, figures: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for name in FIGURES:
        values = [100 * f[name] for f in figures]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.1f}{spread}")
    each = ", ".join(f"{100 * f['AP']:.1f}" for f in figures)
    return f"| {arm} | {network} | {len(figures)} | {' | '.join(cells)} | {each} |"


def plot(by_arm: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Validation AP against the step: a thin line a run, a thick one for the mean over seeds."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for number, (arm, results) in enumerate(by_arm.items()):
        for network, style in (("student", "--"), ("teacher", "-")):
            curves = [{h["step"]: 100 * h[network]["AP"] for h in r["history"] if network in h} for r in results]
            if not curves[0]:
                continue
            steps = sorted(set.intersection(*(set(c) for c in curves)))
            for curve in curves:
                ax.plot(steps, [curve[s] for s in steps], style, color=f"C{number}", linewidth=0.6, alpha=0.5)
            means = [statistics.mean(c[s] for c in curves) for s in steps]
            ax.plot(steps, means, style, color=f"C{number}", linewidth=2, marker=".", label=f"{arm}, {network}")
    ax.set_xlabel("step")
    ax.set_ylabel("AP")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)


def main(words: Sequence[str]) -> int:
    try:
        given = parse_words(words)
        arms = {name: shlex.split(str(line or "")) for name, line in given.pop("arm", {}).items()}
        values = {"seeds": 3, "jobs": 2} | given
        if set(values) != {"cfg", "out", "seeds", "jobs"} or not arms:
            raise UserError(
                "a study needs cfg=, out= and at least one arm.NAME='words'; seeds= and jobs= are optional."
            )
        print(study(values["cfg"], arms, values["seeds"], values["jobs"], Path(str(values["out"]))))
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
