"""RPL's two stages in one run: schedules, resume, a given teacher, numbers by class, two processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.data.shapes import NAMES
from ssod.deploy.predictor import load_detector
from ssod.engine.signals import Stopped
from ssod.engine.trainer import SemiTrainer
from ssod.errors import UserError
from ssod.strategies.base import Plan

Tiny = dict[str, Any]
TIMED = ("seconds", "time/data", "memory/rss")  # columns that are another run's
RPL = {"name": "rpl", "threshold_on": "sqrt_pv", "tau": 0.05, "gamma1": 0.0}  # an untrained teacher gives boxes, too

BUCKET = {"fpn_channels": 16, "codec": "bucket", "buckets": 6, "rank_by_quality": True}
DETECTORS = {
    "fcos": BUCKET | {"name": "fcos", "head_convs": 0, "pre_nms": 50},
    "faster_rcnn": BUCKET | {"name": "faster_rcnn", "box_head_width": 16, "train_proposals": 50, "test_proposals": 50},
}


@pytest.fixture
def small(tiny: Tiny) -> Tiny:
    quick = {"imgsz": 32, "val_fraction": 0.25, "max_det": 10, "save_interval": 100}
    return tiny | quick | {"detector": DETECTORS["fcos"], "strategy": RPL, "eval_on": "student"}


def run(overrides: Tiny, **more: Any) -> tuple[SemiTrainer, dict[str, Any]]:
    trainer = SemiTrainer(load_config("train", overrides | more))
    return trainer, trainer.train()


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, through nested containers."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b) or (a != a and b != b)


def rows(trainer: SemiTrainer) -> list[dict[str, str]]:
    return list(csv.DictReader((trainer.folder / "results.csv").read_text().splitlines()))


def test_stages_of_a_plan() -> None:
    assert [Plan(9, 3, 0.9).stage(s) for s in (0, 3, 8)] == [(0, 9)] * 3
    assert [Plan(9, 3, 0.9, two_stages=True).stage(s) for s in (0, 2, 3, 8)] == [(0, 3), (0, 3), (3, 9), (3, 9)]
    assert Plan(9, 0, 0.9, two_stages=True).stage(0) == (0, 9)


def test_each_stage_has_its_own_warm_up_and_milestones(small: Tiny) -> None:
    schedule = {"schedule": "multistep", "milestones": [0.5, 0.75], "warmup_iters": 1, "lr0": 0.004}
    trainer, _ = run(small, iters=20, burn_in=10, val_interval=30, **schedule)
    rates = [float(r["lr"]) for r in rows(trainer) if r["sup/cls"]]
    # warm-up of one step (a tenth of stage one), 0.004 up to step 5, a tenth up to 7.5 (rounded: 8), a hundredth;
    # then once more in stage two
    stage = [4e-6, *[4e-3] * 4, *[4e-4] * 3, *[4e-5] * 2]
    assert rates == pytest.approx(stage + stage)


def test_stage_two_starts_without_momentum(small: Tiny) -> None:
    trainer = SemiTrainer(load_config("train", small))
    states: list[int] = []
    step = trainer._step

    def watched(*args: Any) -> bool:
        states.append(len(trainer.optimizer.state))
        return step(*args)

    trainer._step = watched  # type: ignore[method-assign]
    trainer.train()
    assert [n > 0 for n in states] == [False, True, True, False, True, True]


def test_patience_ends_stage_two_only_and_counts_from_its_start(small: Tiny) -> None:
    # No box of an untrained network is right: the first validation is the best, and each later one is no better.
    trainer, _ = run(small, iters=8, burn_in=4, val_interval=1, patience=1, conf=0.99)
    assert trainer.step == 5


def test_the_teacher_of_stage_two_is_the_network_of_stage_one(small: Tiny) -> None:
    trainer = SemiTrainer(load_config("train", small | {"save_period": 3}))
    summary = trainer.train()
    first = load_checkpoint(trainer.folder / "weights" / "step3.pt")["networks"]
    last = load_checkpoint(trainer.folder / "weights" / "last.pt")["networks"]
    assert same(first["student"], first["teacher"])
    assert same(first["teacher"], last["teacher"])
    assert not same(first["student"], last["student"])
    assert [h["step"] for h in summary["history"]] == [3, 6]
    assert summary["burn_in"]["AP"] >= 0
    log = [r for r in rows(trainer) if r["sup/cls"]]
    assert [r["unsup/cls"] != "" for r in log] == [False] * 3 + [True] * 3
    assert float(log[-1]["pseudo/per_image"]) > 0


@pytest.mark.parametrize(
    ("name", "stop", "more"),
    [
        pytest.param("fcos", 2, {}, id="in stage one", marks=pytest.mark.slow),
        pytest.param("fcos", 3, {"ensemble": 2}, id="between the stages"),
        pytest.param("faster_rcnn", 5, {"teacher": "ema"}, id="in stage two", marks=pytest.mark.slow),
    ],
)
@pytest.mark.fault(18)
def test_a_resumed_run_equals_one_that_was_never_stopped(small: Tiny, name: str, stop: int, more: Tiny) -> None:
    small |= {"detector": DETECTORS[name], "strategy": RPL | more}
    whole, _ = run(small, name="whole")
    halves = SemiTrainer(load_config("train", small | {"name": "halves"}))
    step = halves._step

    def asked(*args: Any) -> bool:
        done = step(*args)
        if halves.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    halves._step = asked  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        halves.train()
    assert halves.step == stop
    resumed = SemiTrainer(load_config("train", {"resume": str(halves.folder)}))
    resumed.train()
    a, b = (load_checkpoint(t.folder / "weights" / "last.pt")["train"] for t in (whole, resumed))
    for key in ("strategy", "optimizer", "scaler", "step", "best", "history"):
        assert same(a[key], b[key]), key
    assert a["strategy"]["balance.sums"][1].sum() > 0
    curves = [[{k: v for k, v in r.items() if k not in TIMED} for r in rows(t)] for t in (whole, resumed)]
    assert curves[0] == curves[1]


def test_a_given_teacher_takes_the_place_of_stage_one(small: Tiny) -> None:
    one, _ = run(small, strategy="supervised", iters=3, name="one")
    file = one.folder / "weights" / "last.pt"
    trainer = SemiTrainer(load_config("train", small | {"teacher_weights": str(file), "name": "two"}))
    assert (trainer.plan.iters, trainer.plan.burn_in) == (3, 0)
    trained = load_detector(file, "student")[0].state_dict()
    assert same(dict(trainer.strategy.student.state_dict()), dict(trained))
    trainer.train()
    assert trainer.step == 3
    assert trainer.strategy.teacher is not None
    assert same(dict(trainer.strategy.teacher.state_dict()), dict(trained))
    assert not same(dict(trainer.strategy.student.state_dict()), dict(trained))


def test_two_given_teachers_of_an_ensemble(small: Tiny) -> None:
    files = []
    for seed in (1, 2):
        one, _ = run(small, strategy="supervised", iters=2, name=f"seed{seed}", seed=seed)
        files.append(str(one.folder / "weights" / "last.pt"))
    strategy = {"strategy": RPL | {"ensemble": 2}, "val_interval": 2}
    trainer, summary = run(small | strategy, teacher_weights=files, name="both")
    for (_, teacher), file in zip(trainer.strategy.pairs(), files, strict=True):
        assert same(dict(teacher.state_dict()), dict(load_detector(file, "student")[0].state_dict()))
    assert set(summary["final"]) == {"student", "students"}
    for name, network in zip(("student", "student2"), trainer.strategy.pairs(), strict=True):
        saved = load_detector(trainer.folder / "weights" / "last.pt", name)[0].state_dict()
        assert same(dict(saved), dict(network[0].state_dict()))
    with pytest.raises(UserError, match="teacher_weights names 1 files for 2 teachers"):
        SemiTrainer(load_config("train", small | strategy | {"teacher_weights": files[0]}))


def test_what_is_no_teacher_is_refused_in_one_sentence(small: Tiny, tmp_path: Path) -> None:
    import torchvision

    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "classifier.pth")
    resnet = {"backbone": "resnet18", "teacher_weights": str(tmp_path / "classifier.pth")}
    for change, sentence in (
        (resnet, "is no finished teacher .*or leave it out to train the teacher first"),
        ({"teacher_weights": "nowhere.pt"}, "weights=nowhere.pt: there is no such file"),
        ({"strategy": "mean_teacher", "teacher_weights": "x.pt"}, "strategy=mean_teacher trains no teacher beforehand"),
        ({"burn_in": 0}, "needs a teacher: give burn_in=STEPS .* or teacher_weights=FILE"),
        ({"burn_in": 6}, "leaves none of the 6 steps"),
    ):
        with pytest.raises(UserError, match=sentence) as error:
            SemiTrainer(load_config("train", small | change))
        assert "\n" not in str(error.value)


def test_numbers_by_class_are_written_and_drawn(small: Tiny) -> None:
    trainer, _ = run(small, plots=True, strategy={"name": "rpl"})
    history = json.loads((trainer.folder / "metrics.json").read_text())["history"]
    for entry in history:
        assert set(entry["by_class"]) == {"tau", "alpha", "certainty"}
        assert all(list(by_name) == list(NAMES) for by_name in entry["by_class"].values())
        assert all(0.4 <= tau <= 0.9 for tau in entry["by_class"]["tau"].values())
    strategy = trainer.strategy
    last = list(history[-1]["by_class"]["alpha"].values())
    assert last == pytest.approx(strategy.by_class()["alpha"].tolist())
    assert (trainer.folder / "by_class.png").stat().st_size > 5000


TWO_RANKS = """
import torch
from ssod import dist
from ssod.detectors import build_detector
from ssod.strategies import build_strategy
from ssod.strategies.base import Plan
from ssod.structures import Instances, SemiBatch, View

