"""What `predict` returns for one image. Needs no torch."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ssod.data.draw import draw_boxes
from ssod.data.image import read_image
from ssod.deploy.video import VideoFrame
from ssod.errors import UserError


class Array(np.ndarray):
    """An array that also answers to what scripts written for tensors ask: `.cpu()`, `.numpy()`, `int(one_value)`."""

    def cpu(self) -> Array:
        return self

    def numpy(self) -> np.ndarray:
        return self.view(np.ndarray)

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())


def _array(values: Any, dtype: type, shape: tuple[int, ...]) -> Array:
    return np.asarray(values, dtype).reshape(shape).view(Array)


class Boxes:
    """Detections of one image, by descending score.

    xyxy, xywh    float32 [N, 4] pixels (xywh: centre and size)
    xyxyn, xywhn  the same as shares of the image's width and height, 0..1
    conf          float32 [N], 0..1;  cls  int64 [N];  id  None: nothing is tracked
    """

    id = None

    def __init__(self, xyxy: np.ndarray, conf: np.ndarray, cls: np.ndarray, orig_shape: tuple[int, int]) -> None:
        self.xyxy = _array(xyxy, np.float32, (-1, 4))
        self.conf = _array(conf, np.float32, (-1,))
        self.cls = _array(cls, np.int64, (-1,))
        assert len(self.xyxy) == len(self.conf) == len(self.cls)
        self.orig_shape = orig_shape

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, index: Any) -> Boxes:
        """Some of the boxes: a number, a slice, a mask or numbers."""
        rows = np.arange(len(self))[index]  # raises IndexError past the end, which also ends a `for`
        return Boxes(self.xyxy[rows], self.conf[rows], self.cls[rows], self.orig_shape)

    @property
    def xywh(self) -> Array:
        low, high = self.xyxy[:, :2], self.xyxy[:, 2:]
        return np.concatenate([(low + high) / 2, high - low], axis=1).view(Array)

    @property
    def xyxyn(self) -> Array:
        return (self.xyxy / self._extent).view(Array)

    @property
    def xywhn(self) -> Array:
        return (self.xywh / self._extent).view(Array)

    @property
    def _extent(self) -> Array:
        h, w = self.orig_shape
        return _array([w, h, w, h], np.float32, (4,))


class Results:
    """Detections of one image and what it takes to show them.

    path        the image or video file; of an image in memory a made-up name
    frame       which frame of a video or webcam it is: number from 0, time in seconds, rate; None of other images
    names       {class number: class name}
    orig_shape  (height, width) of the image after EXIF rotation, pixels
    speed       milliseconds of this image's share of its batch: {"preprocess", "inference", "postprocess"}
    masks       None: what reads results of several kinds asks for it
    """

    masks = None

    def __init__(
        self,
        boxes: Boxes,
        path: Path,
        names: Sequence[str],
        speed: dict[str, float],
        pixels: np.ndarray | None = None,
        frame: VideoFrame | None = None,
    ) -> None:
        self.boxes = boxes
        self.path = path
        self.names = dict(enumerate(names))
        self.orig_shape = boxes.orig_shape
        self.speed = speed
        self.frame = frame
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Any) -> Results:
        """The same image with some of its boxes: a number, a slice, a mask or numbers."""
        return Results(self.boxes[index], self.path, list(self.names.values()), self.speed, self._pixels, self.frame)

    def __repr__(self) -> str:
        return f"Results({self.path.name}: {self.verbose()})"

    @property
    def orig_img(self) -> np.ndarray:
        """uint8 [H, W, 3] RGB; of a file it is read again: results of many images hold no pixels."""
        return read_image(self.path) if self._pixels is None else self._pixels

    def verbose(self) -> str:
        """ "3 fish, 1 shark", or "nothing found"."""
        counts: dict[str, int] = {}
        for label in self.boxes.cls.tolist():
            counts[self.names[label]] = counts.get(self.names[label], 0) + 1
        return ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing found"

    def plot(self) -> np.ndarray:
        """The image with boxes, names and scores drawn: uint8 [H, W, 3] RGB."""
        labels = self.boxes.cls.tolist()
        captions = [f"{self.names[c]} {s:.2f}" for c, s in zip(labels, self.boxes.conf.tolist(), strict=True)]
        return draw_boxes(self.orig_img, self.boxes.xyxy, labels, captions)

    def save(self, path: str | Path) -> Path:
        """Write the drawn image (format by the file's ending) and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.plot()).save(path)
        return path

    def save_txt(self, path: str | Path) -> Path:
        """Write `to_yolo` into a file and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_yolo(), encoding="utf-8")
        return path

    def summary(self) -> list[dict[str, Any]]:
        """One dictionary a box: name, class, confidence, box {x1, y1, x2, y2} in pixels."""
        rows = zip(self.boxes.cls.tolist(), self.boxes.conf.tolist(), self.boxes.xyxy.tolist(), strict=True)
        return [
            {
                "name": self.names[c],
                "class": c,
                "confidence": round(s, 5),
                "box": dict(zip(("x1", "y1", "x2", "y2"), (round(v, 2) for v in box), strict=True)),
            }
            for c, s, box in rows
        ]

    def to_json(self) -> str:
        """`summary` as JSON."""
        return json.dumps(self.summary(), ensure_ascii=False)

    def to_df(self) -> Any:
        """A pandas table, a row a box: name, class, confidence, x1, y1, x2, y2. Raises UserError without pandas."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise UserError("to_df() makes a pandas table, and pandas is not installed: pip install pandas.") from None
        columns = ["name", "class", "confidence", "x1", "y1", "x2", "y2"]
        rows = [[row["name"], row["class"], row["confidence"], *row["box"].values()] for row in self.summary()]
        return pandas.DataFrame(rows, columns=columns)

    def to_yolo(self) -> str:
        """Lines `class x_center y_center width height score`, shares of the image, as YOLO text files hold them."""
        rows = zip(self.boxes.cls.tolist(), self.boxes.xywhn.tolist(), self.boxes.conf.tolist(), strict=True)
        return "".join(f"{c} {' '.join(f'{v:.6f}' for v in box)} {s:.5f}\n" for c, box, s in rows)
