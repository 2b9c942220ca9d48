"""`ssod benchmark`: what each format of a model costs and finds on this machine, timed by the code that `predict` runs.

Needs torch only where a model does, where data are scored and where something is exported first.
"""

from __future__ import annotations

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod import __version__
from ssod.config import validate
from ssod.data.shapes import SIZE, draw_image
from ssod.deploy.array_model import ArrayModel, threads
from ssod.deploy.asked import Asked, asked
from ssod.deploy.formats import kind_of
from ssod.deploy.predictor import Predictor, open_model
from ssod.engine.run import new_run
from ssod.errors import Fault, UserError
from ssod.modes import BenchmarkConfig, ExportConfig
from ssod.zoo.fetch import resolve

if TYPE_CHECKING:
    from ssod.data.samples import Dataset
    from ssod.deploy.exported import Loaded

PARTS = ("preprocess", "inference", "postprocess")
BUSY = 0.25  # load per CPU from which other programs are felt
DRAWN = 16  # images where there are no data
Say = Callable[[str], None]


@dataclass(frozen=True)
class Speed:
    """Of one batch size. ms: median and 90th percentile of an image's share, of each of PARTS; rate: images a second,
    reading and drawing up results included."""

    ms: dict[str, tuple[float, float]]
    rate: float


@dataclass
class Row:
    """One model. A column of two rows compares their formats only where `input` is the same.

    megabytes  None where there is no file
    input      height x width in pixels, or the long side where any shape is taken
    ap         0..1, None without data
    speed      by batch size, without those that an engine does not take
    reason     why there are no figures, else empty
    """

    model: str
    format: str
    megabytes: float | None = None
    device: str = ""
    input: str = ""
    ap: float | None = None
    speed: dict[int, Speed] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """machine: load, CPUs, threads, versions; images: what was timed. The first row is what others are held against."""

    machine: dict[str, Any]
    images: str
    rows: list[Row]


def benchmark(config: BenchmarkConfig, say: Say = print) -> Report:
    """Measure every model, and write benchmark.json into a new run folder.

    What cannot be had on this machine gets a row with the reason. Raises UserError for a model that does not exist,
    and where no model at all could be measured.
    """
    load = os.getloadavg()[0]  # of others: this program has done nothing yet
    given = [resolve(p) for p in ([config.model] if isinstance(config.model, str) else config.model)]
    for path in given:
        if kind_of(path) == "checkpoint" and not path.exists():
            raise UserError(f"there is no checkpoint {path}. Give model=FILE, as written by `ssod train`.")
    data = _data(config)
    sources, images = _sources(config, data)
    rows: list[Row] = []
    with ExitStack() as stack:
        for row, find in _candidates(config, given, stack, say):
            say(f"{row.model} ...")
            try:
                path = find()
                row.megabytes = _megabytes(path)
                _measure(row, path, config, sources, data)
            except (UserError, Fault) as error:
                row.reason = str(error)
            rows.append(row)
    if not any(row.speed for row in rows):
        raise UserError(f"none of the models could be measured; {rows[0].model}: {rows[0].reason}")
    report = Report(_machine(load), images, rows)
    folder = new_run(config.project, "benchmark", config.name, config.exist_ok)
    _write(report, folder / "benchmark.json")
    say(text(report, config.batches))
    say(f"run folder {folder}: benchmark.json")
    return report


# ---- what is measured


def _data(config: BenchmarkConfig) -> Dataset | None:
    if config.data is None:
        return None
    from ssod.engine.setup import load_split

    return load_split(config.data, config.split, config.data_path, config.strict)