def batch(boxes):
    generator = torch.Generator().manual_seed(boxes)
    images = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8, generator=generator)
    places = torch.tensor([[4.0 + 9 * i, 4, 34 + 9 * i, 40] for i in range(boxes)])
    target = Instances(places, torch.full((boxes,), boxes - 1))
    view = View(images, torch.full((1, 2), 64), torch.eye(3, dtype=torch.float64)[None], [target], [0])
    return SemiBatch(view)

def strategy():
    torch.manual_seed(0)
    options = {"fpn_channels": 16, "head_convs": 0, "codec": "bucket", "buckets": 4}
    student = build_detector("fcos", 3, "test_resnet", options).eval()
    return build_strategy("rpl", student, {}, Plan(4, 2, 0.9, True))

alone = [strategy() for _ in range(2)]
for rank, s in enumerate(alone):
    s(batch(rank + 1), 0)
dist.init(torch.device("cpu"))
together = strategy()
together(batch(dist.rank() + 1), 0)
torch.testing.assert_close(together.balance.sums, alone[0].balance.sums + alone[1].balance.sums)
assert (together.balance.sums[1] > 0).tolist() == [True, True, False]
dist.close()
"""


@pytest.mark.slow
def test_the_sums_are_those_of_all_ranks(tmp_path: Path) -> None:
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    out = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]


@pytest.mark.slow
def test_two_ranks_train_both_students(small: Tiny, tmp_path: Path) -> None:
    config = tmp_path / "two.yaml"
    more = {"strategy": RPL | {"ensemble": 2}, "batch": 4, "iters": 4, "burn_in": 2}
    config.write_text(yaml.safe_dump(small | more))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    out = subprocess.run(
        [*command, "-m", "ssod", "train", f"cfg={config}"], capture_output=True, text=True, timeout=200
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    last = load_checkpoint(Path(str(small["project"])) / "train" / "exp" / "weights" / "last.pt")
    assert last["train"]["step"] == 4
    assert set(last["networks"]) == {"student", "teacher", "student2"}
