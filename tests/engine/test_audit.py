"""The audit in a run: what is hidden, what is measured, and that neither true labels nor measuring reach training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.data.samples import SampleTable
from ssod.data.shapes import NAMES
from ssod.engine.callbacks import Callbacks, State
from ssod.engine.setup import build_data
from ssod.engine.trainer import SemiTrainer
from ssod.engine.watch.audit import read_audit
from ssod.errors import UserError

Tiny = dict[str, Any]
QUICK = {"val_fraction": 0.25, "max_det": 10, "imgsz": 32, "labeled": "50%", "audit": 4}
FCOS = {"name": "fcos", "fpn_channels": 16, "head_convs": 0, "pre_nms": 50}


FEW = {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01, "max_boxes": 20}
SMALL = QUICK | {"detector": FCOS, "strategy": FEW, "eval_on": "student"}


@pytest.fixture
def tiny(tiny: Tiny) -> Tiny:
    return tiny | SMALL


@pytest.fixture(scope="module")
def audited(shapes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SemiTrainer, list[str]]:
    """A finished run with an audit, and what it has said."""
    plain = {
        "backbone": "test_resnet",
        "iters": 6,
        "burn_in": 3,
        "batch": 2,
        "workers": 0,
        "amp": False,
        "plots": False,
    }
    plain |= {"ema_decay": 0.5, "warmup_iters": 0, "val_interval": 3, "save_interval": 1, "device": "cpu"}
    plain |= {"data": str(shapes_data), "project": str(tmp_path_factory.mktemp("audited"))}
    trainer, said = SemiTrainer(load_config("train", plain | SMALL)), []
    say = trainer.say
    trainer.say = lambda text: (said.append(text), say(text))[1]  # type: ignore[method-assign]
    trainer.train()
    return trainer, said


def run(overrides: Tiny, **more: Any) -> SemiTrainer:
    trainer = SemiTrainer(load_config("train", overrides | more))
    trainer.train()
    return trainer


def same_end(a: SemiTrainer, b: SemiTrainer) -> bool:
    """Whether two runs have ended with the same strategy and optimizer, to the last bit."""
    ends = [load_checkpoint(t.folder / "weights" / "last.pt")["train"] for t in (a, b)]
    return all(_same(ends[0][k], ends[1][k]) for k in ("strategy", "optimizer"))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def names_of(samples: Any) -> list[str]:
    return [s.path.name for s in samples]


def listed(path: Path, names: list[str]) -> str:
    path.write_text("\n".join(names))
    return str(path)


def test_hidden_images_are_unlabelled_ones_and_measured_at_every_validation(
    audited: tuple[SemiTrainer, list[str]],
) -> None:
    trainer, said = audited
    data = trainer.data
    assert (len(data.labeled), len(data.unlabeled), len(data.audit)) == (8, 16, 4)
    assert set(names_of(data.audit)) <= set(names_of(data.unlabeled))
    assert not set(names_of(data.audit)) & set(names_of(data.labeled))
    assert all(len(s.boxes) == 0 and not s.labeled for s in data.unlabeled)
    assert sum(len(s.boxes) for s in data.audit) > 0

    lines = read_audit(trainer.folder)
    assert [(line["step"], line["network"], line["images"]) for line in lines] == [(3, "teacher", 4), (6, "teacher", 4)]
    for line in lines:
        assert list(line["classes"]) == list(NAMES)
        every = line["all"]
        assert every["true"] == sum(len(s.boxes) for s in data.audit)
        for key in ("true", "found", "kept"):
            assert every[key] == sum(c[key] for c in line["classes"].values())
        assert [c["tau"] for c in line["classes"].values()] == pytest.approx([0.02] * len(NAMES))
        assert sum(b["n"] for b in every["calibration"]) == every["found"] == every["kept"], "tau is below 0.05"
    table = (trainer.folder / "results.csv").read_text().splitlines()
    assert "audit/recall" in table[0]
    assert sum("audit, teacher: " in text for text in said) == 2
    assert said[-1].startswith(f"audit: {lines[-1]['all']['true']} true boxes, and what was found of them, are too few")


@pytest.mark.parametrize("strategy", ["supervised", "sed", "mean_teacher"])
def test_without_a_threshold_nothing_is_kept_or_dropped(tiny: Tiny, strategy: str) -> None:
    tiny |= {"strategy": strategy, "detector": tiny["detector"] | {"half_scale": True}}
    lines = read_audit(run(tiny, iters=3, burn_in=2, val_interval=1).folder)
    networks = ["student"] * 3 if strategy == "supervised" else ["student", "teacher", "teacher"]
    assert [line["network"] for line in lines] == networks
    first, last = lines[0]["all"], lines[-1]
    assert [first[k] for k in ("kept", "precision", "recall", "iou")] == [None] * 4, "tau=auto has seen no step yet"
    automatic = strategy == "mean_teacher"
    assert all((c["tau"] is not None) == automatic for c in last["classes"].values())
    assert (last["all"]["kept"] is not None) == automatic


def test_measuring_changes_nothing_in_training(
    audited: tuple[SemiTrainer, list[str]], tiny: Tiny, tmp_path: Path
) -> None:
    """The same images, simply unlabelled and not measured, give the same weights to the last bit."""
    measured, _ = audited
    plain = run(tiny, labeled=listed(tmp_path / "l.txt", names_of(measured.data.labeled)), audit="none")
    assert names_of(plain.data.unlabeled) == names_of(measured.data.unlabeled)
    assert read_audit(measured.folder)
    assert not (plain.folder / "audit.jsonl").exists()
    assert same_end(measured, plain)


def test_true_labels_of_hidden_and_unlabelled_images_are_never_learnt(tiny: Tiny, tmp_path: Path) -> None:
    """With all their boxes elsewhere in the annotation file: the same weights, other figures of the audit."""
    first = SemiTrainer(load_config("train", tiny))
    labeled = [*names_of(first.data.labeled), *names_of(first.data.audit)]
    tiny |= {"labeled": listed(tmp_path / "list.txt", labeled)}
    ends = []
    for kind in ("true", "wrong"):
        root = tmp_path / kind
        shutil.copytree(Path(str(tiny["data"])).parent, root)
        file = root / "annotations" / "instances_train.json"
        truth = json.loads(file.read_text())
        kept = {i["id"] for i in truth["images"] if i["file_name"] in names_of(first.data.labeled)}
        for one in truth["annotations"]:
            if kind == "wrong" and one["image_id"] not in kept:
                # The classes stay: which images are hidden follows from them, and the two runs must hide the same.
                one["bbox"] = [0, 0, 4 + one["id"] % 5, 3]
        file.write_text(json.dumps(truth))
        config = tiny | {"data": str(root / "data.yaml"), "name": kind}
        trainer = SemiTrainer(load_config("train", config))
        trainer.train()
        ends.append(trainer)
    true, wrong = ends
    assert names_of(true.data.audit) == names_of(wrong.data.audit)
    assert not np.array_equal(true.data.audit[0].boxes, wrong.data.audit[0].boxes)
    assert same_end(true, wrong)
    figures = [read_audit(t.folder)[-1]["all"]["calibration"] for t in ends]
    assert [b["n"] for b in figures[0]] == [b["n"] for b in figures[1]]


def test_the_audit_hands_true_boxes_to_nobody_else(audited: tuple[SemiTrainer, list[str]], tiny: Tiny) -> None:
    """Other true boxes in memory, from the first step on, change the audit and nothing besides."""

    def lie(state: State) -> None:
        moved = [replace(s, boxes=np.minimum(s.boxes, 3) + np.float32([0, 0, 5, 5])) for s in state.trainer.data.audit]
        state.trainer.data.audit = SampleTable.of(moved)

    trainer = SemiTrainer(load_config("train", tiny), Callbacks({"on_train_start": lie}))
    trainer.train()
    assert same_end(audited[0], trainer)


def test_a_resumed_run_goes_on_with_the_same_audit(audited: tuple[SemiTrainer, list[str]], tmp_path: Path) -> None:
    whole, _ = audited
    folder = tmp_path / "broken"
    shutil.copytree(whole.folder, folder)
    (folder / "weights" / "previous.pt").replace(folder / "weights" / "last.pt")  # as after step 5
    resumed = SemiTrainer(load_config("train", {"resume": str(folder)}))
    assert resumed.step == 5
    resumed.train()
    assert names_of(resumed.data.audit) == names_of(whole.data.audit)
    assert read_audit(resumed.folder) == read_audit(whole.folder)
    assert same_end(whole, resumed)


def test_hidden_images_join_a_folder_of_unlabelled_ones(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "more"
    folder.mkdir()
    source = Path(str(tiny["data"])).parent / "images" / "val"
    for name in ("0.png", "1.png"):
        shutil.copy(source / name, folder / f"own{name}")
    data = build_data(load_config("train", tiny | {"unlabeled": str(folder)}))
    assert names_of(data.unlabeled) == ["own0.png", "own1.png", *names_of(data.audit)]
    assert not any(len(s.boxes) for s in data.unlabeled)
    without = build_data(load_config("train", tiny | {"unlabeled": "none", "strategy": "supervised"}))
    assert (len(without.labeled), len(without.unlabeled), len(without.audit)) == (8, 0, 4)


def test_an_audit_of_everything_is_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="audit=12: there are 12 labelled images; hide 1 to 11"):
        build_data(load_config("train", tiny | {"audit": 12}))
