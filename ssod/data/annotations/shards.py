"""Images in tar files (shards, as WebDataset writes them), read where they lie: nothing is unpacked.

Only images are looked at; what lies beside them (labels, captions) is not, so tars serve as unlabelled images. A tar is
gone through once, from header to header, and what was found is kept in the cache folder. From then on every image can
be read on its own, in any order. I images.
"""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from ssod.data import samples as kinds
from ssod.data.annotations.found import Found, is_image, walk_images
from ssod.data.annotations.listing import is_glob
from ssod.data.image import ImageError, image_size
from ssod.data.samples import Inspector
from ssod.data.store import identity, load_arrays, place_of, save_arrays
from ssod.data.table import SampleTable, unlabeled_table
from ssod.errors import UserError

FORMAT = "tar 1"  # of the cached arrays

_HEADER = 1 << 16  # bytes that hold the header of almost any image
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


def is_tar(name: str) -> bool:
    return name.lower().endswith(".tar")


def find_tars(source: Path) -> list[Path]:
    """The tars that a path means: a .tar, a range `pool-{000000..000127}.tar`, a glob `*.tar`, or a folder that holds
    some; sorted, a range as it counts. Empty where it means none.

    Raises UserError for a range of which tars are missing, and for a folder that holds images as well.
    """
    if source.is_dir():
        with os.scandir(source) as entries:
            tars = sorted(source / e.name for e in entries if is_tar(e.name) and not e.name.startswith("."))
        if tars and next(walk_images(source), None) is not None:
            raise UserError(f"{source} holds tars and images; point 'unlabeled' at the one or the other.")
        return tars
    if not is_tar(source.name):
        return []
    if source.is_file():
        return [source]
    if _RANGE.search(str(source)):
        tars = [Path(name) for name in _counted(str(source))]
        missing = [tar for tar in tars if not tar.is_file()]
        if missing:
            raise UserError(
                f"{source}: {len(missing)} of these {len(tars)} tars are missing, the first is {missing[0]}; mend the "
                "range, or get them."
            )
        return tars
    if is_glob(str(source)):
        return sorted(p for p in map(Path, glob.glob(str(source), recursive=True)) if is_tar(p.name) and p.is_file())
    return []


def _counted(text: str) -> Iterator[str]:
    """Every text that the ranges {first..last} in it stand for; numbers keep the width of the first."""
    found = _RANGE.search(text)
    if found is None:
        yield text
        return
    first, last = int(found[1]), int(found[2])
    for number in range(first, last + 1):
        yield from _counted(f"{text[: found.start()]}{number:0{len(found[1])}d}{text[found.end() :]}")


def read(found: Found, inspector: Inspector) -> SampleTable:
    """Unlabelled samples of the tars that a split of a data YAML points to."""
    return read_tars(find_tars(found.images), inspector)


def read_tars(tars: Sequence[Path], inspector: Inspector) -> SampleTable:
    """Unlabelled samples of the images in tars, in the order of the tars and of the images in them.

    Images whose header cannot be read, names that stand twice in a tar, and damaged tars are reported. Of a damaged tar
    what lies before the damage is used.
    """
    indices = []
    for tar in tqdm(tars, desc="tars", unit="tar", leave=False, disable=None if len(tars) > 1 else True):
        index = _index(tar)
        for kind, record, reason in index.problems:
            inspector.report(kind, tar, record, reason)
        indices.append(index)
    parts = [_table(tar, index) for tar, index in zip(tars, indices, strict=True)]
    return SampleTable.join(parts).renumbered() if parts else SampleTable.of([])


@dataclass
class _Index:
    """The usable images of one tar.

    names     I names
    places    int64 [I, 2]  first byte, bytes
    sizes     int32 [I, 2]  (width, height)
    problems  (kind, record, reason)
    """

    names: list[str]
    places: np.ndarray
    sizes: np.ndarray
    problems: list[tuple[str, str, str]]


