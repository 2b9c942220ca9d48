"""Which labelled images are hidden: by the seed, so many, and never the last one of a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssod.data.samples import Sample, SampleTable
from ssod.data.split.audited import choose_audited
from ssod.errors import UserError


def table(*labels: list[int], complete: bool = True) -> SampleTable:
    samples = []
    for i, own in enumerate(labels):
        n = len(own)
        boxes = np.tile(np.float32([0, 0, 5, 5]), (n, 1))
        arrays = (boxes, np.array(own, np.int64), np.zeros(n, np.bool_))
        samples.append(Sample(Path(f"{i}.png"), i + 1, 9, 9, *arrays, labeled=True, complete=complete))
    return SampleTable.of(samples)


COMMON = [[0]] * 40 + [[0, 1]] * 6 + [[2]] * 2 + [[3]]


@pytest.mark.parametrize(("spec", "count"), [("5%", 3), ("10%", 5), (7, 7), ("7", 7), ("none", 0)])
def test_as_many_as_asked_for(spec: str | int, count: int) -> None:
    assert len(choose_audited(table(*COMMON), spec, 0, 4)) == count


def test_the_seed_draws_and_nothing_else() -> None:
    draws = [tuple(choose_audited(table(*COMMON), 10, seed, 4)) for seed in (0, 0, 1, 2)]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
    assert list(draws[0]) == sorted(set(draws[0]))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("count", [3, 20, 48])
def test_every_class_keeps_an_image_and_gives_one_where_it_can(seed: int, count: int) -> None:
    hidden = choose_audited(table(*COMMON), count, seed, 4)
    kept = [COMMON[i] for i in range(len(COMMON)) if i not in hidden]
    assert {c for own in kept for c in own} == {0, 1, 2, 3}
    assert {c for i in hidden for c in COMMON[i]} == {0, 1, 2}, "the one image of class 3 cannot be spared"
    assert len(hidden) <= count


def test_fewer_are_hidden_where_more_would_take_a_class_away() -> None:
    assert len(choose_audited(table([0], [0], [1], [2]), 3, 0, 3)) == 1


def test_images_annotated_in_part_are_no_measure() -> None:
    mixed = SampleTable.join([table([0], [0], [0], complete=False), table([0], [0], [0])])
    assert set(choose_audited(mixed, 4, 0, 1)) == {3, 4, 5}
    with pytest.raises(UserError, match="none of the 3 labelled images can be hidden"):
        choose_audited(table([0], [0], [0], complete=False), 1, 0, 1)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("a few", "audit='a few' is not understood; it is a share such as 5%"),
        ("100%", "audit=100%: a share lies between 0% and 100%"),
        ("0%", "a share lies between"),
        ("1.5", "audit=1.5: there are 4 labelled images; hide 1 to 3"),
        (4, "hide 1 to 3"),
        (0, "hide 1 to 3"),
        (2, "none of the 4 labelled images can be hidden, since each of them is the only one of a class"),
    ],
)
def test_what_cannot_be_hidden_is_said(spec: str | int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        choose_audited(table([0], [1], [2], [3]), spec, 0, 4)
