"""Splits as files: plain COCO JSON that every tool reads, a data YAML for each split, and a manifest.

OUT/manifest.json                   what was drawn, from what, and the SHA-256 of every JSON file
OUT/10percent/fold0/labeled.json    the labelled images with their boxes
OUT/10percent/fold0/unlabeled.json  the other images, without boxes
OUT/10percent/fold0/data.yaml       for `data=`: these two, and val, test and unlabeled of the source
OUT/hard/fold0/labeled.json         sparse: all images with the boxes that are left
OUT/hard/fold0/erased.json          sparse: the boxes that were erased
OUT/hard/fold0/data.yaml            for `data=`: labeled.json as 'partial', and val, test and unlabeled of the source

File names in the JSON files are relative to the source's `path`. JSON files and manifest depend on the data, the kind
and the seed alone, to the last byte: not on folders, the machine, the time or the version of any library.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssod.data.samples import count_problems
from ssod.data.split.division import Source, Split
from ssod.errors import UserError


def write_splits(source: Source, splits: Iterator[Split], out: Path, extra: dict[str, Any]) -> list[str]:
    """Write all splits into a new folder, whole or not at all; returns a line on each for the user.

    extra: what else the manifest says (the seed, say). Raises UserError when `out` holds files already.
    """
    check_out(out)
    building = out.with_name(f".{out.name}.part")
    shutil.rmtree(building, ignore_errors=True)  # of a run that was killed
    try:
        lines = _write_all(source, splits, out, building, extra)
        if out.exists():
            out.rmdir()
        os.replace(building, out)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return lines


def check_out(out: Path) -> None:
    """Raise UserError when `out` holds files already, to be called before much is read."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out} exists and is not an empty folder; give another, or remove it.")


