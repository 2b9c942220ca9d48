"""A run that diverges goes back to a checkpoint from before, and on at half the learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ssod import dist
from ssod.checkpoint import load_checkpoint
from ssod.engine.log import Logger
from ssod.engine.saved import restore
from ssod.engine.watch.diagnosis.course import Explosion
from ssod.errors import Fault, UserError

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer

MOST = 2  # times a run goes back; a quarter of the rate is not the remedy then
SLOWER = 0.5  # times the learning rate, each time


class Diverged(Exception):
    """Loss or weights explode. sound: the last step that was not seen to be part of it."""

    def __init__(self, why: str, sound: int) -> None:
        super().__init__(why)
        self.sound = sound


class Divergence:
    """Looks at the lines of the log, which all ranks have, for what the diagnosis calls `exploding`."""

    def __init__(self) -> None:
        self._explosion = Explosion()
        self._sound = 0

    def look(self, trainer: SemiTrainer, values: dict[str, float]) -> None:
        """Raises Diverged."""
        norm = torch.stack(torch._foreach_norm([p.detach() for p in trainer.strategy.student.parameters()])).norm()
        alarm = self._explosion.look(values, float(norm), trainer.config.lr0, trainer.config.clip_grad)
        if alarm is not None and alarm.code == "exploding":
            raise Diverged(alarm.text, self._sound)
        self._sound = trainer.step


def roll_back(trainer: SemiTrainer, log: Logger, error: Diverged) -> None:
    """Put the run back to its newest checkpoint of a sound step. Raises Fault where there is none, or too often."""
    done = trainer.rollbacks
    if done == MOST:
        raise Fault(f"{error} The run went back {MOST} times and diverged again; its weights are those of before.")
    content = dist.from_main(lambda: _sound(trainer, error.sound))
    if content is None:
        raise Fault(f"{error} There is no checkpoint from before; a smaller save_interval makes one.")
    failed = trainer.step
    restore(trainer, content)
    trainer.rollbacks = done + 1
    log.back_to(trainer.step)
    log.say(
        f"back from step {failed} to step {trainer.step}, and on with {SLOWER ** (done + 1):g} of the learning rate"
    )


def _sound(trainer: SemiTrainer, step: int) -> dict[str, object] | None:
    """What the newest readable checkpoint up to `step` holds of the run, or None."""
    for name in ("last.pt", "previous.pt"):
        try:
            content: dict[str, object] = load_checkpoint(trainer.folder / "weights" / name)["train"]
        except (UserError, OSError):
            continue
        if int(str(content["step"])) <= step:
            return content
    return None
