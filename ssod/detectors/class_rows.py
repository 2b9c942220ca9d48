"""Class heads between sets of classes: rows of shared class names move over, the others start anew.

Letters: K classes here, J classes there, G groups of rows of a head (anchors of a cell), D numbers per class.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ssod.detectors.base import Detector

# The tensors with a row (or several) per class, by detector.
CLASS_TENSORS = {
    "fcos": r"cls_logits\.",
    "retinanet": r"cls_logits\.",
    "faster_rcnn": r"roi_(logits|codes)\.",
    "deformable_detr": r"cls_heads\.\d+\.",
}


@dataclass
class ClassMatch:
    """Which class row of a file serves which class here.

    pairs  (class here, row there)
    names  class names here
    how    why these rows: "by name", or what took the place of names
    """

    pairs: list[tuple[int, int]]
    names: list[str]
    how: str

    def __str__(self) -> str:
        found = {k for k, _ in self.pairs}
        kept = [n for i, n in enumerate(self.names) if i in found]
        new = [n for i, n in enumerate(self.names) if i not in found]
        if not new:
            return f"all {len(kept)} classes found {self.how}"
        if not kept:
            return f"all {len(new)} classes start anew, none found {self.how}"
        return (
            f"{len(kept)} of {len(self.names)} classes found {self.how} ({_some(kept)}), "
            f"{len(new)} start anew ({_some(new)})"
        )


def match_classes(names: Sequence[str], there: Sequence[str] | None, rows: int, background: bool = False) -> ClassMatch:
    """Rows of a head of `rows` classes for the classes `names`: by name, whatever the case.

    there  names of the file's rows ("" where a row has none), or None where the file does not say them: then equally
           many rows are taken in their order, and all start anew where the numbers differ
    background  whether one row more, the first, would be the background's
    """
    if there is not None:
        known = {n.strip().lower(): i for i, n in reversed(list(enumerate(there))) if n.strip()}
        wanted = [(k, known.get(n.strip().lower())) for k, n in enumerate(names)]
        return ClassMatch([(k, j) for k, j in wanted if j is not None], list(names), "by name")
    if rows == len(names):
        return ClassMatch([(k, k) for k in range(rows)], list(names), "by their order, as the file names none")
    if background and rows == len(names) + 1:
        pairs = [(k, k + 1) for k in range(len(names))]
        return ClassMatch(pairs, list(names), "by their order after the background, as the file names none")
    return ClassMatch([], list(names), f"as the file has {rows} rows without names")


def is_class_tensor(detector: Detector, key: str) -> bool:
    return re.match(CLASS_TENSORS[detector.spec["name"]], key) is not None


def with_rows(detector: Detector, key: str, here: Tensor, there: Tensor, rows: int, match: ClassMatch) -> Tensor | None:
    """The tensor `key` with the matching rows of `there` and the other rows of `here`; None where the two do not fit.

    here   [G * K * D, ...] of this detector, freshly initialised (RoI logits: and a last row for the background)
    there  [G * J * D, ...] of the file, J = `rows`
    """
    name, classes = detector.spec["name"], detector.num_classes
    shared = _shared_rows(detector, key)
    if shared == "all":
        return there if there.shape == here.shape else None
    extra = 1 if shared == "last" else 0
    groups = 1
    if name == "retinanet":
        groups = len(here) // classes
    per_class = (len(here) - extra) // (groups * classes)
    if len(there) != groups * rows * per_class + extra or there.shape[1:] != here.shape[1:]:
        return None

    out = here.clone()
    mine = out[: len(here) - extra].unflatten(0, (groups, classes, per_class))
    theirs = there[: len(there) - extra].unflatten(0, (groups, rows, per_class)).to(here)
    for k, j in match.pairs:
        mine[:, k] = theirs[:, j]
    if shared == "last":
        out[-1] = there[-1]
    if shared == "first":
        out[0] = there[0]
    return out


def _shared_rows(detector: Detector, key: str) -> str:
    """Which rows belong to no class: "all" (a class-agnostic box head), the "last" (background), the "first"
    (objectness of the encoder's proposals), or "none"."""
    if key.startswith("roi_codes."):
        return "all" if getattr(detector, "box_classes", 0) != detector.num_classes else "none"
    if key.startswith("roi_logits."):
        return "last"
    heads = getattr(detector, "cls_heads", None)
    if heads is not None and detector.spec["options"]["two_stage"] and key.startswith(f"cls_heads.{len(heads) - 1}."):
        return "first"
    return "none"


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
