"""`ssod export` from a checkpoint of a real, short training run."""

import json

import numpy as np
import pytest

from ssod.cli import main
from ssod.config import load_config
from ssod.errors import Fault, UserError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from ssod.deploy.contract import KEY  # noqa: E402
from ssod.deploy.exported import load_model  # noqa: E402
from ssod.deploy.predictor import load_detector  # noqa: E402
from ssod.engine.export import _compared, _runs, export  # noqa: E402
from ssod.engine.trainer import SemiTrainer  # noqa: E402


@pytest.fixture(scope="module")
def best(shapes_data, tmp_path_factory):
    """A checkpoint whose student finds something everywhere, and the data it is of."""
    overrides = {
        "data": str(shapes_data),
        "detector": {"name": "fcos", "fpn_channels": 16, "head_convs": 1},
        "backbone": "test_resnet",
        "strategy": {"name": "supervised"},
        "imgsz": 96,
        "iters": 30,
        "batch": 4,
        "workers": 0,
        "amp": False,
        "lr0": 0.02,
        "plots": False,
        "project": str(tmp_path_factory.mktemp("run")),
        "device": "cpu",
    }
    trainer = SemiTrainer(load_config("train", overrides))
    trainer.train()
    return trainer.folder / "weights" / "best.pt"


@pytest.fixture(scope="module")
def exported(best, shapes_data):
    """(what was made, the lines that were said) of the plainest export with data."""
    said: list[str] = []
    words = {"model": str(best), "data": str(shapes_data), "workers": 0, "conf": 0.02}
    return export(load_config("export", words), said.append), said


def test_lies_beside_the_checkpoint_and_says_what_was_compared(exported, best):
    made, said = exported
    assert made.path == best.with_suffix(".onnx")
    assert made.path.exists()
    assert made.difference.total > 0
    assert any(line.startswith("compared in onnxruntime on 7 images of the data and an empty one") for line in said)
    assert any(line.startswith("AP on val: checkpoint ") for line in said)
    assert not list(best.parent.glob(".ssod-export-*"))


def test_has_the_ap_of_the_checkpoint(exported):
    made, _ = exported
    before, after = made.ap
    assert before == pytest.approx(after, abs=2e-3)


def test_the_card_says_what_it_is_of(exported, best):
    made, _ = exported
    card = load_model(made.path).card
    assert (card.detector, card.size, card.imgsz, card.precision) == ("fcos", (96, 96), 96, "fp32")
    assert card.names == load_detector(best)[1]["names"]
    assert len(card.source) == 64


def test_int8_of_a_run_folder_elsewhere(best, shapes_data, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    words = [f"model={best}", "int8=true", f"data={shapes_data}", "workers=0", "calibration=8", f"out={out}"]
    code = main(["export", *words])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "calibrating int8 on 8 images" in said.out
    model = onnx.load(out)
    assert json.loads({p.key: p.value for p in model.metadata_props}[KEY])["precision"] == "int8"
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in model.graph.node}


def test_torchscript_takes_any_batch(best, tmp_path, capsys):
    assert main(["export", f"model={best}", "format=torchscript", f"out={tmp_path / 'm.torchscript'}"]) == 0
    assert "compared in TorchScript" in capsys.readouterr().out


def test_a_file_that_finds_something_else_is_not_let_through(exported, best):
    """The run of one network held against another: the same one with other weights."""
    made, _ = exported
    detector, _ = load_detector(best)
    detector.cls_logits.bias.data += 0.5
    with pytest.raises(Fault, match=r"differs from the detector by more than 0\.01 px"):
        _compared(detector, made.card, _runs(made.path, "cpu"), [], "onnxruntime", lambda line: None)


def test_numbers_that_are_not_finite_are_not_let_through(exported, best):
    made, _ = exported
    detector, _ = load_detector(best)
    run = _runs(made.path, "cpu")

    def broken(images, sizes):
        out = run(images, sizes)
        return out._replace(scores=np.full_like(out.scores, np.nan))

    with pytest.raises(Fault):
        _compared(detector, made.card, broken, [], "onnxruntime", lambda line: None)


def test_of_a_model_trained_on_two_sides_the_input_must_be_said(best):
    from ssod.engine.export import _size

    with pytest.raises(UserError, match=r"imgsz=\[800,1344\] .* or dynamic=true"):
        _size(None, [800, 1333])
    assert _size([480, 640], 320) == (480, 640)
    assert _size(None, 250) == (256, 256)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["format=onxx"], "Did you mean 'onnx'"),
        (["imgsz=250"], "imgsz=256 is near"),
        (["imgsz=[480,650]"], r"imgsz=\[480,640\] is near"),
        (["batch=0"], "batch=0 does not fit"),
        (["int8=true"], "give data=DATA.yaml"),
        (["half=true", "int8=true"], "two precisions"),
        (["format=torchscript", "dynamic=true"], "fixed size"),
        (["opset=23"], "opset=23 does not fit"),
        (["out=nowhere/x.onnx"], "the folder nowhere does not exist"),
        (["out=x.engine"], "is named NAME.onnx"),
        (["weights=teacher"], "holds no teacher"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(best, words, sentence, capsys):
    import re

    before = sorted(best.parent.iterdir())
    assert main(["export", f"model={best}", *words]) == 2
    said = capsys.readouterr().err
    assert re.search(sentence, said), said
    assert len(said.strip().splitlines()) == 1
    assert sorted(best.parent.iterdir()) == before


def test_data_of_other_classes_are_refused(best, shapes_data, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text(f"path: {shapes_data.parent}\ntrain: images/train\nval: images/val\nnames: [a, b, c, d, e, f]\n")
    assert main(["export", f"model={best}", f"data={other}"]) == 2
    assert "ssod: " in capsys.readouterr().err