def _write_all(source: Source, splits: Iterator[Split], out: Path, building: Path, extra: dict[str, Any]) -> list[str]:
    lines, written = [], []
    for split in splits:
        folder = building / split.name
        folder.mkdir(parents=True)
        files = {f"{n}.json": _write_json(source, split, n, folder / f"{n}.json") for n in split.files}
        (folder / "data.yaml").write_text(_data_yaml(source, split, out), encoding="utf-8")
        written.append({"name": split.name, **split.about, "files": files})
        lines.append(f"{split.name}: {', '.join(_said(n, f) for n, f in files.items())}")
    manifest = {"format": 1, **extra, "source": _described(source), "splits": written}
    (building / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return lines


def _said(file: str, content: dict[str, Any]) -> str:
    line = f"{file} {content['images']} images"
    if "boxes" not in content:
        return line
    absent = [name for name, count in content["classes"].items() if not count]
    lacks = f" (none of {', '.join(absent)})" if file == "labeled.json" and absent else ""
    return f"{line} with {content['boxes']} boxes{lacks}"


def _write_json(source: Source, split: Split, part: str, path: Path) -> dict[str, Any]:
    """Write one COCO JSON, a record a line, never all of it in memory; returns what the manifest says of it."""
    names, selection = source.train.names, split.files[part]
    categories = [{"id": i, "name": n} for i, n in zip(source.category_ids, names, strict=True)]
    counts = np.zeros(len(names), np.int64)
    crowd = 0
    for i, keep in selection:
        s = source.train.samples[i]
        counts += np.bincount(s.labels[keep & ~s.crowd], minlength=len(names))
        crowd += int((keep & s.crowd).sum())
    with _Hashed(path) as file:
        file.write(f'{{"info": {_text({"description": f"{part} part of {split.name}", **split.about})},\n"images": [')
        file.records(_image(source, i) for i, _ in selection)
        file.write('],\n"annotations": [')
        file.records(a for i, keep in selection for a in _annotations(source, i, keep))
        file.write(f'],\n"categories": {_text(categories)}}}\n')
    content: dict[str, Any] = {"sha256": file.digest(), "images": len(selection)}
    if part == "unlabeled":
        return content
    classes = dict(zip(names, counts.tolist(), strict=True))
    return content | {"boxes": int(counts.sum()), "crowd": crowd, "classes": classes}


class _Hashed:
    """A text file that knows the SHA-256 of what was written."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb")  # noqa: SIM115
        self.sha = hashlib.sha256()

    def write(self, text: str) -> None:
        data = text.encode("utf-8")
        self.sha.update(data)
        self.file.write(data)

    def records(self, records: Iterator[dict[str, Any]]) -> None:
        for n, record in enumerate(records):
            self.write((",\n" if n else "\n") + _text(record))

    def digest(self) -> str:
        return self.sha.hexdigest()

    def __enter__(self) -> _Hashed:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True)  # a file name may hold what UTF-8 cannot


def _image(source: Source, i: int) -> dict[str, Any]:
    s = source.train.samples[i]
    name = s.path.relative_to(source.yaml.root).as_posix()
    return {"id": s.image_id, "file_name": name, "width": s.width, "height": s.height}


def _annotations(source: Source, i: int, keep: np.ndarray) -> Iterator[dict[str, Any]]:
    """COCO records of the kept boxes of a sample; a box has the same id in every file of the same source."""
    s = source.train.samples[i]
    if not keep.any():
        return
    corners = _decimal(s.boxes)  # [N, 4]
    # Nine digits undo the rounding of the difference: x and width add up to the float32 that was read.
    sizes = np.round(corners[:, 2:] - corners[:, :2], 9)
    areas = np.round(sizes.prod(1), 3) if s.areas is None else _decimal(s.areas)
    for k in np.flatnonzero(keep).tolist():
        yield {
            "id": source.first_ids[i] + k,
            "image_id": s.image_id,
            "category_id": source.category_ids[int(s.labels[k])],
            "bbox": [*corners[k, :2].tolist(), *sizes[k].tolist()],
            "area": float(areas[k]),
            "iscrowd": int(s.crowd[k]),
        }


def _decimal(values: np.ndarray) -> np.ndarray:
    """float32 -> the shortest decimal number that means it, as float64: 473.07, not 473.07000732421875."""
    return values.astype(np.str_).astype(np.float64)


def _data_yaml(source: Source, split: Split, out: Path) -> str:
    """The data YAML of a split. It may move together with the data if it lies among them; else paths are absolute."""
    root, folder = Path(os.path.realpath(source.yaml.root)), Path(os.path.realpath(out)) / split.name
    inside = folder.is_relative_to(root)

    def place(part: str) -> str:
        file = folder / f"{part}.json"
        return (file.relative_to(root) if inside else file).as_posix()

    unlabeled = [place("unlabeled")] if "unlabeled" in split.files else []
    splits = source.yaml.splits | {
        "train": [place("labeled")],
        "unlabeled": unlabeled + source.yaml.splits.get("unlabeled", []),
    }
    content: dict[str, Any] = {"path": Path(os.path.relpath(root, folder)).as_posix() if inside else root.as_posix()}
    train = "train" if split.complete else "partial"
    content |= {train if k == "train" else k: v[0] if len(v) == 1 else v for k, v in splits.items() if v}
    content["names"] = source.train.names
    if source.yaml.layout:
        content["layout"] = source.yaml.layout
    return (
        f"# {split.name}: labelled and other images of {source.yaml.file.name}; train on it with data=THIS FILE.\n"
        + (yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=110))
    )


def _described(source: Source) -> dict[str, Any]:
    """What was divided, told apart by its content."""
    samples, root = source.train.samples, source.yaml.root
    sha = hashlib.sha256()
    counts = np.zeros(len(source.train.names), np.int64)
    for i, s in enumerate(samples):
        sha.update(_text(_image(source, i)).encode())
        for array in (s.boxes, s.labels, s.crowd, s.areas):
            sha.update(b"-" if array is None else array.tobytes())
        counts += np.bincount(s.labels[~s.crowd], minlength=len(counts))
    files = []
    for path in (p.annotations or p.images for p in source.parts):
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        files.append({"file": name} | ({"sha256": _sha256(path)} if path.is_file() else {}))
    return {
        "format": source.train.format,
        "files": files,
        "content_sha256": sha.hexdigest(),
        "images": len(samples),
        "boxes": int(counts.sum()),
        "classes": dict(zip(source.train.names, counts.tolist(), strict=True)),
        "problems": count_problems(source.train.problems),
    }


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()
