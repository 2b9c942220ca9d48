"""Sparsely annotated sets: which boxes of a fully annotated set are erased.

The kinds are those of Co-mining (Wang et al., AAAI 2021, section "Dataset"), after Zhang et al., ICASSP 2020:

easy     one box of every image
hard     half of the boxes of every image
extreme  all but one box of every image
50miss   half of the boxes of every class, over all images; an image may lose all of its boxes

Where the papers are silent, ours: an image with one box keeps it in easy and hard, half is rounded down, and crowd
boxes stay, for nothing is learnt from them. As with labelled shares, a hash of the seed, the image's name and the
box's place in it decides, no random generator. For one seed, what easy erases hard erases, too, and extreme with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from ssod.data.samples import Sample

Kind = Literal["easy", "hard", "extreme", "50miss"]
_PER_IMAGE: dict[str, Callable[[int], int]] = {
    "easy": lambda n: min(1, n // 2),
    "hard": lambda n: n // 2,
    "extreme": lambda n: max(0, n - 1),
}


def erased_boxes(samples: Sequence[Sample], kind: Kind, seed: int) -> list[np.ndarray]:
    """For every sample bool [N]: which of its boxes are erased."""
    erased = [np.zeros(len(s.boxes), np.bool_) for s in samples]
    # [(lot, sample, box)] of all boxes that may go
    lots = [(_lot(seed, s, k), i, k) for i, s in enumerate(samples) for k in np.flatnonzero(~s.crowd).tolist()]
    groups: dict[int, list[tuple[bytes, int, int]]] = {}
    for lot, i, k in sorted(lots):
        groups.setdefault(int(samples[i].labels[k]) if kind == "50miss" else i, []).append((lot, i, k))
    for group in groups.values():
        count = len(group) // 2 if kind == "50miss" else _PER_IMAGE[kind](len(group))
        for _, i, k in group[:count]:
            erased[i][k] = True
    return erased


def _lot(seed: int, sample: Sample, box: int) -> bytes:
    return hashlib.sha256(f"box:{seed}:{sample.path.name}:{box}".encode("utf-8", "surrogateescape")).digest()
