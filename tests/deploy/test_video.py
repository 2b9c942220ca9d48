"""Videos: every frame with its number and time, cut-off files, and what `ssod predict` makes of them."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from small_models import card, write_onnx

from ssod import SSOD
from ssod.cli import main
from ssod.data.image import ImageError
from ssod.deploy.predictor import Predictor
from ssod.deploy.sources import pictures
from ssod.deploy.video import NoEncoder, VideoWriter, read_video, read_webcam
from ssod.errors import Fault, UserError

cv2 = pytest.importorskip("cv2")

FRAMES, RATE, HEIGHT, WIDTH = 20, 10.0, 48, 64


def shade(number: int) -> int:
    return 20 + 10 * number


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Frame n is as bright as `shade(n)`, red is above, blue below."""
    path = tmp_path_factory.mktemp("videos") / "ein Film é.mp4"
    writer = VideoWriter(path, RATE)
    for number in range(FRAMES):
        pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        pixels[: HEIGHT // 2, :, 0] = pixels[HEIGHT // 2 :, :, 2] = shade(number)
        writer.add(pixels)
    writer.close()
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("models") / "student.onnx", card())


def test_every_frame_comes_once_with_its_number_and_time(video: Path) -> None:
    found = list(read_video(video))
    assert [frame.number for frame, _ in found] == list(range(FRAMES))
    np.testing.assert_allclose([frame.time for frame, _ in found], np.arange(FRAMES) / RATE, atol=1e-3)
    assert {frame.rate for frame, _ in found} == {RATE}
    for number, (_, pixels) in enumerate(found):
        assert (pixels.shape, pixels.dtype) == ((HEIGHT, WIDTH, 3), np.uint8)
        above, below = pixels[4:20].mean((0, 1)), pixels[28:44].mean((0, 1))
        np.testing.assert_allclose(above, [shade(number), 0, 0], atol=12)  # RGB; the codec is lossy
        np.testing.assert_allclose(below, [0, 0, shade(number)], atol=12)


