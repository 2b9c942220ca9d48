"""What `ssod label` is going to do, written down before it starts, so that a killed run can go on.

The images of a source stand in one file, a line each, divided into parts of equal length. Whoever labels a part reads
its lines alone, so neither millions of images nor many processes cost memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from ssod.config import find_yaml
from ssod.data.annotations.formats import read_split
from ssod.data.annotations.found import walk_images
from ssod.data.annotations.listing import iter_images
from ssod.data.annotations.sources import SPLITS, find_parts, read_data_yaml
from ssod.data.annotations.yolo import images_of
from ssod.data.samples import Inspector
from ssod.errors import UserError
from ssod.files import replacing

_OF_YAML = re.compile(rf"(.+\.ya?ml)(?::({'|'.join(SPLITS)}))?")


@dataclass(frozen=True)
class Plan:
    """folder    where the plan and the finished parts lie
    settings  everything that decides about the labels; a run goes on only with the same
    base      the folder that file names in the output are relative to, absolute
    starts    where in the list of images each part begins, bytes, and where the last one ends
    images    how many images there are
    left_out  lines about images that the source names, but that are not there
    """

    folder: Path
    settings: dict[str, Any]
    base: Path
    starts: list[int]
    images: int
    left_out: list[str]

    @property
    def parts(self) -> int:
        return len(self.starts) - 1

    def part_file(self, part: int) -> Path:
        return self.folder / f"part-{part:07d}.jsonl"

    def missing(self) -> list[int]:
        """Parts that are not done, ascending; none once the first rank has finished and removed the folder."""
        try:
            done = {entry.name for entry in os.scandir(self.folder)}
        except FileNotFoundError:
            return []
        return [part for part in range(self.parts) if self.part_file(part).name not in done]

    def images_of(self, part: int) -> list[str]:
        """File names of a part's images, relative to `base`."""
        with open(self.folder / "images.jsonl", "rb") as stream:
            stream.seek(self.starts[part])
            lines = stream.read(self.starts[part + 1] - self.starts[part]).splitlines()
        return [os.path.relpath(json.loads(line), self.base) for line in lines]

    def rows(self) -> Iterator[dict[str, Any]]:
        """What was found on every image, in the order of the images, one at a time."""
        for part in range(self.parts):
            with open(self.part_file(part), encoding="ascii") as stream:
                yield from map(json.loads, stream)


def make_plan(source: str | list[str], folder: Path, settings: Mapping[str, Any], part: int, by_stem: bool) -> Plan:
    """List the images of a source, write the plan and return it.

    part     images of a part
    by_stem  refuse two images that differ in their suffix only, because their labels would have the same name
    Raises UserError when there is no image, or when one is there twice.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found, base, left_out = _images(source)
    starts: list[int] = []
    keys = array("Q")
    with replacing(folder / "images.jsonl") as stream:
        for number, path in enumerate(found):
            name = os.path.abspath(path)
            if number % part == 0:
                starts.append(stream.tell())
            stream.write(json.dumps(name).encode() + b"\n")
            keys.append(_key(name, by_stem))
            base = base or os.path.dirname(name)
            if os.path.commonpath([base, name]) != base:
                base = os.path.commonpath([base, os.path.dirname(name)])
        starts.append(stream.tell())
    if not keys or base is None:
        raise UserError(f"source={source}: no image there.")
    _refuse_twins(folder / "images.jsonl", keys, by_stem)
    content = {"settings": dict(settings), "base": base, "starts": starts, "images": len(keys), "left_out": left_out}
    with replacing(folder / "plan.json") as stream:
        stream.write(json.dumps(content).encode())
    return Plan(folder, dict(settings), Path(base), starts, len(keys), left_out)


def read_plan(folder: Path) -> Plan | None:
    """The plan in a folder, or None where there is none yet. Raises UserError for one that is damaged."""
    try:
        content = json.loads((folder / "plan.json").read_bytes())
        return TypeAdapter(Plan).validate_python({**content, "folder": folder})
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        raise UserError(
            f"{folder / 'plan.json'} is damaged or not by `ssod label`; remove {folder} to start anew."
        ) from None


def _images(source: str | list[str]) -> tuple[Iterator[Path], str | None, list[str]]:
    """Images, the folder that their names shall be relative to (None: the deepest common one), and what is missing."""
    given = _OF_YAML.fullmatch(source) if isinstance(source, str) else None
    if given is not None:
        return _of_yaml(given[1], given[2] or "unlabeled")
    base = os.path.abspath(os.path.expanduser(source)) if isinstance(source, str) and os.path.isdir(source) else None
    return iter_images(source), base, []


def _of_yaml(name: str, split: str) -> tuple[Iterator[Path], str | None, list[str]]:
    """Images of a split of a data YAML; no annotation is opened, but for a COCO file's list of images."""
    parts = find_parts(read_data_yaml(find_yaml(name)), split)
    if len(parts) == 1 and parts[0].format in ("images", "YOLO"):
        return walk_images(parts[0].images), str(parts[0].images), []
    inspector = Inspector()
    paths: list[Path] = []
    for found in parts:
        if found.format in ("COCO", "VOC"):
            paths += [s.path for s in read_split(replace(found, split="unlabeled"), [], inspector)]
        else:
            paths += images_of(found, inspector)
    return iter(paths), None, [str(problem) for problem in inspector.problems]


def _key(name: str, by_stem: bool) -> int:
    name = os.path.splitext(name)[0] if by_stem else name
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")


def _refuse_twins(file: Path, keys: array[int], by_stem: bool) -> None:
    values, counts = np.unique(np.frombuffer(keys, np.uint64), return_counts=True)
    twice = set(values[counts > 1].tolist())
    if not twice:
        return
    seen: dict[int, str] = {}
    with open(file, "rb") as stream:
        for line in stream:
            name = json.loads(line)
            key = _key(name, by_stem)
            if key in seen:
                file.unlink()
                if seen[key] == name:
                    raise UserError(f"{name} stands twice in the source; list every image once.")
                raise UserError(
                    f"{seen[key]} and {name} would share one label file; rename one of them, or use format=coco."
                )
            if key in twice:
                seen[key] = name
