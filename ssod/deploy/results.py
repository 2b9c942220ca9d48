"""What `predict` returns for one image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ssod.data.draw import draw_boxes
from ssod.data.image import read_image
from ssod.structures import Instances


class Boxes:
    """Detections of one image, by descending score.

    xyxy, xywh    float32 [N, 4] pixels (xywh: centre and size)
    xyxyn, xywhn  the same as shares of the image's width and height, 0..1
    conf          float32 [N], 0..1;  cls  int64 [N]
    """

    def __init__(self, found: Instances, orig_shape: tuple[int, int]) -> None:
        assert found.scores is not None
        self.xyxy: Tensor = found.boxes
        self.conf: Tensor = found.scores
        self.cls: Tensor = found.labels
        self.orig_shape = orig_shape

    def __len__(self) -> int:
        return len(self.xyxy)

    @property
    def xywh(self) -> Tensor:
        return torch.cat([(self.xyxy[:, :2] + self.xyxy[:, 2:]) / 2, self.xyxy[:, 2:] - self.xyxy[:, :2]], 1)

    @property
    def xyxyn(self) -> Tensor:
        return self.xyxy / self._extent

    @property
    def xywhn(self) -> Tensor:
        return self.xywh / self._extent

    @property
    def _extent(self) -> Tensor:
        h, w = self.orig_shape
        return self.xyxy.new_tensor([w, h, w, h])


class Results:
    """Detections of one image and what it takes to show them.

    path        the image file
    names       {class number: class name}
    orig_shape  (height, width) of the image after EXIF rotation, pixels
    speed       {"inference": milliseconds} of this image's share of its batch: reading, network and decoding
    """

    def __init__(
        self, found: Instances, path: Path, names: list[str], orig_shape: tuple[int, int], speed: dict[str, float]
    ) -> None:
        self.boxes = Boxes(found, orig_shape)
        self.path = path
        self.names = dict(enumerate(names))
        self.orig_shape = orig_shape
        self.speed = speed

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        return f"Results({self.path.name}: {self.verbose()})"

    def verbose(self) -> str:
        """ "3 fish, 1 shark", or "nothing found"."""
        counts: dict[str, int] = {}
        for label in self.boxes.cls.tolist():
            counts[self.names[label]] = counts.get(self.names[label], 0) + 1
        return ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing found"

    def plot(self) -> np.ndarray:
        """The image with boxes, names and scores drawn: uint8 [H, W, 3] RGB."""
        captions = [
            f"{self.names[c]} {s:.2f}" for c, s in zip(self.boxes.cls.tolist(), self.boxes.conf.tolist(), strict=True)
        ]
        return draw_boxes(read_image(self.path), self.boxes.xyxy.numpy(), self.boxes.cls.tolist(), captions)

    def save(self, path: str | Path) -> Path:
        """Write the drawn image (format by the file's ending) and return its path."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(self.plot()).save(path)
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

    def to_yolo(self) -> str:
        """Lines `class x_center y_center width height score`, shares of the image, as YOLO text files hold them."""
        rows = zip(self.boxes.cls.tolist(), self.boxes.xywhn.tolist(), self.boxes.conf.tolist(), strict=True)
        return "".join(f"{c} {' '.join(f'{v:.6f}' for v in box)} {s:.5f}\n" for c, box, s in rows)
