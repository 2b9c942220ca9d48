"""`ssod report`: pages of finished and of running trainings. What needs the model and the data is done here; the pages
themselves (ssod.report) are made from files alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ssod.data.samples import Sample
from ssod.deploy.asked import asked
from ssod.deploy.exported import load_model
from ssod.deploy.infer import detect
from ssod.engine.setup import load_split
from ssod.errors import Fault, UserError
from ssod.modes import ReportConfig
from ssod.report.compare_runs import Comparison, compare_runs
from ssod.report.findings import FILE, Findings
from ssod.report.many import write_comparison
from ssod.report.page import Seen, write_page
from ssod.report.run import Run, is_run, read_run

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

MOST = 1000  # validation images that the model looks at for a page; of more, as many at equal distances


def report(config: ReportConfig, say: Callable[[str], None] = print) -> Path:
    """Write the page of one run, or of several side by side, and return its path.

    Raises UserError for folders that are no runs, and for a baseline beside several.
    """
    given = [config.run] if isinstance(config.run, str) else config.run
    folders, left_out = find_runs(given)
    if left_out:
        say(f"left out, since they hold no run (no args.yaml): {', '.join(left_out)}")
    if len(folders) == 1:
        comparison = None
        if config.baseline is not None:
            comparison = compare_runs(folders[0], Path(config.baseline))
            say(comparison.text())
        return report_run(folders[0], config, comparison)
    if config.baseline is not None:
        raise UserError("baseline= goes with one run; several are compared with each other as they are.")
    parent = Path(os.path.commonpath([f.resolve() for f in folders]))
    return write_comparison([read_run(f) for f in folders], Path(config.out or parent / "comparison.html"))


def run_of(checkpoint: Path) -> Path:
    """The run folder that a checkpoint lies in. Raises UserError where it lies in none."""
    folder = checkpoint.parent.parent
    if not is_run(folder):
        raise UserError(
            f"{checkpoint} lies in no run folder, as RUN/weights/best.pt does, so there is no run to tell of."
        )
    return folder


def find_runs(given: Sequence[str]) -> tuple[list[Path], list[str]]:
    """(run folders, what was left out): of each path itself if it is a run, else the runs up to two folders below it.

    Raises UserError where there is none.
    """
    folders: dict[Path, None] = {}
    left_out = []
    for word in given:
        places = [Path(p) for p in sorted(glob.glob(word))] if glob.has_magic(word) else [Path(word)]
        for place in places:
            below = sorted(f.parent for pattern in ("*", "*/*") for f in place.glob(f"{pattern}/args.yaml"))
            found = [place] if is_run(place) else [f for f in below if not is_run(f.parent)]
            folders |= dict.fromkeys(found)
            if not found:
                left_out.append(str(place))
    if not folders:
        raise UserError(
            f"{', '.join(given)}: no folder of a training run (with args.yaml) is there. Give one such as "
            "runs/train/exp."
        )
    return list(folders), left_out


def report_at_end(trainer: SemiTrainer) -> None:
    """The page of a run that has ended. What goes wrong with it is said, and does the run no harm."""
    config = trainer.config
    own = ReportConfig(run=str(trainer.folder), device=config.device, workers=0, batch=config.batch)
    try:
        report_run(trainer.folder, own, val=Val(trainer.data.val, trainer.data.names))
    except Exception as error:
        trainer.say(
            f"WARNING: report.html could not be made ({type(error).__name__}: {error}); the run itself is complete. "
            f"`ssod report {trainer.folder} verbose=true` tries again."
        )


class Val(NamedTuple):
    """Validation images with their annotations."""

    samples: Sequence[Sample]
    names: list[str]


def report_run(
    folder: Path, config: ReportConfig, comparison: Comparison | None = None, val: Val | None = None
) -> Path:
    """Write the page of a run, by default as report.html into its folder. Detections of best.pt on the validation
    images are made where they are not there yet, and kept beside the page.

    val  where they have been read already
    """
    run = read_run(folder)
    control = folder / "baseline"  # where baseline=auto has trained it
    if comparison is None and run.summary and (control / "metrics.json").is_file():
        comparison = compare_runs(folder, control)
    out = Path(config.out or folder / "report.html")
    out.parent.mkdir(parents=True, exist_ok=True)
    data, why = (val, "") if val is not None else _val(run, config)
    return write_page(run, out, comparison, _look(run, config, out.resolve().parent, data, why))


def _look(run: Run, config: ReportConfig, beside: Path, data: Val | None, no_images: str) -> Seen:
    """The model's detections, and the images they are on, as far as either can be had."""
    best = run.folder / "weights" / "best.pt"
    found = (Findings.load(place / FILE) for place in (beside, run.folder))
    kept = next((f for f in found if f is not None and f.about.get("best") == _stamp(run)), None)
    if kept is not None:
        samples = None if data is None else _chosen(data)
        same = samples is not None and [s.path.name for s in samples] == [i["file_name"] for i in kept.images]
        why = no_images if data is None else "the data have other validation images than when the model saw them."
        return Seen(kept, [s.path for s in samples] if same and samples else None, "" if same else why)
    if data is None:
        return Seen(None, None, no_images)
    if not best.is_file():
        return Seen(None, None, "the run has no weights/best.pt yet.")
    try:
        findings = find(best, data, config, run)
    except (UserError, Fault, OSError) as error:
        return Seen(None, None, f"{error}")
    findings.save(beside / FILE)
    return Seen(findings, [s.path for s in _chosen(data)], "")


