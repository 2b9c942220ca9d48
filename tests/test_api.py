"""`SSOD`: the same as the command line, and every example of docs/python.md."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ssod
from ssod import SSOD, UserError
from ssod.api import Trained
from ssod.checkpoint import load_checkpoint
from ssod.cli import main
from ssod.data.shapes import NAMES
from ssod.deploy.predictor import Predictor
from ssod.engine.predict import Options
from ssod.modes import MODES

ROOT = Path(__file__).resolve().parent.parent
RECIPE = {
    "labeled": "25%",
    "detector": {"name": "fcos", "fpn_channels": 32, "head_convs": 1},
    "backbone": "test_resnet",
    "strategy": {"name": "mean_teacher", "tau": 0.02, "tau_low": 0.01},
    "imgsz": 64,
    "iters": 4,
    "burn_in": 2,
    "batch": 2,
    "workers": 0,
    "amp": False,
    "plots": False,
    "val_interval": 4,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, shapes_data: Path) -> Path:
    folder = tmp_path_factory.mktemp("api")
    content = RECIPE | {"data": str(shapes_data), "project": str(folder / "runs")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def run(recipe: Path) -> tuple[SSOD, Trained]:
    model = SSOD(recipe, device="cpu")
    return model, model.train()


def args_of(done: Trained) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((done.folder / "args.yaml").read_text())
    return content


def test_training_leaves_the_best_network(run: tuple[SSOD, Trained], recipe: Path, shapes_data: Path) -> None:
    model, done = run
    assert model.path == done.folder / "weights" / "best.pt"
    assert list(model.names.values()) == list(NAMES)
    assert done.ap == json.loads((done.folder / "metrics.json").read_text())["best"]["AP"]
    assert done.use == load_checkpoint(model.path)["use"]
    scores = {h["step"]: {n: h[n]["AP"] for n in ("student", "teacher") if n in h} for h in done.summary["history"]}
    assert done.ap == scores[done.step][done.use] == max(max(s.values()) for s in scores.values())
    assert repr(model) == f"SSOD({model.path}: {len(NAMES)} classes, on cpu)"
    assert args_of(done)["data"] == str(shapes_data)


def test_val_is_the_command_line(run: tuple[SSOD, Trained], recipe: Path, shapes_data: Path) -> None:
    model, done = run
    project = recipe.parent / "val"
    metrics = model.val(project=project, workers=0, save_json=True)  # on the data it was trained on
    words = [f"model={model.path}", f"data={shapes_data}", f"project={project}", "workers=0", "device=cpu"]
    assert main(["val", *words]) == 0
    first, second = ((project / "val" / name / "metrics.json").read_text() for name in ("exp", "exp-2"))
    assert first == second
    assert json.dumps({"figures": metrics.figures, "per_class": metrics.per_class}) == first
    assert metrics.ap == metrics.figures["AP"] == pytest.approx(done.ap)
    assert metrics.folder == project / "val" / "exp"
    assert (metrics.folder / "detections.json").is_file()
    with pytest.raises(UserError, match=r"there is no data: give data=DATA\.yaml"):
        SSOD(model.path).val()


def test_report_is_the_command_line(run: tuple[SSOD, Trained], tmp_path: Path) -> None:
    model, done = run
    page = model.report(out=tmp_path / "mine.html", workers=0)
    assert page == tmp_path / "mine.html"
    words = [str(done.folder), f"out={tmp_path / 'theirs.html'}", "workers=0", "device=cpu"]
    assert main(["report", *words]) == 0
    mine, theirs = (re.sub(r"mine|theirs", "", (tmp_path / f"{n}.html").read_text()) for n in ("mine", "theirs"))
    assert "</html>" in mine
    assert len(mine) == pytest.approx(len(theirs), rel=0.01)  # drawn ids differ

    model.save(tmp_path / "lone.pt")
    with pytest.raises(UserError, match=r"lone\.pt lies in no run folder"):
        SSOD(tmp_path / "lone.pt").report()


def test_a_run_folder_is_free_again_after_val(run: tuple[SSOD, Trained], recipe: Path) -> None:
    model, _ = run
    for _ in range(2):
        assert model.val(project=recipe.parent, name="again", exist_ok=True, workers=0).images == 8


def test_predict_takes_the_options_of_the_predictor(run: tuple[SSOD, Trained], shapes_data: Path) -> None:
    model, _ = run
    source = shapes_data.parent / "images" / "val"
    results = model.predict(source, conf=0.0, max_det=3, classes=[NAMES[0]])
    assert [len(r) for r in results] == [3] * 8
    assert {int(c) for r in results for c in r.boxes.cls} == {0}
    stream = model.predict(source, conf=0.0, max_det=3, stream=True)
    assert len(next(stream)) == 3


def folder_with_a_broken_image(photos: Path, folder: Path) -> Path:
    """Three images of that folder and one that is none; by their names the latter comes second."""
    folder.mkdir()
    for new, old in zip("acd", sorted(photos.glob("*.png")), strict=False):
        shutil.copy(old, folder / f"{new}.png")
    (folder / "b.png").write_bytes(b"nothing of the kind")
    return folder


def test_images_that_cannot_be_read_are_said(run: tuple[SSOD, Trained], shapes_data: Path, tmp_path: Path) -> None:
    model, _ = run
    source = folder_with_a_broken_image(shapes_data.parent / "images" / "val", tmp_path / "photos")
    broken = source / "b.png"
    with pytest.warns(UserWarning, match=rf"1 image could not be read and have no results .{broken}: .*") as told:
        results = model.predict(source)
    assert [t.filename for t in told] == [__file__], "the line that called"
    assert [r.path.stem for r in results] == ["a", "c", "d"]
    ((path, reason),) = model.unreadable
    assert path == str(broken)
    assert reason
    assert model.saved is None

    stream = model.predict(source, stream=True, batch=1, workers=0)
    next(stream)
    assert model.unreadable == []
    with pytest.warns(UserWarning, match="1 image could not be read") as told:
        assert len(list(stream)) == 2
    assert [t.filename for t in told] == [__file__]
    assert model.unreadable == [(path, reason)]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.predict(source / "a.png")
    assert model.unreadable == [], "of the last call"
    with pytest.raises(UserError, match="none of the 7 images can be read"):
        model.predict([broken] * 7)
    with pytest.warns(UserWarning, match=r"7 images could not .*; and 2 more\); `unreadable` lists them"):
        Predictor(model.path or "", device="cpu")([source / "a.png", *[broken] * 7])


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def test_predict_writes_what_the_command_line_writes(
    run: tuple[SSOD, Trained], shapes_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, _ = run
    source = shapes_data.parent / "images" / "val"
    words = [f"model={model.path}", f"source={source}", "device=cpu", "conf=0.01", "save_txt=true", "save_json=true"]
    assert main(["predict", *words]) == 0
    results = model.predict(source, conf=0.01, save=True, save_txt=True, save_json=True)
    assert model.saved == Path("runs/predict/exp-2")
    there, here = contents(tmp_path / "runs/predict/exp"), contents(model.saved)
    assert there == here
    assert {f"{r.path.stem}.jpg" for r in results} < set(here)

    model.predict(source, project=tmp_path / "mine", name="text", save_txt=True)
    assert model.saved == tmp_path / "mine/predict/text"
    assert {Path(name).parts[0] for name in contents(model.saved)} == {"labels"}, "no images that nobody asked for"
    again = model.predict(source, project=tmp_path / "mine", name="text", exist_ok=True, save_txt=True)
    assert model.saved == tmp_path / "mine/predict/text", "free again"
    model.predict(source)
    assert model.saved is None
    assert len(again) == len(results)


def test_a_saved_stream_that_is_left_early_is_complete(
    run: tuple[SSOD, Trained], shapes_data: Path, tmp_path: Path
) -> None:
    model, _ = run
    source = shapes_data.parent / "images" / "val"
    stream = model.predict(source, stream=True, save=True, save_json=True, project=tmp_path)
    assert model.saved is None
    assert not (tmp_path / "predict").exists()
    names = [next(stream).path.stem for _ in range(3)]
    stream.close()  # type: ignore[attr-defined]
    folder = tmp_path / "predict" / "exp"
    assert model.saved == folder
    assert {p.stem for p in folder.glob("*.jpg")} == set(names)
    assert [Path(row["path"]).stem for row in json.loads((folder / "predictions.json").read_text())] == names
    with pytest.raises(UserError, match="no image there"):
        model.predict(tmp_path / "none", save=True, project=tmp_path)
    assert sorted(p.name for p in (tmp_path / "predict").iterdir()) == ["exp"], "nothing for nothing"


def test_a_checkpoint_trains_onward_as_what_it_is(run: tuple[SSOD, Trained], recipe: Path, shapes_data: Path) -> None:
    model, _ = run
    quick = {"strategy": "supervised", "iters": 1, "batch": 2, "workers": 0, "plots": False, "project": recipe.parent}
    onward = SSOD(str(model.path), device="cpu")
    args = args_of(onward.train(shapes_data, lr0=0.002, detector={"box_loss_weight": 2.0}, **quick))
    assert args["weights"] == str(model.path)
    assert (args["backbone"], args["imgsz"], args["device"], args["lr0"]) == ("test_resnet", 64, "cpu", 0.002)
    options = args["detector"]
    assert (options["fpn_channels"], options["head_convs"], options["box_loss_weight"]) == (32, 1, 2.0)
    assert args["batch"] == 2
    assert args["ema_decay"] == MODES["train"].model_fields["ema_decay"].default
    assert onward.path == recipe.parent / "train" / "exp" / "weights" / "best.pt"


def test_resume(recipe: Path) -> None:
    first = SSOD(recipe).train(iters=3, name="short")
    last = SSOD(first.folder / "weights" / "last.pt")
    done = last.train(resume=True, iters=4)
    assert done.folder == first.folder
    assert done.summary["steps"] == 4
    with pytest.raises(UserError, match="is finished"):
        SSOD(recipe).train(resume=first.folder)


@pytest.mark.slow
def test_every_rank_knows_the_result(recipe: Path) -> None:
    script = recipe.with_name("ranks.py")
    script.write_text(
        "import sys; from ssod import SSOD\n"
        f"done = SSOD({str(recipe)!r}).train(name='ranks', val_fraction=0.25)\n"
        "print(f'result {done.ap} {done.step} {len(done.summary[\"history\"])}\\n', end='')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    out = subprocess.run(command, capture_output=True, text=True, timeout=200, env=env)
    assert out.returncode == 0, out.stderr[-2000:]
    results = re.findall(r"result \S+ \d+ \d+", out.stdout)  # one line each, written in one piece
    assert len(results) == 2
    assert results[0] == results[1]
    assert results[0].endswith(" 2"), "two validations"


def test_save_keeps_one_network(run: tuple[SSOD, Trained], tmp_path: Path) -> None:
    model, done = run
    whole = load_checkpoint(done.folder / "weights" / "last.pt")
    for use in ("student", "teacher"):
        one = load_checkpoint(SSOD(done.folder / "weights" / "last.pt", weights=use).save(tmp_path / f"{use}.pt"))
        assert (one["use"], list(one["networks"]), "train" in one) == (use, [use], False)
        for name, value in one["networks"][use].items():
            torch.testing.assert_close(value, whole["networks"][use][name], rtol=0, atol=0)
    assert model.save(tmp_path / "auto.pt") == tmp_path / "auto.pt"
    assert load_checkpoint(tmp_path / "auto.pt")["use"] == done.use
    with pytest.raises(UserError, match="holds no"):
        SSOD(tmp_path / "student.pt", weights="teacher")


def test_info(run: tuple[SSOD, Trained], capsys: pytest.CaptureFixture[str]) -> None:
    from ssod.deploy.predictor import load_detector

    model, _ = run
    assert model.path is not None
    told = model.info()
    detector, _ = load_detector(model.path)
    assert told.parameters == sum(p.numel() for p in detector.parameters())
    assert told.names == list(NAMES)
    assert (told.detector, told.backbone, told.imgsz, told.precision) == ("fcos", "test_resnet", 64, "fp32")
    assert told.gflops is not None
    assert 0.01 < told.gflops < 1
    assert f"{told.parameters:,} parameters" in capsys.readouterr().out
    assert model.info(verbose=False) == told
    assert capsys.readouterr().out == ""


def test_mistakes(run: tuple[SSOD, Trained], recipe: Path, tmp_path: Path) -> None:
    model, done = run
    other = {"student": "teacher", "teacher": "student"}[done.use]
    (tmp_path / "bad.yaml").write_text("epoch: 3\n")
    for call, sentence in (
        (lambda: SSOD("fcoss"), "'fcoss' is no model. Did you mean 'fcos'"),
        (lambda: SSOD("best.ptt"), "model best.ptt ends in .ptt"),
        (lambda: SSOD("none.pt"), "there is no checkpoint none.pt"),
        (lambda: SSOD("none.yaml"), "there is no YAML 'none.yaml'"),
        (lambda: SSOD(tmp_path / "bad.yaml"), "'epoch' is not a valid argument. Did you mean epochs"),
        (lambda: SSOD("fcos").predict("x.jpg"), r"SSOD\(fcos: not trained\) yet: call train\(\) first"),
        (lambda: SSOD("fcos").val(), "not trained"),
        (lambda: SSOD("fcos").export(), "not trained"),
        (lambda: SSOD("fcos").save("x.pt"), "not trained"),
        (lambda: SSOD("fcos").info(), "not trained"),
        (lambda: SSOD("fcos").train(), "there is no data: give data=DATA.yaml"),
        (lambda: SSOD("fcos").train(epoch=3), "'epoch' is not a valid argument. Did you mean epochs"),
        (lambda: SSOD("fcos").train(callbacks={"on_save_end": print}), "'on_save_end' is not an event. Did you mean"),
        (lambda: SSOD(recipe).train(cfg="demo.yaml"), r"tiny.yaml already, so cfg=demo.yaml has no place"),
        (lambda: SSOD("fcos").add_callback("on_sve", print), "'on_sve' is not an event. Did you mean 'on_save'"),
        (lambda: SSOD(model.path, weights=other).train(data="shapes"), f"training starts from the {done.use} of"),
        (lambda: model.export(format="onx"), "format=onx is not one of .* Did you mean 'onnx'"),
        (lambda: model.save(tmp_path / "x.onnx"), "a checkpoint is named NAME.pt"),
        (lambda: model.save(tmp_path / "no" / "x.pt"), "no does not exist"),
        (lambda: model.val(split="vla"), "split='vla' does not fit"),
        (lambda: model.predict("x.jpg", batch=0), "batch=0 does not fit: it should be 1 or more"),
        (lambda: model.predict("x.jpg", conf=2), r"conf=2 does not fit: it should be 0 \.\. 1"),
        (lambda: model.predict("x.jpg", imgsz=16), "imgsz=16: give a long side of at least 32 pixels"),
    ):
        with pytest.raises(UserError, match=sentence):
            call()


def test_named_options_are_options_of_the_command_line() -> None:
    """What completion shows is what the configs know; nothing else has a default here."""
    for mode in ("train", "val", "export", "benchmark"):
        parameters = list(inspect.signature(getattr(SSOD, mode)).parameters.values())[1:]
        named = {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD} | {"callbacks": None}
        assert set(named) - {"callbacks", "cfg"} <= set(MODES[mode].model_fields), mode
        assert set(named.values()) == {None}, mode
        assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters = list(inspect.signature(SSOD.predict).parameters.values())[1:]
    named = {p.name: p.default for p in parameters if p.name not in ("source", "stream", "bgr")}
    assert set(named) == set(Options.__annotations__) - {"bgr"}
    assert set(named) == set(MODES["predict"].model_fields) - {"model", "weights", "source", "device", "verbose"}
    there = {name: MODES["predict"].model_fields[name].default for name in named}
    in_the_file = {"conf", "iou", "max_det"}  # None: of an exported model its own
    assert {name for name in named if named[name] != there[name]} == in_the_file | {"save"}
    assert named["save"] is False
    assert all(named[name] is None for name in in_the_file)


def test_the_package_is_typed() -> None:
    assert (Path(ssod.__file__).parent / "py.typed").is_file()
    source = Path(ssod.__file__).read_text()
    for name in ssod.__all__[1:]:
        assert f"import {name} as {name}\n" in source, f"type checkers see no {name}"
