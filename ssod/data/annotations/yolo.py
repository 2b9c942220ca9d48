"""YOLO text labels, and images without labels.

A label line is `class x_center y_center width height`, relative to the upright image; a polygon
(`class x y x y x y ...`, as segmentation exports write it) stands for the box around it. A sixth number is a score,
as `predict` and `label` write it, and not used.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from ssod.data import samples as kinds
from ssod.data.annotations.found import Found, corrupt, list_images, walk_images
from ssod.data.annotations.listing import glob_images, listed_images
from ssod.data.samples import Inspector, Sample, no_objects


def label_folder(images: Path, root: Path) -> Path | None:
    """The folder of the labels: beside that of the images, `images` replaced by `labels`, or the images' own where
    their labels lie next to them. None where there are none."""
    below = images.relative_to(root) if images.is_relative_to(root) else images
    folder = _images_to_labels(below)
    if folder is not None and (root / folder).is_dir():
        return root / folder
    beside = any(path.with_suffix(".txt").is_file() for path in islice(walk_images(images), 100))
    return images if beside else None


def _images_to_labels(path: Path) -> Path | None:
    """The path with its last part `images` replaced by `labels`, or None without such a part."""
    parts = list(path.parts)
    for i in reversed(range(len(parts))):
        if parts[i] == "images":
            return Path(*parts[:i], "labels", *parts[i + 1 :])
    return None


def read(found: Found, names: list[str], inspector: Inspector) -> list[Sample]:
    """Samples of a folder with labels, sorted by path, or of a list or glob of images.

    An image without a label file is background, and reported.
    """
    folder = found.annotations if found.format == "YOLO" else None
    out: list[Sample] = []
    used: set[Path] = set()
    for image_id, path in enumerate(images_of(found, inspector), 1):
        label = label_of(path) if folder is None else (folder / path.relative_to(found.images)).with_suffix(".txt")
        used.add(label)
        size = inspector.size(path)
        if size is None:
            continue
        if label.is_file():
            out.append(_sample(label, path, image_id, size, names, inspector))
        else:
            inspector.report(kinds.NO_LABEL_FILE, path, "", f"there is no {label}")
            out.append(Sample(path, image_id, *size, *no_objects(), labeled=True))
    if folder is not None and folder != found.images:
        for label in sorted(folder.rglob("*.txt")):
            if label not in used and label.name != "classes.txt":  # labelling programs leave that one there
                inspector.report(kinds.ANNOTATION_ORPHAN, label, "", f"there is no image for it in {found.images}")
    return out


def read_plain(found: Found, inspector: Inspector) -> list[Sample]:
    """Unlabelled samples of a folder, list or glob; nothing but images is opened."""
    out = []
    for image_id, path in enumerate(images_of(found, inspector), 1):
        size = inspector.size(path)
        if size is not None:
            out.append(Sample.unlabeled(path, image_id, *size))
    return out


def images_of(found: Found, inspector: Inspector) -> list[Path]:
    """Image files of a folder or glob, sorted by path, or of a text list, in its order."""
    if found.format.endswith("list"):
        return listed_images(found, inspector)
    return glob_images(found.images) if found.format.endswith("glob") else list_images(found.images)


def label_of(path: Path) -> Path:
    """Where the label of an image stands whose label folder is not known: in `labels` instead of `images`, or
    beside it."""
    elsewhere, beside = _images_to_labels(path.parent), path.with_suffix(".txt")
    label = beside if elsewhere is None else elsewhere / beside.name
    return label if label.is_file() or not beside.is_file() else beside


def _sample(
    label: Path, path: Path, image_id: int, size: tuple[int, int], names: list[str], inspector: Inspector
) -> Sample:
    try:
        lines = label.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        corrupt(label, "", f"cannot be read as YOLO labels ({error})")
    boxes, labels, records = [], [], []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        class_id, box = _parse_line(line, label, f"line {i}")
        if not 0 <= class_id < len(names):
            classes = ", ".join(f"{k} {name}" for k, name in enumerate(names))
            corrupt(label, f"line {i}", f"unknown class {class_id}, the classes are {classes}")
        boxes.append([v * side for v, side in zip(box, (*size, *size), strict=True)])
        labels.append(class_id)
        records.append(f"line {i}")
    if not boxes:
        return Sample(path, image_id, *size, *no_objects(), labeled=True)
    clean, keep = inspector.clean(boxes, size, label, records)
    return Sample(
        path, image_id, *size, clean, np.array(labels, np.int64)[keep], np.zeros(len(keep), np.bool_), labeled=True
    )


def _parse_line(line: str, label: Path, record: str) -> tuple[int, list[float]]:
    """Class id and box xyxy, relative to the image."""
    try:
        values = [float(v) for v in line.split()]
    except ValueError:
        corrupt(label, record, f"numbers are expected, not {line.strip()!r}")
    polygon = len(values) >= 7 and len(values) % 2 == 1
    if len(values) == 6 and 0 <= values[5] <= 1:  # a pseudo label with its score
        values.pop()
    elif len(values) != 5 and not polygon:
        corrupt(label, record, f"'class x_center y_center width height' is expected, not {len(values)} numbers")
    if not values[0].is_integer():
        corrupt(label, record, f"the class must be an integer, not {values[0]}")
    if polygon:
        points = np.array(values[1:]).reshape(-1, 2)
        return int(values[0]), [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
    _, x, y, w, h = values
    return int(values[0]), [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