def test_a_phone_held_upright(video: Path, tmp_path: Path) -> None:
    content = bytearray(video.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40  # of a track header of version 0
    assert struct.unpack(">9i", content[matrix : matrix + 36])[0] == 1 << 16
    turned = [0, 1 << 16, 0, -1 << 16, 0, 0, HEIGHT << 16, 0, 1 << 30]  # by 90 degrees, clockwise
    content[matrix : matrix + 36] = struct.pack(">9i", *turned)
    (tmp_path / "x.mp4").write_bytes(content)
    _, pixels = next(read_video(tmp_path / "x.mp4"))
    assert pixels.shape == (WIDTH, HEIGHT, 3)
    np.testing.assert_allclose(pixels[:, 28:44].mean((0, 1)), [shade(0), 0, 0], atol=12)  # what was above is right


def test_results_say_which_frame_they_are_of(model: Path, video: Path) -> None:
    results = SSOD(model).predict([np.full((80, 120, 3), 255, np.uint8), video], conf=0.05)
    assert results[0].frame is None
    assert [r.frame.number for r in results[1:] if r.frame] == list(range(FRAMES))
    assert {r.path for r in results[1:]} == {video}
    scores = [float(r.boxes.conf[0]) for r in results[1:]]  # of the brightest value, which may be the padding's
    np.testing.assert_allclose(scores, [max(shade(n) / 255, 0.485) for n in range(FRAMES)], atol=0.03)
    assert results[3].orig_img.shape == (HEIGHT, WIDTH, 3)
    assert results[3][:1].frame == results[3].frame


def test_a_stream_may_be_left_early(model: Path, video: Path) -> None:
    results = list(islice(Predictor(model, batch=2).stream(video), 3))
    assert [r.frame.number for r in results if r.frame] == [0, 1, 2]


def test_globs_of_videos(video: Path) -> None:
    assert len(list(pictures(video.parent / "*.mp4"))) == FRAMES
    with pytest.raises(UserError, match="no video there"):
        list(pictures(video.parent / "*.avi"))
    with pytest.raises(UserError, match=r"there is no video .*ein Film\.mp4\. Did you mean 'ein Film é\.mp4'"):
        list(pictures(video.parent / "ein Film.mp4"))


def cut(content: bytes) -> bytes:
    """An AVI, whose index stands at the end, without its last third."""
    return content[: len(content) * 2 // 3]


@pytest.mark.parametrize(("damage", "frames"), [(cut, True), (lambda _: b"no video", False), (lambda _: b"", False)])
def test_damaged_videos_give_what_they_have_and_are_named(
    damage: Callable[[bytes], bytes], frames: bool, model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "x.avi"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter_fourcc(*"MJPG"), RATE, (WIDTH, HEIGHT))
    for number in range(FRAMES):
        writer.write(np.full((HEIGHT, WIDTH, 3), shade(number), np.uint8))
    writer.release()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ImageError):
        list(read_video(path))
    predict = Predictor(model, conf=0.05)
    results = predict([np.zeros((80, 120, 3), np.uint8), path])
    assert len(results) == 1 or frames
    assert not frames or 0 < len(results) - 1 < FRAMES
    ((name, reason),) = predict.unreadable
    assert name == str(path)
    assert ("cut off or damaged after" in reason) if frames else ("not a video" in reason)
    if not frames:
        with pytest.raises(UserError, match=r"none of the 1 images can be read; the first, .*x\.avi: not a video"):
            predict(path)


def test_without_opencv(video: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"a video needs OpenCV, .* pip install 'ssod\[video\]'"):
        next(read_video(video))
    with pytest.raises(UserError, match=r"a webcam needs OpenCV"):
        next(read_webcam(0))


def test_a_webcam_that_is_not_there_and_one_without_an_end(model: Path) -> None:
    with pytest.raises(UserError, match="there is no webcam of that number"):
        next(Predictor(model).stream(97))
    with pytest.raises(UserError, match="a webcam, which never ends: use stream=True"):
        Predictor(model)(97)


def test_writing(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "x.mp4", 25)
    for _ in range(5):
        writer.add(np.full((49, 65, 3), 200, np.uint8))
    assert not (tmp_path / "x.mp4").exists(), "it appears when it is whole"
    writer.close()
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]
    sizes = [pixels.shape for _, pixels in read_video(tmp_path / "x.mp4")]
    assert sizes == [(48, 64, 3)] * 5
    dropped = VideoWriter(tmp_path / "y.mp4", 25)
    dropped.add(np.zeros((48, 64, 3), np.uint8))
    dropped.drop()
    damaged = VideoWriter(tmp_path / "z.mp4", 25)
    damaged.add(np.zeros((48, 64, 3), np.uint8))
    damaged.count += 1  # as if a frame had not reached the disk
    with pytest.raises(Fault, match="could not be written whole"):
        damaged.close()
    nowhere = VideoWriter(tmp_path / "no folder" / "x.mp4", 25)
    with pytest.raises(NoEncoder):
        nowhere.add(np.zeros((48, 64, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["x.mp4"]


def test_predict_writes_an_annotated_video(
    model: Path, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"model={model}", f"source=[{video},{video}]", f"project={tmp_path}", "save_txt=true", "save_json=true"]
    assert main(["predict", *words, "conf=0.05"]) == 0
    folder = tmp_path / "predict" / "exp"
    assert f"80 objects on {2 * FRAMES} images" in capsys.readouterr().out
    names = sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))
    assert names == [f"{FRAMES:05d}_{video.name}", video.name, "labels", "predictions.json"]
    drawn = [pixels for _, pixels in read_video(folder / video.name)]
    assert len(drawn) == FRAMES
    assert (drawn[5][:2, 8:20].mean((0, 1)) > 2 * shade(5) / 3).any(), "a box is drawn along the border"
    assert len(list((folder / "labels").iterdir())) == 2 * FRAMES
    rows = json.loads((folder / "predictions.json").read_text(encoding="utf-8"))
    assert [row["frame"] for row in rows] == [*range(FRAMES)] * 2
    assert rows[3]["time"] == 0.3


def test_predict_writes_frames_where_there_is_no_encoder(
    model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: 0x20202020)  # a codec that no machine has
    assert main(["predict", f"model={model}", f"source={video}", f"project={tmp_path}"]) == 0
    folder = tmp_path / "predict" / "exp" / video.stem
    assert [p.name for p in sorted(folder.iterdir())] == [f"{n:06d}.jpg" for n in range(FRAMES)]
    assert "Its frames are written as images instead." in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_was_found(
    model: Path, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Predictor.stream

    def interrupted(self: Predictor, source: object) -> object:
        yield from islice(stream(self, source), 7)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "stream", interrupted)
    words = [f"model={model}", f"source={video}", f"project={tmp_path}", "save_json=true"]
    assert main(["predict", *words]) == 130
    folder = tmp_path / "predict" / "exp"
    assert len(list(read_video(folder / video.name))) == 7
    assert len(json.loads((folder / "predictions.json").read_text())) == 7
