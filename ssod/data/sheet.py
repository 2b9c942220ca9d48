"""A contact sheet: some images of a data set with their boxes, to see whether the annotations fit."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ssod.data.draw import draw_boxes, fit, sheet
from ssod.data.image import ImageError, read_image
from ssod.data.samples import Dataset, Sample
from ssod.errors import UserError

TILE = 400  # pixels, long side of each image


def draw_samples(dataset: Dataset, n: int, out_path: str | os.PathLike[str], seed: int = 0) -> Path:
    """Write a PNG of n images (all, if there are fewer), boxes and class names drawn in; returns its path.

    Images with boxes come first; which of them depends on the seed alone. Crowd boxes are drawn in gray.
    Raises UserError when no image can be drawn.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    order = sorted(rng.permutation(len(dataset)), key=lambda i: len(dataset.samples[i].boxes) == 0)
    tiles: list[np.ndarray] = []
    titles: list[str] = []
    for i in order:
        if len(tiles) == n:
            break
        sample = dataset.samples[i]
        try:
            tiles.append(_tile(sample, dataset.names))
        except ImageError:
            continue  # `check_data` lists these
        titles.append(f"{sample.path.name}   {sample.width}x{sample.height}")
    if not tiles:
        raise UserError(f"No image of '{dataset.split}' can be drawn: give n above 0, and mend the unreadable images.")
    out = Path(out_path)
    out.parent.mkdir(parents=True, exist_ok=True)
    page = sheet(tiles, titles, columns=math.ceil(math.sqrt(len(tiles))))
    Image.fromarray(page).save(out, "PNG")
    return out


def _tile(sample: Sample, names: list[str]) -> np.ndarray:
    image, factor = fit(read_image(sample.path), TILE)
    labels = [
        -1 if crowd else label for label, crowd in zip(sample.labels.tolist(), sample.crowd.tolist(), strict=True)
    ]
    return draw_boxes(image, sample.boxes * factor, labels, [names[i] for i in sample.labels.tolist()])
