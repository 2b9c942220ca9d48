"""The labelled parts that papers share: a file {percent: {fold: [positions]}} of images of COCO train2017.

A position counts the images that have at least one box which is not crowd, sorted by image id; of train2017 these are
117,266 of 118,287 images. Unbiased Teacher publishes such a file as COCO_supervision.txt. Position and image id are
different things, so a list is worthless on any other choice of images: their number is checked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ssod.errors import UserError

TRAIN2017 = 117_266

Positions = dict[float, dict[str, list[int]]]


def read_positions(file: Path) -> Positions:
    """{percent: {fold: positions}}. Raises UserError where the file is not of that form."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"canonical={file}: there is no such file (current folder: {Path.cwd()}).") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"canonical={file}: cannot be read as a list of positions ({error}).") from error
    out: Positions = {}
    try:
        for percent, folds in content.items():
            out[float(percent)] = {str(fold): _checked(positions) for fold, positions in folds.items()}
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"canonical={file}: {{percent: {{fold: [positions]}}}} is expected, as in COCO_supervision.txt."
        ) from None
    return out


def _checked(positions: object) -> list[int]:
    if not isinstance(positions, list) or not positions or len(set(positions)) != len(positions):
        raise ValueError
    if any(type(p) is not int or p < 0 for p in positions):
        raise ValueError
    return positions


def pick(
    positions: Positions, percent: float, folds: int, image_ids: Sequence[int], file: Path
) -> dict[str, list[int]]:
    """{fold: image ids} of the first `folds` folds of a share; image_ids: of the images with a box, ascending."""
    if percent not in positions:
        known = ", ".join(f"{p:g}" for p in positions)
        raise UserError(f"canonical={file}: no list for percent={percent:g}; there are {known}.")
    lists = positions[percent]
    if folds > len(lists):
        raise UserError(f"canonical={file}: folds={folds}, but {percent:g} % has {len(lists)} lists; ask for fewer.")
    return {fold: sorted(image_ids[p] for p in lists[fold]) for fold in list(lists)[:folds]}


def check_count(positions: Positions, count: int, expected: int, file: Path, annotations: Path) -> None:
    """Raise UserError unless `annotations` has as many images with a box as the positions count."""
    if count != expected:
        raise UserError(
            f"{annotations} has {count:,} images with a box that is not crowd, but {file} counts positions among "
            f"{expected:,}{', those of COCO train2017' if expected == TRAIN2017 else ''}; use the whole, unchanged "
            "annotation file, or, for a list of your own, say canonical_images=NUMBER."
        )
    largest = max(p for folds in positions.values() for chosen in folds.values() for p in chosen)
    if largest >= count:
        raise UserError(f"canonical={file}: position {largest} is beyond the {count:,} images it counts.")
