"""What watches a run and changes nothing in it: diagnosis, audit, the film of pseudo labels.

An observer is told what the user's callbacks are told (ssod.engine.callbacks), before them, and keeps what it knows in
the checkpoint, so that a resumed run goes on watching where it stopped. A new one is a class here in the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ssod.engine.callbacks import Callback
from ssod.strategies.base import StepOutput
from ssod.structures import SemiBatch

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer


class Observer:
    """Base: watches nothing. It may raise UserError to stop the run; it never draws from the global random numbers."""

    name = ""  # its key in the checkpoint

    def events(self) -> dict[str, Callback]:
        """The functions to call, by event."""
        return {}

    def note(self, batch: SemiBatch, out: StepOutput) -> None:
        """Look at a batch of the step, on its device, and at what it gave; reading numbers from there would make a GPU
        wait."""

    def summary(self) -> dict[str, Any]:
        """What it adds to metrics.json."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` gave."""


def build_observers(trainer: SemiTrainer) -> list[Observer]:
    """The observers that the config asks for."""
    from ssod.engine.watch.audit import Audit
    from ssod.engine.watch.board import Board
    from ssod.engine.watch.diagnose import Diagnosis
    from ssod.engine.watch.film import Film

    found: list[Observer] = [Diagnosis(trainer)]
    if trainer.data.audit:
        found.append(Audit(trainer))
    if trainer.config.baseline == "auto":
        from ssod.engine.baseline import Baseline

        found.append(Baseline(trainer))
    if trainer.config.film:
        found.append(Film(trainer))
    found.append(Board(trainer))
    return found
