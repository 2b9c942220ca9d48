"""Diagnosis of pseudo boxes and of what is known before the first step: each alarm caused by a run, none by a healthy
one; strict, resume, and that watching changes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from ssod.config import load_config
from ssod.data.shapes import NAMES
from ssod.detectors import build_detector
from ssod.engine.callbacks import Callbacks
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.diagnosis.probe import Scores
from ssod.engine.watch.diagnosis.supply import Supply
from ssod.errors import UserError
from ssod.strategies.base import Plan
from ssod.strategies.mean_teacher import MeanTeacher
from ssod.strategies.unbiased_teacher import UnbiasedTeacher

Tiny = dict[str, Any]
FAST = {"val_fraction": 0.25, "max_det": 10, "val_interval": 100, "save_interval": 100}
HUNGRY = {"strategy": {"name": "mean_teacher", "tau": 0.99, "ignore": False}}


def run(overrides: Tiny, **more: Any) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", overrides | FAST | more))
    trainer.train()
    return trainer


def alarms(folder: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "diagnosis.jsonl").read_text().splitlines()]
    assert len({a["code"] for a in lines}) == len(lines), "each is said once"
    assert json.loads((folder / "metrics.json").read_text())["diagnosis"] == lines
    return {a["code"]: a for a in lines}


def altered(data: Path, root: Path, change: Callable[[str, dict[str, Any]], None]) -> str:
    """A copy of a data set whose annotations of each split were changed in place."""
    shutil.copytree(data.parent, root)
    for file in (root / "annotations").iterdir():
        truth = json.loads(file.read_text())
        change(file.stem.removeprefix("instances_"), truth)
        file.write_text(json.dumps(truth))
    return str(root / data.name)


def test_nothing_above_the_threshold(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run(tiny, **HUNGRY, iters=14)
    found = alarms(trainer.folder)
    assert set(found) - {"teacher_norm"} == {"nothing_above_threshold", "starved"}, "norms of 14 steps are young"
    first, long = found["nothing_above_threshold"], found["starved"]
    assert (first["level"], first["step"]) == ("warning", 6), "three log lines after burn-in"
    assert (long["level"], long["step"]) == ("error", 13), "ten of them, and a tenth of the run"
    numbers = first["numbers"]
    assert 0 < numbers["tau_for_one"] <= numbers["median_best"] + 0.5 < 0.99
    assert numbers["tau"] == pytest.approx(0.99)
    assert f"strategy.tau={numbers['tau_for_one']:g} would keep one box an image" in first["text"]
    printed = capsys.readouterr().out
    assert printed.count(f"WARNING: {first['text']}") == 1
    assert printed.count(f"ERROR: {long['text']}") == 1


def test_the_threshold_that_is_named_keeps_one_box_an_image() -> None:
    scores = Scores([0.52, 0.419, 0.33, 0.2, 0.1], best=[0.52, 0.419, 0.2])
    assert scores.median_best == 0.419
    for per_image, tau in ((1.0, 0.33), (1 / 3, 0.52), (5 / 3, 0.1), (2.0, None)):
        assert scores.threshold(per_image) == tau
    assert sum(s >= 0.33 for s in scores.scores) == 3, "of three images"


def test_lines_in_a_row_and_the_option_that_moves_the_threshold() -> None:
    hungry = {"pseudo/per_image": 0.0, "pseudo/labeled_per_image": 4.0, "pseudo/tau": 0.9}
    plan, few = Plan(10_000, 0, 0.9), Scores([0.2], [0.2])
    lines = [{}, hungry, hungry, hungry | {"pseudo/per_image": 3.0}, *[hungry] * 3]
    for options, name in ((MeanTeacher.Options(), "tau_low"), (UnbiasedTeacher.Options(), "tau")):
        supply = Supply()
        said = [list(supply.look(v, i * 50, plan, 4.0, options, lambda: few)) for i, v in enumerate(lines)]
        assert [len(s) for s in said] == [0] * 6 + [1]
        assert f"strategy.{name}=0.2 would keep one" in said[-1][0].text


def test_boxes_that_none_of_the_strong_views_shows(tiny: Tiny) -> None:
    away = ["weak", {"crop": {"keep": [0.05, 0.05]}}]
    found = alarms(run(tiny, iters=8, augment={"strong": away}).folder)
    assert "pseudo_boxes_clipped" in found
    numbers = found["pseudo_boxes_clipped"]["numbers"]
    assert numbers["per_image"] < 0.1 * numbers["above_per_image"]
    assert "augment.strong" in found["pseudo_boxes_clipped"]["text"]
    assert "nothing_above_threshold" not in found


def test_labels_lost_in_their_view_stop_a_strict_run_which_goes_on_when_resumed(tiny: Tiny) -> None:
    away = [{"resize": {}}, {"crop": {"keep": [0.05, 0.05]}}]
    trainer = SemiTrainer(load_config("train", tiny | FAST | {"augment": {"labeled": away}, "strict": True}))
    with pytest.raises(UserError, match=r"strict=true stops the run at step 3, labels_clipped: of \d+ labelled boxes"):
        trainer.train()
    resumed = SemiTrainer(load_config("train", {"resume": str(trainer.folder)}))
    assert resumed.step == 3
    resumed.train()
    assert alarms(resumed.folder)["labels_clipped"]["step"] == 3


@pytest.mark.slow
def test_too_many_boxes_and_none_of_some_classes(tiny: Tiny) -> None:
    """An untrained teacher with a threshold of nothing."""
    more = {"strategy": {"name": "mean_teacher", "tau": 0.005, "tau_low": 0.005}, "batch_unlabeled": 8}
    found = alarms(run(tiny, **more | {"iters": 22, "burn_in": 1, "ema_decay": 0.1}, val_interval=7).folder)
    assert set(found) >= {"flood", "class_starving"}
    assert found["flood"]["numbers"]["per_image"] > 5 * found["flood"]["numbers"]["labelled_per_image"]
    missing = found["class_starving"]["numbers"]["expected boxes"]
    assert all(v >= 50 for v in missing.values())
    assert set(missing) < set(NAMES)


def test_pseudo_boxes_of_other_classes_than_the_labels(tiny: Tiny, shapes_data: Path, tmp_path: Path) -> None:
    def skew(split: str, truth: dict[str, Any]) -> None:
        """All boxes of one class, and one of each other."""
        first = {a["category_id"]: a["id"] for a in reversed(truth["annotations"])}
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] == 1 or a["id"] in first.values()]

    data = altered(shapes_data, tmp_path / "data", skew)
    more = {"data": data, "labeled": "all", "unlabeled": str(tmp_path / "data" / "images" / "train")}
    strategy = {"strategy": {"name": "mean_teacher", "tau": 0.005, "tau_low": 0.005}}
    untaught = {"iters": 7, "burn_in": 1, "lr0": 1e-6}
    found = alarms(run(tiny, **more | strategy | untaught, val_interval=3).folder)
    alarm = found["class_drift"]
    given, labels = (alarm["numbers"][f"share of {k}"] for k in ("pseudo boxes", "labels"))
    assert sum(given.values()) == pytest.approx(1)
    assert labels[NAMES[0]] > 0.5
    named = alarm["text"].split(": ")[1].split(" is ")[0]
    assert given[named] > labels[named]


def without(*classes: int) -> Callable[[str, dict[str, Any]], None]:
    def change(split: str, truth: dict[str, Any]) -> None:
        gone = classes if split == "train" else classes[1:]
        truth["annotations"] = [a for a in truth["annotations"] if a["category_id"] - 1 not in gone]

    return change


def test_classes_without_a_label(tiny: Tiny, shapes_data: Path, tmp_path: Path) -> None:
    data = {"data": altered(shapes_data, tmp_path / "data", without(0, 1)), "labeled": "all"}
    config = tiny | FAST | data | {"strategy": "supervised", "iters": 1, "val_fraction": 1.0}
    trainer = SemiTrainer(load_config("train", config))
    trainer.train()
    found = alarms(trainer.folder)
    assert {c: a["level"] for c, a in found.items()} == {"no_labels": "error", "unused_class": "warning"}
    assert list(found["no_labels"]["numbers"]["boxes in val"]) == [NAMES[0]]
    assert NAMES[1] in found["unused_class"]["text"]
    strict = SemiTrainer(load_config("train", config | {"strict": True}))
    with pytest.raises(UserError, match=f"at step 0, no_labels: none of the 24 .* {NAMES[0]}, so .*strict=false"):
        strict.train()
    assert strict.step == 0


@pytest.mark.parametrize(
    ("names", "burn_in", "level"),
    [([NAMES[2], "cat"], 0, "warning"), (["cat", "dog"], 1, "warning"), (["cat", "dog"], 0, "error")],
)
def test_weights_of_other_classes(tiny: Tiny, tmp_path: Path, names: list[str], burn_in: int, level: str) -> None:
    torch.manual_seed(0)
    detector = build_detector("fcos", len(names), "test_resnet", {"fpn_channels": 32, "head_convs": 1})
    content = {"format": FORMAT, "spec": detector.spec, "names": names, "imgsz": 64, "use": "teacher", "metrics": {}}
    save_checkpoint(content | {"networks": {"teacher": detector.state_dict()}}, tmp_path / "other.pt")
    trainer = run(tiny, weights=str(tmp_path / "other.pt"), iters=2, burn_in=burn_in)
    alarm = alarms(trainer.folder)["classes_differ"]
    known = sum(n in NAMES for n in names)
    assert alarm["level"] == level
    assert f"know {known} of the {len(NAMES)} classes" in alarm["text"]
    assert alarm["numbers"] == {"classes": len(NAMES), "known": known}


def state(trainer: SemiTrainer) -> dict[str, Any]:
    return load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_watching_changes_nothing_and_survives_a_resume(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny | FAST | HUNGRY | {"iters": 9, "val_interval": 4}
    whole = run(config, val_interval=4, name="whole")

    def stop(s: Any) -> None:
        if s.step == 5:  # between the first hungry line and the alarm
            raise KeyboardInterrupt

    stopped = SemiTrainer(load_config("train", config), Callbacks({"on_log": stop}))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    with open(stopped.folder / "diagnosis.jsonl", "a") as file:  # said after the checkpoint: it will be said again
        file.write(json.dumps(alarms(whole.folder)["nothing_above_threshold"]) + "\n")
    resumed = SemiTrainer(load_config("train", {"resume": str(stopped.folder)}))
    resumed.train()
    steps = [{code: a["step"] for code, a in alarms(t.folder).items()} for t in (resumed, whole)]
    assert steps[0] == steps[1]
    assert steps[0]["nothing_above_threshold"] == 6
    counted = [state(t)["observers"]["diagnosis"] | {"alarms": []} for t in (resumed, whole)]
    assert same(counted[0], counted[1])

    monkeypatch.setattr("ssod.engine.trainer.build_observers", lambda trainer: [])
    blind = run(config, val_interval=4, name="blind")
    for key in ("strategy", "optimizer"):
        assert same(state(blind)[key], state(whole)[key]), key
    assert str(blind.history) == str(whole.history), "as text: NaN is not itself"


def test_a_healthy_run_hears_nothing(tiny: Tiny) -> None:
    healthy = {"strategy": {"name": "mean_teacher", "tau_low": 0.005}, "labeled": "50%", "iters": 60, "burn_in": 50}
    trainer = run(tiny, **healthy, val_interval=55)
    assert alarms(trainer.folder) == {}
