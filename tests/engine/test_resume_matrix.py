"""Stopped and resumed, or never stopped: the same run to the last bit.

Every strategy, with 0 and 2 workers, on 1 and 2 ranks, stopped by SIGTERM after a step and by SIGKILL in the middle of
one. And whatever is left out of a checkpoint makes another run: the comparison would notice.
"""

from __future__ import annotations

import csv
import gc
import os
import shutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod.checkpoint import load_checkpoint, save_checkpoint
from ssod.config import load_config
from ssod.engine import trainer as module
from ssod.engine.optim import lr_at
from ssod.engine.saved import content_of
from ssod.engine.signals import Stopped
from ssod.engine.trainer import SemiTrainer

Tiny = dict[str, Any]
FCOS = {"name": "fcos", "fpn_channels": 16, "head_convs": 0, "pre_nms": 50}
RETINANET = FCOS | {"name": "retinanet"}
# Faster R-CNN draws anchors and regions, Deformable DETR its dropout.
FRCNN = {"name": "faster_rcnn", "fpn_channels": 16, "box_head_width": 16, "train_proposals": 50, "test_proposals": 50}
DETR = {"name": "deformable_detr", "width": 32, "queries": 10, "encoder_layers": 1, "decoder_layers": 1}
BUCKET = {"codec": "bucket", "buckets": 6, "rank_by_quality": True}
RPL = {"name": "rpl", "threshold_on": "sqrt_pv", "tau": 0.05, "gamma1": 0.0, "teacher": "ema"}
# name: detector, strategy, the step (counted from 0) in which the signal comes
CASES: dict[str, tuple[Tiny, Tiny, int]] = {
    "supervised": (FRCNN, {"name": "supervised", "ema": True}, 5),
    "mean_teacher": (DETR, {"name": "mean_teacher", "tau_low": 0.01}, 5),
    "unbiased_teacher": (FRCNN, {"name": "unbiased_teacher", "tau": 0.02}, 5),
    "soft_teacher": (FRCNN, {"name": "soft_teacher"}, 5),
    "rpl at the end of stage one": (FRCNN | BUCKET, RPL | {"teacher": "frozen", "ensemble": 2}, 2),
    "rpl in stage two": (FRCNN | BUCKET, RPL, 5),
    "prc": (FCOS | {"codec": "gaussian"}, {"name": "prc", "tau": 0.02}, 5),
    "sed": (RETINANET | {"half_scale": True}, {"name": "sed"}, 5),
    "lsm": (FCOS | {"half_scale": True}, {"name": "lsm", "tau": 0.03, "alpha": 0.02}, 5),
    "comining": (FRCNN, {"name": "comining", "tau": 0.02}, 5),
}
FAST = {("unbiased_teacher", 2, 0, "SIGKILL")}  # the rest takes minutes
EVERY = [
    pytest.param(*row, marks=() if row in FAST else pytest.mark.slow)
    for row in ((case, n, w, s) for case in CASES for n in (1, 2) for w in (0, 2) for s in ("SIGTERM", "SIGKILL"))
]
TIMED = ("seconds", "time/data", "memory/rss")