def _index(tar: Path) -> _Index:
    """From the cache where the tar has not changed since."""
    try:
        key = f"{FORMAT}|{identity(tar)}"
    except OSError as error:
        return _Index([], np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int32), [_damage("", str(error.strerror))])
    place = place_of("tars", tar)
    stored = load_arrays(place, key)
    if stored is not None:
        try:
            text = json.loads(stored["text"].tobytes())
            problems = [(kind, record, reason) for kind, record, reason in text["problems"]]
            return _Index(text["names"], stored["places"], stored["sizes"], problems)
        except (KeyError, ValueError, TypeError):  # of another program
            pass
    index = _gone_through(tar)
    encoded = json.dumps({"names": index.names, "problems": index.problems}).encode()
    arrays = {"text": np.frombuffer(encoded, np.uint8), "places": index.places, "sizes": index.sizes}
    save_arrays(place, key, arrays)
    return index


def _gone_through(tar: Path) -> _Index:
    names: list[str] = []
    places: list[tuple[int, int]] = []
    sizes: list[tuple[int, int]] = []
    problems: list[tuple[str, str, str]] = []
    seen: set[str] = set()
    with open(tar, "rb") as file:
        for name, first, size in _members(file, problems):
            try:
                shape = _image_size(tar, file, name, first, size)
            except ImageError as error:
                problems.append((kinds.IMAGE_UNREADABLE, name, error.reason))
                continue
            if name in seen:
                problems.append((kinds.IMAGE_TWICE, name, "an image before it has the same name"))
            seen.add(name)
            names.append(name)
            places.append((first, size))
            sizes.append(shape)
    index_places, index_sizes = np.array(places, np.int64), np.array(sizes, np.int32)
    return _Index(names, index_places.reshape(-1, 2), index_sizes.reshape(-1, 2), problems)


def _members(file: BinaryIO, problems: list[tuple[str, str, str]]) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of the images that lie whole in a tar; `problems` gets what is wrong with it."""
    total = os.fstat(file.fileno()).st_size
    last = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:  # a compressed one cannot be read in any order
            while (member := tar.next()) is not None:
                if member.offset_data + member.size > total:
                    break
                last = member.name
                if member.isreg() and not member.issparse() and is_image(os.path.basename(member.name)):
                    yield member.name, member.offset_data, member.size
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
            end = tar.offset
    except (tarfile.TarError, OSError, ValueError, EOFError, OverflowError) as error:
        what = "it is empty" if not total else str(error) or type(error).__name__
        problems.append(_damage(last, f"cannot be read as an uncompressed tar ({what})"))
        return
    file.seek(end)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        what = "ends too early" if len(block) < tarfile.BLOCKSIZE else "is damaged"
        problems.append(_damage(last, f"the tar {what}, at byte {min(end, total)} of {total}"))


def _damage(last: str, reason: str) -> tuple[str, str, str]:
    return kinds.SHARD_DAMAGED, f"behind {last}" if last else "", reason


def _image_size(tar: Path, file: BinaryIO, name: str, first: int, size: int) -> tuple[int, int]:
    """Upright (width, height) from as few bytes as will do."""
    for length in sorted({min(size, _HEADER), size}):
        file.seek(first)
        try:
            return image_size(tar / name.lstrip("/"), stream=BytesIO(file.read(length)))
        except ImageError:
            if length == size:
                raise
    raise AssertionError


def _table(tar: Path, index: _Index) -> SampleTable:
    head = os.fsencode(os.path.abspath(tar))
    paths = [head + b"/" + os.fsencode(name.lstrip("/")) for name in index.names]
    ends = np.cumsum([len(path) for path in paths], dtype=np.int64)
    places = np.column_stack([np.full(len(paths), len(head)), index.places])
    text = np.frombuffer(bytearray(b"".join(paths)), np.uint8)
    return unlabeled_table(text, ends, np.arange(1, len(paths) + 1), index.sizes, places)
