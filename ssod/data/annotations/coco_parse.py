"""A COCO JSON as arrays, without ever holding the file or its objects in memory.

Records are decoded one after the other and dropped once their few fields that count are in an array: the outlines
alone, which nothing here uses, would take gigabytes as Python lists. What an ordinary record holds goes into arrays;
a record that is out of the ordinary, right or wrong, is kept whole, to be judged in `coco.py`, where it matters.
I images, N annotations.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.annotations.found import corrupt
from ssod.data.store import identity, load_arrays, place_of, save_arrays

FORMAT = "coco 1"  # of the cached arrays
CACHE_FROM = 8 << 20  # bytes; smaller files are read faster than they are looked up

ABSENT = np.iinfo(np.int64).min  # no number there
_LISTS = ("images", "annotations", "categories")
_BATCH = 100  # records turned into arrays at once; with thousands alive, garbage collection takes half of the time
_CHUNK = 1 << 20  # characters
_SPACE = re.compile(r"[ \t\n\r]*").match
_OUTLINE = "segmentation"


@dataclass(eq=False)
class CocoArrays:
    """What a COCO JSON says, in the order of the file and unjudged.

    image_ids      int64 [I]
    names          I file names; "" of an odd image
    sizes          int64 [I, 2]  declared (width, height), ABSENT where it is not an integer
    owners         int64 [N]     image id of each annotation
    categories_of  int64 [N]     its category id
    boxes          float64 [N, 4]  x, y, width, height
    areas          float64 [N]   NaN where there is no usable one
    crowd          bool [N]
    ids            int64 [N]     ABSENT where it is not an integer
    odd            {list: {position: record}}, records that fit into no array; their rows above mean nothing
    categories     the list as it stands in the file
    missing        names of the lists that are not there
    """

    image_ids: np.ndarray
    names: list[str]
    sizes: np.ndarray
    owners: np.ndarray
    categories_of: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    ids: np.ndarray
    odd: dict[str, dict[int, Any]]
    categories: list[Any]
    missing: list[str]


def parse(file: Path) -> CocoArrays:
    """The arrays of a COCO JSON, from the cache where the file is large and has not changed since.

    Raises UserError when it is not a JSON object, with the line and column.
    """
    try:
        key = f"{FORMAT}|{identity(file)}"
        large = file.stat().st_size >= CACHE_FROM
    except OSError as error:
        corrupt(file, "", f"cannot be read as JSON ({error})")
    place = place_of("annotations", file)
    stored = load_arrays(place, key) if large else None
    arrays = _unpacked(stored) if stored is not None else None
    if arrays is None:
        arrays = _parse(file)
        if large:
            save_arrays(place, key, _packed(arrays))
    return arrays


def _parse(file: Path) -> CocoArrays:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            return _collect(_Records(stream))
    except (OSError, ValueError, RecursionError):
        # Something is wrong with the file: the whole of it through the plain parser, which says what and where.
        return _parse_whole(file)


def _parse_whole(file: Path) -> CocoArrays:
    try:
        with open(file, encoding="utf-8-sig") as stream:
            content = json.load(stream)
    except json.JSONDecodeError as error:
        corrupt(file, f"line {error.lineno}, column {error.colno}", f"not valid JSON ({error.msg})")
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a number of 5000 digits
        corrupt(file, "", f"cannot be read as JSON ({error})")
    if not isinstance(content, dict):
        corrupt(file, "", "not a COCO file: an object with images, annotations and categories is expected")
    return _collect((key, iter(value) if isinstance(value, list) else None) for key, value in content.items())


class _Records:
    """Iterates over (key, records or None) of the JSON object in a text stream; None where the value is no list.

    Lists under other names than COCO's are passed over. Raises ValueError where the text is not what it expects.
    """

    def __init__(self, stream: io.TextIOBase) -> None:
        self.stream, self.text, self.at = stream, "", 0
        self.decode = json.JSONDecoder().raw_decode

    def __iter__(self) -> Iterator[tuple[str, Iterator[Any] | None]]:
        self._expect("{")
        while self._next() != "}":
            key = self._value()
            if not isinstance(key, str):
                raise ValueError
            self._expect(":")
            if self._next() == "[" and key in _LISTS:
                self.at += 1
                records = self._list()
                yield key, records
                for _ in records:  # what the reader has left
                    pass
            else:
                value = self._value()
                yield key, iter(value) if isinstance(value, list) else None
            if self._next() == ",":
                self.at += 1
                if self._next() == "}":
                    raise ValueError
            elif self._next() != "}":
                raise ValueError
        self.at += 1
        if self._next():
            raise ValueError

    def _list(self) -> Iterator[Any]:
        if self._next() == "]":
            self.at += 1
            return
        mark = ","
        while mark == ",":
            yield self._value()
            mark = self._next()
            self.at += 1
        if mark != "]":
            raise ValueError

    def _next(self) -> str:
        """The next character that is not white space, which `at` then points to; "" at the end of the file."""
        while True:
            self.at = _SPACE(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(_CHUNK):
                return ""

    def _expect(self, mark: str) -> None:
        if self._next() != mark:
            raise ValueError
        self.at += 1

    def _value(self) -> Any:
        self._next()
        size = _CHUNK
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                if end < len(self.text) and self.text[end] not in ".eE":  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if not self._more(size):
                    raise
            else:
                if not self._more(size):
                    self.at = end
                    return value
            size *= 2  # a large value is not decoded from its start too often

    def _more(self, size: int) -> bool:
        chunk = self.stream.read(size)
        self.text, self.at = self.text[self.at :] + chunk, 0
        return bool(chunk)


@dataclass
class _Table:
    """Columns of one list, batch after batch."""

    batches: list[tuple[np.ndarray, ...]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    odd: dict[int, Any] = field(default_factory=dict)
    length: int = 0

    def add(self, columns: tuple[np.ndarray, ...]) -> None:
        self.batches.append(columns)
        self.length += len(columns[0])


def _collect(content: Iterable[tuple[str, Iterator[Any] | None]]) -> CocoArrays:
    images, annotations = _Table(), _Table()
    categories: list[Any] | None = None
    found = {}
    for key, records in content:
        found[key] = records is not None
        if key == "images":  # should a key stand there twice, the last counts, as always in JSON
            images = _Table()
            _fill(images, records or iter(()), _image_columns)
        elif key == "annotations":
            annotations = _Table()
            _fill(annotations, records or iter(()), _annotation_columns)
        elif key == "categories":
            categories = list(records or ())
    image_ids, sizes = _joined(images, (np.zeros(0, np.int64), np.zeros((0, 2), np.int64)))
    none = np.zeros(0, np.int64)
    empty = (none, none, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.bool_), none)
    owners, categories_of, boxes, areas, crowd, ids = _joined(annotations, empty)
    odd = {"images": images.odd, "annotations": annotations.odd}
    missing = [key for key in _LISTS if not found.get(key)]
    return CocoArrays(
        image_ids,
        images.names,
        sizes,
        owners,
        categories_of,
        boxes,
        areas,
        crowd,
        ids,
        odd,
        categories or [],
        missing,
    )


def _joined(table: _Table, empty: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    return [np.concatenate(parts) for parts in zip(empty, *table.batches, strict=True)]


def _fill(table: _Table, records: Iterator[Any], columns: Any) -> None:
    while batch := list(islice(records, _BATCH)):
        try:
            table.add(columns(batch, table.names))
        except (TypeError, ValueError, AttributeError, OverflowError):
            for record in batch:  # one by one, to find out which do not fit
                try:
                    table.add(columns([record], table.names))
                except (TypeError, ValueError, AttributeError, OverflowError):
                    if isinstance(record, dict):
                        record = {k: v for k, v in record.items() if k != _OUTLINE}
                    table.odd[table.length] = record
                    table.add(columns([_PLACEHOLDER], table.names))


_PLACEHOLDER = {"id": -1, "image_id": -1, "category_id": -1, "bbox": [0, 0, 0, 0], "file_name": ""}


def _image_columns(records: list[Any], names: list[str]) -> tuple[np.ndarray, ...]:
    """(ids, sizes) of images, and their names into `names`. Raises one of four errors when a record does not fit."""
    ids = _required(records, "id")
    sides = [r.get(side) for r in records for side in ("width", "height")]
    sizes = _integers([int(s) if isinstance(s, int) else ABSENT for s in sides]).reshape(-1, 2)
    new = [r.get("file_name") for r in records]
    if any(type(n) is not str or "\0" in n for n in new):
        raise ValueError
    "".join(new).encode()  # half characters do not fit
    names += new
    return ids, sizes


def _annotation_columns(records: list[Any], _: list[str]) -> tuple[np.ndarray, ...]:
    """(owners, categories_of, boxes, areas, crowd, ids). Raises one of four errors when a record does not fit."""
    boxes = [r.get("bbox") for r in records]
    numbers = [v for box in boxes for v in box]
    if {*map(type, boxes)} != {list} or {*map(len, boxes)} != {4} or not {*map(type, numbers)} <= {int, float}:
        raise ValueError
    areas = [r.get("area") for r in records]
    ids = [r.get("id") for r in records]
    return (
        _required(records, "image_id"),
        _required(records, "category_id"),
        np.array(numbers, np.float64).reshape(-1, 4),
        np.array([usable_area(a) for a in areas], np.float64),
        np.array([bool(r.get("iscrowd", 0)) for r in records], np.bool_),
        _integers([i if type(i) is int else ABSENT for i in ids]),
    )


def usable_area(value: Any) -> float:
    """The area that a record tells, or NaN."""
    return value if isinstance(value, (int, float)) and 0 <= value < 1e12 else np.nan


def _required(records: list[Any], key: str) -> np.ndarray:
    values = [r.get(key) for r in records]
    if {*map(type, values)} != {int} or ABSENT in values:  # bool is an int, too, but not an id
        raise TypeError
    return _integers(values)


def _integers(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64)  # OverflowError where one needs more bits


_NUMBERS = ("image_ids", "sizes", "owners", "categories_of", "boxes", "areas", "crowd", "ids")


def _packed(arrays: CocoArrays) -> dict[str, np.ndarray]:
    odd = {key: list(records.items()) for key, records in arrays.odd.items()}
    rest = json.dumps({"odd": odd, "categories": arrays.categories, "missing": arrays.missing})
    texts = {"names": "\0".join(arrays.names), "rest": rest}
    return {name: getattr(arrays, name) for name in _NUMBERS} | {
        name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()
    }


def _unpacked(stored: dict[str, np.ndarray]) -> CocoArrays | None:
    try:
        rest = json.loads(stored["rest"].tobytes())
        names = stored["names"].tobytes().decode().split("\0") if len(stored["image_ids"]) else []
        odd = {key: dict(records) for key, records in rest["odd"].items()}
        numbers = {name: stored[name] for name in _NUMBERS}
        return CocoArrays(**numbers, names=names, odd=odd, categories=rest["categories"], missing=rest["missing"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