def _sources(config: BenchmarkConfig, data: Dataset | None) -> tuple[list[Any], str]:
    """As many images as asked for, some of them several times where there are fewer; and what they are."""
    if data is None:
        every: list[Any] = [draw_image(np.random.default_rng([1, i]))[0] for i in range(DRAWN)]
        what = f"drawn images of {SIZE} pixels, in memory"
    else:
        step = max(1, len(data.samples) // config.images)
        every = [sample.path for sample in data.samples[::step]]
        what = f"image files of {config.split}"
    return [every[i % len(every)] for i in range(config.images)], f"{config.images} {what}"


def _candidates(
    config: BenchmarkConfig, given: list[Path], stack: ExitStack, say: Say
) -> Iterator[tuple[Row, Callable[[], Path]]]:
    """A row for each model, and what finds its file: the exports are made when their turn comes."""
    for path in given:
        yield Row(path.name, kind_of(path)), partial(Path, path)
    if not config.formats:
        return
    checkpoint = next(path for path in given if kind_of(path) == "checkpoint")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ssod-benchmark-")))
    for wanted in config.formats:
        row = Row(f"{checkpoint.stem}, exported", wanted)
        yield row, partial(_export, config, checkpoint, wanted, folder, say)


def _export(config: BenchmarkConfig, checkpoint: Path, wanted: str, folder: Path, say: Say) -> Path:
    from ssod.checkpoint import load_checkpoint
    from ssod.engine.export import SUFFIX, export

    kind, _, precision = wanted.partition("-")
    if kind == "engine":
        _needs_gpu()
    imgsz = config.imgsz or load_checkpoint(checkpoint)["imgsz"]
    values = {
        "model": str(checkpoint),
        "weights": config.weights,
        "format": kind,
        "out": str(folder / f"{checkpoint.stem}-{wanted}{SUFFIX[kind]}"),
        "dynamic": not isinstance(imgsz, int),  # [short, long] does not say which side is the height
        "imgsz": config.imgsz if isinstance(config.imgsz, int) else None,
        "half": precision == "fp16",
        "int8": precision == "int8",
        "batch": max(config.batches),
        "conf": config.conf,
        "iou": config.iou,
        "max_det": config.max_det,
        "workers": config.workers,
    }
    if precision == "int8":  # the others need none: their AP is taken here
        values |= {"data": config.data, "data_path": config.data_path, "split": config.split}
    return export(validate(ExportConfig, values, ""), lambda line: say(f"  {line}")).path


def _needs_gpu() -> None:
    """Raises UserError before minutes go into an engine that would not run."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("an engine runs on an NVIDIA GPU, and this machine has none.")


def _megabytes(path: Path) -> float:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files) / 1e6


# ---- measuring


def _measure(row: Row, path: Path, config: BenchmarkConfig, sources: list[Any], data: Dataset | None) -> None:
    """Fill in a row. Raises UserError where the model cannot run here or on these data."""
    model = open_model(path, config.weights, config.device)
    row.device, row.input = str(model.device).lower(), _input(model, config)
    if model.card is not None and model.card.precision not in ("fp32", row.format.rpartition("-")[2]):
        row.format = f"{row.format}-{model.card.precision}"
    if data is not None and model.names != data.names:
        raise UserError(
            f"it knows the classes {', '.join(model.names)} and the data {', '.join(data.names)}. "
            "Give data with the model's classes."
        )
    # An exported model has its own thresholds; what the user did not ask for, it need not give.
    said = {k: getattr(config, k) for k in ("conf", "iou", "max_det") if k in config.model_fields_set}
    wanted = asked(model.card, path, **said, default_conf=config.conf)
    most = None if isinstance(model, ArrayModel) else model.most
    for batch in config.batches:
        if most is None or batch <= most:
            row.speed[batch] = _speed(model, wanted, batch, config, sources)
    if not row.speed:
        raise UserError(f"it takes at most {most} images at once. Add batches=[{most}].")
    if data is not None:
        row.ap = _average_precision(model, path, wanted, config, data)


def _input(model: ArrayModel | Loaded, config: BenchmarkConfig) -> str:
    if model.card is not None and model.card.size is not None:
        return "{}x{}".format(*model.card.size)
    trained = model.card.imgsz if isinstance(model, ArrayModel) else model.imgsz
    size = config.imgsz or trained
    return str(size if isinstance(size, int) else list(size)).replace(" ", "")


def _speed(model: ArrayModel | Loaded, wanted: Asked, batch: int, config: BenchmarkConfig, sources: list[Any]) -> Speed:
    predict = Predictor(
        model,
        conf=wanted.conf,
        iou=wanted.iou,
        max_det=wanted.max_det,
        imgsz=config.imgsz,
        batch=batch,
        workers=config.workers,
    )
    if config.warmup:
        predict([sources[i % len(sources)] for i in range(max(config.warmup, batch))])
    start = time.perf_counter()
    results = predict(sources)
    seconds = time.perf_counter() - start
    ms = {part: np.percentile([r.speed[part] for r in results], (50, 90)).tolist() for part in PARTS}
    return Speed({part: (low, high) for part, (low, high) in ms.items()}, len(results) / seconds)


def _average_precision(
    model: ArrayModel | Loaded, path: Path, wanted: Asked, config: BenchmarkConfig, data: Dataset
) -> float:
    from ssod.deploy.exported import load_model
    from ssod.engine.evaluate import evaluate

    loaded = load_model(path, config.weights, config.device) if isinstance(model, ArrayModel) else model
    how = loaded.how(wanted, config.imgsz, max(config.batches), config.workers)
    return evaluate(loaded.detector, data.samples, data.names, how).ap


# ---- telling


def _machine(load: float) -> dict[str, Any]:
    versions = {"ssod": __version__}
    for package in ("torch", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"):
        if package in sys.modules:  # what was used, not what is installed
            versions[package] = _version(package)
    torch = sys.modules.get("torch")
    gpu = torch.cuda.get_device_name() if torch is not None and torch.cuda.is_available() else None
    return {
        "processor": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "threads": threads() or None,
        "gpu": gpu,
        "load": round(load, 2),
        "versions": versions,
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # onnxruntime-gpu, a nightly
        return str(getattr(sys.modules[package], "__version__", "unknown"))


def _write(report: Report, path: Path) -> None:
    rows = [asdict(row) | {"ap": None if row.ap is None or math.isnan(row.ap) else row.ap} for row in report.rows]
    content = {"machine": report.machine, "images": report.images, "rows": rows}
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def text(report: Report, batches: list[int]) -> str:
    """The table, and above it what its figures hold for."""
    machine = report.machine
    used = "OMP_NUM_THREADS is not set" if machine["threads"] is None else f"OMP_NUM_THREADS={machine['threads']}"
    where = [machine["gpu"]] if machine["gpu"] else []
    where += [f"{machine['processor']}, {machine['cpus']} CPUs", used, f"load {machine['load']:.1f} before the start"]
    lines = ["", ", ".join(f"{name} {version}" for name, version in machine["versions"].items()), ", ".join(where)]
    lines.append(
        f"{report.images}; ms: share of an image at batch {batches[0]}, median / 90th percentile; "
        "faster: inference against the first row, medians"
    )
    if machine["load"] > BUSY * (machine["cpus"] or 1):
        lines.append("NOTE: other programs are busy: times are not comparable.")
    batch_heads = [f"images/s, batch {b}" for b in batches]
    scores = ["AP", "difference"] if any(row.ap is not None for row in report.rows) else []
    head = ["model", "format", "on", "input", "MB", *scores, *(f"{part} ms" for part in PARTS), "faster", *batch_heads]
    table = [head, *(_cells(row, report.rows[0], batches, bool(scores)) for row in report.rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines.append("")
    for cells, row in zip(table, [None, *report.rows], strict=True):
        sides = [str.ljust] * 4 + [str.rjust] * (len(cells) - 4)
        lines.append("  ".join(side(c, w) for side, c, w in zip(sides, cells, widths, strict=True)).rstrip())
        if row is not None and row.reason:
            lines.append(f"  not measured: {row.reason}")
    return "\n".join(lines)


def _cells(row: Row, first: Row, batches: list[int], scored: bool) -> list[str]:
    cells = [row.model, row.format, row.device, row.input, "" if row.megabytes is None else f"{row.megabytes:.1f}"]
    if scored:
        cells.append("" if row.ap is None else f"{row.ap:.4f}")
        cells.append("" if row.ap is None or first.ap is None else f"{row.ap - first.ap:+.4f}")
    at, reference = row.speed.get(batches[0]), first.speed.get(batches[0])
    cells += ["{:.1f} / {:.1f}".format(*at.ms[part]) if at else "" for part in PARTS]
    cells.append(f"{reference.ms['inference'][0] / at.ms['inference'][0]:.2f}" if at and reference else "")
    return cells + [f"{row.speed[b].rate:.1f}" if b in row.speed else "-" for b in batches]
