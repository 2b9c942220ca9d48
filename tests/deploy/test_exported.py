"""Exported models in PyTorch's loop: `detect`, and `ssod val` and `ssod predict` without any YAML of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import card, write_model, write_onnx

from ssod import Predictor
from ssod.cli import main
from ssod.data.samples import Sample
from ssod.data.shapes import NAMES as SHAPES
from ssod.deploy.asked import asked
from ssod.deploy.exported import Exported, load_model
from ssod.deploy.infer import detect
from ssod.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    (tmp_path / "photos").mkdir()
    made = []
    for number, (h, w) in enumerate([(80, 120), (120, 80), (60, 60), (80, 120)]):
        path = tmp_path / "photos" / f"{number}.png"
        Image.fromarray(np.full((h, w, 3), 255 - 51 * number // 2, np.uint8)).save(path)
        made.append(Sample.unlabeled(path, number + 1, w, h))
    return made


@pytest.mark.parametrize("kind", ["onnx", "openvino", "torchscript"])
@pytest.mark.parametrize("size", [None, (96, 160)])
def test_detect_takes_them_as_it_takes_detectors(
    kind: str, size: tuple[int, int] | None, samples: list[Sample], tmp_path: Path
) -> None:
    model = load_model(write_model(tmp_path, kind, card(size=size)), device="cpu")
    how = model.how(asked(model.card, model.path, conf=0.4), None, 2, 0)
    found = dict(detect(model.detector, samples, how))
    assert sorted(found) == [0, 1, 2, 3]
    for number, sample in enumerate(samples):
        one, brightest = found[number], (255 - 51 * number // 2) / 255  # the mean around it is darker
        expected = [brightest, brightest / 2] if brightest / 2 >= 0.4 else [brightest]
        assert one.scores is not None
        np.testing.assert_allclose(one.scores, expected, atol=1e-6)
        w, h = sample.width, sample.height
        np.testing.assert_allclose(one.boxes[0], [w / 4, h / 4, w / 2, h * 3 / 4], atol=1e-3)
        assert one.labels.tolist() == [1, 0][: len(expected)]
        assert one.labels.dtype == torch.int64
    assert model.detector.training is True, "the mode is put back"


def test_both_loops_of_predict_agree(samples: list[Sample], tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "x.onnx", card())
    arrays, tensors = Predictor(path), Predictor(load_model(path))
    for a, b in zip(arrays(tmp_path / "photos"), tensors(tmp_path / "photos"), strict=True):
        assert a.path == b.path
        np.testing.assert_allclose(a.boxes.xyxy, b.boxes.xyxy, atol=1e-3)
        np.testing.assert_allclose(a.boxes.conf, b.boxes.conf, atol=1e-6)


def test_what_lies_in_the_padding_is_no_detection(tmp_path: Path) -> None:
    """A model without `sizes` does not know where the image ends."""
    about = card(inputs=("images",))

    def call(images: torch.Tensor, sizes: torch.Tensor | None) -> list[torch.Tensor]:
        assert sizes is None
        boxes = torch.tensor([[[0.0, 0, 20, 25], [10, 10, 40, 64], [0, 41, 20, 60]]])
        return [torch.tensor([[3]]), boxes, torch.tensor([[0.9, 0.8, 0.7]]), torch.tensor([[0, 1, 1]])]

    (found,) = Exported(about, tmp_path, call)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.tensor([[40, 30]]))
    assert found.boxes.tolist() == [[0, 0, 20, 25], [10, 10, 30, 40]]
    path = write_onnx(tmp_path / "x.onnx", about, sized=False)  # a box of the whole padded image, and of 1/4 .. 3/4
    for model in (path, load_model(path)):
        (result,) = Predictor(model)(np.full((40, 96, 3), 255, np.uint8))
        np.testing.assert_allclose(result.boxes.xyxy, [[24, 16, 48, 40], [0, 0, 96, 40]], atol=1e-4)


def test_the_padding_holds_the_mean(tmp_path: Path) -> None:
    seen: list[torch.Tensor] = []

    def call(images: torch.Tensor, sizes: torch.Tensor | None) -> list[torch.Tensor]:
        seen.append(images)
        assert sizes is not None
        assert sizes.dtype == torch.int32
        rows = len(images)
        zero = torch.zeros(rows, 3)
        return [torch.zeros(rows, 1, dtype=torch.int32), torch.zeros(rows, 3, 4), zero, zero.int() - 1]

    images = torch.full((2, 3, 32, 64), 114, dtype=torch.uint8)
    images[0, :, :30, :50] = 255
    images[1, :, :20, :64] = 255
    sizes = torch.tensor([[30, 50], [20, 64]])
    for size, expected in ((None, (32, 64)), ((64, 96), (64, 96))):
        about = card(size=size)
        found = Exported(about, tmp_path, call)(images, sizes)
        assert [len(f) for f in found] == [0, 0]
        canvas = seen.pop()
        assert canvas.shape == (2, 3, *expected)
        for own, (h, w) in zip(canvas, sizes.tolist(), strict=True):
            assert (own[:, :h, :w] == 1).all()
            outside = torch.ones(expected, dtype=torch.bool)
            outside[:h, :w] = False
            assert torch.equal(own[:, outside], torch.tensor(about.mean)[:, None].expand(3, int(outside.sum())))
    with pytest.raises(UserError, match="fixed at 32 x 32 pixels"):
        Exported(card(size=(32, 32)), tmp_path, call)(images, sizes)


def test_val_and_predict_on_the_command_line(
    shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = list(SHAPES)
    path = write_onnx(tmp_path / "student.onnx", card(names=names, conf=0.1))
    words = [f"model={path}", "device=cpu", f"project={tmp_path / 'runs'}", "workers=0"]
    assert main(["val", *words, f"data={shapes_data}", "save_json=true"]) == 0
    said = capsys.readouterr()
    assert "8 images, 16 detections" in said.out
    assert "gives no score below 0.1" in said.err
    rows = json.loads((tmp_path / "runs" / "val" / "exp" / "detections.json").read_text())
    assert len(rows) == 16
    assert main(["predict", *words, f"source={shapes_data.parent / 'images' / 'val'}", "save=false"]) == 0
    assert "16 objects on 8 images" in capsys.readouterr().out
    for mode, extra, told in (
        ("val", ["iou=0.5", f"data={shapes_data}"], "so iou=0.5 cannot be had of it"),
        ("val", ["conf=0.01", f"data={shapes_data}"], "so conf=0.01 cannot be had of it"),
        ("predict", ["max_det=300", f"source={shapes_data.parent}"], "so max_det=300 cannot be had of it"),
        ("predict", ["weights=teacher", f"source={shapes_data.parent}"], "holds the student alone"),
    ):
        assert main([mode, *words, *extra]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.fault(32)
def test_val_refuses_a_model_of_other_classes(
    shapes_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_onnx(tmp_path / "x.onnx", card())
    assert main(["val", f"model={path}", f"data={shapes_data}", f"project={tmp_path}"]) == 2
    assert "the model knows the classes cat, dog and the data" in capsys.readouterr().err
