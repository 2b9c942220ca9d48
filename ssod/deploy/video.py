"""Frames of video files and webcams, and an annotated video of them, by OpenCV (the extra `video`). Needs no torch.

OpenCV's headless wheels carry FFmpeg under the LGPL; those of other packages bring x264 and x265, which are GPL.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from ssod.data.image import MAX_PIXELS, ImageError
from ssod.errors import Fault, UserError, did_you_mean

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp"})

_USUAL_RATE = 25.0  # where neither the file nor the camera says one
_LOST = 0.05  # share of the announced frames that may be missing: what a header announces is often an estimate


class VideoFrame(NamedTuple):
    """Which frame of a video an image is. number: from 0; time: seconds from its start; rate: frames a second."""

    number: int
    time: float
    rate: float


def is_video(path: str | Path) -> bool:
    """Whether a file's name (or a pattern's ending) looks like that of a video."""
    return Path(path).suffix.lower() in VIDEO_SUFFIXES


def read_video(path: Path) -> Iterator[tuple[VideoFrame, np.ndarray]]:
    """Frames of a video file, uint8 [H, W, 3] RGB, upright, one at a time in memory.

    Raises ImageError for what is no video, or gigantic, and, after the frames that are there, where it is cut off;
    UserError without OpenCV and for a file that is not there.
    """
    cv2 = _opencv("a video")
    if not path.is_file():
        raise UserError(f"there is no video {path}.{did_you_mean(path.name, _beside(path))}")
    capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)  # other backends read other things, such as numbered images
    try:
        if not capture.isOpened():
            raise ImageError(path, "not a video, of an unsupported kind, or cut off")
        width, height = (int(capture.get(p)) for p in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > MAX_PIXELS:
            raise ImageError(path, f"its frames have {width}x{height} pixels, more than the limit of {MAX_PIXELS}")
        capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        announced = capture.get(cv2.CAP_PROP_FRAME_COUNT)
        number = -1
        for number, (seconds, pixels) in enumerate(_grabbed(cv2, capture)):
            rate = _rate(cv2, capture)
            yield VideoFrame(number, seconds if seconds > 0 else number / rate, rate), pixels
        if number + 1 < announced * (1 - _LOST) - 1 or number < 0:
            raise ImageError(path, f"cut off or damaged after {number + 1} frames of {max(0, int(announced))}")
    finally:
        capture.release()


def read_webcam(number: int) -> Iterator[tuple[VideoFrame, np.ndarray]]:
    """Images of a webcam, uint8 [H, W, 3] RGB, until it stops giving any. Raises UserError where there is none."""
    cv2 = _opencv("a webcam")
    capture = cv2.VideoCapture(number)
    try:
        if not capture.isOpened():
            raise UserError(f"source={number}: there is no webcam of that number, or another program uses it.")
        rate = _rate(cv2, capture)
        for index, (_, pixels) in enumerate(_grabbed(cv2, capture)):
            yield VideoFrame(index, index / rate, rate), pixels
    finally:
        capture.release()


class VideoWriter:
    """An MPEG-4 video of frames uint8 [H, W, 3] RGB of one size; odd sides lose their last row or column.

    It appears under its name, which ends in .mp4, by `close`; `drop` leaves nothing of it.
    Raises NoEncoder where this machine cannot write videos, Fault where the file did not become whole.
    """

    def __init__(self, path: Path, rate: float) -> None:
        self.path, self.rate, self.count = path, rate, 0
        self._cv2 = _opencv("writing a video")
        self._own = path.with_name(f".{path.name}.{os.getpid()}.partial.mp4")
        self._writer: Any = None

    def add(self, pixels: np.ndarray) -> None:
        if self._writer is None:
            height, width = pixels.shape[:2]
            code = self._cv2.VideoWriter_fourcc(*"mp4v")
            self._writer = self._cv2.VideoWriter(str(self._own), self._cv2.CAP_FFMPEG, code, self.rate, (width, height))
            if not self._writer.isOpened():
                self.drop()
                raise NoEncoder(f"{self.path}: this OpenCV has no encoder for it.")
        self._writer.write(self._cv2.cvtColor(pixels, self._cv2.COLOR_RGB2BGR))
        self.count += 1

    def close(self) -> None:
        self._writer.release()
        if not self._whole():
            self.drop()
            raise Fault(f"{self.path} could not be written whole. Is the disk full?")
        os.replace(self._own, self.path)

    def drop(self) -> None:
        self._writer.release()
        self._own.unlink(missing_ok=True)

    def _whole(self) -> bool:
        """OpenCV says nothing about a full disk; the frame count stands at the end of the file."""
        written = self._cv2.VideoCapture(str(self._own), self._cv2.CAP_FFMPEG)
        count = written.get(self._cv2.CAP_PROP_FRAME_COUNT) if written.isOpened() else 0
        written.release()
        return count == self.count


class NoEncoder(UserError):
    """There is nothing on this machine that writes the video."""


def _grabbed(cv2: ModuleType, capture: Any) -> Iterator[tuple[float, np.ndarray]]:
    """(seconds, uint8 [H, W, 3] RGB) until there is no more."""
    while True:
        there, pixels = capture.read()
        if not there:
            return
        yield capture.get(cv2.CAP_PROP_POS_MSEC) / 1000, cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _rate(cv2: ModuleType, capture: Any) -> float:
    rate = capture.get(cv2.CAP_PROP_FPS)
    return rate if 0 < rate <= 1000 else _USUAL_RATE


def _opencv(what: str) -> ModuleType:
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # or their own words mix with ours
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    try:
        return importlib.import_module("cv2")
    except ImportError:
        raise UserError(f"{what} needs OpenCV, which is not installed: pip install 'ssod[video]'.") from None


def _beside(path: Path) -> list[str]:
    return [p.name for p in path.parent.glob("*") if is_video(p)]