@pytest.fixture(scope="module")
def small(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return {
        "data": str(shapes_data),
        "labeled": "25%",
        "backbone": "test_resnet",
        "imgsz": 32,
        "iters": 7,
        "burn_in": 3,
        "batch": 4,
        "workers": 0,
        "amp": False,
        "ema_decay": 0.5,
        "schedule": "cosine",
        "warmup_iters": 0,
        "lr0": 0.002,
        "val_interval": 3,
        "val_fraction": 0.25,
        "max_det": 10,
        "save_interval": 2,
        "film": 0,
        "plots": False,
        "project": str(tmp_path_factory.mktemp("runs")),
        "device": "cpu",
    }


def of(case: str, small: Tiny) -> Tiny:
    detector, strategy, _ = CASES[case]
    augment = {"augment": "comining"} if strategy["name"] == "comining" else {}
    return small | {"detector": detector, "strategy": strategy} | augment


class Struck(SemiTrainer):
    """Sends itself a signal in the middle of a step: losses are there, gradients not yet."""

    at, number = -1, 0

    def _gradients(self, *args: Any) -> None:
        scale = self.scaler.scale

        def strike(loss: torch.Tensor) -> torch.Tensor:
            if self.step == self.at:
                os.kill(os.getpid(), self.number)
            return scale(loss)

        self.scaler.scale = strike  # type: ignore[method-assign]
        super()._gradients(*args)
        self.scaler.scale = scale  # type: ignore[method-assign]


def train(values: Tiny, ranks: int, log: Path, strike: tuple[int, int] | None = None) -> list[int]:
    """Train in forks of this process, which has loaded everything; their exit codes, rank by rank. The last rank gets
    the signal of `strike`, (step, number)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child:
            children.append(child)
            continue
        gc.freeze()  # not ours to collect: see the loader's workers
        code = 1
        try:
            sys.stdout = sys.stderr = open(log, "a", buffering=1)  # noqa: SIM115
            place = {"WORLD_SIZE": ranks, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
            os.environ.update({k: str(v) for k, v in (place | {"MASTER_PORT": port}).items()})
            trainer = Struck(load_config("train", values))
            if strike is not None and rank == ranks - 1:
                trainer.at, trainer.number = strike
            trainer.train()
            code = 0
        except Stopped as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def left(folder: Path) -> Tiny:
    """All that a run has come to: its checkpoint, and its curves without times."""
    content = load_checkpoint(folder / "weights" / "last.pt")["train"]
    with open(folder / "results.csv", newline="") as file:
        rows = [{k: v for k, v in r.items() if k not in TIMED} for r in csv.DictReader(file)]
    kept = ("step", "strategy", "optimizer", "scaler", "best", "since_best", "history", "bad", "rollbacks")
    return {k: content[k] for k in kept} | {"rows": rows}


def other(a: Any, b: Any, place: str = "") -> list[str]:
    """The places in which two nested containers differ, by a bit or more."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [place]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{place}: {sorted(map(str, a.keys() ^ b.keys()))}"]
        return [found for k in a for found in other(a[k], b[k], f"{place}/{k}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{place}: {len(a)} and {len(b)}"]
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in other(x, y, f"{place}/{i}")]
    return [] if a == b or (a != a and b != b) else [place]


@pytest.fixture(scope="module")
def whole(small: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Tiny]:
    """What a run that was never stopped comes to, made once for a case and a number of ranks."""
    made: dict[tuple[str, int], Tiny] = {}
    log = tmp_path_factory.mktemp("whole") / "log.txt"

    def get(case: str, ranks: int) -> Tiny:
        if (case, ranks) not in made:
            name = f"whole {case} {ranks}"
            assert train(of(case, small) | {"name": name}, ranks, log) == [0] * ranks, log.read_text()
            made[case, ranks] = left(Path(small["project"]) / "train" / name)
        return made[case, ranks]

    return get


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has loaded torch")
@pytest.mark.parametrize(("case", "ranks", "workers", "how"), EVERY)
@pytest.mark.fault(17, 18)
def test_a_resumed_run_is_the_same_to_the_last_bit(
    small: Tiny, whole: Callable[[str, int], Tiny], tmp_path: Path, case: str, ranks: int, workers: int, how: str
) -> None:
    log, at = tmp_path / "log.txt", CASES[case][2]
    values = of(case, small) | {"workers": workers, "name": f"{case} {ranks} {workers} {how}"}
    codes = train(values, ranks, log, (at, signal.Signals[how]))
    folder = Path(small["project"]) / "train" / values["name"]
    if how == "SIGTERM":  # of the last rank alone: all stop after this step
        assert codes == [143] * ranks, log.read_text()
        done = at + 1
    else:  # what is left of a step that nobody finished is the last save, or what the surviving rank saves
        assert codes == [1] * (ranks - 1) + [-signal.SIGKILL], log.read_text()
        done = at - at % small["save_interval"] if ranks == 1 else at
    assert load_checkpoint(folder / "weights" / "last.pt")["train"]["step"] == done
    assert train({"resume": str(folder)}, ranks, log) == [0] * ranks, log.read_text()
    assert other(left(folder), whole(case, ranks)) == []


# -- what is left out of a checkpoint

Undo = Callable[[SemiTrainer, Tiny, pytest.MonkeyPatch], None]  # of a resumed trainer; the Tiny is what a new one holds


