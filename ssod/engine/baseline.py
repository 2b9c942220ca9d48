"""baseline=auto: the matched supervised control of a run, trained after it, and what the run has gained over it.

The control is strategy=supervised with everything else as it was: labelled images and their order, views, detector,
weights to start from, optimizer, schedule, seed, validations, and as many steps. Where the strategy's teacher is a
moving average, the control keeps one too: what averaging alone gains is not due to unlabelled images.

Where the steps of the burn-in are those of the control to the last bit, they are not done twice: at their end
RUN/baseline becomes a run folder of the control, stopped there, and after the run it is resumed. Otherwise (RPL's
stages have schedules of their own; LSM, PRC and co-mining learn from labelled images in their own way) the control is
trained from its first step.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from ssod import dist
from ssod.checkpoint import save_checkpoint
from ssod.config import to_yaml, validate
from ssod.engine.callbacks import Callback, State
from ssod.engine.run import lock_run
from ssod.engine.saved import content_of
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.observers import Observer
from ssod.files import replacing
from ssod.modes import TrainConfig
from ssod.report.compare_runs import Comparison, compare_runs
from ssod.report.table import Table, read_rows
from ssod.strategies.base import Plan, Strategy
from ssod.strategies.teacher_student import TeacherStudent
from ssod.structures import SemiBatch

FOLDER = "baseline"  # in the run folder: the control's own
FILE = "baseline.json"  # in the run folder: there when the control is finished and compared


class Baseline(Observer):
    """Keeps the end of the burn-in for the control, where they share it."""

    name = "baseline"

    def __init__(self, trainer: SemiTrainer) -> None:
        self.trainer = trainer

    def events(self) -> dict[str, Callback]:
        return {"on_train_start": self._begin, "on_burn_in_end": self._keep}

    def _begin(self, state: State) -> None:
        """With exist_ok=true there may be the control of an earlier run."""
        if dist.is_main() and state.step == 0:
            shutil.rmtree(state.folder / FOLDER, ignore_errors=True)
            (state.folder / FILE).unlink(missing_ok=True)

    def _keep(self, state: State) -> None:
        if dist.is_main() and shares_burn_in(self.trainer.strategy):
            begin_at_burn_in(self.trainer, state.folder / FOLDER)


def shares_burn_in(strategy: Strategy) -> bool:
    """Whether the steps of the burn-in are, to the last bit, those of the supervised control."""
    plain = (Strategy.supervised, TeacherStudent.supervised)  # the latter counts the labels besides
    learnt = sum(p.numel() for p in strategy.parameters() if p.requires_grad)
    return (
        not strategy.plan.two_stages
        and type(strategy).forward is Strategy.forward
        and type(strategy).supervised in plain
        and type(strategy).after_step is Strategy.after_step
        and learnt == sum(p.numel() for p in strategy.student.parameters() if p.requires_grad)
    )


def control_config(config: TrainConfig, strategy: Strategy) -> TrainConfig:
    """The config of the control. A run that begins with a given teacher is compared with what goes on from it."""
    plan: Plan = strategy.plan
    teacher = config.teacher_weights[0] if isinstance(config.teacher_weights, list) else config.teacher_weights
    changed = {
        "strategy": {"name": "supervised", "ema": strategy.teacher is not None and not plan.two_stages},
        "iters": plan.iters,
        "epochs": None,
        "burn_in": plan.burn_in,  # when the average begins, and a validation comes
        "weights": teacher or config.weights,
        "teacher_weights": None,
        "patience": 0,
        "baseline": "none",
        "resume": False,
    }
    return validate(TrainConfig, config.model_dump() | changed, "")


def begin_at_burn_in(trainer: SemiTrainer, folder: Path) -> None:
    """Make `folder` a run folder of the control, stopped where the trainer stands: at the end of the burn-in."""
    config = control_config(trainer.config, trainer.strategy)
    content = content_of(trainer, whole=True)
    train = content["train"]
    owned = ("student.", "teacher.")  # what else a strategy remembers, the control has not
    train["strategy"] = {k: v for k, v in train["strategy"].items() if k.startswith(owned)}
    train |= {"config": config.model_dump(), "observers": {}}
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "weights").mkdir(parents=True)
    (folder / "args.yaml").write_text(to_yaml(config), encoding="utf-8")
    _copy_rows(trainer.folder / "results.csv", folder / "results.csv", trainer.step)
    shutil.copyfile(trainer.folder / "weights" / "best.pt", folder / "weights" / "best.pt")
    save_checkpoint(content, folder / "weights" / "last.pt")  # last: from here on there is something to resume


def _copy_rows(source: Path, target: Path, until_step: int) -> None:
    rows, _ = read_rows(source)
    table = Table(target)
    for row in rows:
        if int(row["step"]) <= until_step:
            table.add({k: v for k, v in row.items() if v})


class Control(SemiTrainer):
    """Trains the control in a folder of its own, up to the step that the run itself has come to."""

    def __init__(self, config: TrainConfig, folder: Path, steps: int) -> None:
        self._into, self._steps = folder, steps
        super().__init__(config)

    def _new_folder(self) -> Path:
        (self._into / "weights").mkdir(parents=True, exist_ok=True)
        lock_run(self._into)
        return self._into

    def _batches(self) -> Iterator[list[SemiBatch]]:
        return islice(super()._batches(), max(0, self._steps - self.step))


def run_baseline(trainer: SemiTrainer) -> dict[str, Any]:
    """Train what is missing of the control of a finished run, compare the two, and write FILE; what FILE holds, without
    the history, which is also "baseline" of metrics.json. Raises Stopped when asked to stop."""
    folder = trainer.folder / FOLDER
    if dist.from_main(lambda: _steps_of(folder)) != trainer.step:
        control = build_control(trainer, folder)
        shared = f" from step {control.step}, the burn-in being the same" if control.step else ""
        trainer.say(f"baseline: the supervised control, {trainer.step} steps{shared}, into {folder}")
        control.run()
    return dist.from_main(lambda: _report(trainer, folder))


def build_control(trainer: SemiTrainer, folder: Path) -> Control:
    """The control, standing where its own folder stopped, or at step 0."""
    if not dist.from_main(lambda: any((folder / "weights" / n).is_file() for n in ("last.pt", "previous.pt"))):
        return Control(control_config(trainer.config, trainer.strategy), folder, trainer.step)
    own = {"resume": str(folder), "iters": trainer.plan.iters}
    own |= {k: getattr(trainer.config, k) for k in ("device", "workers", "plots", "data_path")}
    return Control(validate(TrainConfig, own, ""), folder, trainer.step)


def _steps_of(folder: Path) -> int | None:
    """How many steps the finished control has done; None where it is not finished."""
    file = folder / "metrics.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["steps"]) if file.is_file() else None


def _report(trainer: SemiTrainer, folder: Path) -> dict[str, Any]:
    comparison = compare_runs(trainer.folder, folder)
    trainer.say(f"what the run gained over its supervised control:\n{comparison.text()}")
    result = as_result(comparison)
    _write(trainer.folder / FILE, result | {"history": comparison.baseline.history})
    file = trainer.folder / "metrics.json"
    _write(file, json.loads(file.read_text(encoding="utf-8")) | {"baseline": result})
    return result


def as_result(comparison: Comparison) -> dict[str, Any]:
    """Figures and gains at the end, which nothing has selected, and those of the two best.pt."""
    control = comparison.baseline
    return {
        "folder": str(control.folder),
        "steps": control.steps,
        "network": control.network,
        "AP": control.final,
        "gain": comparison.gain,
        "per_class": comparison.per_class,
        "best": control.best,
        "best_step": control.best_step,
        "best_gain": comparison.best_gain,
    }


def _write(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())
