"""A data YAML becomes samples; the format is found by looking at the files, never by guessing between two.

path: ../datasets/fish     # relative to this file; `data_path=DIR` on the command line replaces it
train: images/train        # see ssod.data.annotations.formats for what these may point to
partial: images/sparse     # labelled images, too, but only some of their objects are annotated
unlabeled: [images/more, images/still_more]   # several paths make one split
val: images/val
test: images/test
names: [carp, pike]        # in class order; may be left out for COCO and VOC
layout: images/ and labels/ of the fish set, from fish.example   # said where `path` or a split is missing
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ssod.data.annotations import coco
from ssod.data.annotations.formats import class_names, find_split, read_split, way_out
from ssod.data.annotations.found import Found
from ssod.data.samples import Dataset, Inspector, Problem, Sample, SampleTable, count_problems
from ssod.errors import UserError, did_you_mean

__all__ = ["SPLITS", "DataYaml", "Dataset", "Problem", "Sample", "count_problems", "load_data", "read_data_yaml"]

SPLITS = ("train", "unlabeled", "val", "test")
_KEYS = ("train", "partial", *SPLITS[1:])


@dataclass(frozen=True)
class DataYaml:
    """A data YAML, read and checked; no file beyond the YAML itself was touched.

    root: what the splits are relative to, an absolute path. splits: {split: its paths as written, one or more}, those
    of 'partial' behind those of 'train', as one split. partial: how many of the split "train" come from there.
    names: None where absent. layout: what should lie in `root`, for messages; "" where absent.
    """

    file: Path
    root: Path
    splits: dict[str, list[str]]
    names: list[str] | None
    layout: str = ""
    partial: int = 0


def load_data(
    yaml_path: str | os.PathLike[str],
    split: str,
    path: str | os.PathLike[str] | None = None,
    strict: bool = False,
    headers: bool = False,
) -> Dataset:
    """Read one split ("train", "unlabeled", "val" or "test") that a data YAML describes.

    The split "train" is of the images of 'train' and then those of 'partial', whose samples are not `complete`.
    `path` replaces the YAML's `path`, and is relative to the current folder. Of the split "unlabeled" only the images
    are used: annotations that lie beside them are not opened (of a COCO file, only its list of images is used).
    Flaws that can be mended, and images left out, are listed in the result's `problems`; with `strict` the first of
    them is an error. Where a COCO file tells the sizes of more than 20,000 images, their headers are not read: an image
    of another size shows when it is decoded. With `headers` or `strict` all are read.
    Raises UserError when the YAML, an annotation file or the split as a whole cannot be used.
    """
    data = read_data_yaml(yaml_path, path)
    inspector = Inspector(strict, headers)
    try:
        parts = find_parts(data, split)
        names = _names(data, split, parts)
        read = [_read(found, names, inspector) for found in parts]
    finally:
        coco.forget()
    keys = " and ".join(f"'{key}'" for key in dict.fromkeys(map(_key, parts)))
    _refuse_empty(read, parts, f"{data.file}, {keys}", inspector.problems)
    samples = _as_one(read, f"{data.file}, {keys}")
    formats = " + ".join(dict.fromkeys(found.format for found in parts))
    return Dataset(samples, names, inspector.problems, formats, data.root, split)


def read_data_yaml(yaml_path: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> DataYaml:
    """Read and check a data YAML; `path` replaces its `path`. Raises UserError with the key that is wrong."""
    file = Path(yaml_path)
    content = _load_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a data YAML holds keys such as train, val and names, not a {type(content).__name__}.")
    known = ("path", *_KEYS, "names", "nc", "layout")
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key), known) or f" The keys are {', '.join(known)}."
            raise UserError(f"{file}: unknown key {key!r}.{hint}")
    layout = content.get("layout") or ""
    if not isinstance(layout, str):
        raise UserError(f"{file}: 'layout' must be a text that says what lies in 'path', not {layout!r}.")
    paths = {key: _paths(file, key, content[key]) for key in _KEYS if content.get(key) is not None}
    if not paths:
        raise UserError(f"{file}: no data in it; give at least one of {', '.join(_KEYS)}.")
    partial = paths.pop("partial", [])
    if partial:
        paths = {"train": paths.pop("train", []) + partial} | paths
    root = _root(file, content.get("path"), path, layout)
    return DataYaml(file, root, paths, _yaml_names(file, content), layout, len(partial))


def _load_yaml(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"Data YAML not found: {file} (current folder: {Path.cwd()}).") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read as a YAML file ({error}).") from error
    try:
        return yaml.safe_load(text)
    except yaml.constructor.ConstructorError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{file}{line}: refused, only plain YAML values are read ({error.problem}).") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, say
        raise UserError(f"{file}: not valid YAML: {' '.join(str(error).split())}.") from error


def _paths(file: Path, split: str, value: Any) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not paths or not all(isinstance(p, str) and p.strip() for p in paths):
        known = "one path (a folder, a COCO .json or a VOC list) or a list of these"
        raise UserError(f"{file}: '{split}' must be {known}, not {value!r}.")
    return paths


def _root(file: Path, written: Any, override: str | os.PathLike[str] | None, layout: str) -> Path:
    if override is not None:
        root, origin = Path(override).expanduser(), "the path given"
    elif written is None or isinstance(written, str):
        root, origin = file.parent / Path(written or ".").expanduser(), f"'path' of {file}"
    else:
        raise UserError(f"{file}: 'path' must be a folder, not {written!r}.")
    if not root.is_dir():
        raise UserError(f"{origin}: there is no folder {root.absolute()}; {way_out(layout, root)}.")
    return Path(os.path.abspath(root))  # tidies `..`, but keeps the user's own symbolic links


def _yaml_names(file: Path, content: dict[str, Any]) -> list[str] | None:
    names = content.get("names")
    if isinstance(names, dict):  # {0: carp, 1: pike}
        if set(names) != set(range(len(names))):
            raise UserError(f"{file}: the keys of 'names' must be 0, 1, 2, ... without a gap, not {list(names)}.")
        names = [names[i] for i in range(len(names))]
    if names is None:
        return None
    if not isinstance(names, list) or not names or not all(isinstance(n, str) and n.strip() for n in names):
        raise UserError(f'{file}: \'names\' must be a list of class names (quote names such as "on" or "1").')
    twice = sorted({n for n in names if names.count(n) > 1})
    if twice:
        raise UserError(f"{file}: 'names' holds {', '.join(twice)} more than once.")
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{file}: 'nc' is {content['nc']}, but 'names' lists {len(names)} classes; remove 'nc'.")
    return names


def find_parts(data: DataYaml, split: str) -> list[Found]:
    """Where the paths of a split lie, in the order of the YAML; each is looked at on its own, formats may differ."""
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; it is one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    if split not in data.splits:
        raise UserError(f"{data.file}: there is no '{split}' in it; add the line '{split}: PATH' (relative to 'path').")
    remedy = way_out(data.layout, data.root)
    values, partial = data.splits[split], data.partial if split == "train" else 0
    keys = [split] * (len(values) - partial) + ["partial"] * partial
    return [
        replace(find_split(data.root, value, split, f"{data.file}, '{key}'", remedy), complete=key == split)
        for key, value in zip(keys, values, strict=True)
    ]


def _read(found: Found, names: list[str], inspector: Inspector) -> SampleTable:
    samples = SampleTable.of(read_split(found, names, inspector))
    return samples if found.complete else samples.as_partial()


def _key(found: Found) -> str:
    """The key of the data YAML that a path stands under."""
    return found.split if found.complete else "partial"


def _names(data: DataYaml, split: str, parts: list[Found]) -> list[str]:
    """Class names: the YAML's; without these, the training annotations' (one list for all splits)."""
    if split == "unlabeled" or all(found.format == "images" for found in parts):
        if data.names is not None or "train" not in data.splits:
            return data.names or []
        return class_names(find_parts(data, "train")[0])
    if data.names is not None:
        expected, origin = data.names, str(data.file)
    else:
        first = find_parts(data, "train")[0] if split != "train" and "train" in data.splits else parts[0]
        expected, origin = class_names(first), str(first.annotations)
    for found in parts:
        # A YOLO label holds no names, and a VOC folder need not show every class: their reader refuses unknown ones.
        if found.format == "COCO" or (found.format == "VOC" and len(parts) > 1 and data.names is None):
            written = class_names(found)
            if written != expected:
                raise UserError(
                    f"The class lists differ: {origin} has {expected}, {found.annotations} has {written} (in the order "
                    "of the labels); make them equal, or "
                    + ("remove 'names' from the YAML." if data.names is not None else "list 'names' in the YAML.")
                )
    return expected


def _as_one(parts: list[SampleTable], where: str) -> SampleTable:
    """Samples of several paths, one after the other; ids are counted anew from 1 where two paths use the same ones."""
    samples = SampleTable.join(parts)
    if len(parts) == 1:
        return samples
    if len(np.unique(samples.ids)) < len(samples):
        samples = samples.renumbered()
    part_of: dict[Path, int] = {}
    for number, part in enumerate(parts):
        for i in range(len(part)):
            path = part.file(i)[0]
            if part_of.setdefault(path, number) != number:
                raise UserError(f"{where}: two of its paths hold the image {path}; list every image once.")
    return samples


def _refuse_empty(read: list[SampleTable], parts: list[Found], where: str, problems: list[Problem]) -> None:
    for samples, found in zip(read, parts, strict=True):
        if not samples:
            first = f" The first of {len(problems)} problems: {problems[0]}." if problems else ""
            raise UserError(
                f"{where}: no usable image in {found.annotations or found.images}; "
                f"point '{_key(found)}' at data, or remove the line.{first}"
            )
    if parts[0].split != "unlabeled" and not any((~samples.objects()[2]).any() for samples in read):
        places = " and ".join(str(found.annotations or found.images) for found in parts)
        raise UserError(
            f"{where}: {sum(map(len, read))} images but not one box in {places}; "
            "annotate some, or give the images as 'unlabeled'."
        )