def weights(part: Callable[[str], bool]) -> Undo:
    def undo(trainer: SemiTrainer, new: Tiny, patch: pytest.MonkeyPatch) -> None:
        found = {k: v for k, v in new["strategy"].items() if part(k)}
        assert found
        trainer.strategy.load_state_dict(found, strict=False)

    return undo


def schedule(trainer: SemiTrainer, new: Tiny, patch: pytest.MonkeyPatch) -> None:
    done = trainer.step
    patch.setattr(module, "lr_at", lambda step, steps, config: lr_at(max(0, step - done), steps, config))


def position(trainer: SemiTrainer, new: Tiny, patch: pytest.MonkeyPatch) -> None:
    loader = trainer._loader
    patch.setattr(trainer, "_loader", lambda start, end, per_step: loader(0, end - start, per_step))


LEFT_OUT: dict[str, Undo | None] = {
    "nothing": None,
    "student": weights(lambda k: k.startswith("student.")),
    "teacher": weights(lambda k: k.startswith("teacher.")),
    "strategy's own state": weights(lambda k: not k.startswith(("student.", "teacher."))),
    "optimizer": lambda trainer, new, patch: trainer.optimizer.load_state_dict(new["optimizer"]),
    "scaler": lambda trainer, new, patch: trainer.scaler.load_state_dict(new["scaler"]),
    "step": lambda trainer, new, patch: setattr(trainer, "step", new["step"]),
    "schedule": schedule,
    "sampler position": position,
    "best": lambda trainer, new, patch: setattr(trainer, "best", new["best"]),
    "history": lambda trainer, new, patch: setattr(trainer, "history", new["history"]),
    "seeding": None,
}


def scaled(patch: pytest.MonkeyPatch, seeded: bool) -> None:
    """A scaler that scales, which on a CPU no number format asks for; and steps that seed themselves, or do not."""
    real = torch.amp.GradScaler
    patch.setattr(torch.amp, "GradScaler", lambda *_, **__: real("cpu", init_scale=4.0, growth_interval=2))
    if not seeded:
        patch.setattr(module, "seed_step", lambda *_: None)


def run(values: Tiny, stop: int = 0) -> SemiTrainer:
    trainer = Struck(load_config("train", values))
    trainer.at, trainer.number = stop - 1, signal.SIGTERM
    if not stop:
        trainer.train()
        return trainer
    with pytest.raises(Stopped):
        trainer.train()
    return trainer


@pytest.fixture(scope="module")
def ends(small: Tiny) -> dict[bool, tuple[Tiny, Path, Tiny]]:
    """(what a whole run came to, the folder of a stopped one, what a new one holds), seeded step by step or not."""
    found = {}
    for seeded in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            scaled(patch, seeded)
            values = of("rpl in stage two", small) | {"save_interval": 100}
            new = content_of(SemiTrainer(load_config("train", values | {"name": f"new {seeded}"})), whole=True)["train"]
            end = left(run(values | {"name": f"whole {seeded}"}).folder)
            found[seeded] = end, run(values | {"name": f"stopped {seeded}"}, stop=6).folder, new
    return found


@pytest.mark.parametrize("what", LEFT_OUT)
@pytest.mark.fault(18)
def test_what_is_left_out_is_noticed(
    ends: dict[bool, tuple[Tiny, Path, Tiny]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    scaled(monkeypatch, what != "seeding")
    end, stopped, new = ends[what != "seeding"]
    folder = shutil.copytree(stopped, tmp_path / "run")
    resumed = SemiTrainer(load_config("train", {"resume": str(folder)}))
    if undo := LEFT_OUT[what]:
        undo(resumed, new, monkeypatch)
    resumed.train()
    assert bool(other(left(folder), end)) == (what != "nothing")


def test_a_checkpoint_of_an_older_version_resumes(small: Tiny) -> None:
    folder = run(of("prc", small) | {"name": "older"}, stop=6).folder
    last = folder / "weights" / "last.pt"
    content = load_checkpoint(last)
    content["train"] |= {"rng": torch.get_rng_state(), "rng_cuda": []}  # which they kept
    del content["train"]["rollbacks"]  # and did not
    save_checkpoint(content, last)
    assert run({"resume": str(folder)}).step == 7
