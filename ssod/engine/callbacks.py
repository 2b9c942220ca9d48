"""Functions of the user's that a run calls at fixed places of its loop. Without any, nothing is computed for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssod.engine.log import Averages
from ssod.errors import Fault, UserError, did_you_mean
from ssod.ops.views import map_boxes
from ssod.strategies.base import StepOutput
from ssod.structures import Instances, SemiBatch, View

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

EVENTS = {
    "on_train_start": "before the first step",
    "on_pseudo_labels": "after a step with unlabelled images: what the teacher saw on them",
    "on_step_end": "after every step",
    "on_log": "with every row of results.csv: what is in it",
    "on_burn_in_end": "once, when the supervised start is over and validated",
    "on_val_end": "after every validation",
    "on_save": "when a checkpoint has been written",
    "on_train_end": "when all files of the run are there; not where it was stopped",
}
Callback = Callable[["State"], object]


@dataclass(frozen=True)
class PseudoLabels:
    """What was done with one unlabelled image in one step, in pixels of the image (of the mosaic, where the views are
    made of one), on the CPU. Views that are rotated or sheared give boxes that enclose those of the view.

    path   the image
    found  the teacher's detections in the weak view, by descending score, before the strategy's threshold
    used   what the student learned from in the strong view; without scores where the strategy keeps none
    """

    path: Path
    found: Instances
    used: Instances


@dataclass(frozen=True)
class State:
    """What a callback is told.

    event    its name
    step     steps done
    folder   the run folder
    trainer  everything else; what is changed there changes the run
    metrics  of the last validation: {"student": {"AP": ..., "per_class": {...}}, "teacher": ...}; {} before the first
    losses   on_step_end: each loss of the step ("sup/cls", ...), already weighted; on_log: their means; else {}
    stats    the same of the other numbers that the log has ("pseudo/per_image", "pseudo/tau", ...); else {}
    pseudo   on_pseudo_labels: an entry for each unlabelled image of the step; none with strategies that draw no boxes
             (sed) or take them from labelled images, too (comining); else []
    file     on_save: the checkpoint; else None
    """

    event: str
    step: int
    folder: Path
    trainer: SemiTrainer
    metrics: dict[str, Any]
    losses: dict[str, float] = field(default_factory=dict)
    stats: dict[str, float] = field(default_factory=dict)
    pseudo: list[PseudoLabels] = field(default_factory=list)
    file: Path | None = None


class Callbacks:
    """The callbacks of a run, by event, called in the order in which they were added.

    Under torchrun every process calls its own; on_val_end and on_save come in the first alone, which does that work and
    has the metrics.
    """

    def __init__(self, *given: Mapping[str, Callback | Sequence[Callback]]) -> None:
        """Raises UserError for an event that does not exist and for what cannot be called."""
        self._of: dict[str, list[Callback]] = {}
        self._figures = Averages()
        self._pseudo: list[PseudoLabels] = []
        self._unlabeled = False  # whether the step had unlabelled images
        for event, functions in ((e, f) for one in given for e, f in one.items()):
            for function in functions if isinstance(functions, Sequence) else [functions]:
                self._add(event, function)

    def _add(self, event: str, function: Callback) -> None:
        if event not in EVENTS:
            raise UserError(f"'{event}' is not an event.{did_you_mean(event, EVENTS)} Events: {', '.join(EVENTS)}.")
        if not callable(function):
            raise UserError(
                f"the callback of {event} is a {type(function).__name__}; give a function of one argument, the state."
            )
        self._of.setdefault(event, []).append(function)

    def precede(self, events: Mapping[str, Callback]) -> None:
        """Add functions that are called before all others."""
        for event, function in events.items():
            self._of.setdefault(event, []).insert(0, function)

    def __call__(self, event: str, trainer: SemiTrainer, **more: Any) -> None:
        """Raises Fault, with its cause, where a callback raises; no other is called any more then."""
        functions = self._of.get(event, [])
        if not functions:
            return
        last = trainer.history[-1] if trainer.history else {}
        metrics = {k: v for k, v in last.items() if k not in ("step", "by_class")}
        state = State(event, trainer.step, trainer.folder, trainer, metrics, **more)
        for function in functions:
            try:
                function(state)
            except UserError:  # it stops the run on purpose
                raise
            except Exception as error:
                self._of = {}  # the checkpoint that a failing run writes is no reason to call more of them
                name = getattr(function, "__qualname__", type(function).__name__)
                raise Fault(
                    f"the callback {name} of {event} failed at step {trainer.step} and ended the run: "
                    f"{type(error).__name__}: {error}"
                ) from error

    def note(self, trainer: SemiTrainer, batch: SemiBatch, out: StepOutput) -> None:
        """Keep what a batch of the step gave, as far as a callback asks for it."""
        if "on_step_end" in self._of:
            self._figures.add({**out.losses, **out.stats})
        if "on_pseudo_labels" in self._of and batch.weak is not None and batch.strong is not None:
            self._unlabeled = True
            found, used = _in_source(out.found, batch.weak), _in_source(out.used, batch.strong)
            paths = [trainer.data.unlabeled[i].path for i in batch.weak.indices[: len(found)]]
            self._pseudo += map(PseudoLabels, paths, found, used)

    def step_end(self, trainer: SemiTrainer) -> None:
        """Call what waits for the end of a step, which is a state that training can be resumed from."""
        if self._unlabeled:
            pseudo, self._pseudo, self._unlabeled = self._pseudo, [], False
            self("on_pseudo_labels", trainer, pseudo=pseudo)
        if "on_step_end" in self._of:
            self.figures("on_step_end", trainer, self._figures.read())

    def figures(self, event: str, trainer: SemiTrainer, values: dict[str, float]) -> None:
        """Call an event that has numbers, the losses apart from the others."""
        losses = {k: v for k, v in values.items() if k.startswith(("sup/", "unsup/"))}
        self(event, trainer, losses=losses, stats={k: v for k, v in values.items() if k not in losses})


def _in_source(every: list[Instances], view: View) -> list[Instances]:
    """Objects of each image in the view's pixels -> in those of the images they were made of, on the CPU."""
    inverse = torch.linalg.inv(view.matrices.cpu())  # [B, 3, 3]
    moved = [one.detach().to("cpu") for one in every]
    return [one.with_boxes(map_boxes(one.boxes, inverse[i])) for i, one in enumerate(moved)]
