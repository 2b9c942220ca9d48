"""Training runs, small but whole: files, resume, signals, bad images, bad numbers."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ssod.checkpoint import load_checkpoint
from ssod.cli import main, summary_text
from ssod.config import load_config
from ssod.deploy.predictor import Predictor, load_detector
from ssod.engine.run import lock_run, new_run
from ssod.engine.signals import Stopped
from ssod.engine.trainer import SemiTrainer
from ssod.errors import Fault, UserError

Tiny = dict[str, Any]
TIMED = ("seconds", "time/data", "memory/rss")  # columns that are another run's


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


def test_a_run_leaves_everything_in_its_folder(tiny: Tiny) -> None:
    trainer, summary = run(tiny, plots=True)
    folder = trainer.folder
    names = {p.name for p in folder.iterdir()}
    assert {"args.yaml", "env.txt", "results.csv", "metrics.json", "results.png", "predictions.png"} <= names
    assert {p.name for p in (folder / "weights").iterdir()} == {"best.pt", "last.pt", "previous.pt"}
    rows = list(csv.DictReader((folder / "results.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows if r["sup/cls"]] == [1, 2, 3, 4, 5, 6]
    assert [r["unsup/cls"] != "" for r in rows if r["sup/cls"]] == [False] * 3 + [True] * 3
    assert [int(r["step"]) for r in rows if r["val/student/AP"]] == [3, 6]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["burn_in"]["AP"] >= 0
    assert set(metrics["final"]) == {"student", "teacher"}
    assert (metrics["labeled"], metrics["unlabeled"], metrics["val"]) == (6, 18, 8)
    text = summary_text(summary)
    assert "end of burn-in" in text
    assert str(folder) in text
    best = load_checkpoint(folder / "weights" / "best.pt")
    assert best["use"] == summary["best"]["use"]
    assert "train" not in best
    assert load_config("train", {"cfg": str(folder / "args.yaml")}) == trainer.config


def test_a_second_run_gets_a_folder_of_its_own(tiny: Tiny) -> None:
    folders = [run(tiny, iters=1, burn_in=0)[0].folder.name for _ in range(2)]
    assert folders == ["exp", "exp-2"]


def test_the_same_seed_gives_the_same_run_with_any_number_of_workers(tiny: Tiny) -> None:
    states = [run(tiny, workers=w, name=f"w{w}")[0].strategy.state_dict() for w in (0, 2)]
    assert same(*states)
    other = run(tiny, seed=1, name="other")[0].strategy.state_dict()
    assert not same(states[0], other)


@pytest.mark.parametrize(
    ("name", "stop"), [("fcos", 2), pytest.param("fcos", 3, marks=pytest.mark.slow), ("faster_rcnn", 5)]
)
@pytest.mark.fault(17, 18)
def test_a_resumed_run_equals_one_that_was_never_stopped(tiny: Tiny, name: str, stop: int) -> None:
    tiny |= {"detector": {"name": name, "fpn_channels": 32}}
    whole, _ = run(tiny, name="whole")
    halves = SemiTrainer(load_config("train", tiny | {"name": "halves"}))
    step = halves._step

    def asked(*args: Any) -> bool:
        done = step(*args)
        if halves.step + 1 == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    halves._step = asked  # type: ignore[method-assign]
    with pytest.raises(Stopped) as stopped:
        halves.train()
    assert stopped.value.code == 143
    assert halves.step == stop
    resumed = SemiTrainer(load_config("train", {"resume": str(halves.folder)}))
    assert resumed.step == stop
    resumed.train()
    a, b = (load_checkpoint(t.folder / "weights" / "last.pt")["train"] for t in (whole, resumed))
    for key in ("strategy", "optimizer", "scaler", "step", "best", "history"):
        assert same(a[key], b[key]), key
    curves = [(t.folder / "results.csv").read_text() for t in (whole, resumed)]
    kept = [[{k: v for k, v in r.items() if k not in TIMED} for r in csv.DictReader(c.splitlines())] for c in curves]
    assert kept[0] == kept[1]


@pytest.mark.fault(18)
def test_the_comparison_above_notices_a_lost_state(tiny: Tiny) -> None:
    trainer, _ = run(tiny)
    state = load_checkpoint(trainer.folder / "weights" / "last.pt")["train"]
    other = load_checkpoint(trainer.folder / "weights" / "previous.pt")["train"]
    for key in ("strategy", "optimizer", "step"):
        assert not same(state[key], other[key]), key


@pytest.mark.fault(20)
def test_a_finished_run_is_not_resumed_but_may_be_made_longer(tiny: Tiny) -> None:
    trainer, _ = run(tiny, iters=4)
    with pytest.raises(UserError, match=r"is finished .4 of 4 steps.*larger iters="):
        SemiTrainer(load_config("train", {"resume": True, "project": tiny["project"]}))
    longer = SemiTrainer(load_config("train", {"resume": str(trainer.folder), "iters": 6}))
    assert (longer.step, longer.plan.iters, longer.plan.burn_in) == (4, 6, 3)
    longer.train()
    assert longer.step == 6


def test_a_resumed_run_keeps_its_own_config(tiny: Tiny) -> None:
    trainer, _ = run(tiny, iters=4)
    with pytest.raises(UserError, match="keeps its own batch, lr0"):
        SemiTrainer(load_config("train", {"resume": str(trainer.folder), "iters": 6, "lr0": 0.5, "batch": 3}))


@pytest.mark.fault(3)
def test_a_damaged_last_checkpoint_resumes_from_the_previous(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = run(tiny)
    last = trainer.folder / "weights" / "last.pt"
    last.write_bytes(last.read_bytes()[:-100])
    resumed = SemiTrainer(load_config("train", {"resume": str(trainer.folder), "iters": 8}))
    assert resumed.step == 5 or resumed.step == 6
    assert "last.pt" in capsys.readouterr().err


@pytest.mark.fault(18)
def test_a_killed_run_goes_on(tiny: Tiny) -> None:  # SIGKILL
    import yaml

    config = Path(str(tiny["project"])).parent / "kill.yaml"
    config.write_text(yaml.safe_dump(tiny | {"iters": 1000, "val_interval": 1000}))
    process = subprocess.Popen(
        [sys.executable, "-m", "ssod", "train", f"cfg={config}"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    last = Path(str(tiny["project"])) / "train" / "exp" / "weights" / "last.pt"
    deadline = time.monotonic() + 90
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)
    process.kill()
    process.wait()
    assert process.returncode == -signal.SIGKILL
    resumed = SemiTrainer(load_config("train", {"resume": str(last.parent.parent), "iters": 1001}))
    assert resumed.step >= 1


@pytest.mark.fault(17)
def test_sigint_of_a_whole_process_saves_and_exits_with_130(tiny: Tiny) -> None:
    import yaml

    config = Path(str(tiny["project"])).parent / "stop.yaml"
    config.write_text(yaml.safe_dump(tiny | {"iters": 1000, "val_interval": 1000, "save_interval": 5000}))
    process = subprocess.Popen(
        [sys.executable, "-m", "ssod", "train", f"cfg={config}"], stdout=subprocess.PIPE, text=True
    )
    table = Path(str(tiny["project"])) / "train" / "exp" / "results.csv"
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and not (table.exists() and len(table.read_text().splitlines()) > 1):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "goes on" in out
    assert load_checkpoint(table.parent / "weights" / "last.pt")["train"]["step"] > 0


@pytest.mark.fault(23)
def test_two_runs_on_one_folder(tmp_path: Path) -> None:
    folder = new_run(str(tmp_path), "train", "exp", exist_ok=True)
    code = (
        "from ssod.engine.run import lock_run; from pathlib import Path; from ssod.errors import Fault, UserError\n"
        f"try: lock_run(Path({str(folder)!r})); print('mine')\n"
        "except UserError as e: print(e)\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"is in use by process {os.getpid()}" in out.stdout
    other = tmp_path / "other"
    other.mkdir()
    lock_run(other)


@pytest.fixture
def broken_data(shapes_data: Path, tmp_path: Path) -> Path:
    """A copy of the drawn set in which two training images are cut off in the middle."""
    root = tmp_path / "broken set ü"
    shutil.copytree(shapes_data.parent, root)
    for name in ("3.png", "4.png"):
        file = root / "images" / "train" / name
        file.write_bytes(file.read_bytes()[:-2000])
    return root / "data.yaml"


@pytest.mark.fault(4)
def test_images_that_cannot_be_read_are_replaced_and_reported(tiny: Tiny, broken_data: Path) -> None:
    before = {p: p.read_bytes() for p in broken_data.parent.rglob("*") if p.is_file()}
    _, summary = run(tiny, data=str(broken_data), max_bad=0.2, batch=6, iters=8)
    assert {Path(p).name for p in summary["unreadable"]} == {"3.png", "4.png"}
    assert {p: p.read_bytes() for p in broken_data.parent.rglob("*") if p.is_file()} == before


@pytest.mark.fault(4)
def test_a_validation_image_that_cannot_be_read_is_said(
    tiny: Tiny, broken_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = broken_data.parent / "images" / "val" / "2.png"
    file.write_bytes(file.read_bytes()[:-2000])
    _, summary = run(tiny, data=str(broken_data), max_bad=0.5)
    assert "2.png" in {Path(p).name for p in summary["unreadable"]}
    assert capsys.readouterr().out.count("validation counts it as without detections") == 1


@pytest.mark.fault(4)
def test_too_many_unreadable_images_stop_the_run(tiny: Tiny, broken_data: Path) -> None:
    with pytest.raises(UserError, match=r"training images cannot be read, more than max_bad=0\.01"):
        run(tiny, data=str(broken_data), max_bad=0.01, batch=6, iters=8)


@pytest.mark.fault(33)
def test_annotations_of_unlabelled_images_change_nothing(tiny: Tiny, shapes_data: Path, tmp_path: Path) -> None:
    """Train with the true labels of the unlabelled part, then with garbage there: the same weights, to the bit."""
    truth = json.loads((shapes_data.parent / "annotations" / "instances_train.json").read_text())
    root = tmp_path / "poisoned"
    shutil.copytree(shapes_data.parent, root)
    clean = SemiTrainer(load_config("train", tiny | {"name": "clean"}))
    labeled = {s.path.name for s in clean.data.labeled}
    keep = {i["id"] for i in truth["images"] if i["file_name"] in labeled}
    changed = 0
    for a in truth["annotations"]:
        if a["image_id"] not in keep:
            a["bbox"], a["category_id"], changed = [1, 2, 3 + a["id"] % 50, 40], 1 + a["id"] % 2, changed + 1
    assert changed > 20
    (root / "annotations" / "instances_train.json").write_text(json.dumps(truth))
    (tmp_path / "list.txt").write_text("\n".join(sorted(labeled)))
    states = []
    for data in (shapes_data, root / "data.yaml"):
        trainer, _ = run(tiny, data=str(data), labeled=str(tmp_path / "list.txt"), name=data.parent.name)
        states.append(trainer.strategy.state_dict())
    assert same(*states)


@pytest.mark.fault(11, 13)
def test_steps_without_finite_gradients_are_skipped_and_then_stop_the_run(tiny: Tiny) -> None:
    trainer = SemiTrainer(load_config("train", tiny | {"iters": 40, "burn_in": 0}))
    before = {k: v.clone() for k, v in trainer.strategy.state_dict().items()}
    loss = trainer.strategy.student.loss
    trainer.strategy.student.loss = lambda *a: {k: v * float("nan") for k, v in loss(*a).items()}  # type: ignore[method-assign]
    with pytest.raises(Fault, match="not finite for 20 steps"):
        trainer.train()
    for name, tensor in trainer.strategy.state_dict().items():
        assert torch.isfinite(tensor.float()).all(), name
        if name.startswith("teacher.") or name.endswith(".weight"):
            assert torch.equal(tensor, before[name]), name


@pytest.mark.fault(10)
def test_an_unsupervised_loss_of_nothing_is_said(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, strategy={"name": "mean_teacher", "tau": 0.999})
    out = capsys.readouterr().out
    assert out.count("WARNING: the teacher gives 0.000 pseudo boxes") == 1
    assert "the threshold is 1.00" in out
    assert "strategy.tau=" in out


@pytest.mark.parametrize(("strategy", "name"), [("supervised", "faster_rcnn"), ("mean_teacher", "fcos")])
def test_pairs_train_save_and_predict(tiny: Tiny, name: str, strategy: str) -> None:
    detector = {"name": name, "fpn_channels": 32}
    trainer, _ = run(tiny, detector=detector, strategy=strategy, iters=3, burn_in=1, val_interval=3)
    path = trainer.folder / "weights" / "last.pt"
    restored, content = load_detector(path, "student")
    for key, value in restored.state_dict().items():
        assert torch.equal(value, trainer.strategy.student.state_dict()[key])
    predictor = Predictor(path, device="cpu", conf=0.0, max_det=5)
    results = predictor([str(s.path) for s in trainer.data.val])
    assert [r.path for r in results] == [s.path for s in trainer.data.val]
    assert all(len(r) == 5 for r in results)
    assert content["names"] == trainer.data.names


def test_accumulation_and_bf16_and_adamw_run(tiny: Tiny) -> None:
    trainer, summary = run(tiny, accumulate=2, amp="bf16", optimizer="adamw", lr0=1e-3, schedule="cosine")
    assert summary["steps"] == 6
    assert all(torch.isfinite(p).all() for p in trainer.strategy.parameters())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"labeled": "all"}, "finds no unlabelled image"),  # 9
        ({"unlabeled": "none"}, "finds no unlabelled image"),
        ({"unlabeled": "no/such/folder"}, "no image there"),
        ({"burn_in": 6}, "leaves none of the 6 steps"),
        ({"weights": "no.pt"}, "weights=no.pt: there is no such file"),
        ({"backbone": "resnet51"}, "'resnet51' is not a backbone that timm knows"),
        ({"amp": "fp16"}, "amp=fp16 needs a CUDA device"),
        ({"augment": {"strong": "stronk"}}, "stronk"),
        ({"detector": {"name": "fcos", "head_conv": 3}}, "detector.head_conv"),
    ],
)
@pytest.mark.fault(9)
def test_what_cannot_work_is_refused_before_the_first_step(tiny: Tiny, change: Tiny, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        run(tiny, **change)


def test_a_plain_folder_serves_as_the_unlabelled_set(tiny: Tiny, shapes_data: Path) -> None:
    trainer, _ = run(tiny, labeled="all", unlabeled=str(shapes_data.parent / "images" / "val"), iters=4)
    assert (len(trainer.data.labeled), len(trainer.data.unlabeled)) == (24, 8)


def test_a_run_starts_from_a_checkpoint_of_the_same_classes(tiny: Tiny) -> None:
    first, _ = run(tiny)
    best = first.folder / "weights" / "best.pt"
    second = SemiTrainer(load_config("train", tiny | {"weights": str(best), "name": "second"}))
    content = load_checkpoint(best)
    assert same(content["networks"][content["use"]], dict(second.strategy.student.state_dict()))


def test_val_and_predict_modes_on_the_result(tiny: Tiny, shapes_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer, summary = run(tiny)
    best, project = trainer.folder / "weights" / "best.pt", f"project={tiny['project']}"
    assert main(["val", f"model={best}", f"data={shapes_data}", project, "workers=0", "save_json=true"]) == 0
    metrics = json.loads((Path(str(tiny["project"])) / "val" / "exp" / "metrics.json").read_text())
    assert metrics["figures"]["AP"] == pytest.approx(summary["best"]["AP"], abs=1e-6)
    images = shapes_data.parent / "images" / "val"
    words = ["save_txt=true", "save_json=true", "conf=0.0", "max_det=3", "workers=0", project]
    assert main(["predict", f"model={best}", f"source={images}", *words]) == 0
    folder = Path(str(tiny["project"])) / "predict" / "exp"
    assert len(list(folder.glob("*.jpg"))) == len(list(folder.glob("labels/*.txt"))) == 8
    rows = json.loads((folder / "predictions.json").read_text())
    assert len(rows) == 8
    assert len(rows[0]["boxes"]) == 3
    assert "24 objects on 8 images" in capsys.readouterr().out
    assert main(["check", f"data={shapes_data}", project]) == 0
    assert (Path(str(tiny["project"])) / "check" / "exp" / "samples.png").is_file()
