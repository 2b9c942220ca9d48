"""Erased boxes: how many of each image and class, nested, seeded, crowds untouched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssod.data.samples import Sample
from ssod.data.split.sparse import erased_boxes

K = 3
KINDS = ("easy", "hard", "extreme", "50miss")


def sample(i: int, labels: list[int], crowd: list[bool] | None = None) -> Sample:
    boxes = np.array([[k, 0, k + 1, 9] for k in range(len(labels))], np.float32).reshape(-1, 4)
    flags = np.array(crowd or [False] * len(labels), np.bool_)
    return Sample(Path(f"{i:03d}.jpg"), i, 99, 9, boxes, np.array(labels, np.int64), flags, labeled=True)


some_samples = st.lists(
    st.lists(st.tuples(st.integers(0, K - 1), st.booleans()), max_size=7), min_size=1, max_size=20
).map(lambda images: [sample(i, [c for c, _ in o], [f for _, f in o]) for i, o in enumerate(images)])


@given(some_samples, st.integers(0, 99))
def test_counts_of_every_image(samples: list[Sample], seed: int) -> None:
    erased = {kind: erased_boxes(samples, kind, seed) for kind in KINDS}
    for i, s in enumerate(samples):
        n = int((~s.crowd).sum())
        assert erased["easy"][i].sum() == (1 if n >= 2 else 0)
        assert erased["hard"][i].sum() == n // 2
        assert erased["extreme"][i].sum() == max(0, n - 1)
        for kind in KINDS:
            assert not (erased[kind][i] & s.crowd).any()
        assert not (erased["easy"][i] & ~erased["hard"][i]).any()
        assert not (erased["hard"][i] & ~erased["extreme"][i]).any()


@given(some_samples, st.integers(0, 99))
def test_counts_of_every_class(samples: list[Sample], seed: int) -> None:
    erased = erased_boxes(samples, "50miss", seed)
    for c in range(K):
        total = sum(int(((s.labels == c) & ~s.crowd).sum()) for s in samples)
        assert sum(int((e & (s.labels == c)).sum()) for s, e in zip(samples, erased, strict=True)) == total // 2


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_differ_and_repeat(kind: str) -> None:
    samples = [sample(i, [0, 1, 2, 0, 1]) for i in range(30)]
    draws = {s: [e.tolist() for e in erased_boxes(samples, kind, s)] for s in (0, 1)}
    assert draws[0] != draws[1]
    assert draws[0] == [e.tolist() for e in erased_boxes(samples, kind, 0)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_box_is_erased_equally_often(kind: str) -> None:
    """Over many seeds, the place of a box in its image does not matter."""
    samples = [sample(0, [0, 0, 0, 0])]
    often = np.mean([erased_boxes(samples, kind, seed)[0] for seed in range(2000)], axis=0)
    expected = {"easy": 1 / 4, "hard": 1 / 2, "extreme": 3 / 4, "50miss": 1 / 2}[kind]
    assert np.abs(often - expected).max() < 0.055  # five standard deviations


def test_the_draw_is_pinned() -> None:
    """A change here changes every user's experiment; it must not happen unnoticed."""
    erased = erased_boxes([sample(0, [0, 1, 2, 0, 1, 2]), sample(1, [0, 1])], "hard", 0)
    assert [np.flatnonzero(e).tolist() for e in erased] == [[1, 3, 5], [1]]
