"""Files in, Results out: sources, order, files that cannot be read, coordinates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ssod import SSOD
from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.data.annotations.listing import find_images
from ssod.data.image import read_image
from ssod.deploy.infer import pick_device
from ssod.deploy.predictor import Predictor
from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.errors import UserError
from ssod.structures import Instances

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    networks = {}
    for name in ("student", "teacher"):
        detector = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 32, "head_convs": 1})
        networks[name] = detector.state_dict()
    content = {"format": FORMAT, "spec": detector.spec, "names": NAMES, "imgsz": 96, "use": "teacher", "metrics": {}}
    path = tmp_path_factory.mktemp("model") / "best.pt"
    save_checkpoint(content | {"networks": networks}, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "mes photos é"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, (h, w) in {"b.jpg": (80, 120), "a.png": (120, 60), "more/c.jpg": (96, 96), "d.jpg": (80, 120)}.items():
        Image.fromarray(rng.integers(0, 255, (h, w, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("not an image")
    return folder


def predictor(checkpoint: Path, **options: Any) -> Predictor:
    return Predictor(checkpoint, device="cpu", **{"conf": 0.0, "max_det": 4} | options)


def test_sources(photos: Path) -> None:
    names = lambda source: [p.relative_to(photos).as_posix() for p in find_images(source)]  # noqa: E731
    assert names(photos) == ["a.png", "b.jpg", "d.jpg", "more/c.jpg"]
    assert names(str(photos / "*.jpg")) == ["b.jpg", "d.jpg"]
    assert names([photos / "d.jpg", photos / "more"]) == ["d.jpg", "more/c.jpg"]
    for nothing in (photos / "*.gif", photos / "none", [photos / "none"]):
        with pytest.raises(UserError, match="no image there"):
            find_images(nothing)


def test_results_come_in_order_and_do_not_depend_on_the_batch(checkpoint: Path, photos: Path) -> None:
    together = predictor(checkpoint, batch=8)(photos)
    alone = [predictor(checkpoint, batch=1)(p)[0] for p in find_images(photos)]
    assert [r.path for r in together] == find_images(photos)
    for a, b in zip(together, alone, strict=True):
        np.testing.assert_allclose(a.boxes.xyxy, b.boxes.xyxy, atol=1e-3, rtol=1e-5)
        np.testing.assert_allclose(a.boxes.conf, b.boxes.conf, rtol=1e-5)
        h, w = a.orig_shape
        assert (a.boxes.xyxy >= 0).all()
        assert (a.boxes.xyxy[:, 2] <= w).all()
        assert (a.boxes.xyxy[:, 3] <= h).all()
        assert min(a.speed.values()) > 0
        assert set(a.speed) == {"preprocess", "inference", "postprocess"}


def test_images_in_memory_are_found_the_same_in(checkpoint: Path, photos: Path) -> None:
    files = find_images(photos)
    pixels = [read_image(p) for p in files]
    given = [pixels[0], files[1], Image.fromarray(pixels[2]), pixels[3]]
    predict = predictor(checkpoint, workers=2)
    results = predict(given)
    assert [r.path.name for r in results] == ["image0.jpg", "b.jpg", "image2.jpg", "image3.jpg"]
    for a, b in zip(results, predict(files), strict=True):
        np.testing.assert_allclose(a.boxes.xyxy, b.boxes.xyxy, atol=1e-3)
        assert a.orig_shape == b.orig_shape
        np.testing.assert_array_equal(a.orig_img, b.orig_img)
    assert len(SSOD(checkpoint, device="cpu").predict(pixels[0], conf=0.0, max_det=7)[0]) == 7


def test_files_that_cannot_be_read_are_named_and_left_out(checkpoint: Path, photos: Path) -> None:
    whole = (photos / "b.jpg").read_bytes()
    (photos / "b.jpg").write_bytes(whole[: len(whole) // 2])  # the header is there, the pixels are not
    (photos / "d.jpg").write_bytes(b"nothing of the kind")
    predict = predictor(checkpoint)
    assert [r.path.name for r in predict(photos)] == ["a.png", "c.jpg"]
    assert {Path(p).name for p, _ in predict.unreadable} == {"b.jpg", "d.jpg"}
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict(photos / "d.jpg")


def test_the_checkpoint_decides_between_student_and_teacher(checkpoint: Path, photos: Path) -> None:
    auto, teacher, student = (predictor(checkpoint, weights=w)(photos)[0] for w in ("auto", "teacher", "student"))
    assert np.array_equal(auto.boxes.conf, teacher.boxes.conf)
    assert not np.array_equal(auto.boxes.conf, student.boxes.conf)


def test_classes_are_kept_by_name_or_number(checkpoint: Path, photos: Path) -> None:
    everything = predictor(checkpoint, max_det=100)(photos)[0].boxes.cls
    assert set(everything.tolist()) == {0, 1}
    assert set(predictor(checkpoint, classes=["dog"])(photos)[0].boxes.cls.tolist()) == {1}
    assert set(predictor(checkpoint, classes=[0])(photos)[0].boxes.cls.tolist()) == {0}
    with pytest.raises(UserError, match=r"no class 'dgo'. Did you mean 'dog'"):
        predictor(checkpoint, classes=["dgo"])


def test_boxes_come_back_in_source_pixels(checkpoint: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that sees 96 x 64 of a 120 x 80 photo and answers in view pixels."""

    def found(self: Detector, images: torch.Tensor, sizes: torch.Tensor, **_: float) -> list[Instances]:
        assert sizes.tolist() == [[64, 96]]
        box = torch.tensor([[24.0, 16, 48, 64]])
        return [Instances(box, torch.tensor([1]), scores=torch.tensor([0.5]))]

    monkeypatch.setattr(Detector, "forward", found)
    (result,) = predictor(checkpoint)(photos / "b.jpg")
    np.testing.assert_allclose(result.boxes.xyxy, [[30, 20, 60, 80]], rtol=1e-6)  # times 120 / 96 = 1.25
    assert (result.verbose(), result.orig_shape) == ("1 dog", (80, 120))


def test_devices() -> None:
    assert pick_device("cpu").type == "cpu"
    assert pick_device("auto").type in ("cpu", "cuda")
    with pytest.raises(UserError, match="device=gpu is not a device"):
        pick_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="0 CUDA devices"):
            pick_device(0)
