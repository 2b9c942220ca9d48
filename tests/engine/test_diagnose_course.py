"""Diagnosis of the run's course: what explodes, who waits, a teacher that is slow, behind, or has norms of other
images; each caused by a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssod.config import load_config
from ssod.data.shapes import NAMES
from ssod.detectors import build_detector
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.diagnosis import course
from ssod.engine.watch.diagnosis.course import Waiting, teacher_behind
from ssod.engine.watch.diagnosis.probe import norm_gaps
from ssod.errors import Fault, UserError
from ssod.strategies.base import Plan
from ssod.structures import View

Tiny = dict[str, Any]
FAST = {"val_fraction": 0.25, "max_det": 10, "val_interval": 100, "save_interval": 100}


def trainer(overrides: Tiny, **more: Any) -> SemiTrainer:
    return SemiTrainer(load_config("train", overrides | FAST | more))


def alarms(folder: Path) -> dict[str, dict[str, Any]]:
    return {a["code"]: a for a in map(json.loads, (folder / "diagnosis.jsonl").read_text().splitlines())}


def test_a_learning_rate_far_too_high(tiny: Tiny) -> None:
    wild = {"strategy": "supervised", "lr0": 30.0, "clip_grad": 0.0, "iters": 30}
    run = trainer(tiny, **wild)
    with pytest.raises(Fault, match=r"no checkpoint from before|not finite for"):
        run.train()
    found = alarms(run.folder)
    assert {"exploding", "not_finite"} & set(found)
    for code in {"exploding", "not_finite"} & set(found):
        assert found[code]["level"] == "error"
        assert "lr0=3 instead of 30" in found[code]["text"]
        assert "clip_grad=10" in found[code]["text"]
    strict = trainer(tiny, **wild, strict=True)
    with pytest.raises(UserError, match="strict=true stops the run at step"):
        strict.train()
    assert strict.step < 30


def test_a_run_that_goes_back_says_it_once_all_the_same(tiny: Tiny) -> None:
    run = SemiTrainer(load_config("train", tiny | FAST | {"strategy": "supervised", "lr0": 30.0, "clip_grad": 0.0}))
    run._save("last.pt")
    with pytest.raises(Fault):
        run.train()
    assert run.rollbacks > 0
    codes = [json.loads(line)["code"] for line in (run.folder / "diagnosis.jsonl").read_text().splitlines()]
    assert codes.count("exploding") == 1
    assert [a["code"] for a in run.observers[0].summary()["diagnosis"]] == codes


def test_images_that_take_longer_than_the_step(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course, "LEAST_WAIT", 0.1)  # seconds: a fast machine reads all of it in less than the usual two
    noise = np.random.default_rng(0).integers(0, 255, (2600, 2600, 3), dtype=np.uint8)
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        Image.fromarray(noise if split == "train" else noise[:64, :64]).save(tmp_path / "images" / split / "0.png")
        side = 2600 if split == "train" else 64
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, side / 2, side / 2], "area": 1, "iscrowd": 0}
        image = {"id": 1, "file_name": "0.png", "width": side, "height": side}
        truth = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\n")
    slow = {"data": str(tmp_path / "data.yaml"), "labeled": "all", "strategy": "supervised", "iters": 12, "batch": 2}
    run = trainer(tiny, **slow)
    run.train()
    alarm = alarms(run.folder)["waiting_for_data"]
    assert alarm["numbers"]["share"] > 0.5
    assert "workers=4, cache=ram" in alarm["text"]


def test_waiting_is_told_of_lines_in_a_row_that_cost_seconds() -> None:
    for shares, seconds, due in (
        ([0.8] * 5, 10, True),
        ([0.8, 0.8, 0.2, 0.8, 0.8], 10, False),
        ([0.8] * 5, 0.5, False),
    ):
        waiting = Waiting()
        lines = [{"time/data": s, "seconds": seconds * (i + 1)} for i, s in enumerate(shares)]
        assert any(waiting.look(line, 2, False) for line in lines) == due


def test_a_teacher_too_slow_for_the_run(tiny: Tiny) -> None:
    run = trainer(tiny, ema_decay=0.9996)
    run.train()
    alarm = alarms(run.folder)["slow_teacher"]
    assert alarm["step"] == 0
    # Its warm-up makes the last step's decay 1 - 1/6: half of it is left after ln 0.5 / ln (5/6) steps.
    assert alarm["numbers"]["half-life"] == pytest.approx(3.802, abs=1e-3)
    followed = trainer(tiny, ema_decay=alarm["numbers"]["suggested"])
    followed.train()
    assert "slow_teacher" not in alarms(followed.folder)


@pytest.mark.slow
def test_a_teacher_that_stays_behind(tiny: Tiny) -> None:
    """Two images by heart, validated on themselves: the student learns fast, its average of all steps does not."""
    heart = {"optimizer": "adamw", "lr0": 2e-3, "ema_decay": 0.99999, "burn_in": 1, "iters": 100, "labeled": "all"}
    data = json.loads((Path(str(tiny["data"])).parent / "annotations" / "instances_train.json").read_text())
    assert len(data["categories"]) == len(NAMES)
    own = Path(str(tiny["data"])).with_name("by_heart.yaml")
    own.write_text("path: .\ntrain: images/val\nval: images/val\nunlabeled: images/train\n")
    augment = {"labeled": [{"resize": {}}], "weak": [{"resize": {}}], "strong": ["weak"]}
    more = {"data": str(own), "augment": augment, "val_interval": 20, "val_fraction": 1.0, "max_det": 20, "batch": 4}
    run = trainer(tiny, **heart, **{"val_interval": 20} | more)
    run.train()
    gaps = [(h["step"], h["student"]["AP"], h["teacher"]["AP"]) for h in run.history]
    assert "teacher_behind" in alarms(run.folder), gaps


def test_behind_means_in_all_of_the_last_validations() -> None:
    plan = Plan(1000, 100, 0.999)

    def history(*gaps: float) -> list[dict[str, Any]]:
        return [{"step": 200 + i, "student": {"AP": 0.4}, "teacher": {"AP": 0.4 - g}} for i, g in enumerate(gaps)]

    alarm = teacher_behind(history(0.0, 0.05, 0.05, 0.05), plan, 0.999)
    assert alarm is not None
    assert "ema_decay=0.9923" in alarm.text
    assert teacher_behind(history(0.05, 0.05, 0.01), plan, 0.999) is None
    assert teacher_behind(history(0.05, 0.05), plan, 0.999) is None
    assert teacher_behind(history(0.05, 0.05, 0.05), plan, None) is None, "one that does not move is no average"


def test_norms_of_other_images(tiny: Tiny, tmp_path: Path) -> None:
    """The labelled images are drawn on light ground; the unlabelled ones were taken in the dark."""
    for i in range(4):
        Image.fromarray(np.full((96, 96, 3), 5 * i, dtype=np.uint8)).save(tmp_path / f"{i}.png")
    steps = {"iters": 42, "burn_in": 40, "labeled": "all", "batch": 2}
    run = trainer(tiny, **steps, unlabeled=str(tmp_path))
    run.train()
    alarm = alarms(run.folder)["teacher_norm"]
    assert alarm["level"] == "warning"
    assert alarm["numbers"]["gap"] > 1.2
    assert "frozen_norm=true" in alarm["text"]
    fixed = trainer(tiny, **steps | {"iters": 4, "burn_in": 2}, unlabeled=str(tmp_path), frozen_norm=True)
    fixed.train()
    assert "teacher_norm" not in alarms(fixed.folder)


def test_gaps_are_of_the_images_and_leave_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    network = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 16, "head_convs": 1})
    images = torch.randint(0, 255, (4, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    view = View(images, torch.full((4, 2), 64), torch.eye(3).repeat(4, 1, 1), [], [])
    network.train()
    for _ in range(60):  # a running mean of momentum 0.1 holds 0.2 % of its start then
        network.features(images, view.sizes)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    gaps = norm_gaps(network.eval(), view)
    assert len(gaps) == 15
    assert max(g.gap for g in gaps) < 0.2  # 16 pixels of the last map: their variance is the biased one here
    assert {g.batches for g in gaps} == {60}
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    norm = dict(network.named_modules())[gaps[0].name]
    norm.running_var.mul_(4)  # type: ignore[operator, union-attr]
    assert norm_gaps(network, view)[0].gap == pytest.approx(gaps[0].gap + np.log(2), abs=0.02)
    norm.running_mean.fill_(float("nan"))  # type: ignore[operator, union-attr]
    assert not np.isfinite(norm_gaps(network, view)[0].gap)
