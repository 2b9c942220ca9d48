"""COCO JSON: boxes are [x, y, w, h] pixels, 0-based, of the upright image; categories may have gaps in their ids.

I images, N annotations. What the file says is in `CocoArrays`; here it is judged.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data import samples as kinds
from ssod.data.annotations.coco_parse import ABSENT, CocoArrays, parse, usable_area
from ssod.data.annotations.found import Found, SafePaths, check_name, corrupt
from ssod.data.image import MAX_PIXELS
from ssod.data.samples import Inspector
from ssod.data.table import Columns, SampleTable, path_columns, unlabeled_table
from ssod.errors import UserError

_PREFIXES = ("instances_", "image_info_")
# Names that lead nowhere but downwards; all others are looked at one by one.
_PLAIN = re.compile(r"[\w-][\w. -]*(/[\w-][\w. -]*)*").fullmatch


def find_images(json_path: Path, tops: list[Path], split: str) -> Path:
    """The folder that holds the images of a COCO JSON: of all likely ones below `tops`, that which has most of them.

    Raises UserError when none has any.
    """
    content = load(json_path)
    _require(content, "images", json_path)
    step = max(1, len(content.names) // 100)  # a look at a hundred is enough to tell the folders apart
    looked_at = range(0, len(content.names), step)
    names = [check_name(_name(content, i), json_path, f"images[{i}]") for i in looked_at]
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
    content = load(json_path)
    owners, odd = _owners(content, json_path)
    crowd = content.crowd.copy()
    for i, record in odd.items():
        crowd[i] = bool(record.get("iscrowd"))
    return np.intersect1d(owners[~crowd], _image_ids(content, json_path)).tolist()


def count_annotated(json_path: Path) -> int:
    """How many images the annotations are of; whether these exist, and all else about them, is not looked at."""
    content = load(json_path)
    odd = content.odd["annotations"]
    regular = np.delete(content.owners, list(odd))
    others = {str(record.get("image_id")) for record in odd.values() if isinstance(record, dict)}
    return len(np.unique(regular)) + len(others - set(map(str, regular.tolist() if others else ())))


@lru_cache(maxsize=2)
def load(file: Path) -> CocoArrays:
    """What a COCO JSON says, not to be changed. `load_data` clears this cache when done."""
    return parse(file)


def forget() -> None:
    """Clear the cache of `load` and hand the memory back to the system: the C library would keep most of it."""
    load.cache_clear()
    with suppress(OSError, AttributeError, TypeError):  # only glibc has it, and only glibc needs it
        ctypes.CDLL(None).malloc_trim(0)


def read(found: Found, inspector: Inspector) -> SampleTable:
    """Samples of a COCO JSON in the order of their image ids; for the split "unlabeled" only its images are used."""
    assert found.annotations is not None
    file = found.annotations
    content = load(file)
    labeled = found.split != "unlabeled"
    all_ids = _image_ids(content, file)
    owners, odd = _owners(content, file) if labeled else (content.owners[:0], {})
    if labeled:
        _report_ids(content, owners, odd, all_ids, file, inspector)
        categories = _categories(content, file)

    order = np.argsort(all_ids)
    rows, paths, sizes = _images(content, order, found, inspector)
    ids = all_ids[rows]
    text, ends = path_columns(paths)
    if not labeled:
        return unlabeled_table(text, ends, ids, sizes)

    # Annotations of the images that are left, by image, and those of one image as they stand in the file.
    position = np.searchsorted(ids, owners)
    mine = np.flatnonzero(np.append(ids, 0)[position] == owners) if len(ids) else np.zeros(0, np.int64)
    mine = mine[np.argsort(position[mine], kind="stable")]
    of = position[mine]  # [n] which image
    boxes, category = _boxes(content, mine, odd, file)
    labels = _labels(category, categories, mine, file)
    clean, keep = inspector.clean(boxes, sizes[of], file, _Places("annotations", mine))
    told = _areas(content, mine, odd)[keep]
    own = (clean[:, 2:] - clean[:, :2]).prod(axis=1)
    return SampleTable(
        Columns(
            text,
            ends,
            ids,
            sizes,
            box_ends=np.searchsorted(of[keep], np.arange(len(ids)), side="right"),
            boxes=clean,
            labels=labels[keep],
            crowd=_crowd(content, mine, odd)[keep],
            areas=np.where(np.isnan(told), own, told).astype(np.float32),
            has_areas=np.bincount(of, minlength=len(ids)) > 0,
            labeled=np.ones(len(ids), np.bool_),
            complete=np.ones(len(ids), np.bool_),
            places=np.zeros((len(ids), 3), np.int64),
        )
    )


class _Places(Sequence[str]):
    """Where records stand in the file; written only for those that are reported."""

    def __init__(self, key: str, rows: np.ndarray) -> None:
        self.key, self.rows = key, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return f"{self.key}[{self.rows[index]}]"


def _require(content: CocoArrays, key: str, file: Path) -> None:
    if key in content.missing:
        corrupt(file, "", f"not a COCO file: the list '{key}' is missing")
    for i, record in content.odd.get(key, {}).items():
        if not isinstance(record, dict):
            corrupt(file, f"{key}[{i}]", f"an object is expected, not {record!r}")


def _integer(record: dict[str, Any], key: str, file: Path, where: str) -> int:
    value = record.get(key)
    if type(value) is not int or abs(value) >= 2**63:  # bool is an int, too, but not an id
        corrupt(file, where, f"'{key}' must be an integer, not {value!r}")
    return value


def _categories(content: CocoArrays, file: Path) -> list[tuple[int, str]]:
    """(id, name) in ascending ids."""
    _require(content, "categories", file)
    out: list[tuple[int, str]] = []
    for i, record in enumerate(content.categories):
        if not isinstance(record, dict):
            corrupt(file, f"categories[{i}]", f"an object is expected, not {record!r}")
    for i, record in enumerate(content.categories):
        id_ = _integer(record, "id", file, f"categories[{i}]")
        name = record.get("name")
        if not isinstance(name, str) or not name.strip():
            corrupt(file, f"categories[{i}]", f"'name' must be a text, not {name!r}")
        for other, other_name in out:
            if id_ == other or name == other_name:
                corrupt(file, f"categories[{i}]", f"category {id_} {name!r} repeats category {other} {other_name!r}")
        out.append((id_, name))
    return sorted(out)


def _name(content: CocoArrays, i: int) -> Any:
    """The file name of an image, whatever stands there."""
    odd = content.odd["images"].get(i)
    return content.names[i] if odd is None else odd.get("file_name")


def _image_ids(content: CocoArrays, file: Path) -> np.ndarray:
    """int64 [I]; an id given twice is refused, for its annotations could be of either."""
    _require(content, "images", file)
    ids = content.image_ids.copy()
    for i, record in content.odd["images"].items():
        ids[i] = _integer(record, "id", file, f"images[{i}]")
    first_of: dict[int, int] = {}
    if len(np.unique(ids)) < len(ids):
        for i, id_ in enumerate(ids.tolist()):
            first = first_of.setdefault(id_, i)
            if first != i:
                names = f"{_name(content, first)!r} (images[{first}]) and {_name(content, i)!r}"
                corrupt(file, f"images[{i}]", f"image id {id_} is given to both {names}; image ids must be unique")
    return ids


def _owners(content: CocoArrays, file: Path) -> tuple[np.ndarray, dict[int, dict[str, Any]]]:
    """The image id of every annotation, int64 [N], and the odd records among the annotations."""
    _require(content, "annotations", file)
    odd = content.odd["annotations"]
    owners = content.owners.copy() if odd else content.owners
    for i, record in odd.items():
        owners[i] = _integer(record, "image_id", file, f"annotations[{i}]")
    return owners, odd


def _report_ids(
    content: CocoArrays,
    owners: np.ndarray,
    odd: dict[int, dict[str, Any]],
    image_ids: np.ndarray,
    file: Path,
    inspector: Inspector,
) -> None:
    """Ids of annotations play no part here: evaluation counts boxes from 1. Those that would have spoilt the score of
    pycocotools (0 counts as "unmatched", a repeated id hides a box) are reported all the same, and so are annotations
    of no image."""
    told: dict[int, int] = {i: r["id"] for i, r in odd.items() if type(r.get("id")) is int}
    ids = content.ids.copy()
    ids[list(odd)] = ABSENT
    for i, id_ in told.items():
        if abs(id_) < 2**63:
            ids[i] = id_
    huge = Counter(id_ for id_ in told.values() if abs(id_) >= 2**63)
    _, inverse, uses = np.unique(ids, return_inverse=True, return_counts=True)
    spoils = ((ids == 0) | (uses[inverse] > 1)) & (ids != ABSENT)
    for i, id_ in told.items():
        spoils[i] |= huge[id_] > 1
    orphan = ~np.isin(owners, image_ids)
    for i in np.flatnonzero(spoils | orphan).tolist():
        where = f"annotations[{i}]"
        if spoils[i]:
            id_ = told.get(i, int(ids[i]))
            reason = f"annotation id {id_} is {'0' if id_ == 0 else 'not unique'}"
            inspector.report(kinds.ANNOTATION_ID, file, where, reason)
        if orphan[i]:
            reason = f"there is no image with the id {owners[i]}"
            inspector.report(kinds.ANNOTATION_ORPHAN, file, where, reason)


def _images(
    content: CocoArrays, order: np.ndarray, found: Found, inspector: Inspector
) -> tuple[np.ndarray, list[str], np.ndarray]:
    """(row in the file, path, (width, height)) of the images that can be used: int64 [I], I paths, int32 [I, 2].

    Each image's header is read, unless there are many and the file tells their sizes: then their folders are listed.
    """
    assert found.annotations is not None
    file, odd = found.annotations, content.odd["images"]
    to_path = SafePaths(found, found.images)
    folders = _Folders(found.images, to_path) if inspector.trusts(len(order)) else None
    ids, declared = content.image_ids.tolist(), content.sizes.tolist()
    rows, paths, sizes = [], [], []
    seen: dict[str, int] = {}
    for i in order.tolist():
        name, told, where = content.names[i], declared[i], f"images[{i}]"
        if i in odd:
            ids[i], told = odd[i]["id"], [_or_absent(odd[i].get(side)) for side in ("width", "height")]
        listed = folders is not None and i not in odd and min(told) > 0 and told[0] * told[1] <= MAX_PIXELS
        path = folders.path(name, where) if listed and folders and _PLAIN(name) else None
        size = tuple(told) if path is not None else None
        if path is None:
            path = str(to_path(_name(content, i), where))
        if path in seen:
            reason = f"{os.path.basename(path)} is image {seen[path]}, too"
            inspector.report(kinds.IMAGE_TWICE, file, where, reason)
        seen.setdefault(path, ids[i])
        if size is None:
            size = inspector.size(Path(path))
            if size is None:
                continue
            if ABSENT not in told:
                inspector.compare_size(Path(path), size, (told[0], told[1]), f"image id {ids[i]}")
        rows.append(i)
        paths.append(path)
        sizes.append(size)
    return np.array(rows, np.int64), paths, np.array(sizes, np.int32).reshape(-1, 2)


class _Folders:
    """Looks for files by listing their folders, each once: opening a hundred thousand files takes far longer."""

    def __init__(self, base: Path, to_path: SafePaths) -> None:
        self.base, self.to_path = str(base), to_path
        self.links: dict[str, dict[str, bool]] = {}  # {folder: {file name: whether it is a symbolic link}}

    def path(self, name: str, where: str) -> str | None:
        """The path of a plain name, or None where there is no such file. Refuses what leads out of the data."""
        folder, _, last = name.rpartition("/")
        links = self.links.get(folder)
        if links is None:
            self.to_path(name, where)
            links = self.links[folder] = {}
            with suppress(OSError), os.scandir(os.path.join(self.base, folder)) as entries:
                links.update((entry.name, entry.is_symlink()) for entry in entries)
        if last not in links:
            return None
        return str(self.to_path(name, where)) if links[last] else f"{self.base}{os.sep}{name}"


def _or_absent(value: Any) -> int:
    return value if isinstance(value, int) else ABSENT


def _boxes(
    content: CocoArrays, mine: np.ndarray, odd: dict[int, dict[str, Any]], file: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Corners float64 [n, 4] and category ids int64 [n] of the annotations at the rows `mine`."""
    boxes, categories = content.boxes[mine], content.categories_of[mine]
    for k, record in _odd_among(mine, odd):
        where = f"annotations[{mine[k]}]"
        boxes[k] = _box(record, file, where)
        categories[k] = _integer(record, "category_id", file, where)
    with np.errstate(over="ignore", invalid="ignore"):
        boxes[:, 2:] += boxes[:, :2]
    return boxes, categories


