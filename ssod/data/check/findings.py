"""What the doctor's numbers mean: findings, worst first, each with what, where and the way out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ssod.data import samples as kinds
from ssod.data.check.doctor import Report, SplitReport
from ssod.data.check.duplicates import Overlap
from ssod.data.samples import Problem, count_problems

LEVELS = ("error", "warning", "note")
LONG_TAIL = 10  # times as many boxes of the commonest class as of the rarest


@dataclass(frozen=True)
class Finding:
    """level: "error" (the data cannot be used like this, or scores on them mean nothing), "warning" (something was
    mended, or will hurt) or "note" (worth knowing). kind: a short name for programs. where: one line a place."""

    level: str
    kind: str
    split: str
    what: str
    where: list[str]
    fix: str


# How bad every kind of problem is, and what to do about it.
_PROBLEMS = {
    kinds.IMAGE_UNREADABLE: ("error", "fetch these files again, or take them out of the data"),
    kinds.SHARD_DAMAGED: ("error", "fetch these tars again; of their images only those before the damage are used"),
    kinds.IMAGE_MISSING: ("error", "put the files where the annotations say, or remove their records"),
    kinds.ANNOTATION_MISSING: ("warning", "annotate these images, or list them as 'unlabeled'"),
    kinds.BOX_DROPPED: ("warning", "draw these boxes again or delete them; they are left out"),
    kinds.BOX_CLIPPED: ("warning", "check them: a wrong image size looks like this; they are cut at the border"),
    kinds.SIZE_DIFFERS: ("warning", "look whether the boxes fit (samples.png); if not, mend the annotation's size"),
    kinds.IMAGE_TWICE: ("warning", "list every image once"),
    kinds.ANNOTATION_ORPHAN: ("warning", "bring the images back, or delete what refers to them"),
    kinds.ANNOTATION_ID: ("warning", "nothing to do here; other programs may score such a file wrongly"),
    kinds.NO_LABEL_FILE: ("note", "right if nothing is on them; if they were not annotated, list them as 'unlabeled'"),
}


def findings(report: Report) -> list[Finding]:
    """All findings of a report, worst first; of one level in the order of the splits."""
    found = [
        *_unusable(report),
        *(f for split, numbers in report.splits.items() for f in _of_split(report, split, numbers)),
        *_classes_between(report),
        *(_overlap(report, o) for o in report.overlaps),
        *(_no_split(split) for split in report.missing),
    ]
    return sorted(found, key=lambda f: LEVELS.index(f.level))


def _unusable(report: Report) -> Iterator[Finding]:
    for split, why in report.errors.items():
        if split in report.misnamed:
            what = "its classes are not those of the data set, so it cannot be used"
            fix = "rename the categories in the annotation file, or mend 'names' in the YAML"
            yield Finding("error", "classes differ", split, what, report.misnamed[split], fix)
        else:
            yield Finding("error", "cannot be used", split, "cannot be used", [why], "see above")


def _of_split(report: Report, split: str, numbers: SplitReport) -> Iterator[Finding]:
    total = len(numbers.dataset)
    for kind, count in count_problems(numbers.problems).items():
        level, fix = _PROBLEMS[kind]
        where = [short(p, report.root) for p in numbers.problems if p.kind == kind]
        yield Finding(level, kind, split, f"{count} x {kind}", where, fix)
    if numbers.repeated:
        where = [short(p, report.root) for p in numbers.repeated]
        what = f"{_count(len(numbers.repeated), 'image')} with a box annotated twice"
        yield Finding("warning", "box annotated twice", split, what, where, "delete the copies")
    told_as_empty = sum(p.kind == kinds.NO_LABEL_FILE for p in numbers.problems)
    if len(numbers.empty) > told_as_empty:
        where = [short(Problem("", str(s.path), "", "no box"), report.root) for s in numbers.empty]
        what = f"{_count(len(numbers.empty), 'image')} of {total} without any box"
        yield Finding("note", "image without boxes", split, what, where, "right if nothing is on them")
    if numbers.partial:
        what = f"{numbers.partial} of {total} images are partly labelled"
        fix = "what is not annotated there is learned as background, unless strategy=comining looks for it"
        yield Finding("note", "partly labelled", split, what, [], fix)
    if numbers.labeled:
        yield from _balance(report, split, numbers)
    if numbers.traits:
        what = ", ".join(f"{count} x {trait}" for trait, count in numbers.traits.most_common())
        fix = "nothing to do: all become upright RGB, 8 bit; annotations must fit the upright image"
        yield Finding("note", "kinds of files", split, f"out of the ordinary: {what}", [], fix)
    if numbers.hidden:
        what = f"{numbers.hidden} of {total} images have labels; they are never read"
        yield Finding("note", "labels of unlabelled images", split, what, [], "list the images as 'train' to use them")


def _balance(report: Report, split: str, numbers: SplitReport) -> Iterator[Finding]:
    order = np.argsort(numbers.counts, kind="stable")
    absent = [report.names[k] for k in order if numbers.counts[k] == 0]
    rarest = [k for k in order if numbers.counts[k] > 0]
    if absent and split == "train":
        what = f"{_count(len(absent), 'class', 'es')} of {len(report.names)} without a single box: nothing learns them"
        fix = "annotate some, or take the names out of 'names'"
        yield Finding("warning", "class without boxes", split, what, absent, fix)
    elif absent:
        what = f"{_count(len(absent), 'class', 'es')} of {len(report.names)} without a single box: not measured"
        yield Finding("note", "class without boxes", split, what, absent, "AP is the mean over the other classes")
    ratio = numbers.counts[rarest[-1]] / numbers.counts[rarest[0]] if rarest else 1
    if split == "train" and ratio >= LONG_TAIL:
        what = f"long tail: {ratio:.0f} times as many boxes of the commonest class as of the rarest"
        rows = [(report.names[k], int(numbers.counts[k]), int(numbers.images[k])) for k in rarest[:5]]
        places = [f"{name}: {_count(boxes, 'box', 'es')} on {_count(images, 'image')}" for name, boxes, images in rows]
        fix = "expect a lower AP of these; annotate more of them first"
        yield Finding("note", "long tail", split, what, places, fix)


def _classes_between(report: Report) -> Iterator[Finding]:
    """Classes that are tested, but not among the training boxes."""
    train = report.splits.get("train")
    for split in ("val", "test"):
        tested = report.splits.get(split)
        if train is None or tested is None:
            continue
        lost = [name for k, name in enumerate(report.names) if tested.counts[k] and not train.counts[k]]
        if lost:
            what = f"{_count(len(lost), 'class', 'es')} with boxes here, but none in train: its AP will be 0"
            yield Finding("warning", "class only tested", split, what, lost, "put some of these images into train")


def _overlap(report: Report, overlap: Overlap) -> Finding:
    count, same = len(overlap.pairs), "look alike" if overlap.near else "have the same content"
    if overlap.a == overlap.b:
        split, what = overlap.a, f"{_count(count, 'pair')} of images that {same}"
        level, fix = "note", "keep one of each, or leave them: repeated images count twice"
    else:
        split, what = f"{overlap.a} and {overlap.b}", f"{_count(count, 'pair')} of images that {same}"
        level, fix = "note", "harmless for the scores; such an image counts twice"
        if {overlap.a, overlap.b} == {"val", "test"}:
            level, fix = "warning", "remove them from one: the model is chosen on val, so test is no longer unseen"
        elif overlap.spoils and overlap.near:
            level, fix = (
                "warning",
                "look at them: the same scene in both makes scores too good; keep it in one of the two",
            )
        elif overlap.spoils:
            level, fix = "error", "scores on them mean nothing; remove them from one of the two"
    names = [(short(Problem("", str(p), "", ""), report.root) for p in pair) for pair in overlap.pairs]
    where = [" = ".join(pair) for pair in names]
    if overlap.distances is not None:
        where = [
            f"{line.replace(' = ', ' ~ ')} ({d} of 256 bits)" for line, d in zip(where, overlap.distances, strict=True)
        ]
    kind = "near-duplicate" if overlap.near else "duplicate"
    return Finding(level, kind, split, what, where, fix)


def _no_split(split: str) -> Finding:
    what = {"train": "there is none: nothing can be trained", "val": "there is none: nothing can be measured"}[split]
    return Finding("warning", "split missing", split, what, [], f"add the line '{split}: PATH' to the data YAML")


def short(problem: Problem, root: Path) -> str:
    """The problem on one line, its paths shortened by that of the data where they lie in there."""
    path = Path(problem.path)
    name = path.relative_to(root).as_posix() if path.is_relative_to(root) else problem.path
    reason = problem.reason.replace(f"{root}{os.sep}", "")
    return f"{name}{', ' + problem.record if problem.record else ''}{': ' + reason if reason else ''}"


def _count(n: int, word: str, plural: str = "s") -> str:
    return f"{n} {word}{'' if n == 1 else plural}"
