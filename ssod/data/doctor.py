"""What `ssod check` says about a data set: its numbers, its flaws, and whether the splits overlap."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ssod.data.image import ImageError, read_image
from ssod.data.samples import (
    IMAGE_MISSING,
    IMAGE_UNREADABLE,
    Dataset,
    Problem,
    Sample,
    class_counts,
    count_problems,
)
from ssod.data.sheet import draw_samples
from ssod.data.sources import load_data, read_data_yaml
from ssod.errors import UserError

__all__ = ["Overlap", "Report", "SplitReport", "check_data", "draw_samples"]

_TRAINED_ON = ("train", "unlabeled")
_EXAMPLES = 3  # of every kind of problem; all of them are in `problems`

# COCO's ranges of box areas in pixels
_SMALL, _MEDIUM = 32**2, 96**2


@dataclass
class SplitReport:
    """Numbers of one split.

    counts   int64 [K]  boxes per class, crowd left out
    crowd    how many boxes are crowd or difficult
    empty    images without any box
    sides    float64 [N]  square root of the area of every box, pixels
    decoded  how many images were decoded whole; 0 when only headers were read
    """

    dataset: Dataset
    counts: np.ndarray
    crowd: int
    empty: int
    sides: np.ndarray
    problems: list[Problem]
    decoded: int = 0


@dataclass
class Overlap:
    """Images of one split that are, by their content, among those of another: pairs (path in `a`, path in `b`)."""

    a: str
    b: str
    pairs: list[tuple[Path, Path]]

    @property
    def spoils(self) -> bool:
        """Whether scores are worthless for it: the model has seen what it is tested on."""
        return (self.a in _TRAINED_ON) != (self.b in _TRAINED_ON)


@dataclass
class Report:
    """All that `check_data` found. errors: {split: why it cannot be used at all}."""

    yaml: Path
    root: Path
    names: list[str] = field(default_factory=list)
    splits: dict[str, SplitReport] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """False when a split or an image cannot be used, or when scores would be spoilt by an overlap.

        Flaws that were mended on reading (a clipped box, say) are told, but leave it True.
        """
        lost = {IMAGE_UNREADABLE, IMAGE_MISSING}
        all_images = not any(p.kind in lost for s in self.splits.values() for p in s.problems)
        return not self.errors and all_images and not any(o.spoils for o in self.overlaps)

    def text(self) -> str:
        """The report for a terminal, at most about 100 columns wide unless paths are longer."""
        parts = [f"Data {self.yaml}, in {self.root}"]
        if self.splits:
            parts += [_table(self._numbers()), _table(self._classes())]
        parts += [f"{split}: cannot be used.\n  {why}" for split, why in self.errors.items()]
        parts += [self._problems(split) for split, report in self.splits.items() if report.problems]
        parts += [_overlap_text(o) for o in self.overlaps]
        return "\n\n".join([*parts, self._verdict()]) + "\n"

    def _numbers(self) -> list[list[str]]:
        rows = [["", *self.splits]]
        reports = self.splits.values()
        rows.append(["format", *(r.dataset.format for r in reports)])
        rows.append(["images", *(str(len(r.dataset)) for r in reports)])
        rows.append(["  without boxes", *(str(r.empty) if _labeled(r) else "-" for r in reports)])
        rows.append(["boxes", *(str(r.counts.sum()) if _labeled(r) else "-" for r in reports)])
        if any(r.crowd for r in reports):
            rows.append(["  crowd, besides", *(str(r.crowd) if _labeled(r) else "-" for r in reports)])
        rows.append(
            ["  an image", *(f"{r.counts.sum() / len(r.dataset):.1f}" if _labeled(r) else "-" for r in reports)]
        )
        for name, low, high in (("small", 0, _SMALL), ("medium", _SMALL, _MEDIUM), ("large", _MEDIUM, np.inf)):
            shares = [f"{_share(r.sides**2, low, high):.0f} %" if _labeled(r) else "-" for r in reports]
            rows.append([f"  {name}", *shares])
        for title, quantile in (("box side, 5 % below", 0.05), ("  half below", 0.5), ("  95 % below", 0.95)):
            rows.append([title, *(f"{np.quantile(r.sides, quantile):.0f} px" if _labeled(r) else "-" for r in reports)])
        return rows

    def _classes(self) -> list[list[str]]:
        labeled = {split: r for split, r in self.splits.items() if _labeled(r)}
        rows = [["class", *labeled]]
        for k, name in enumerate(self.names):
            cells = [f"{r.counts[k]} ({100 * r.counts[k] / max(1, r.counts.sum()):2.0f} %)" for r in labeled.values()]
            rows.append([f"{k} {name}", *cells])
        return rows

    def _problems(self, split: str) -> str:
        problems = self.splits[split].problems
        lines = []
        for kind, count in count_problems(problems).items():
            lines.append(f"{split}: {count} x {kind}")
            examples = [p for p in problems if p.kind == kind][:_EXAMPLES]
            lines += [f"  {_relative(p, self.root)}" for p in examples]
            if count > len(examples):
                lines.append(f"  and {count - len(examples)} more")
        return "\n".join(lines)

    def _verdict(self) -> str:
        images = sum(len(r.dataset) for r in self.splits.values())
        decoded = sum(r.decoded for r in self.splits.values())
        looked = f"{decoded} of {images} images decoded" if decoded else f"headers of {images} images read"
        found = sum(len(r.problems) for r in self.splits.values())
        flaws = f"{found} problem{'' if found == 1 else 's'}" if found else "no problem"
        unseen = "no image in two splits" if not self.overlaps else "splits overlap"
        return f"{'OK' if self.ok else 'NOT OK'}: {looked}, {flaws}, {unseen}."


def check_data(
    yaml_path: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    splits: Sequence[str] | None = None,
    decode: bool = True,
) -> Report:
    """Look at every split of a data YAML (or at those given) and at every image in it.

    With `decode` each image is decoded, which finds truncated ones, and compared by its pixels; without, only headers
    are read, and images are compared by the bytes of their files. A split that cannot be used is an entry in the
    report's `errors`; only a YAML that cannot be read raises UserError.
    """
    data = read_data_yaml(yaml_path, path)
    report = Report(data.file, data.root)
    contents: dict[str, dict[bytes, list[Path]]] = {}
    for split in splits or data.splits:
        try:
            dataset = load_data(yaml_path, split, path)
        except UserError as error:
            report.errors[split] = str(error)
            continue
        report.names = report.names or dataset.names
        report.splits[split] = _describe(dataset)
        contents[split] = _look_at_images(report.splits[split], decode)
    order = list(contents)
    for i, a in enumerate(order):
        for b in order[i:]:
            pairs = _common(contents[a], contents[b], same_split=a == b)
            if pairs:
                report.overlaps.append(Overlap(a, b, pairs))
    return report


def _describe(dataset: Dataset) -> SplitReport:
    boxes = np.concatenate([s.boxes[~s.crowd] for s in dataset.samples]).astype(np.float64)
    return SplitReport(
        dataset,
        counts=class_counts(dataset.samples, len(dataset.names)),
        crowd=sum(int(s.crowd.sum()) for s in dataset.samples),
        empty=sum(len(s.boxes) == 0 for s in dataset.samples),
        sides=np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])),
        problems=list(dataset.problems),
    )


def _look_at_images(report: SplitReport, decode: bool) -> dict[bytes, list[Path]]:
    """{digest of the content: paths}. An image that cannot be read becomes one of the report's problems."""

    def digest(sample: Sample) -> bytes | ImageError:
        try:
            pixels = read_image(sample.path) if decode else np.frombuffer(_read_bytes(sample.path), np.uint8)
        except ImageError as error:
            return error
        return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()

    contents: dict[bytes, list[Path]] = defaultdict(list)
    samples = report.dataset.samples
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # decoding and hashing release the interpreter
        bar = tqdm(samples, desc=f"reading {report.dataset.split}", unit="image", leave=False, disable=None)
        for sample, result in zip(bar, pool.map(digest, samples), strict=True):
            if isinstance(result, ImageError):
                report.problems.append(Problem(IMAGE_UNREADABLE, str(sample.path), "", result.reason))
            else:
                contents[result].append(sample.path)
                report.decoded += decode
    return contents


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(path, error.strerror or str(error)) from error


