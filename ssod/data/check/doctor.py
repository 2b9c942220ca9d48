"""What `ssod check` finds out about a data set: its numbers, its flaws, and whether the splits overlap."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssod.data.annotations import coco
from ssod.data.annotations.formats import class_names
from ssod.data.annotations.sources import DataYaml, find_parts, load_data, read_data_yaml
from ssod.data.annotations.yolo import label_of
from ssod.data.check.duplicates import Fingerprint, Overlap, find_overlaps, fingerprint
from ssod.data.image import ImageError, image_traits, read_image
from ssod.data.samples import IMAGE_UNREADABLE, Dataset, Problem, Sample, class_counts
from ssod.errors import UserError, did_you_mean


@dataclass
class SplitReport:
    """Numbers of one split. N boxes, crowd left out.

    counts    int64 [K]     boxes per class
    images    int64 [K]     images that show a class
    per_image int64 [I]     boxes of every image
    crowd     how many boxes are crowd or difficult, besides
    sides     float64 [N]   square root of the area of every box, pixels
    relative  float64 [N]   the same as a share of the square root of the image's area
    sizes     {(width, height): how many images}, the commonest first
    touching  boxes that touch the border of their image
    repeated  boxes that stand twice in one image, with the same class (the second ones)
    traits    {what is out of the ordinary: how many files}, see `image_traits`
    hidden    labels that exist for images of the unlabelled split, and are not read
    decoded   how many images were decoded whole; 0 when only headers were read
    """

    dataset: Dataset
    counts: np.ndarray
    images: np.ndarray
    per_image: np.ndarray
    crowd: int
    sides: np.ndarray
    relative: np.ndarray
    sizes: Counter[tuple[int, int]]
    touching: int
    repeated: list[Problem]
    problems: list[Problem]
    traits: Counter[str] = field(default_factory=Counter)
    hidden: int = 0
    decoded: int = 0

    @property
    def labeled(self) -> bool:
        return self.dataset.samples[0].labeled

    @property
    def partial(self) -> int:
        """How many labelled images may hold objects without annotation."""
        return int((~self.dataset.samples.complete).sum()) if self.labeled else 0

    @property
    def empty(self) -> list[Sample]:
        """Images without any box, crowd included."""
        return [s for s in self.dataset.samples if len(s.boxes) == 0] if self.labeled else []


@dataclass
class Report:
    """All that `check_data` found.

    errors      {split: why it cannot be used at all}
    misnamed    {split: lines about class names that differ from those of the data set}; these splits are in `errors`
    """

    yaml: Path
    root: Path
    names: list[str] = field(default_factory=list)
    splits: dict[str, SplitReport] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    misnamed: dict[str, list[str]] = field(default_factory=dict)
    overlaps: list[Overlap] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def check_data(
    yaml_path: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
    decode: bool = True,
) -> Report:
    """Look at every split of a data YAML (or at those given) and at every image in it.

    With `decode` each image is decoded, which finds truncated ones, and compared by its pixels and its looks; without,
    only headers are read, and images are compared by the bytes of their files. A split that cannot be used is an entry
    in the report's `errors`; only a YAML that cannot be read raises UserError.
    """
    data = read_data_yaml(yaml_path, path)
    report = Report(data.file, data.root, missing=[s for s in ("train", "val") if s not in data.splits])
    prints: dict[str, list[tuple[Path, Fingerprint]]] = {}
    for split in splits or data.splits:
        try:
            dataset = load_data(yaml_path, split, path, headers=True)
        except UserError as error:
            report.errors[split] = str(error)
            differences = _misnamed(data, split)
            if differences:
                report.misnamed[split] = differences
            continue
        report.names = report.names or dataset.names
        report.splits[split] = describe(dataset)
        if split == "unlabeled":
            report.splits[split].hidden = _hidden_labels(data, dataset)
        prints[split] = _look_at_images(report.splits[split], decode)
    report.overlaps = find_overlaps(prints)
    return report


def describe(dataset: Dataset) -> SplitReport:
    """Everything that the samples alone tell, without opening an image."""
    samples = dataset.samples
    kept = [~s.crowd for s in samples]
    none = np.zeros((0, 4), np.float32)
    boxes = np.concatenate([none, *(s.boxes[k] for s, k in zip(samples, kept, strict=True))]).astype(np.float64)
    per_image = np.array([int(k.sum()) for k in kept])
    extent = np.array([(s.width, s.height) for s in samples], np.float64)[np.repeat(np.arange(len(samples)), per_image)]
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    shown = [np.unique(s.labels[k]) for s, k in zip(samples, kept, strict=True)]
    touching = (boxes[:, :2] <= 0).any(axis=1) | (boxes[:, 2:] >= extent).any(axis=1)
    return SplitReport(
        dataset,
        counts=class_counts(samples, len(dataset.names)),
        images=np.bincount(np.concatenate([np.zeros(0, np.int64), *shown]), minlength=len(dataset.names)),
        per_image=per_image,
        crowd=sum(int(s.crowd.sum()) for s in samples),
        sides=sides,
        relative=sides / np.sqrt(extent.prod(axis=1)),
        sizes=Counter((s.width, s.height) for s in samples),
        touching=int(touching.sum()),
        repeated=[p for s in samples for p in _repeated(s)],
        problems=list(dataset.problems),
    )


def _repeated(sample: Sample) -> list[Problem]:
    """Boxes of one image that stand there a second time, with the same class."""
    rows = np.column_stack([sample.boxes, sample.labels.astype(np.float32)])
    _, counts = np.unique(rows, axis=0, return_counts=True)
    more = int((counts - 1).sum())
    reason = f"{more} box{'es' if more > 1 else ''} with the corners and class of another"
    return [Problem("box annotated twice", str(sample.path), "", reason)] if more else []


def _look_at_images(report: SplitReport, decode: bool) -> list[tuple[Path, Fingerprint]]:
    """Fingerprints of the images that can be read; the others become problems of the report."""

    def look(sample: Sample) -> tuple[Fingerprint, list[str]] | ImageError:
        try:
            stream = sample.stream()
            if decode:
                pixels = read_image(sample.path, stream=stream)
            else:
                pixels = np.frombuffer(stream.getvalue() if stream else _read_bytes(sample.path), np.uint8)
            return fingerprint(pixels, looks=decode), image_traits(sample.path, stream)
        except ImageError as error:
            return error

    found = []
    samples = report.dataset.samples
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and hashing release the interpreter
        bar = tqdm(samples, desc=f"reading {report.dataset.split}", unit="image", leave=False, disable=None)
        for sample, result in zip(bar, pool.map(look, samples), strict=True):
            if isinstance(result, ImageError):
                report.problems.append(Problem(IMAGE_UNREADABLE, str(sample.path), "", result.reason))
                continue
            found.append((sample.path, result[0]))
            report.traits.update(result[1])
            report.decoded += decode
    return found


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


def _misnamed(data: DataYaml, split: str) -> list[str]:
    """How the class names of a COCO split differ from those of the data set, name by name."""
    try:
        own = _coco_names(data, split)
        expected = data.names or (_coco_names(data, "train") if "train" in data.splits else None)
    except UserError:  # told already, as the error of that split
        return []
    finally:
        coco.load.cache_clear()
    if own is None or expected is None or own == expected:
        return []
    unknown = [n for n in own if n not in expected]
    absent = [n for n in expected if n not in own]
    lines = [f"{name!r} is not a class of the data set.{did_you_mean(name, absent or expected)}" for name in unknown]
    lines += [f"{name!r} is missing in its categories." for name in absent]
    return lines or [f"the same names in another order: {', '.join(own)} instead of {', '.join(expected)}."]


def _coco_names(data: DataYaml, split: str) -> list[str] | None:
    """The categories of a split's first COCO file; None where it has none."""
    return next((class_names(found) for found in find_parts(data, split) if found.format == "COCO"), None)


def _hidden_labels(data: DataYaml, dataset: Dataset) -> int:
    """How many unlabelled images have labels all the same. Only their being there is looked at, never a label: for
    YOLO and VOC whether the files exist, for COCO how many records the list has."""
    records = 0
    for found in find_parts(data, "unlabeled"):
        if found.format == "COCO" and found.annotations is not None:
            records += coco.count_annotated(found.annotations)
    coco.load.cache_clear()

    def has_file(path: Path) -> bool:
        return label_of(path).is_file() or (path.parent.parent / "Annotations" / f"{path.stem}.xml").is_file()

    return records + sum(has_file(s.path) for s in dataset.samples)
