"""audit=5%: how right the pseudo labels are, on labelled images that the run treats as unlabelled ones.

The images are in the unlabelled set, without their boxes; these are in `TrainData.audit` alone, which nothing but this
file reads. At every validation the network that labels looks at the images as they are, and a line of FILE is written:

    {"step", "network": "teacher" | "student", "images": n, "classes": {name: {
        "true":          annotated boxes,
        "found":         detections above 0.05,
        "kept":          those that reach the threshold in force, null without one; precision, recall and iou likewise,
        "tau":           the threshold in force, null where there is none,
        "precision":     share of the kept boxes that are right, null where none is kept,
        "recall":        share of the true boxes that a kept one has found,
        "iou":           mean overlap of the right kept boxes with their true boxes,
        "suggested_tau": the threshold with the best F1, null with too few boxes to say,
        "calibration":   [{"low", "high", "n", "right"}, ...] ten bins of the score of all detections}},
     "all": the same without tau and suggested_tau, "suggested_tau": one threshold for all classes, or null}

A box is right as ssod.engine.watch.audit_metric says.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ssod import dist
from ssod.data.evalset import EvalLoader
from ssod.data.samples import Sample
from ssod.deploy.infer import to_source
from ssod.detectors.base import Detector
from ssod.engine.callbacks import Callback, State
from ssod.engine.watch.audit_metric import FOUND, figures, judge, suggested_threshold
from ssod.engine.watch.observers import Observer
from ssod.files import replacing
from ssod.nn.precision import autocast
from ssod.report.sound import AuditLine, flaw
from ssod.structures import Instances

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

FILE = "audit.jsonl"


class Audit(Observer):
    """Measures at every validation, in the first process alone, and says at the end which thresholds fit."""

    name = "audit"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer

    def events(self) -> dict[str, Callback]:
        return {"on_train_start": self._begin, "on_val_end": self._measure, "on_train_end": self._suggest}

    def _begin(self, state: State) -> None:
        """Lines after the checkpoint that the run goes on from are measured again."""
        if dist.is_main():
            known = [line for line in read_audit(state.folder) if line["step"] <= state.step]
            with replacing(state.folder / FILE) as file:
                file.write("".join(json.dumps(line) + "\n" for line in known).encode())

    def _measure(self, state: State) -> None:
        strategy = self.trainer.strategy
        begun = strategy.teacher is not None and state.step >= strategy.plan.burn_in
        network = "teacher" if begun else "student"
        found = list(labelled(self.trainer, strategy.networks()[network]))
        tau = strategy.thresholds_in_force()
        entry: dict[str, Any] = {"step": state.step, "network": network, "images": len(found)}
        entry |= measured(found, self.trainer.data.names, None if tau is None else tau.double().cpu().numpy())
        with open(state.folder / FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        numbers = {f"audit/{k}": entry["all"][k] for k in ("precision", "recall", "iou")}
        if self.trainer.log is not None:
            self.trainer.log.row(state.step, {k: v for k, v in numbers.items() if v is not None})
        self.trainer.say(spoken(entry))

    def _suggest(self, state: State) -> None:
        if dist.is_main() and (lines := read_audit(state.folder)):
            self.trainer.say(suggestion(lines[-1]))


def read_audit(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder, oldest first; [] where it has none. One that a killed run left half written is not
    among them."""
    file, out = folder / FILE, []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if flaw(AuditLine, entry) is None:
                out.append(entry)
    return out


def labelled(trainer: SemiTrainer, by: Detector) -> Iterator[tuple[Sample, Instances]]:
    """(image, what the strategy makes of a network's detections on it, in its pixels, on the CPU) of each audited image
    that can be read. Puts the network's mode back."""
    was_training = by.training
    by.eval()
    samples = trainer.data.audit
    try:
        for view in EvalLoader(samples, trainer.config.imgsz, trainer.config.batch):
            with torch.inference_mode(), autocast(trainer.dtype, trainer.device):
                found = trainer.strategy.label(view.to(trainer.device), FOUND, by)
            for index, one, matrix in zip(view.indices, found, view.matrices, strict=True):
                sample = samples[index]
                yield sample, to_source(one.to("cpu"), matrix, (sample.height, sample.width))
    finally:
        by.train(was_training)


def measured(found: list[tuple[Sample, Instances]], names: list[str], tau: np.ndarray | None) -> dict[str, Any]:
    """ "classes", "all" and "suggested_tau" of a line. tau: thresholds in force [K], None where there is none."""
    judged = judge(found, len(names))
    classes = {}
    for k, name in enumerate(names):
        own = judged.of(k)
        classes[name] = figures(own, None if tau is None else own.scores >= tau[k])
        classes[name] |= {"tau": None if tau is None else float(tau[k]), "suggested_tau": suggested_threshold(own)}
    every = figures(judged, None if tau is None else judged.scores >= tau[judged.labels])
    return {"classes": classes, "all": every, "suggested_tau": suggested_threshold(judged)}


def spoken(entry: dict[str, Any]) -> str:
    """The console's line: "audit, teacher: precision 0.81, recall 0.55 of 34 true boxes in 12 images; ..." """
    every, right = entry["all"], sum(b["right"] for b in entry["all"]["calibration"])
    of = f"of {every['true']} true boxes in {entry['images']} images"
    share = f"{right / every['true']:.2f}" if every["true"] else "-"
    if every["kept"] is None:
        return f"audit, {entry['network']}: no threshold in force; above {FOUND} it finds {share} {of}"
    taus = [c["tau"] for c in entry["classes"].values()]
    low, high = min(taus), max(taus)
    tau = f"{low:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
    return (
        f"audit, {entry['network']}: precision {_two(every['precision'])}, recall {_two(every['recall'])} {of}; "
        f"{every['kept']} boxes kept at tau {tau}, mean IoU of the right ones {_two(every['iou'])}; above {FOUND} it "
        f"finds {share}"
    )


def suggestion(entry: dict[str, Any]) -> str:
    """The console's last line: the threshold of each class with the best F1 in a line of FILE."""
    true, parts = entry["all"]["true"], []
    for name, c in entry["classes"].items():
        if c["suggested_tau"] is not None:
            parts.append(f"{name} {c['suggested_tau']:.2f}" + ("" if c["tau"] is None else f" (now {c['tau']:.2f})"))
    if entry["suggested_tau"] is None:
        return (
            f"audit: {true} true boxes, and what was found of them, are too few to suggest thresholds; hide more images"
        )
    by_class = f"by class {', '.join(parts)}; " if parts else ""
    return (
        f"audit: thresholds with the best F1 on {true} true boxes: {by_class}one for all {entry['suggested_tau']:.2f}"
    )


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
