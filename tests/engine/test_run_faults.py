"""Faults of the machine under a run: no memory, a clock that moves, a data folder that must stay as it is."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.engine import trainer as engine_trainer
from ssod.engine.callbacks import Callbacks, State
from ssod.engine.trainer import SemiTrainer
from ssod.errors import Fault
from ssod.report.table import Table

Tiny = dict[str, Any]
NO_MEMORY = """
import resource, sys
from pathlib import Path
from ssod.cli import main
from ssod.engine import trainer

class Short(trainer.SemiTrainer):
    def _step(self, *args):
        if self.step == 4:  # room for less than a step from here on
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        try:
            return super()._step(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

trainer.SemiTrainer = Short
sys.exit(main(["train", "cfg=" + sys.argv[1]]))
"""


@pytest.mark.fault(15)
@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_out_of_memory_is_a_stop_that_can_be_resumed(tiny: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "short.yaml"
    config.write_text(yaml.safe_dump(tiny | {"save_interval": 100, "imgsz": 128, "batch": 8}))
    out = subprocess.run(
        [sys.executable, "-c", NO_MEMORY, str(config)],
        capture_output=True,
        text=True,
        # What a step frees goes back to the system at once, so that the next one asks for it again.
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 1, out.stdout[-1500:] + out.stderr[-1500:]
    assert "out of memory in step 5" in out.stderr
    assert "batch=4 accumulate=2" in out.stderr
    assert "Traceback" not in out.stderr
    run = Path(str(tiny["project"])) / "train" / "exp"
    assert load_checkpoint(run / "weights" / "last.pt")["train"]["step"] == 4
    trainer = SemiTrainer(load_config("train", {"resume": str(run), "iters": 5}))
    trainer.train()
    assert trainer.step == 5


def exploding(at: list[int]) -> tuple[dict[str, Any], list[int]]:
    """A callback that makes the student's weights a thousandfold after these steps, once each."""
    left, done = list(at), []

    def explode(state: State) -> None:
        if state.step in left:
            left.remove(state.step)
            done.append(state.step)
            with torch.no_grad():
                for p in state.trainer.strategy.student.parameters():
                    p.mul_(1000)

    return {"on_step_end": explode}, done


@pytest.mark.fault(12)
def test_a_run_that_explodes_goes_back_and_on_at_half_the_rate(tiny: Tiny) -> None:
    callbacks, done = exploding([8])
    config = load_config("train", tiny | {"iters": 12, "save_interval": 2, "val_interval": 12})
    trainer = SemiTrainer(config, Callbacks(callbacks))
    summary = trainer.train()
    assert done == [8]
    assert (trainer.step, trainer.rollbacks) == (12, 1)
    assert [a["code"] for a in summary["diagnosis"]].count("exploding") <= 1
    table = Table(trainer.folder / "results.csv", until_step=12)
    steps, rates = table.series("lr")
    assert steps == list(range(1, 13)), "done again, and told once"
    assert rates[:6] == [0.01] * 6
    assert rates[6:] == [0.005] * 6, "step 8 was part of it: back to step 6"
    weights = load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]["strategy"]
    norm = torch.stack([w.float().norm() for w in weights.values()]).max()
    assert norm < 1000


@pytest.mark.fault(12)
def test_a_run_that_explodes_again_and_again_stops(tiny: Tiny) -> None:
    callbacks, done = exploding([8, 14, 20])
    config = load_config("train", tiny | {"iters": 30, "save_interval": 2, "val_interval": 30})
    trainer = SemiTrainer(config, Callbacks(callbacks))
    with pytest.raises(Fault, match="went back 2 times"):
        trainer.train()
    assert done == [8, 14, 20]
    last = load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]
    assert last["step"] < 20
    assert last["rollbacks"] == 2


@pytest.mark.fault(21)
def test_a_clock_that_moves_back_changes_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    first = SemiTrainer(load_config("train", tiny))
    first.train()
    real, asked = time.time, []

    def back() -> float:  # an hour earlier each time
        asked.append(0)
        return real() - 3600 * len(asked)

    monkeypatch.setattr("time.time", back)
    assert time.time() > time.time()
    second = SemiTrainer(load_config("train", tiny | {"iters": 4, "burn_in": 2}))
    second.train()
    _, seconds = Table(second.folder / "results.csv", until_step=9).series("seconds")
    assert seconds == sorted(seconds)
    assert seconds[0] > 0
    for file in (second.folder / "weights").iterdir():  # written in 1990, says the file system
        os.utime(file, (640_000_000, 640_000_000))
    assert second.folder.name == "exp-2"
    resumed = SemiTrainer(load_config("train", {"resume": True, "iters": 5, "project": tiny["project"]}))
    assert (resumed.folder, resumed.step) == (second.folder, 4), "the run that was begun last"
    resumed.train()


@pytest.mark.fault(22)
def test_nothing_is_written_where_the_data_lie(
    tiny: Tiny, shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSOD_CACHE", str(tmp_path / "cache"))
    root = shapes_data.parent

    def state() -> dict[Path, tuple[int, str]]:
        return {
            p: (p.stat().st_mtime_ns, hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "")
            for p in [root, *root.rglob("*")]
        }

    before = state()
    folders = [p for p in [root, *root.rglob("*")] if p.is_dir()]
    modes = {p: p.stat().st_mode for p in folders}
    for p in folders:
        p.chmod(0o555)  # does not stop root, so the state of the files is compared as well
    try:
        SemiTrainer(load_config("train", tiny | {"cache": "disk"})).train()
    finally:
        for p, mode in modes.items():
            p.chmod(mode)
    assert state() == before
    assert any((tmp_path / "cache").rglob("*")), "the decoded images went elsewhere"


@pytest.mark.fault(18)
@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.slow), 6])
def test_a_run_that_failed_in_a_validation_begins_with_it(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    undisturbed = SemiTrainer(load_config("train", tiny | {"name": "whole"})).train()
    broken = SemiTrainer(load_config("train", tiny | {"name": "broken"}))
    with monkeypatch.context() as patch:
        real = engine_trainer.evaluate

        def fails(*args: Any) -> Any:
            if broken.step == at:
                raise OSError(28, "No space left on device")
            return real(*args)

        patch.setattr(engine_trainer, "evaluate", fails)
        with pytest.raises(OSError, match="No space left"):
            broken.train()
    assert not (broken.folder / "metrics.json").exists()

    burnt_in = []
    note = Callbacks({"on_burn_in_end": lambda trainer: burnt_in.append(trainer.step)})
    summary = SemiTrainer(load_config("train", {"resume": str(broken.folder)}), note).train()
    assert str(summary["history"]) == str(undisturbed["history"])  # AP of what no image shows is NaN
    assert summary["best"] == undisturbed["best"]
    assert burnt_in == [3] * (at == 3)
