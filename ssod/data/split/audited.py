"""Which labelled images are hidden from a run, so that it labels them itself and can be told how well.

As the choice of the labelled images (ssod.data.split.splits), the draw is a hash of the seed and the images' names.
"""

from __future__ import annotations

import hashlib
import re
from fractions import Fraction

import numpy as np

from ssod.data.samples import SampleTable
from ssod.errors import UserError


def choose_audited(labeled: SampleTable, spec: str | int, seed: int, num_classes: int) -> list[int]:
    """Positions of the labelled images to hide, ascending.

    spec  "5%", the share of the images, rounded up; 12 or "12", a number of them; "none"

    Every class keeps a labelled image. From the rarest class on, each that can spare an image gives one while the
    number lasts; the rest is filled up from all images alike. Images that are not annotated completely stay where they
    are, and where fewer can be hidden than asked for, fewer are.

    Raises UserError for a spec that is none of these, and where no image can be hidden.
    """
    spec = str(spec).strip()
    if spec == "none":
        return []
    count = _count(spec, len(labeled))
    names = labeled.names()
    order = sorted(range(len(labeled)), key=lambda i: (_lot(seed, names[i]), i))
    owner, labels, crowd = labeled.objects()
    present = np.zeros((len(labeled), num_classes), np.bool_)  # crowd boxes teach nothing
    present[owner[~crowd], labels[~crowd]] = True
    left = present.sum(axis=0)  # labelled images of each class that are not hidden
    hidden: list[int] = []

    def spared(i: int) -> bool:
        return bool(labeled.complete[i]) and i not in hidden and bool((left[present[i]] > 1).all())

    def hide(i: int) -> None:
        hidden.append(i)
        left[present[i]] -= 1

    for c in np.argsort(left, kind="stable"):
        if len(hidden) < count and not present[hidden, c].any():
            for i in (i for i in order if present[i, c] and spared(i)):
                hide(i)
                break
    for i in order:
        if len(hidden) < count and spared(i) and len(hidden) + 1 < len(labeled):
            hide(i)
    if not hidden or not present[hidden].any():
        raise UserError(
            f"audit={spec}: none of the {len(labeled)} labelled images can be hidden, since each of them is the only "
            "one of a class, empty or annotated in part; label more, or leave out audit."
        )
    return sorted(hidden)


def _count(spec: str, n: int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%?)", spec)
    if match is None:
        raise UserError(f"audit={spec!r} is not understood; it is a share such as 5%, a number of images, or none.")
    number = Fraction(match[1])  # exact: 7 % of 100 is 7, not 7.000000000000001
    if match[2]:
        if not 0 < number < 100:
            raise UserError(f"audit={spec}: a share lies between 0% and 100%.")
        return int(-(-number * n // 100))
    if number.denominator != 1 or not 0 < number < n:
        raise UserError(f"audit={spec}: there are {n} labelled images; hide 1 to {n - 1}, or a share such as 5%.")
    return int(number)


def _lot(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"audit:{seed}:{name}".encode("utf-8", "surrogateescape")).digest()
