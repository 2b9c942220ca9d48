"""A data YAML becomes samples; the format is found by looking at the files, never by guessing between two.

path: ../datasets/fish     # relative to this file; `data_path=DIR` on the command line replaces it
train: images/train        # see ssod.data.formats for what these may point to
unlabeled: images/more
val: images/val
test: images/test
names: [carp, pike]        # in class order; may be left out for COCO and VOC
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ssod.data import coco
from ssod.data.formats import class_names, find_split, read_split
from ssod.data.found import Found
from ssod.data.samples import Dataset, Inspector, Problem, Sample, count_problems
from ssod.errors import UserError, did_you_mean

__all__ = ["SPLITS", "DataYaml", "Dataset", "Problem", "Sample", "count_problems", "load_data", "read_data_yaml"]

SPLITS = ("train", "unlabeled", "val", "test")


@dataclass(frozen=True)
class DataYaml:
    """A data YAML, read and checked; no file beyond the YAML itself was touched.

    root: what the splits are relative to, an absolute path. splits: {split: as written}. names: None where absent.
    """

    file: Path
    root: Path
    splits: dict[str, str]
    names: list[str] | None


def load_data(
    yaml_path: str | os.PathLike[str],
    split: str,
    path: str | os.PathLike[str] | None = None,
    strict: bool = False,
) -> Dataset:
    """Read one split ("train", "unlabeled", "val" or "test") that a data YAML describes.

    `path` replaces the YAML's `path`, and is relative to the current folder. Of the split "unlabeled" only the images
    are used: annotations that lie beside them are not opened (of a COCO file, only its list of images is used).
    Flaws that can be mended, and images left out, are listed in the result's `problems`; with `strict` the first of
    them is an error. Raises UserError when the YAML, an annotation file or the split as a whole cannot be used.
    """
    data = read_data_yaml(yaml_path, path)
    inspector = Inspector(strict)
    try:
        found = _find(data, split)
        names = _names(data, split, found)
        samples = read_split(found, names, inspector)
    finally:
        coco.load.cache_clear()
    _refuse_empty(samples, split, found, data, inspector.problems)
    return Dataset(samples, names, inspector.problems, found.format, data.root, split)


def read_data_yaml(yaml_path: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> DataYaml:
    """Read and check a data YAML; `path` replaces its `path`. Raises UserError with the key that is wrong."""
    file = Path(yaml_path)
    content = _load_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"{file}: a data YAML holds keys such as train, val and names, not a {type(content).__name__}.")
    known = ("path", *SPLITS, "names", "nc")
    for key in content:
        if key not in known:
            hint = did_you_mean(str(key), known) or f" The keys are {', '.join(known)}."
            raise UserError(f"{file}: unknown key {key!r}.{hint}")
    splits = {}
    for split in SPLITS:
        value = content.get(split)
        if value is None:
            continue
        if not isinstance(value, str) or not value.strip():
            raise UserError(
                f"{file}: '{split}' must be one path (a folder, a COCO .json or a VOC list), not {value!r}."
            )
        splits[split] = value
    if not splits:
        raise UserError(f"{file}: no data in it; give at least one of {', '.join(SPLITS)}.")
    return DataYaml(file, _root(file, content.get("path"), path), splits, _yaml_names(file, content))


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


def _root(file: Path, written: Any, override: str | os.PathLike[str] | None) -> Path:
    if override is not None:
        root, origin = Path(override).expanduser(), "the path given"
    elif written is None or isinstance(written, str):
        root, origin = file.parent / Path(written or ".").expanduser(), f"'path' of {file}"
    else:
        raise UserError(f"{file}: 'path' must be a folder, not {written!r}.")
    if not root.is_dir():
        raise UserError(f"{origin}: there is no folder {root.absolute()}; mend it, or give data_path=DIR.")
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


def _find(data: DataYaml, split: str) -> Found:
    if split not in SPLITS:
        raise UserError(f"Unknown split {split!r}; it is one of {', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}")
    if split not in data.splits:
        raise UserError(f"{data.file}: there is no '{split}' in it; add the line '{split}: PATH' (relative to 'path').")
    return find_split(data.root, data.splits[split], split, where=f"{data.file}, '{split}'")


def _names(data: DataYaml, split: str, found: Found) -> list[str]:
    """Class names: the YAML's; without these, the training annotations' (one list for all splits)."""
    if split == "unlabeled" or found.format == "images":
        if data.names is not None or "train" not in data.splits:
            return data.names or []
        return class_names(_find(data, "train"))
    if data.names is not None:
        expected, origin = data.names, str(data.file)
    elif split != "train" and "train" in data.splits:
        train = _find(data, "train")
        expected, origin = class_names(train), str(train.annotations)
    else:
        return class_names(found)
    if found.format == "COCO":
        written = class_names(found)
        if written != expected:
            raise UserError(
                f"The class lists differ: {origin} has {expected}, {found.annotations} has {written} (by category id); "
                "make them equal, or remove 'names' from the YAML."
            )
    return expected


def _refuse_empty(samples: list[Sample], split: str, found: Found, data: DataYaml, problems: list[Problem]) -> None:
    where = f"{data.file}, '{split}'"
    if not samples:
        first = f" The first of {len(problems)} problems: {problems[0]}." if problems else ""
        raise UserError(
            f"{where}: no usable image in {found.annotations or found.images}; "
            f"point '{split}' at data, or remove the line.{first}"
        )
    if split != "unlabeled" and not any((~s.crowd).any() for s in samples):
        raise UserError(
            f"{where}: {len(samples)} images but not one box in {found.annotations}; "
            "annotate some, or give the images as 'unlabeled'."
        )
