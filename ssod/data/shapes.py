"""The embedded demo set: drawn, seeded, written once into a cache folder as COCO JSON and PNG images.

Six kinds of shape with a long tail, 4 % to 60 % of the image's side, rotated, textured, half hidden by each
other and by clutter, on textured backgrounds. Colour is a hint and not a rule, as in the world. Few labels leave a
gap that unlabelled images can close.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ssod.data.store import cache_folder

VERSION = 3  # part of the folder's name: raise it when a change alters a pixel
SIZE = 128  # pixels
NAMES = ("disc", "square", "triangle", "star", "ring", "cross")
SHARES = (0.34, 0.25, 0.17, 0.12, 0.08, 0.04)  # long tail
COUNTS = {"train": 600, "val": 200}
TYPICAL = 0.95  # of the objects wear the hue that is typical of their class; the others any
HIDDEN = 0.65  # an object of which more is covered by others is not annotated
_DRAW = 2  # supersampling


def shapes_yaml(cache: Path | None = None) -> Path:
    """Path of the demo set's data YAML; the set is drawn on first use (about half a minute).

    cache: parent folder; default: $SSOD_CACHE, else ~/.cache/ssod. An interrupted drawing leaves nothing behind.
    """
    cache = cache or cache_folder()
    folder = cache / f"shapes-{VERSION}"
    if not (folder / "shapes.yaml").is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as temporary:
            _write(Path(temporary) / "new")
            try:
                os.rename(Path(temporary) / "new", folder)
            except OSError:  # another process was faster; its folder is the same, byte for byte
                if not (folder / "shapes.yaml").is_file():
                    shutil.rmtree(folder)  # a foreign, incomplete folder of that name
                    os.rename(Path(temporary) / "new", folder)
    return folder / "shapes.yaml"


def _write(folder: Path) -> None:
    for split, count in COUNTS.items():
        (folder / "images" / split).mkdir(parents=True)
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for index in range(count):
            rng = np.random.default_rng([VERSION, list(COUNTS).index(split), index])
            picture, boxes, labels = draw_image(rng)
            name = f"{index:05d}.png"
            Image.fromarray(picture).save(folder / "images" / split / name)
            images.append({"id": index + 1, "file_name": name, "width": SIZE, "height": SIZE})
            for (x1, y1, x2, y2), label in zip(boxes.tolist(), labels.tolist(), strict=True):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": index + 1,
                        "category_id": label + 1,
                        "bbox": [x1, y1, x2 - x1, y2 - y1],
                        "area": (x2 - x1) * (y2 - y1),
                        "iscrowd": 0,
                    }
                )
        categories = [{"id": i + 1, "name": n} for i, n in enumerate(NAMES)]
        (folder / "annotations").mkdir(exist_ok=True)
        truth = {"images": images, "annotations": annotations, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(truth))
    lines = ["path: .", *(f"{s}: images/{s}" for s in COUNTS), f"names: [{', '.join(NAMES)}]"]
    (folder / "shapes.yaml").write_text("\n".join(lines) + "\n")


def draw_image(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One picture: uint8 [SIZE, SIZE, 3], boxes float [N, 4] xyxy pixels of what can be seen, labels int [N]."""
    side = SIZE * _DRAW
    picture = _background(rng, side)
    for _ in range(rng.integers(1, 5)):
        _clutter(rng, picture)
    owner = np.full((side, side), -1, np.int64)  # which object is seen at each pixel
    labels, full = [], []
    for number in range(int(rng.integers(1, 6))):
        label = int(rng.choice(len(NAMES), p=SHARES))
        extent = side * 0.04 * (0.60 / 0.04) ** rng.beta(2.4, 1.6)  # log scale, few at either end, half above a fifth
        mask = _outline(rng, label, extent, side)
        labels.append(label)
        full.append(int(mask.sum()))
        owner[mask] = number
        _paint(rng, picture, mask, label)
    for _ in range(rng.integers(0, 3)):  # clutter in front
        owner[_clutter(rng, picture)] = -1
    boxes, kept = [], []
    for number, label in enumerate(labels):
        ys, xs = np.nonzero(owner == number)
        if len(xs) == 0 or len(xs) < (1 - HIDDEN) * full[number]:
            continue
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / _DRAW
        if min(box[2] - box[0], box[3] - box[1]) >= 0.03 * SIZE:
            boxes.append(np.round(box, 1))
            kept.append(label)
    small = Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BOX)
    noisy = np.asarray(small).astype(np.float32) + rng.normal(0, rng.uniform(2, 8), (SIZE, SIZE, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8), np.array(boxes).reshape(-1, 4), np.array(kept, np.int64)


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """Two colours blended by noise of several octaves, with stripes on top of some."""
    field = np.zeros((side, side))
    for octave in (3, 6, 12, 24):
        grid = Image.fromarray(rng.random((octave, octave)).astype(np.float32))
        field += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) / octave**0.5
    field = (field - field.min()) / (field.max() - field.min() + 1e-6)
    if rng.random() < 0.4:
        field = 0.7 * field + 0.3 * _stripes(rng, side)
    gray = rng.uniform(40, 215)
    a, b = (gray + rng.uniform(-60, 60) + rng.uniform(-25, 25, 3) for _ in range(2))  # muted
    return (a + (b - a) * field[..., None]).clip(0, 255).astype(np.uint8)


