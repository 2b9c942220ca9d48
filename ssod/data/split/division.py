"""How a train split is divided: by our own draw, by the papers' lists of positions, or by erasing boxes.

Nothing is written here; `ssod.data.split.split_files` turns a Source and its Splits into files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssod.data.annotations.coco import load, read_ids, with_objects
from ssod.data.annotations.found import Found
from ssod.data.annotations.sources import DataYaml, find_parts, load_data, read_data_yaml
from ssod.data.samples import Dataset, SampleTable
from ssod.data.split.canonical import check_count, pick, read_positions
from ssod.data.split.sparse import Kind, erased_boxes
from ssod.data.split.splits import choose_labeled
from ssod.errors import UserError

Selection = list[tuple[int, np.ndarray]]
"""[(position of a sample, bool [N]: which of its boxes)], ascending"""


@dataclass(frozen=True)
class Source:
    """The train split that is divided.

    category_ids: id of label 0, 1, ... in the JSON files. first_ids: id of each sample's first box, counted from 1.
    """

    yaml: DataYaml
    train: Dataset
    parts: list[Found]
    category_ids: list[int]
    first_ids: list[int]


@dataclass(frozen=True)
class Split:
    """One split to be written: its folder below OUT, what the manifest says of it, and its two files.

    complete: False where objects of the labelled images may be without annotation
    """

    name: str
    about: dict[str, Any]
    files: dict[str, Selection]
    complete: bool


def read_source(yaml_path: Path, data_path: str | None = None, strict: bool = False) -> Source:
    """Read the train split of a data YAML. Raises UserError as `load_data`, and for images outside of `path`."""
    data = read_data_yaml(yaml_path, data_path)
    parts = find_parts(data, "train")
    ids = {tuple(read_ids(p.annotations)) for p in parts if p.format == "COCO" and p.annotations}
    train = load_data(yaml_path, "train", data_path, strict)  # while the parsed JSON is still cached
    # One COCO numbering is kept, so that its own val file fits; else classes count from 1.
    keep = train.format == "COCO" and len(ids) == 1
    category_ids = list(ids.pop()) if keep else list(range(1, len(train.names) + 1))
    outside = next((s.path for s in train.samples if not s.path.is_relative_to(data.root)), None)
    if outside is not None:
        raise UserError(f"{outside} lies outside of {data.root}; let 'path' of {data.file} be a folder that holds all.")
    counts = [len(s.boxes) for s in train.samples]
    return Source(data, train, parts, category_ids, (np.cumsum([0, *counts])[:-1] + 1).tolist())


def by_percent(source: Source, percents: Sequence[float], folds: int, seed: int) -> Iterator[Split]:
    """Our own draw: fold k is what `ssod train labeled=P% seed=SEED+k` takes.

    Raises UserError where images with all and with some of their objects annotated would share one file.
    """
    samples = source.train.samples
    if len(np.unique(samples.complete)) > 1:
        raise UserError(
            f"{source.yaml.file} has 'train' and 'partial', and one labeled.json cannot hold images of both; "
            "train with labeled=10%, which draws over all of them, or split a data YAML that has one of the two."
        )
    for percent in dict.fromkeys(percents):
        if not 0 < percent <= 100:
            raise UserError(f"percent={percent:g}: a share lies above 0 and is at most 100.")
        share = _plain(percent)
        for fold in range(folds):
            chosen, _ = choose_labeled(samples, f"{share}%", seed + fold, len(source.train.names))
            about = {"kind": "percent", "percent": percent, "fold": str(fold), "seed": seed + fold}
            yield _divided(f"{share}percent/fold{fold}", about, samples, set(chosen))


def by_list(source: Source, file: Path, expected: int, percents: Sequence[float], folds: int) -> Iterator[Split]:
    """The papers' own parts, from a list of positions; see `ssod.data.split.canonical`."""
    if [p.format for p in source.parts] != ["COCO"] or source.parts[0].annotations is None:
        raise UserError(f"canonical={file} counts images of one COCO JSON, but train of {source.yaml.file} is not one.")
    annotations = source.parts[0].annotations
    try:
        image_ids = with_objects(annotations)
    finally:
        load.cache_clear()
    positions = read_positions(file)
    check_count(positions, len(image_ids), expected, file, annotations)
    samples = source.train.samples
    index_of = {s.image_id: i for i, s in enumerate(samples)}
    for percent in dict.fromkeys(percents):
        for fold, ids in pick(positions, percent, folds, image_ids, file).items():
            missing = [i for i in ids if i not in index_of]
            if missing:
                raise UserError(
                    f"{len(missing)} of the {len(ids)} images that {file} names for {percent:g} % cannot be used, "
                    f"the first has the id {missing[0]}; `ssod check` says what is wrong with the images."
                )
            about = {"kind": "canonical", "percent": percent, "fold": fold}
            yield _divided(f"{_plain(percent)}percent/fold{fold}", about, samples, {index_of[i] for i in ids})


def by_erasing(source: Source, kind: Kind, folds: int, seed: int) -> Iterator[Split]:
    """All images with some of their boxes erased; fold k draws with seed + k."""
    for fold in range(folds):
        erased = erased_boxes(source.train.samples, kind, seed + fold)
        about = {"kind": "sparse", "sparse": kind, "fold": str(fold), "seed": seed + fold}
        left = [(i, ~e) for i, e in enumerate(erased)]
        gone = [(i, e) for i, e in enumerate(erased) if e.any()]
        yield Split(f"{kind}/fold{fold}", about, {"labeled": left, "erased": gone}, complete=False)


def _divided(name: str, about: dict[str, Any], samples: SampleTable, chosen: set[int]) -> Split:
    labeled = [(i, np.ones(len(s.boxes), np.bool_)) for i, s in enumerate(samples) if i in chosen]
    rest = [(i, np.zeros(len(s.boxes), np.bool_)) for i, s in enumerate(samples) if i not in chosen]
    files = {"labeled": labeled} | ({"unlabeled": rest} if rest else {})
    return Split(name, about, files, complete=bool(samples.complete.all()))


def _plain(percent: float) -> str:
    return f"{percent:.6f}".rstrip("0").rstrip(".")
