"""The supervised control beside a run: what it shares, that sharing changes nothing, stopping, resuming, the report."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.engine.baseline import Control, control_config, shares_burn_in
from ssod.engine.setup import build, build_data
from ssod.engine.signals import Stopped
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.audit import read_audit
from ssod.errors import UserError
from ssod.report.compare_runs import compare_runs

Tiny = dict[str, Any]
FCOS = {"name": "fcos", "fpn_channels": 16, "head_convs": 0, "pre_nms": 50}
FRCNN = {"name": "faster_rcnn", "fpn_channels": 16, "box_head_width": 16, "train_proposals": 20, "test_proposals": 20}


def options(data: Path, project: Path, **more: Any) -> Tiny:
    return {
        "data": str(data),
        "labeled": "25%",
        "detector": FCOS,
        "backbone": "test_resnet",
        "strategy": {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01, "max_boxes": 20},
        "imgsz": 32,
        "iters": 5,
        "burn_in": 3,
        "batch": 2,
        "workers": 0,
        "amp": False,
        "ema_decay": 0.5,
        "warmup_iters": 0,
        "lr0": 0.001,
        "val_interval": 5,
        "val_fraction": 0.25,
        "max_det": 10,
        "save_interval": 1,
        "plots": False,
        "project": str(project),
        "device": "cpu",
        "baseline": "auto",
    } | more


def run(overrides: Tiny) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", overrides))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the trainer of `whole` has said."""
    return []


@pytest.fixture(scope="module")
def whole(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory, said: list[str]) -> SemiTrainer:
    """A run with its control, of a detector that draws random numbers while it trains."""
    config = options(shapes_data, tmp_path_factory.mktemp("whole"), detector=FRCNN)
    trainer = SemiTrainer(load_config("train", config))
    trainer.say = said.append  # type: ignore[method-assign]
    trainer.train()
    return trainer


def end(folder: Path) -> dict[str, Any]:
    train = load_checkpoint(folder / "weights" / "last.pt")["train"]
    return {k: train[k] for k in ("step", "strategy", "optimizer", "history", "best", "since_best")}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through nested containers; NaN is NaN."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def rows(folder: Path) -> list[dict[str, str]]:
    timed = ("seconds", "time/data", "memory/rss")
    found = csv.DictReader((folder / "results.csv").read_text().splitlines())
    return [{k: v for k, v in r.items() if v and k not in timed} for r in found]


def test_a_shared_burn_in_gives_what_the_control_gives_from_its_first_step(whole: SemiTrainer) -> None:
    config = control_config(whole.config, whole.strategy)
    assert (config.strategy.name, config.iters, config.burn_in) == ("supervised", 5, 3)
    alone = run(config.model_dump() | {"project": str(whole.folder / "alone")})
    control = whole.folder / "baseline"
    assert same(end(alone.folder), end(control))
    assert same(rows(alone.folder), rows(control))
    best = [load_checkpoint(f / "weights" / "best.pt")["networks"] for f in (alone.folder, control)]
    assert same(*best)
    assert [r["step"] for r in rows(control)] == ["1", "2", "3", "3", "4", "5", "5"]


def test_the_gain_is_in_the_console_and_in_two_files(whole: SemiTrainer, said: list[str]) -> None:
    begun, compared = (text for text in said if "supervised control" in text)
    assert begun.startswith("baseline: the supervised control, 5 steps from step 3, the burn-in being the same")
    assert "gain" in compared
    comparison = compare_runs(whole.folder, whole.folder / "baseline")
    assert comparison.warnings == [], "nothing but the strategy differs"
    result = json.loads((whole.folder / "baseline.json").read_text())
    assert (result["folder"], result["steps"]) == (str(whole.folder / "baseline"), 5)
    assert result["gain"] == comparison.gain
    assert result["AP"] == comparison.baseline.final
    history = result.pop("history")
    assert [h["step"] for h in history] == [3, 5]
    assert set(history[1]) == {"step", "student", "teacher"}, "an average as the strategy's own"
    assert json.loads((whole.folder / "metrics.json").read_text())["baseline"] == result


