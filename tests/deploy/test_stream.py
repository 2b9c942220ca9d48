"""`stream`: one result after the other, in order, with a bounded number of images in memory; and tiles on their way."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import card, write_model, write_onnx

from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.deploy import predictor as predictor_file
from ssod.deploy.predictor import Predictor
from ssod.deploy.results import Results
from ssod.deploy.sources import Picture
from ssod.deploy.stream import WINDOW
from ssod.deploy.video import VideoFrame
from ssod.detectors import build_detector
from ssod.errors import UserError

WHITE = np.full((80, 120, 3), 255, np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("models") / "student.onnx", card())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    detector = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 32, "head_convs": 1})
    content = {"format": FORMAT, "spec": detector.spec, "names": ["cat", "dog"], "imgsz": 96, "use": "student"}
    path = tmp_path_factory.mktemp("model") / "best.pt"
    save_checkpoint(content | {"metrics": {}, "networks": {"student": detector.state_dict()}}, path)
    return path


class Camera:
    """Gives images of these sizes and knows how many of them are alive."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        self.sizes = sizes
        self.given = self.alive = self.most = 0

    def __iter__(self) -> Iterator[np.ndarray]:
        for number, (height, width) in enumerate(self.sizes):
            pixels = np.full((height, width, 3), number % 256, np.uint8)
            self.given += 1
            self.alive += 1
            self.most = max(self.most, self.alive)
            weakref.finalize(pixels, self._gone)
            yield pixels
            del pixels

    def _gone(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rare", [0, 1, 7])
def test_a_long_stream_holds_few_images_and_keeps_their_order(model: Path, workers: int, rare: int) -> None:
    """rare: every so many images are of a size that comes once in 97; 0 = none are."""
    sizes = [(40 + 8 * (n % 3), 30) for n in range(400)]
    for n in range(5, 400, 97):
        if rare:
            sizes[n] = (30, 200 + 40 * (n % rare))
    camera, batch = Camera(sizes), 4
    latest = -1
    for result in Predictor(model, batch=batch, workers=workers, conf=0.05).stream(iter(camera)):
        number = int(result.path.stem.removeprefix("image"))
        assert number == latest + 1
        assert result.orig_shape == sizes[number]
        assert (result.orig_img == number % 256).all()
        latest = number
    assert latest == len(sizes) - 1
    assert camera.most <= WINDOW * batch + max(2 * workers, batch) + 3
    del result
    assert camera.alive == 0


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_stream_asks_for_no_more_than_it_needs(model: Path, workers: int) -> None:
    """And for a batch ahead, or two images a thread, where threads read."""
    camera = Camera([(40, 30)] * 100)
    stream = Predictor(model, batch=4, workers=workers).stream(iter(camera))
    assert camera.given == 0
    next(stream)
    assert camera.given == 4 + (max(2 * workers, 4) if workers else 0)
    stream.close()


def same(a: list[Results], b: list[Results]) -> None:
    assert [r.path.name for r in a] == [r.path.name for r in b]
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one.boxes.xyxy, other.boxes.xyxy, atol=1e-3)
        np.testing.assert_allclose(one.boxes.conf, other.boxes.conf, rtol=1e-5)
        np.testing.assert_array_equal(one.boxes.cls, other.boxes.cls)


