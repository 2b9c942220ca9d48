"""Descriptions of exported models: what fits becomes the dataclass, what does not is named by its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from ssod.deploy.described import described

FITS: dict[str, Any] = {"size": [4, 5], "mean": [0, 0.5], "names": ["a"], "counts": {"x": 1}, "either": 3}


@dataclass
class Thing:
    size: tuple[int, int] | None
    mean: tuple[float, ...]
    names: list[str]
    counts: dict[str, int]
    either: int | list[int]
    note: str = ""


def test_json_becomes_what_the_types_say() -> None:
    assert described(Thing, FITS) == Thing((4, 5), (0.0, 0.5), ["a"], {"x": 1}, 3)
    other = described(Thing, FITS | {"size": None, "either": [1, 2], "note": "n"})
    assert (other.size, other.either, other.note) == (None, [1, 2], "n")
    assert [type(v) for v in described(Thing, FITS).mean] == [float, float]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size": [4]}, "size is .4., which does not fit"),
        ({"size": [4, True]}, "size is"),
        ({"mean": [0.5, "x"]}, "mean.1 is 'x', which does not fit float"),
        ({"mean": [float("nan")]}, "mean.0 is nan"),
        ({"mean": [10**400]}, "mean.0 is 1000"),
        ({"names": [1]}, "names.0 is 1, which does not fit str"),
        ({"names": "ab"}, "names is 'ab'"),
        ({"counts": {"x": 1.5}}, "counts.x is 1.5"),
        ({"either": "3"}, "either is '3'"),
        ({"more": 1}, "more is not known"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        described(Thing, FITS | change)


def test_what_is_missing_and_what_is_no_mapping() -> None:
    with pytest.raises(ValueError, match="names is missing"):
        described(Thing, {k: v for k, v in FITS.items() if k != "names"})
    with pytest.raises(ValueError, match="no mapping"):
        described(Thing, [1])
