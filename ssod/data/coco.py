"""COCO JSON: boxes are [x, y, w, h] pixels, 0-based, of the upright image; categories may have gaps in their ids."""

from __future__ import annotations

import json
import os
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data import samples as kinds
from ssod.data.found import Found, SafePaths, check_name, corrupt
from ssod.data.samples import Inspector, Sample, no_objects
from ssod.errors import UserError

_PREFIXES = ("instances_", "image_info_")


def find_images(json_path: Path, tops: list[Path], split: str) -> Path:
    """The folder that holds the images of a COCO JSON: of all likely ones below `tops`, that which has most of them.

    Raises UserError when none has any.
    """
    records = _records(load(json_path), "images", json_path)
    step = max(1, len(records) // 100)  # a look at a hundred is enough to tell the folders apart
    names = [
        check_name(record.get("file_name"), json_path, f"images[{i}]")
        for i, record in enumerate(records)
        if i % step == 0
    ]
    stem = json_path.stem
    for prefix in _PREFIXES:
        stem = stem.removeprefix(prefix)
    below = (f"images/{stem}", stem, f"images/{split}", split, "images", "")
    folders = [f for f in dict.fromkeys(top / name for top in tops for name in below) if f.is_dir()]
    counts = {f: sum(os.path.isfile(os.path.join(f, n)) for n in names) for f in folders}
    best = max(folders, key=lambda f: counts[f])  # the first of equals
    if names and counts[best] == 0:
        places = ", ".join(str(f) for f in folders)
        raise UserError(f"{json_path}: none of its images ({names[0]!r}, ...) is in any of {places}; put them there.")
    return best


def read_names(json_path: Path) -> list[str]:
    """Names of the categories in the order of their ids: the order that labels 0, 1, ... follow."""
    return [name for _, name in _categories(load(json_path), json_path)]


def read_ids(json_path: Path) -> list[int]:
    """Ids of the categories, ascending: label k is the category read_ids()[k]."""
    return [id_ for id_, _ in _categories(load(json_path), json_path)]


def with_objects(json_path: Path) -> list[int]:
    """Ids of the images that have an annotation which is not crowd, ascending, whether or not the files are there."""
    records = _records(load(json_path), "annotations", json_path)
    annotated = {
        _integer(r, "image_id", json_path, f"annotations[{i}]") for i, r in enumerate(records) if not r.get("iscrowd")
    }
    return sorted(annotated & _images(load(json_path), json_path).keys())


def read(found: Found, inspector: Inspector) -> list[Sample]:
    """Samples of a COCO JSON in the order of their image ids; for the split "unlabeled" only its images are used."""
    assert found.annotations is not None
    file = found.annotations
    content = load(file)
    labeled = found.split != "unlabeled"
    images = _images(content, file)
    objects = _annotations(content, set(images), file, inspector) if labeled else {}
    label_of = {id_: label for label, (id_, _) in enumerate(_categories(content, file))} if labeled else {}

    to_path = SafePaths(found, found.images)
    out: list[Sample] = []
    seen: dict[Path, int] = {}
    for image_id in sorted(images):
        record, image = images[image_id]
        path = to_path(image.get("file_name"), record)
        if path in seen:
            inspector.report(kinds.IMAGE_TWICE, file, record, f"{path.name} is image {seen[path]}, too")
        seen.setdefault(path, image_id)
        size = inspector.size(path)
        if size is None:
            continue
        if isinstance(image.get("width"), int) and isinstance(image.get("height"), int):
            inspector.compare_size(path, size, (image["width"], image["height"]), f"image id {image_id}")
        if labeled:
            out.append(_sample(path, image_id, size, objects.get(image_id, []), label_of, file, inspector))
        else:
            out.append(Sample.unlabeled(path, image_id, *size))
    return out


@lru_cache(maxsize=2)
def load(file: Path) -> dict[str, Any]:
    """The JSON object in a file, not to be changed. `load_data` clears this cache when done: files may be gigabytes."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except json.JSONDecodeError as error:
        corrupt(file, f"line {error.lineno}, column {error.colno}", f"not valid JSON ({error.msg})")
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of 5000 digits
        corrupt(file, "", f"cannot be read as JSON ({error})")
    if not isinstance(content, dict):
        corrupt(file, "", "not a COCO file: an object with images, annotations and categories is expected")
    return content


def _records(content: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    records = content.get(key)
    if not isinstance(records, list):
        corrupt(file, "", f"not a COCO file: the list '{key}' is missing")
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            corrupt(file, f"{key}[{i}]", f"an object is expected, not {record!r}")
    return records


def _integer(record: dict[str, Any], key: str, file: Path, where: str) -> int:
    value = record.get(key)
    if type(value) is not int or abs(value) >= 2**63:  # bool is an int, too, but not an id
        corrupt(file, where, f"'{key}' must be an integer, not {value!r}")
    return value


def _categories(content: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    """(id, name) in ascending ids."""
    out: list[tuple[int, str]] = []
    for i, record in enumerate(_records(content, "categories", file)):
        id_ = _integer(record, "id", file, f"categories[{i}]")
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            corrupt(file, f"categories[{i}]", f"'name' must be a text, not {name!r}")
        for other, other_name in out:
            if id_ == other or name == other_name:
                corrupt(file, f"categories[{i}]", f"category {id_} {name!r} repeats category {other} {other_name!r}")
        out.append((id_, name))
    return sorted(out)


def _images(content: dict[str, Any], file: Path) -> dict[int, tuple[str, dict[str, Any]]]:
    """{image id: (where it stands, record)}; an id given twice is refused, for its annotations could be of either."""
    out: dict[int, tuple[str, dict[str, Any]]] = {}
    for i, record in enumerate(_records(content, "images", file)):
        id_ = _integer(record, "id", file, f"images[{i}]")
        if id_ in out:
            first, other = out[id_]
            names = f"{other.get('file_name')!r} ({first}) and {record.get('file_name')!r}"
            corrupt(file, f"images[{i}]", f"image id {id_} is given to both {names}; image ids must be unique")
        out[id_] = (f"images[{i}]", record)
    return out


def _annotations(
    content: dict[str, Any], image_ids: set[int], file: Path, inspector: Inspector
) -> dict[int, list[tuple[str, dict[str, Any]]]]:
    """{image id: [(where it stands, record)]}.

    Ids of annotations play no part here: evaluation counts boxes from 1. Those that would have spoilt the score of
    pycocotools (0 counts as "unmatched", a repeated id hides a box) are reported all the same.
    """
    records = _records(content, "annotations", file)
    uses = Counter(r.get("id") for r in records if type(r.get("id")) is int)
    out: dict[int, list[tuple[str, dict[str, Any]]]] = {}
    for i, record in enumerate(records):
        where = f"annotations[{i}]"
        image_id = _integer(record, "image_id", file, where)
        id_ = record.get("id")
        if type(id_) is int and (id_ == 0 or uses[id_] > 1):
            inspector.report(
                kinds.ANNOTATION_ID, file, where, f"annotation id {id_} is {'0' if id_ == 0 else 'not unique'}"
            )
        if image_id not in image_ids:
            inspector.report(kinds.ANNOTATION_ORPHAN, file, where, f"there is no image with the id {image_id}")
            continue
        out.setdefault(image_id, []).append((where, record))
    return out


def _sample(
    path: Path,
    image_id: int,
    size: tuple[int, int],
    objects: list[tuple[str, dict[str, Any]]],
    label_of: dict[int, int],
    file: Path,
    inspector: Inspector,
) -> Sample:
    if not objects:
        return Sample(path, image_id, *size, *no_objects(), labeled=True)
    boxes, labels, crowd, areas = [], [], [], []
    for where, record in objects:
        x, y, w, h = _box(record, file, where)
        category = _integer(record, "category_id", file, where)
        if category not in label_of:
            known = ", ".join(str(id_) for id_ in label_of)
            corrupt(file, where, f"category_id {category} is not among the categories of this file ({known})")
        boxes.append((x, y, x + w, y + h))
        labels.append(label_of[category])
        crowd.append(bool(record.get("iscrowd", 0)))
        area = record.get("area")
        areas.append(area if isinstance(area, (int, float)) and 0 <= area < 1e12 else np.nan)
    clean, keep = inspector.clean(boxes, size, file, [where for where, _ in objects])
    told, own = np.array(areas)[keep], (clean[:, 2:] - clean[:, :2]).prod(axis=1)
    return Sample(
        path,
        image_id,
        *size,
        boxes=clean,
        labels=np.array(labels, np.int64)[keep],
        crowd=np.array(crowd, np.bool_)[keep],
        labeled=True,
        areas=np.where(np.isnan(told), own, told).astype(np.float32),
    )


def _box(record: dict[str, Any], file: Path, where: str) -> list[float]:
    box = record.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
        with suppress(OverflowError):  # an integer of 400 digits
            return [float(v) for v in box]
    corrupt(file, where, f"'bbox' must be four numbers [x, y, width, height], not {box!r}")
