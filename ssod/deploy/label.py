"""`ssod label`: pseudo labels of a model for any number of images, in files that other programs read.

Images are labelled in parts, each written whole or not at all. Started again, a run goes on with the parts that are
missing; under torchrun every rank takes its share of them. When all are there, rank 0 writes them out one after the
other. What a part holds depends on its images alone, so the result is the same bytes however often the run was
stopped and however many ranks took part.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from tqdm import tqdm

from ssod import dist
from ssod.data.image import ImageError, image_size
from ssod.data.samples import Sample
from ssod.deploy.asked import Asked, asked
from ssod.deploy.exported import Exported, Loaded, load_model
from ssod.deploy.formats import kind_of
from ssod.deploy.infer import Inference, detect, pick_device
from ssod.deploy.label_plan import Plan, make_plan, read_plan
from ssod.deploy.label_writers import WRITERS, Counts
from ssod.deploy.onnx_model import device_of_rank
from ssod.detectors.base import Detector
from ssod.errors import Fault, UserError, did_you_mean
from ssod.files import replacing
from ssod.modes import LabelConfig
from ssod.structures import Instances
from ssod.zoo.fetch import resolve

_POLL = 0.5  # seconds between looks for what another rank does


@dataclass
class Labeled:
    """What a run left: counts, the data YAML that reads the labels, and whether all had been done before."""

    folder: Path
    counts: Counts
    data_yaml: Path
    before: bool = False

    def text(self) -> str:
        c = self.counts
        lines = [f"{c.images} images labelled, {c.boxes} boxes, {c.empty} images without any"]
        lines += [f"  {name:<20} {count}" for name, count in c.boxes_of_class.items()]
        if c.unreadable:
            lines.append(f"{c.unreadable} images could not be read ({self.folder / 'unreadable.txt'} lists them)")
        lines.append(f"{'there already: ' if self.before else ''}{self.data_yaml} describes the labels as 'train'")
        return "\n".join(lines)


def label(config: LabelConfig) -> Labeled | None:
    """Label all images of `config.source` into `config.out`; None on ranks other than the first.

    Raises UserError for a source without images, unknown classes, a folder that holds labels of other settings, and
    for what an exported model cannot give.
    """
    config = config.model_copy(update={"model": str(resolve(config.model))})
    device = _join(config)
    try:
        model = load_model(config.model, config.weights, device)
        names = model.names
        _refuse_broken(model.detector, config.model)
        thresholds, wanted = _wanted(config, model)
        how = model.how(wanted, config.imgsz, config.batch, config.workers)
        settings = _settings(config, names, thresholds, how)
        out = Path(config.out)
        done = _done(out, settings)
        if done is not None:
            return done if dist.is_main() else None
        plan = _plan(config, out, settings)
        if plan is None:
            return None
        _label_parts(model.detector, plan, how, thresholds)
        if not dist.is_main():
            return None
        _wait_for_others(plan)
        return _write(plan, out, names)
    finally:
        dist.close()


def _join(config: LabelConfig) -> str | int:
    """Join the other ranks, if there are any, and say where this one's model runs.

    Formats that PyTorch does not run have devices of their own, which say nothing about how the ranks meet.
    """
    kind = kind_of(config.model)
    if kind not in ("onnx", "openvino"):
        return str(dist.init(pick_device(config.device)))
    dist.init(torch.device("cpu"))
    if kind == "onnx" and dist.world() > 1:
        return device_of_rank(config.device, int(os.environ.get("LOCAL_RANK", "0")))
    return config.device


def _wanted(config: LabelConfig, model: Loaded) -> tuple[list[float], Asked]:
    """The lowest score of each class, and what the model is asked for: an exported one has its own NMS and limits.

    Raises UserError for thresholds that are fixed otherwise in an exported model.
    """
    thresholds = class_thresholds(config.conf, model.names)
    given, lowest = config.given_limits(), min(thresholds)
    if given["conf"] is not None:
        given["conf"] = lowest
    wanted = asked(model.card, model.path, **given, default_conf=lowest)
    return [max(t, wanted.conf) for t in thresholds], wanted


def _refuse_broken(detector: Detector | Exported, path: str) -> None:
    """A network that is not finite finds nothing anywhere, and every image would be written as background."""
    for name, tensor in detector.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise Fault(f"{path}: {name} is not finite, the network has diverged. Take an earlier checkpoint.")


def class_thresholds(conf: float | Mapping[str, float], names: Sequence[str]) -> list[float]:
    """The lowest score of each class. A mapping names classes; `default` stands for those it does not name."""
    if not isinstance(conf, Mapping):
        conf = {"default": conf}
    for key, value in conf.items():
        if key not in names and key != "default":
            raise UserError(
                f"conf: the model has no class {key!r}.{did_you_mean(key, names)} It knows {', '.join(names)}."
            )
        if not 0 <= value <= 1:
            raise UserError(f"conf={value} for {key}: a score lies between 0 and 1.")
    missing = [name for name in names if name not in conf]
    if missing and "default" not in conf:
        raise UserError(f"conf says nothing about {', '.join(missing)}; add them, or conf.default=0.5 for the rest.")
    return [float(conf[name] if name in conf else conf["default"]) for name in names]


def _settings(config: LabelConfig, names: list[str], thresholds: list[float], how: Inference) -> dict[str, Any]:
    """Everything that decides what the output holds; no time and no path of this machine but the source's."""
    return {
        "model": Path(config.model).name,
        "model_sha256": _digest(Path(config.model)),
        "weights": config.weights,
        "source": config.source,
        "format": config.format,
        "conf": dict(zip(names, thresholds, strict=True)),
        "iou": how.iou,
        "max_det": how.max_det,
        "imgsz": how.imgsz,
        "scores": config.scores,
        "save_interval": config.save_interval,
    }


