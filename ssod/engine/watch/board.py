"""What TensorBoard gets besides the columns of results.csv: curves of each class, and pictures.

Nothing is done where `tensorboard` is not installed, nor in any process but the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod.engine.callbacks import Callback, State
from ssod.engine.watch.audit import read_audit
from ssod.engine.watch.observers import Observer

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

CLASSES = 100  # with more than these there are no curves of each: nobody finds anything in 10 000
AUDITED = ("precision", "recall", "iou", "tau", "suggested_tau")


class Board(Observer):
    """After a validation: the AP of each class, what a strategy keeps by class, and what the audit found of each."""

    name = "board"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer

    def events(self) -> dict[str, Callback]:
        return {"on_val_end": self._write} if len(self.trainer.data.names) <= CLASSES else {}

    def _write(self, state: State) -> None:
        if writer(self.trainer) is None:
            return
        entry = self.trainer.history[-1]
        for network, figures in entry.items():
            if isinstance(figures, dict) and "per_class" in figures:
                by_class(self.trainer, f"AP_{network}", figures["per_class"], state.step)
        for number, values in entry.get("by_class", {}).items():
            by_class(self.trainer, f"by_class_{number}", values, state.step)
        audits = [a for a in read_audit(state.folder) if a["step"] == state.step]
        for number in AUDITED if audits else ():
            values = {name: c.get(number) for name, c in audits[-1]["classes"].items()}
            by_class(self.trainer, f"audit_{number}", values, state.step)


def writer(trainer: SemiTrainer) -> Any:
    """The run's SummaryWriter, None where there is none."""
    log = trainer.log
    return None if log is None or not log.active else log.events


def by_class(trainer: SemiTrainer, name: str, values: Mapping[str, float | None], step: int) -> None:
    """A curve a class, NAME/CLASS, in one section of the page; numbers that do not exist are left out."""
    events = writer(trainer)
    if events is None or len(trainer.data.names) > CLASSES:
        return
    for label, value in values.items():
        if value is not None and np.isfinite(value):
            events.add_scalar(f"{name}/{label}", value, step)


def picture(trainer: SemiTrainer, name: str, encoded: bytes, size: tuple[int, int], step: int) -> None:
    """A JPEG of (height, width). As JPEG: `add_image` would write a PNG, ten times as large."""
    events = writer(trainer)
    if events is None:
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(height=size[0], width=size[1], colorspace=3, encoded_image_string=encoded)
    events.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