def _labels(category: np.ndarray, categories: list[tuple[int, str]], mine: np.ndarray, file: Path) -> np.ndarray:
    """int64 [n]: category ids as positions in the sorted list of categories."""
    known = np.array([id_ for id_, _ in categories], np.int64)
    labels = np.searchsorted(known, category)
    unknown = np.flatnonzero(np.append(known, 0)[labels] != category) if len(known) else np.arange(len(category))
    unknown = np.union1d(unknown, np.flatnonzero(labels == len(known)))
    if len(unknown):
        k = int(unknown[0])
        listed = ", ".join(str(id_) for id_ in known)
        reason = f"category_id {category[k]} is not among the categories of this file ({listed})"
        corrupt(file, f"annotations[{mine[k]}]", reason)
    return labels


def _areas(content: CocoArrays, mine: np.ndarray, odd: dict[int, dict[str, Any]]) -> np.ndarray:
    """float64 [n], NaN where the file tells none that is usable."""
    areas = content.areas[mine]
    for k, record in _odd_among(mine, odd):
        areas[k] = usable_area(record.get("area"))
    return areas


def _crowd(content: CocoArrays, mine: np.ndarray, odd: dict[int, dict[str, Any]]) -> np.ndarray:
    crowd = content.crowd[mine]
    for k, record in _odd_among(mine, odd):
        crowd[k] = bool(record.get("iscrowd", 0))
    return crowd


def _odd_among(mine: np.ndarray, odd: dict[int, dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(position among `mine`, record) of the odd ones."""
    if odd:
        yield from ((k, odd[int(mine[k])]) for k in np.flatnonzero(np.isin(mine, list(odd))).tolist())


def _box(record: dict[str, Any], file: Path, where: str) -> list[float]:
    box = record.get("bbox")
    if isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) for v in box):
        with suppress(OverflowError):  # an integer of 400 digits
            return [float(v) for v in box]
    corrupt(file, where, f"'bbox' must be four numbers [x, y, width, height], not {box!r}")
