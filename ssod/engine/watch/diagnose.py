"""What is going wrong in a run, said once, with numbers and a way out. docs/diagnosis.md lists the alarms."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssod import dist
from ssod.data.samples import SampleTable, class_counts
from ssod.detectors.convert import WeightsReport
from ssod.engine.callbacks import Callback, State
from ssod.engine.watch.diagnosis.alarm import Alarm
from ssod.engine.watch.diagnosis.classes import ClassSupply
from ssod.engine.watch.diagnosis.course import Explosion, LostLabels, Waiting, teacher_behind, wrong_norms
from ssod.engine.watch.diagnosis.probe import norm_gaps, teacher_scores
from ssod.engine.watch.diagnosis.start import classes_differ, missing_labels, slow_teacher
from ssod.engine.watch.diagnosis.supply import Supply
from ssod.engine.watch.observers import Observer
from ssod.errors import UserError
from ssod.files import replacing
from ssod.strategies.base import StepOutput
from ssod.structures import SemiBatch, View

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

FILE = "diagnosis.jsonl"  # in the run folder, a line an alarm
KEPT = 16  # unlabelled images that the teacher is asked about for an alarm


class Diagnosis(Observer):
    """Says each alarm once: in the console, as a line {"step", "code", "level", "text", "numbers"} of FILE, and in
    metrics.json. With strict=true an alarm of level "error" raises UserError; a run that is resumed goes on past it.

    Under torchrun the first process watches its own share of the images.
    """

    name = "diagnosis"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer
        self.alarms: list[dict[str, Any]] = []  # said so far, as in FILE
        labeled, names = SampleTable.of(trainer.data.labeled), trainer.data.names
        images, _, crowd = labeled.objects()
        self._boxes = np.bincount(images[~crowd], minlength=len(labeled))  # of each labelled image
        self._labels = class_counts(labeled, len(names))  # [K]
        self._views: deque[View] = deque()  # the last weak views
        self._supply, self._explosion, self._lost, self._waiting = Supply(), Explosion(), LostLabels(), Waiting()
        self._classes = ClassSupply(torch.from_numpy(self._labels / len(labeled)).float(), names)

    def events(self) -> dict[str, Callback]:
        if not dist.is_main():
            return {}
        return {"on_train_start": self._on_start, "on_log": self._on_log, "on_val_end": self._on_val}

    def note(self, batch: SemiBatch, out: StepOutput) -> None:
        view = batch.labeled
        self._lost.note(int(self._boxes[view.indices].sum()), sum(map(len, view.targets)))
        self._classes.note(out.used)
        if batch.weak is not None:
            self._views.append(batch.weak)
            while sum(map(len, self._views)) - len(self._views[0]) >= KEPT:
                self._views.popleft()

    def summary(self) -> dict[str, Any]:
        return {"diagnosis": self.alarms}

    def state_dict(self) -> dict[str, Any]:
        return {
            "alarms": self.alarms,
            "supply": asdict(self._supply),
            "explosion": asdict(self._explosion),
            "lost": asdict(self._lost),
            "classes": self._classes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.alarms = self.alarms or list(state["alarms"])  # what was said stays said where a run goes back
        self._supply = Supply(**state["supply"])
        self._explosion = Explosion(**state["explosion"])
        self._lost = LostLabels(**state["lost"])
        self._classes.load_state_dict(state["classes"])

    # -- when it looks

    def _on_start(self, state: State) -> None:
        with replacing(self.trainer.folder / FILE) as file:  # without what came after the checkpoint
            file.write("".join(map(_line, self.alarms)).encode())
        self._say(state.step, self._of_start())

    def _on_log(self, state: State) -> None:
        self._say(state.step, self._of_line(state.step, state.losses | state.stats))

    def _on_val(self, state: State) -> None:
        self._say(state.step, self._of_validation(state.step))

    # -- at what

    def _of_start(self) -> Iterator[Alarm | None]:
        trainer = self.trainer
        data, strategy = trainer.data, trainer.strategy
        if isinstance(trainer.note, WeightsReport):
            yield classes_differ(trainer.note.classes, strategy)
        val = class_counts(data.val, len(data.names))
        yield from missing_labels(self._labels, val, data.names, len(data.labeled))
        yield slow_teacher(strategy)

    def _of_line(self, step: int, values: dict[str, float]) -> Iterator[Alarm | None]:
        trainer, config = self.trainer, self.trainer.config
        strategy = trainer.strategy
        yield self._explosion.look(values, _norm(strategy.student), config.lr0, config.clip_grad)
        yield self._lost.look()
        yield self._waiting.look(values, config.workers, bool(config.cache))
        wanted = float(self._labels.sum()) / len(self._boxes)
        judge = partial(teacher_scores, strategy, self._views)
        yield from self._supply.look(values, step, trainer.plan, wanted, strategy.options, judge)

    def _of_validation(self, step: int) -> Iterator[Alarm | None]:
        strategy, plan = self.trainer.strategy, self.trainer.plan
        yield teacher_behind(self.trainer.history, plan, strategy.decay_at(step))
        if strategy.teacher is not None and self._views:
            yield wrong_norms(norm_gaps(strategy.teacher, self._views[-1]))
            yield from self._classes.look()

    def _say(self, step: int, alarms: Iterator[Alarm | None]) -> None:
        for alarm in alarms:
            if alarm is None or any(alarm.code == a["code"] for a in self.alarms):
                continue
            line = {"step": step} | asdict(alarm)
            line = {k: line[k] for k in ("step", "code", "level", "text")} | {"numbers": _finite(alarm.numbers)}
            self.alarms.append(line)
            with open(self.trainer.folder / FILE, "a", encoding="utf-8") as file:
                file.write(_line(line))
            self.trainer.say(f"{alarm.level.upper()}: {alarm.text}")
            if alarm.level == "error" and self.trainer.config.strict:
                way = "resume= goes on past it" if step else "strict=false trains all the same"
                raise UserError(f"strict=true stops the run at step {step}, {alarm.code}: {alarm.text} ({way}.)")


def _norm(module: torch.nn.Module) -> float:
    """Of all learnt weights together."""
    weights: list[Tensor] = [p.detach() for p in module.parameters() if p.requires_grad]
    return float(torch.stack(torch._foreach_norm(weights)).norm()) if weights else 0.0


def _line(alarm: dict[str, Any]) -> str:
    return json.dumps(alarm) + "\n"


def _finite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: such a number becomes null."""
    return {k: _finite(v) if isinstance(v, Mapping) else v if math.isfinite(v) else None for k, v in numbers.items()}