@pytest.mark.parametrize(
    ("strategy", "shared"),
    [
        ({"name": "mean_teacher"}, True),
        ({"name": "unbiased_teacher"}, True),
        ({"name": "sed"}, True),
        ({"name": "lsm"}, False),
        ({"name": "rpl", "certainty": False}, False),
        ({"name": "prc", "ler": False, "prc": False}, False),
        ({"name": "comining"}, False),
    ],
)
def test_which_strategies_share_their_burn_in(shapes_data: Path, tmp_path: Path, strategy: Tiny, shared: bool) -> None:
    detector = FCOS | {"half_scale": True}
    config = load_config("train", options(shapes_data, tmp_path, strategy=strategy, detector=detector))
    built, _ = build(config, build_data(config))
    assert shares_burn_in(built) == shared
    ema = strategy["name"] not in ("rpl", "comining")
    assert control_config(config, built).strategy.options == {"ema": ema}


def test_a_strategy_of_two_stages_has_its_control_trained_in_full(shapes_data: Path, tmp_path: Path) -> None:
    rpl = {"name": "rpl", "certainty": False, "tau": 0.05, "max_boxes": 20}
    trainer = run(options(shapes_data, tmp_path, strategy=rpl, eval_on="student", iters=3, burn_in=2))
    control = trainer.folder / "baseline"
    assert [r["step"] for r in rows(control) if "sup/cls" in r] == ["1", "2", "3"]
    assert json.loads((trainer.folder / "baseline.json").read_text())["steps"] == 3


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of this process gets a SIGTERM in its `step`-th step."""
    batches = Control._batches

    def stopped(self: Control) -> Iterator[Any]:
        for batch in batches(self):
            if self.step == step - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    monkeypatch.setattr(Control, "_batches", stopped)


def test_a_stopped_control_goes_on_where_it_was(
    whole: SemiTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished run that has nothing of its control, as one without baseline=auto: it is trained in full."""
    folder = tmp_path / "copy"
    shutil.copytree(whole.folder, folder, ignore=shutil.ignore_patterns("baseline*", "alone"))
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(Stopped):
            run({"resume": str(folder), "baseline": "auto"})
    assert not (folder / "baseline.json").exists()
    assert end(folder / "baseline")["step"] == 4
    resumed = run({"resume": str(folder)})
    assert same(end(whole.folder), end(folder))
    assert same(end(whole.folder / "baseline"), end(folder / "baseline"))
    assert json.loads((folder / "baseline.json").read_text())["gain"] == compare_runs(folder, folder / "baseline").gain
    with pytest.raises(UserError, match="is finished"):
        SemiTrainer(load_config("train", {"resume": str(resumed.folder)}))


@pytest.mark.slow
def test_a_run_that_stops_early_has_a_control_as_long(shapes_data: Path, tmp_path: Path) -> None:
    trainer = run(options(shapes_data, tmp_path, patience=1, val_interval=1, burn_in=1))
    assert trainer.step < 5
    metrics = json.loads((trainer.folder / "baseline" / "metrics.json").read_text())
    assert metrics["steps"] == trainer.step
    assert metrics["history"][-1]["step"] == trainer.step


def test_the_control_of_an_earlier_run_is_not_taken_for_this_one(shapes_data: Path, tmp_path: Path) -> None:
    old = tmp_path / "train" / "exp" / "baseline"
    old.mkdir(parents=True)
    (old / "metrics.json").write_text('{"steps": 2}')
    (old.parent / "baseline.json").write_text("{}")
    run(options(shapes_data, tmp_path, exist_ok=True, iters=2, burn_in=1))
    assert len(json.loads((old / "metrics.json").read_text())["history"]) == 2
    assert json.loads((old.parent / "baseline.json").read_text())["steps"] == 2


def test_the_supervised_strategy_has_no_other_control(shapes_data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="strategy=supervised is itself the control"):
        SemiTrainer(load_config("train", options(shapes_data, tmp_path, strategy="supervised")))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_measure_once_and_train_one_control(shapes_data: Path, tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    more = {"audit": 2, "labeled": "50%", "batch": 4, "val_interval": 2, "iters": 4, "burn_in": 2}
    config.write_text(yaml.safe_dump(options(shapes_data, tmp_path, **more)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run(
        [*command, "-m", "ssod", "train", f"cfg={config}"], capture_output=True, text=True, timeout=400
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    folder = tmp_path / "train" / "exp"
    assert [line["step"] for line in read_audit(folder)] == [2, 4]
    assert [line["step"] for line in read_audit(folder / "baseline")] == [4], "the control begins at the burn-in's end"
    assert json.loads((folder / "baseline.json").read_text())["steps"] == 4
    assert end(folder / "baseline")["step"] == 4
    assert [r["step"] for r in rows(folder / "baseline") if "sup/cls" in r] == ["1", "2", "3", "4"]
