"""`ssod benchmark`: rows of real files, drawn and annotated images, and what cannot be had said in the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import card, write_model, write_onnx

from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.data.shapes import NAMES as SHAPES
from ssod.detectors import build_detector
from ssod.engine.benchmark import PARTS, Report, benchmark
from ssod.errors import UserError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tells what a machine without a GPU says")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained FCOS of 64 pixels for the drawn shapes."""
    torch.manual_seed(0)
    detector = build_detector("fcos", len(SHAPES), "test_resnet", {"fpn_channels": 32, "head_convs": 1})
    content = {"format": FORMAT, "spec": detector.spec, "names": list(SHAPES), "imgsz": 64, "use": "student"}
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    save_checkpoint(content | {"metrics": {}, "networks": {"student": detector.state_dict()}}, path)
    return path


def run(tmp_path: Path, **words: object) -> Report:
    small = {"images": 4, "batches": [1, 2], "warmup": 1, "device": "cpu", "project": str(tmp_path / "runs")}
    return benchmark(load_config("benchmark", small | words), say=lambda line: None)


def test_a_checkpoint_and_an_exported_file_on_annotated_images(
    checkpoint: Path, shapes_data: Path, tmp_path: Path
) -> None:
    other = write_onnx(tmp_path / "other.onnx", card(names=list(SHAPES)))
    report = run(tmp_path, model=[str(checkpoint), str(other)], data=str(shapes_data))
    assert [(row.model, row.format, row.reason) for row in report.rows] == [
        ("best.pt", "checkpoint", ""),
        ("other.onnx", "onnx", ""),
    ]
    assert report.images == "4 image files of val"
    assert report.rows[0].megabytes == checkpoint.stat().st_size / 1e6
    for row in report.rows:
        assert set(row.speed) == {1, 2}
        assert row.ap is not None
        for speed in row.speed.values():
            assert all(0 < speed.ms[part][0] <= speed.ms[part][1] for part in PARTS)
    written = json.loads((tmp_path / "runs" / "benchmark" / "exp" / "benchmark.json").read_text())
    assert [row["format"] for row in written["rows"]] == ["checkpoint", "onnx"]
    assert written["rows"][1]["ap"] == report.rows[1].ap
    assert written["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.slow  # an export takes from ten seconds to a minute and a half
def test_exports_are_made_measured_and_left_nowhere(checkpoint: Path, shapes_data: Path, tmp_path: Path) -> None:
    first, plain, script = run(
        tmp_path, model=str(checkpoint), formats=["onnx", "torchscript"], data=str(shapes_data)
    ).rows
    assert (plain.format, plain.reason) == ("onnx", "")
    assert (script.format, script.reason) == ("torchscript", "")
    assert plain.ap == pytest.approx(first.ap, abs=1e-3)
    assert script.ap == pytest.approx(first.ap, abs=1e-3)
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_times_are_those_of_the_parts(tmp_path: Path) -> None:
    """Without workers nothing overlaps: a whole image takes as long as its parts, and the loop around them little."""
    report = run(tmp_path, model=str(write_onnx(tmp_path / "a.onnx", card(imgsz=640))), images=12, batches=[1])
    speed = report.rows[0].speed[1]
    assert 1000 / speed.rate >= sum(low for low, _ in speed.ms.values()) * 0.5
    assert 1000 / speed.rate < 2 * sum(high for _, high in speed.ms.values()) + 5


def test_formats_by_file_and_precision_by_card(tmp_path: Path) -> None:
    models = [write_onnx(tmp_path / "a.onnx", card()), write_onnx(tmp_path / "b.onnx", card(precision="int8"))]
    models += [write_model(tmp_path, kind, card(precision="fp16")) for kind in ("openvino", "torchscript")]
    report = run(tmp_path, model=[str(m) for m in models])
    assert [row.format for row in report.rows] == ["onnx", "onnx-int8", "openvino-fp16", "torchscript-fp16"]
    assert not any(row.reason for row in report.rows)


def test_the_size_of_the_input_is_told(checkpoint: Path, tmp_path: Path) -> None:
    """A smaller input is faster in any format."""
    fixed = write_onnx(tmp_path / "a.onnx", card(size=(64, 96)))
    free = write_onnx(tmp_path / "b.onnx", card(imgsz=[64, 96]))
    report = run(tmp_path, model=[str(checkpoint), str(fixed), str(free)], images=1, batches=[1])
    assert [row.input for row in report.rows] == ["64", "64x96", "[64,96]"]


def test_the_table_says_what_its_figures_hold_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (50.0, 1.0, 1.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    paths = [write_onnx(tmp_path / name, card()) for name in ("a.onnx", "b.onnx")]
    words = [f"model=[{paths[0]},{paths[1]}]", "images=3", "batches=[1]", f"project={tmp_path}"]
    assert main(["benchmark", *words]) == 0
    shown = capsys.readouterr().out
    for part in ("onnxruntime 1.", "2 CPUs", "OMP_NUM_THREADS=1", "load 50.0", "3 drawn images of 128 pixels"):
        assert part in shown
    assert "NOTE: other programs are busy: times are not comparable." in shown
    rows = [line.split() for line in shown.splitlines() if line.startswith(("a.onnx  ", "b.onnx  "))]
    assert rows[0][:5] == ["a.onnx", "onnx", "cpu", "96", "0.0"]
    assert rows[0][-2] == "1.00"  # as fast as itself
    assert "AP" not in shown  # no data, no column
    monkeypatch.setattr("os.getloadavg", lambda: (0.1, 1.0, 1.0))
    assert main(["benchmark", *words]) == 0
    assert "NOTE" not in capsys.readouterr().out
    assert (tmp_path / "benchmark" / "exp-2" / "benchmark.json").is_file()


@no_gpu
def test_what_cannot_be_had_gets_a_row_with_the_reason(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = write_onnx(tmp_path / "foreign.onnx", None)
    openvino = write_model(tmp_path, "openvino", card())
    monkeypatch.setitem(sys.modules, "openvino", None)  # what an import finds where it is not installed
    words = [f"model=[{checkpoint},{foreign},{openvino}]", "formats=[onnx-int8,engine]", "images=1", "batches=[1]"]
    assert main(["benchmark", *words, "device=cpu", f"project={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not measured: ") == 4
    for reason in (
        "exported by another program",
        "pip install openvino",
        "give data=DATA.yaml, the one it was trained with",
        "an engine runs on an NVIDIA GPU, and this machine has none",
    ):
        assert reason in shown


def test_a_model_of_other_classes_is_not_scored_as_if_it_were_bad(
    checkpoint: Path, shapes_data: Path, tmp_path: Path
) -> None:
    other = write_onnx(tmp_path / "cats.onnx", card())
    report = run(tmp_path, model=[str(checkpoint), str(other)], data=str(shapes_data))
    assert "it knows the classes cat, dog and the data disc, square" in report.rows[1].reason
    assert report.rows[1].ap is None
    assert not report.rows[1].speed


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"model": "none.pt"}, "there is no checkpoint none.pt"),
        ({"model": "none.onnx"}, "there is no model none.onnx"),
        ({"model": []}, "'model' is an empty list"),
        ({"model": "best.onnx", "formats": ["onnx"]}, "exported from a checkpoint; give one .pt file"),
        ({"model": "best.pt", "formats": ["onnx-int4"]}, "Did you mean 'onnx-int8'"),
        ({"model": "best.pt", "formats": ["torchscript-int8"]}, "formats: torchscript-int8 is not one of"),
        ({"model": "best.pt", "batches": []}, "batches"),
        ({"model": "best.pt", "batches": [0]}, "batches"),
    ],
)
def test_mistakes_are_said_before_anything_is_timed(
    words: dict[str, object], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=sentence):
        run(tmp_path, **words)
    assert list(tmp_path.iterdir()) == []


def test_where_nothing_could_be_measured_there_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none of the models could be measured; x\.onnx: .*carries no description"):
        run(tmp_path, model=str(write_onnx(tmp_path / "x.onnx", None)))
    assert not (tmp_path / "runs").exists()


def test_an_onnx_file_is_timed_without_torch(tmp_path: Path) -> None:
    """As on the machine where it will work."""
    path = write_onnx(tmp_path / "a.onnx", card())
    words = ["benchmark", f"model={path}", "images=2", "batches=[1]", f"project={tmp_path}"]
    code = f"import sys, ssod.cli; code = ssod.cli.main({words!r}); print(code, 'torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout.endswith("\n0 False\n"), out.stderr