def _digest(model: Path) -> str:
    """SHA-256 of a model's file; of an OpenVINO model of all files of its folder, one after the other."""
    folder = model if model.is_dir() else model.parent if model.suffix == ".xml" else None
    digest = hashlib.sha256()
    for path in [model] if folder is None else sorted(p for p in folder.iterdir() if p.is_file()):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _done(out: Path, settings: dict[str, Any]) -> Labeled | None:
    """The result of an earlier, finished run with the same settings. Raises UserError where they were others."""
    file = out / "label.json"
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before, counts = dict(content["settings"]), TypeAdapter(Counts).validate_python(content["counts"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{file} is damaged or not by `ssod label`; remove it to label anew.") from None
    _refuse_other(before, settings, out)
    return Labeled(out, counts, out / "data.yaml", before=True)


def _plan(config: LabelConfig, out: Path, settings: dict[str, Any]) -> Plan | None:
    """Rank 0 makes the plan, or finds that of a run that was stopped; the other ranks wait for it.

    They poll files instead of waiting in a collective call: listing millions of images, or a slower rank, may take
    longer than any time limit of those. None where the first rank has finished alone in the meantime.
    """
    plan = read_plan(out / "work")
    if plan is None and dist.is_main():
        plan = make_plan(config.source, out / "work", settings, config.save_interval, by_stem=config.format != "coco")
    while plan is None:
        if (out / "label.json").is_file():
            return None
        time.sleep(_POLL)
        plan = read_plan(out / "work")
    _refuse_other(plan.settings, settings, out)
    return plan


def _refuse_other(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    for key in new:
        if old.get(key) != new[key]:
            raise UserError(
                f"{out} holds labels made with {key}={old.get(key)}, not {new[key]}; give another out=, or remove it."
            )


def _label_parts(detector: Detector | Exported, plan: Plan, how: Inference, thresholds: list[float]) -> None:
    """Label this rank's share of the missing parts: those whose number, divided by the ranks, leaves its own."""
    missing = plan.missing()
    own = [part for part in missing if part % dist.world() == dist.rank()]
    before = plan.parts - len(missing)
    if before and dist.is_main():
        print(f"going on: {before} of {plan.parts} parts were done before")
    bar = tqdm(total=plan.images // dist.world(), unit="image", disable=None if dist.is_main() else True)
    for part in own:
        rows = label_images(detector, plan.base, plan.images_of(part), how, thresholds)
        with replacing(plan.part_file(part)) as stream:
            stream.writelines(json.dumps(row, separators=(",", ":")).encode() + b"\n" for row in rows)
        bar.update(len(rows))
    bar.close()


def label_images(
    detector: Detector | Exported, base: Path, files: Sequence[str], how: Inference, thresholds: Sequence[float]
) -> list[dict[str, Any]]:
    """A row for each file below `base`: {"file", "width", "height", "objects": [[label, x1, y1, x2, y2, score,
    quality or None], ...]} in source pixels, best first, or {"file", "error"} for one that cannot be read."""
    rows: list[dict[str, Any]] = []
    samples: list[Sample] = []
    places: list[int] = []  # of each sample, its row
    for file in files:
        row: dict[str, Any] = {"file": Path(file).as_posix()}
        try:
            width, height = image_size(base / file)
            row |= {"width": width, "height": height, "objects": []}
            places.append(len(rows))
            samples.append(Sample.unlabeled(base / file, len(samples) + 1, width, height))
        except ImageError as error:
            row["error"] = error.reason
        rows.append(row)
    bad: list[tuple[str, str]] = []
    for index, found in detect(detector, samples, how, bad):
        rows[places[index]]["objects"] = _objects(found, thresholds, str(samples[index].path))
    row_of = {str(s.path): place for s, place in zip(samples, places, strict=True)}
    for path, reason in bad:
        rows[row_of[path]] = {"file": rows[row_of[path]]["file"], "error": reason}
    return rows


def _objects(found: Instances, thresholds: Sequence[float], path: str) -> list[list[float | None]]:
    """Detections above their class's threshold, rounded to what a file needs: 1/100 pixel, scores to 5 digits."""
    assert found.scores is not None
    columns = [found.boxes, found.scores[:, None]] + ([found.quality[:, None]] if found.quality is not None else [])
    table = torch.cat([c.double() for c in columns], dim=1)  # [N, 5 or 6]
    if not torch.isfinite(table).all():
        raise Fault(f"{path}: the network found a box or score that is not finite. It has diverged; take another.")
    out: list[list[float | None]] = []
    for label_, row in zip(found.labels.tolist(), table.tolist(), strict=True):
        x1, y1, x2, y2 = (round(v, 2) for v in row[:4])
        if row[4] >= thresholds[label_] and x2 > x1 and y2 > y1:
            out.append([label_, x1, y1, x2, y2, round(row[4], 5), round(row[5], 5) if len(row) > 5 else None])
    return out


def _wait_for_others(plan: Plan) -> None:
    missing = plan.missing()
    if missing:
        print(f"waiting for {len(missing)} parts of other ranks")
    while missing:
        time.sleep(_POLL)
        missing = plan.missing()


def _write(plan: Plan, out: Path, names: list[str]) -> Labeled:
    """Write the parts out in the format asked for, then the summary that says that all is done."""
    counts = Counts(boxes_of_class=dict.fromkeys(names, 0))
    with replacing(out / "unreadable.txt") as stream:
        stream.writelines(f"{line}\n".encode("utf-8", "backslashreplace") for line in plan.left_out)
        counts.unreadable = len(plan.left_out)
        for row in plan.rows():
            counts.add(row, names)
            if "error" in row:
                stream.write(f"{row['file']}: {row['error']}\n".encode("utf-8", "backslashreplace"))
    if counts.images == 0:
        raise UserError(f"none of the {counts.unreadable} images could be read ({out / 'unreadable.txt'} says why).")
    WRITERS[plan.settings["format"]](plan, out, names)
    summary = {"settings": plan.settings, "counts": vars(counts)}
    with replacing(out / "label.json") as stream:
        stream.write(json.dumps(summary, indent=1).encode())
    shutil.rmtree(plan.folder)
    return Labeled(out, counts, out / "data.yaml")
