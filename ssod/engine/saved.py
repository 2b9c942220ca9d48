"""What a checkpoint holds of a run, and a run put back to where it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssod import __version__
from ssod.checkpoint import FORMAT
from ssod.engine.optim import put_back
from ssod.errors import UserError

if TYPE_CHECKING:
    from ssod.engine.trainer import SemiTrainer


def content_of(trainer: SemiTrainer, whole: bool) -> dict[str, Any]:
    """The networks, and with `whole` all that resuming needs. Random numbers are not among it: those of a step follow
    from its number (ssod.engine.draws)."""
    content: dict[str, Any] = {
        "format": FORMAT,
        "spec": trainer.strategy.student.spec,
        "names": trainer.data.names,
        "imgsz": trainer.config.imgsz,
        "use": trainer.best["use"],
        "metrics": {"best": trainer.best, "step": trainer.step, "seed": trainer.config.seed, "ssod": __version__},
        "networks": {n: m.state_dict() for n, m in trainer.strategy.networks().items()},
    }
    if whole:
        content["train"] = {
            "step": trainer.step,
            "config": trainer.config.model_dump(),
            "strategy": trainer.strategy.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "best": trainer.best,
            "since_best": trainer.since_best,
            "history": trainer.history,
            "bad": trainer.bad,
            "rollbacks": trainer.rollbacks,
            "observers": {o.name: o.state_dict() for o in trainer.observers},
        }
    return content


def restore(trainer: SemiTrainer, train: dict[str, Any]) -> None:
    """Put everything back that `content_of` holds under "train"."""
    trainer.strategy.load_state_dict(train["strategy"])
    put_back(trainer.optimizer, train["optimizer"])
    trainer.scaler.load_state_dict(train["scaler"])
    trainer.step, trainer.best, trainer.since_best = train["step"], train["best"], train["since_best"]
    trainer.history, trainer.bad = train["history"], train["bad"]
    trainer.rollbacks = train.get("rollbacks", 0)  # older versions knew none, and watched less
    for observer in trainer.observers:
        if state := train.get("observers", {}).get(observer.name):
            observer.load_state_dict(state)


def refuse_finished(trainer: SemiTrainer, train: dict[str, Any], folder: Path) -> None:
    """Raises UserError for a run that has nothing left to do."""
    done = ["metrics.json"] + ["baseline.json"] * (trainer.config.baseline == "auto")  # what comes after the last step
    if train["step"] >= trainer.plan.iters and all((folder / name).is_file() for name in done):
        raise UserError(
            f"{folder} is finished ({train['step']} of {trainer.plan.iters} steps). "
            "To go on, give a larger iters= or epochs=."
        )