def _val(run: Run, config: ReportConfig) -> tuple[Val | None, str]:
    """(what the run validated on or None, why not)."""
    path = config.data_path or run.args.get("data_path")
    try:
        data = load_split(run.args.get("data"), "val", path, strict=False)
        used = max(1, round(len(data.samples) * run.args.get("val_fraction", 1.0)))
        return Val(data.samples[:used], data.names), ""
    except (UserError, OSError) as error:
        return None, f"{error}"


def _chosen(data: Val) -> list[Sample]:
    count = len(data.samples)
    picked = range(count) if count <= MOST else np.linspace(0, count - 1, MOST).astype(int).tolist()
    return [data.samples[i] for i in picked]


def _stamp(run: Run) -> list[Any]:
    """What tells a best.pt from a later one of the same run."""
    best = run.best()
    return [] if best is None else [best[0], best[1], best[2]["AP"]]


def find(best: Path, data: Val, config: ReportConfig, run: Run) -> Findings:
    """Detections of a checkpoint on the validation images. Raises UserError where model and data do not fit."""
    model = load_model(best, "auto", config.device)
    if model.names != data.names:
        raise UserError(f"the model knows the classes {', '.join(model.names)} and the data {', '.join(data.names)}.")
    limits = {k: run.args.get(k) for k in ("conf", "iou", "max_det")}
    wanted = asked(model.card, model.path, **limits, default_conf=0.05)
    samples = _chosen(data)
    how = model.how(wanted, None, config.batch, config.workers)
    rows = [np.zeros((0, 7))]
    for index, found in detect(model.detector, samples, how, []):
        assert found.scores is not None
        ids = np.full((len(found), 1), float(index))
        rows.append(np.hstack([ids, found.boxes, found.labels[:, None], found.scores[:, None]]))
    truth = [np.zeros((0, 7))]
    for index, s in enumerate(samples):
        ids = np.full((len(s.boxes), 1), float(index))
        truth.append(np.hstack([ids, s.boxes, s.labels[:, None], s.crowd[:, None]]))
    about = {"best": _stamp(run), "conf": wanted.conf, "of": len(data.samples)}
    images = [{"file_name": s.path.name, "width": s.width, "height": s.height} for s in samples]
    return Findings(about, images, list(data.names), np.concatenate(truth), np.concatenate(rows))
