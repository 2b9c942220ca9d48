"""A contact sheet: some images of a data set with their boxes, to see whether the annotations fit."""

from __future__ import annotations

import colorsys
import math
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ssod.data.image import ImageError, read_image
from ssod.data.samples import Dataset, Sample
from ssod.errors import UserError

_TILE = 400  # pixels, the side of the square that each image is fitted into
_GAP = 8
_CAPTION = 18
_LABEL = 13  # the height of a class name
_PAPER, _INK = (255, 255, 255), (40, 40, 40)


def draw_samples(dataset: Dataset, n: int, out_path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a PNG of n images (all, if there are fewer), boxes and class names drawn in; returns its path.

    Images with boxes come first; which of them depends on the seed alone. Crowd boxes are drawn in gray.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order = sorted(rng.permutation(len(dataset)), key=lambda i: len(dataset.samples[i].boxes) == 0)
    tiles: list[Image.Image] = []
    for i in order:
        if len(tiles) == n:
            break
        try:
            tiles.append(_tile(dataset.samples[i], dataset.names))
        except ImageError:
            continue  # `check_data` lists these
    if not tiles:
        raise UserError(f"No image of '{dataset.split}' can be drawn: give n above 0, and mend the unreadable images.")
    columns = math.ceil(math.sqrt(len(tiles)))
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (columns * (_TILE + _GAP) + _GAP, sum(heights) + _GAP), _PAPER)
    for k, row in enumerate(rows):
        for i, tile in enumerate(row):
            sheet.paste(tile, (_GAP + i * (_TILE + _GAP), _GAP + sum(heights[:k])))
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, "PNG")
    return out


def _tile(sample: Sample, names: list[str]) -> Image.Image:
    """One image, as large as the square allows, with its boxes and a caption below."""
    image = Image.fromarray(read_image(sample.path))
    scale = _TILE / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    tile = Image.new("RGB", (_TILE, image.height + _CAPTION), _PAPER)
    tile.paste(image, (0, 0))
    draw, font = ImageDraw.Draw(tile), ImageFont.load_default()
    # Large boxes first, so that small ones and their names stay on top.
    areas = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(axis=1)
    for i in np.argsort(-areas, kind="stable"):
        colour = (150, 150, 150) if sample.crowd[i] else _colour(int(sample.labels[i]), len(names))
        x1, y1, x2, y2 = (float(v) * scale for v in sample.boxes[i])
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=2)
        text = names[sample.labels[i]]
        x = min(x1, _TILE - 4 - draw.textlength(text, font=font))
        y = y1 - _LABEL if y1 >= _LABEL else y1  # above the box, not to hide what is in it
        draw.rectangle((x, y, x + draw.textlength(text, font=font) + 3, y + _LABEL), fill=colour)
        draw.text((x + 2, y), text, fill=_PAPER, font=font)
    draw.rectangle((0, image.height, _TILE, tile.height), fill=_PAPER)
    draw.text((2, image.height + 3), f"{sample.path.name}   {sample.width}x{sample.height}", fill=_INK, font=font)
    return tile


def _colour(label: int, classes: int) -> tuple[int, int, int]:
    """One hue a class, evenly spaced; dark enough for white letters."""
    r, g, b = colorsys.hsv_to_rgb(label / max(1, classes), 0.85, 0.75)
    return round(255 * r), round(255 * g), round(255 * b)