@pytest.mark.parametrize("kind", ["onnx", "checkpoint", "torchscript"])
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_neither_batch_nor_threads_nor_window_change_a_result(kind: str, checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint if kind == "checkpoint" else write_model(tmp_path, kind, card())
    rng = np.random.default_rng(0)
    given = [rng.integers(0, 255, (60 + 30 * (n % 4 == 3), 90, 3), dtype=np.uint8) for n in range(6)]
    options = {"device": "cpu", "conf": 0.05, "max_det": 3}
    alone = [Predictor(path, **options)(one)[0] for one in given]
    for number, result in enumerate(alone):
        result.path = Path(f"image{number}.jpg")
    for batch, workers in ((2, 2), (8, 0)):
        predict = Predictor(path, batch=batch, workers=workers, **options)
        same(predict(given), alone)
        same(list(predict.stream(iter(given))), alone)


def test_unreadable_images_of_a_stream_are_named(model: Path, tmp_path: Path) -> None:
    for name in "abc":
        Image.fromarray(WHITE).save(tmp_path / f"{name}.png")
    (tmp_path / "b.png").write_bytes(b"")
    predict = Predictor(model, workers=1)
    assert [r.path.name for r in predict.stream(tmp_path)] == ["a.png", "c.png"]
    assert predict.unreadable == [(str(tmp_path / "b.png"), "the file is empty")]
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        list(predict.stream(tmp_path / "b.png"))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_source_ends_the_stream_after_what_came_before(model: Path, workers: int) -> None:
    def camera() -> Iterator[object]:
        for _ in range(11):
            yield WHITE
        raise RuntimeError("unplugged")

    found: list[str] = []
    with pytest.raises(RuntimeError, match="unplugged"):
        found.extend(r.path.stem for r in Predictor(model, batch=4, workers=workers).stream(camera()))
    assert found == [f"image{n}" for n in range(8)], "two batches"


def test_the_next_images_are_made_ready_while_the_model_looks(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model waits until an image of the next batch is ready: without threads, for ever."""
    from ssod.deploy.array_model import OnArrays

    ready, see, fresh = OnArrays.ready, OnArrays.see, threading.Event()
    made = 0

    def counted(self: OnArrays, pixels: np.ndarray) -> object:
        nonlocal made
        item = ready(self, pixels)
        made += 1
        if made > 2:
            fresh.set()
        return item

    def waits(self: OnArrays, items: list[Any]) -> object:
        assert fresh.wait(20), "nothing was made ready meanwhile"
        return see(self, items)

    monkeypatch.setattr(OnArrays, "ready", counted)
    monkeypatch.setattr(OnArrays, "see", waits)
    assert len(Predictor(model, batch=2)([WHITE] * 8)) == 8


def test_many_frames_as_a_list_are_warned_of(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def frames(*_: object) -> Iterator[object]:
        for number in range(6):
            yield Picture(Path("film.mp4"), WHITE.copy(), frame=VideoFrame(number, number / 10, 10))

    monkeypatch.setattr(predictor_file, "pictures", frames)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Predictor(model)("film.mp4")
    monkeypatch.setattr(predictor_file, "_HEAVY", 3 * WHITE.nbytes)
    with pytest.warns(UserWarning, match=r"film\.mp4 .* stream=True") as told:
        Predictor(model)("film.mp4")
    assert len(told) == 1


@pytest.mark.parametrize("kind", ["onnx", "checkpoint"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_no_larger_than_a_tile_is_seen_as_without_tiles(
    kind: str, workers: int, model: Path, checkpoint: Path
) -> None:
    path = model if kind == "onnx" else checkpoint
    given = [np.random.default_rng(n).integers(0, 255, (90, 60 + 30 * n, 3), dtype=np.uint8) for n in range(3)]
    options = {"conf": 0.05, "device": "cpu", "workers": workers}
    same(Predictor(path, tile=120, **options)(given), Predictor(path, **options)(given))


@pytest.mark.parametrize("workers", [0, 2])
def test_tiles_are_batched_with_other_images_and_merged(model: Path, workers: int) -> None:
    """The small model finds in every tile [1/4, 1/4, 1/2, 3/4] of it (dog) and all of it (cat)."""
    large = np.full((100, 260, 3), 255, np.uint8)
    predict = Predictor(model, tile=100, overlap=0.2, conf=0.05, batch=4, workers=workers)
    first, second, third = predict([large, WHITE[:, :100], large])
    assert predict.unreadable == []
    np.testing.assert_array_equal(first.boxes.xyxy, third.boxes.xyxy)
    dogs = first.boxes[first.boxes.cls == 1].xyxy
    np.testing.assert_allclose(dogs[dogs[:, 0].argsort()], [[25, 25, 50, 75], [105, 25, 130, 75], [185, 25, 210, 75]])
    cats = first.boxes[first.boxes.cls == 0].xyxy
    np.testing.assert_allclose(cats, [[0, 0, 260, 100]], err_msg="found in three parts")
    assert first.orig_shape == (100, 260)
    np.testing.assert_allclose(second.boxes.xyxy, [[25, 20, 50, 60], [0, 0, 100, 80]], atol=1e-4)
    assert min(first.speed.values()) > 0
    (few,) = Predictor(model, tile=100, max_det=1, conf=0.05)(large)
    assert few.verbose() == "3 dog", "max_det is of each tile"


def test_tiles_of_a_large_image_come_few_at_a_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssod.deploy.array_model import OnArrays

    alive, most = 0, 0
    ready = OnArrays.ready

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def counted(self: OnArrays, pixels: np.ndarray) -> object:
        nonlocal alive, most
        item = ready(self, pixels)
        alive += 1
        most = max(most, alive)
        weakref.finalize(item.image, gone)
        return item

    monkeypatch.setattr(OnArrays, "ready", counted)
    Predictor(model, tile=32, overlap=0, batch=4, workers=2)(np.full((512, 512, 3), 255, np.uint8))
    assert 4 <= most <= WINDOW * 4 + 2 * 2 + 2
    assert alive == 0
