"""Boxes and captions on an image, readable at any size."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def class_color(label: int) -> tuple[int, int, int]:
    """A colour per class: hues by the golden ratio, so that neighbours differ; gray for -1 (crowds)."""
    if label < 0:
        return 150, 150, 150
    r, g, b = colorsys.hsv_to_rgb((0.02 + label * 0.618034) % 1.0, 0.75, 0.95)
    return int(r * 255), int(g * 255), int(b * 255)


def draw_boxes(
    image: np.ndarray, boxes: np.ndarray, labels: Sequence[int], captions: Sequence[str], dashed: bool = False
) -> np.ndarray:
    """Draw on a copy of `image` (uint8 [H, W, 3] RGB). boxes: [N, 4] xyxy pixels. `dashed` marks annotations."""
    canvas = Image.fromarray(image.copy())
    pen = ImageDraw.Draw(canvas)
    scale = max(image.shape[:2])
    width = max(1, round(scale / 320))
    font = ImageFont.load_default(max(9, round(scale / 45)))
    for box, label, caption in sorted(
        zip(boxes.tolist(), labels, captions, strict=True), key=lambda row: -(row[0][2] - row[0][0])
    ):
        color = class_color(label)
        if dashed:
            _dashed(pen, box, color, width)
        else:
            pen.rectangle(box, outline=color, width=width)
        if caption:
            left, top, right, bottom = pen.textbbox((0, 0), caption, font=font)
            w, h = right - left + 4, bottom - top + 4
            x = min(max(box[0], 0), max(image.shape[1] - w, 0))
            y = box[1] - h if box[1] >= h else box[1]
            pen.rectangle([x, y, x + w, y + h], fill=color)
            dark = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2] > 140
            pen.text((x + 2 - left, y + 2 - top), caption, fill=(0, 0, 0) if dark else (255, 255, 255), font=font)
    return np.asarray(canvas)


def _dashed(pen: ImageDraw.ImageDraw, box: list[float], color: tuple[int, int, int], width: int) -> None:
    x1, y1, x2, y2 = box
    step = max(4, 4 * width)
    for a, b in (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1))):
        n = max(1, int(max(abs(b[0] - a[0]), abs(b[1] - a[1])) / step))
        for i in range(0, n, 2):
            p, q = i / n, min((i + 1) / n, 1.0)
            pen.line(
                [
                    a[0] + (b[0] - a[0]) * p,
                    a[1] + (b[1] - a[1]) * p,
                    a[0] + (b[0] - a[0]) * q,
                    a[1] + (b[1] - a[1]) * q,
                ],
                fill=color,
                width=width,
            )


def fit(image: np.ndarray, side: int) -> tuple[np.ndarray, float]:
    """The image resized to a long side of `side` pixels, and the factor that took it there."""
    factor = side / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * factor)), max(1, round(image.shape[0] * factor)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)), factor


def sheet(tiles: Sequence[np.ndarray], titles: Sequence[str], columns: int = 4, gap: int = 8) -> np.ndarray:
    """Tiles (uint8 [h, w, 3], any sizes) on one white page in reading order, each with its title below."""
    columns = min(columns, len(tiles))
    line = 18  # pixels of a title
    width = max(t.shape[1] for t in tiles)
    rows = [range(i, min(i + columns, len(tiles))) for i in range(0, len(tiles), columns)]
    heights = [max(tiles[i].shape[0] for i in row) + line + gap for row in rows]
    page = Image.new("RGB", (columns * (width + gap) + gap, sum(heights) + gap), (255, 255, 255))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default()
    y = gap
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = gap + column * (width + gap)
            page.paste(Image.fromarray(tiles[i]), (x, y))
            pen.text((x + 2, y + tiles[i].shape[0] + 3), titles[i], fill=(40, 40, 40), font=font)
        y += height
    return np.asarray(page)