def _stripes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Bars of random angle and width: float [side, side], 0 or 1."""
    y, x = np.mgrid[:side, :side]
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 40)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period)
    return (wave > 0).astype(np.float64)


def _clutter(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """A line, arc or blob that is no class of ours, painted in place; returns its mask [side, side]."""
    side = picture.shape[0]
    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    x, y, dx, dy = rng.uniform(0, side, 4)
    width = int(rng.integers(3, 12))
    kind = rng.integers(3)
    if kind == 0:
        pen.line([x, y, dx, dy], fill=255, width=width)
    elif kind == 1:
        r = rng.uniform(0.1, 0.5) * side
        start = rng.uniform(0, 360)
        pen.arc([x - r, y - r, x + r, y + r], start, start + rng.uniform(40, 150), fill=255, width=width)
    else:  # a blob: smooth noise above a level
        r = int(rng.uniform(0.05, 0.18) * side)
        spots = Image.fromarray((rng.random((2 * r, 2 * r)) * 255).astype(np.uint8)).filter(
            ImageFilter.GaussianBlur(r / 3)
        )
        level = np.asarray(spots)
        mask.paste(
            Image.fromarray(((level > np.quantile(level, 0.7)) * 255).astype(np.uint8)), (int(x) - r, int(y) - r)
        )
    seen = np.asarray(mask) > 127
    picture[seen] = rng.uniform(30, 225) + rng.uniform(-30, 30, 3)
    return seen


def _outline(rng: np.random.Generator, label: int, extent: float, side: int) -> np.ndarray:
    """Mask [side, side] of a rotated, slightly squashed shape whose longer side is about `extent` pixels."""
    r = extent / 2
    squash, turn = rng.uniform(0.75, 1.0), rng.uniform(0, 2 * np.pi)
    cx, cy = rng.uniform(0.1 * side, 0.9 * side, 2)

    def place(points: np.ndarray) -> list[tuple[float, float]]:
        points = points * r * np.array([1.0, squash])
        c, s = np.cos(turn), np.sin(turn)
        return [(cx + c * u - s * v, cy + s * u + c * v) for u, v in points]

    def around(n: int, offset: float = 0.0) -> np.ndarray:
        t = np.arange(n) * 2 * np.pi / n + offset
        return np.stack([np.cos(t), np.sin(t)], 1)

    mask = Image.new("L", (side, side))
    pen = ImageDraw.Draw(mask)
    name = NAMES[label]
    if name in ("disc", "ring"):
        pen.polygon(place(around(48)), fill=255)
        if name == "ring":
            pen.polygon(place(around(48) * 0.55), fill=0)
    elif name == "square":
        pen.polygon(place(around(4, np.pi / 4)), fill=255)
    elif name == "triangle":
        pen.polygon(place(around(3)), fill=255)
    elif name == "star":
        star = around(10)
        star[1::2] *= 0.45
        pen.polygon(place(star), fill=255)
    else:
        w = 0.32
        arm = np.array([(w, 1), (w, w), (1, w)])  # one quarter; the others mirror it
        pen.polygon(place(np.concatenate([arm, arm[::-1] * (1, -1), -arm, arm[::-1] * (-1, 1)])), fill=255)
    return np.asarray(mask) > 127


def _paint(rng: np.random.Generator, picture: np.ndarray, mask: np.ndarray, label: int) -> None:
    """Fill a shape, in place, with a colour, stripes or grain, shaded from one side to the other."""
    side = picture.shape[0]
    hue = label / len(NAMES) + rng.normal(0, 0.04) if rng.random() < TYPICAL else rng.random()
    a, b = _vivid(rng, hue), _vivid(rng, hue + rng.normal(0, 0.04))
    kind = rng.integers(3)
    if kind == 0:
        field = np.linspace(0, 0.4, side)[None].repeat(side, 0)
    elif kind == 1:
        field = _stripes(rng, side) * 0.5
    else:
        field = rng.random((side, side)) * 0.4
    picture[mask] = (a + (b - a) * field[mask][:, None]).astype(np.uint8)


def _vivid(rng: np.random.Generator, hue: float) -> np.ndarray:
    """A saturated colour: float [3], 0..255."""
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, rng.uniform(0.6, 1.0), rng.uniform(0.5, 1.0))) * 255