def _common(a: dict[bytes, list[Path]], b: dict[bytes, list[Path]], same_split: bool) -> list[tuple[Path, Path]]:
    if same_split:
        return [(paths[0], other) for paths in a.values() for other in paths[1:]]
    return [(path, b[key][0]) for key, paths in a.items() if key in b for path in paths]


def _overlap_text(overlap: Overlap) -> str:
    n = len(overlap.pairs)
    if overlap.a == overlap.b:
        head = f"{overlap.a}: {n} image{'s repeat others' if n > 1 else ' repeats another'} of the same content"
    else:
        head = f"{overlap.a} and {overlap.b} share {n} image{'s' if n > 1 else ''} of the same content"
    if overlap.spoils:
        head += "; scores on them mean nothing, remove them from one of the two"
    lines = [f"  {a} = {b}" for a, b in overlap.pairs[:_EXAMPLES]]
    more = [f"  and {n - _EXAMPLES} more"] if n > _EXAMPLES else []
    return "\n".join([head + ":", *lines, *more])


def _relative(problem: Problem, root: Path) -> Problem:
    """The same problem, its path shortened by that of the data where it lies in there."""
    path = Path(problem.path)
    short = path.relative_to(root).as_posix() if path.is_relative_to(root) else problem.path
    reason = problem.reason.replace(f"{root}{os.sep}", "")
    return Problem(problem.kind, short, problem.record, reason)


def _labeled(report: SplitReport) -> bool:
    return report.dataset.samples[0].labeled


def _share(values: np.ndarray, low: float, high: float) -> float:
    return 100 * float(((values >= low) & (values < high)).mean())


def _table(rows: list[list[str]]) -> str:
    """Rows of cells as text; the first column to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]
        lines.append("   ".join(cells).rstrip())
    return "\n".join(lines)
