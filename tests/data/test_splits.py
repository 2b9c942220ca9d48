"""The labelled share: every class in it, the same everywhere, nested, and nothing lost."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssod.data.annotations.sources import load_data
from ssod.data.samples import Sample, class_counts
from ssod.data.split.splits import choose_labeled
from ssod.errors import UserError

K = 5


def sample(i: int, labels: list[int], crowd: bool = False, folder: str = "images") -> Sample:
    n = len(labels)
    boxes = np.tile(np.array([1, 1, 9, 9], np.float32), (n, 1)).reshape(n, 4)
    path = Path(folder) / f"{i:04d}.jpg"
    return Sample(path, 100 + i, 10, 10, boxes, np.array(labels, np.int64), np.full(n, crowd), labeled=True)


def data_set(labels: list[list[int]]) -> list[Sample]:
    return [sample(i, ls) for i, ls in enumerate(labels)]


some_labels = st.lists(st.lists(st.integers(0, K - 1), max_size=4), min_size=1, max_size=60).filter(any)
seeds = st.integers(0, 2**31)


@given(some_labels, seeds, st.integers(1, 100))
def test_share(labels: list[list[int]], seed: int, percent: int) -> None:
    samples = data_set(labels)
    labeled, unlabeled = choose_labeled(samples, f"{percent}%", seed, K)
    assert sorted(labeled + unlabeled) == list(range(len(samples)))
    assert labeled == sorted(labeled)
    assert unlabeled == sorted(unlabeled)
    chosen = class_counts([samples[i] for i in labeled], K)
    everything = class_counts(samples, K)
    assert ((chosen > 0) == (everything > 0)).all()
    asked = math.ceil(Fraction(percent, 100) * len(samples))
    assert asked <= len(labeled) <= max(asked, K)
    assert choose_labeled(samples, f"{percent}%", seed, K) == (labeled, unlabeled)


@given(some_labels, seeds, st.integers(1, 50), st.integers(0, 50))
def test_choices_of_one_seed_are_nested(labels: list[list[int]], seed: int, percent: int, more: int) -> None:
    samples = data_set(labels)
    few, _ = choose_labeled(samples, f"{percent}%", seed, K)
    many, _ = choose_labeled(samples, f"{percent + more}%", seed, K)
    assert set(few) <= set(many)


@given(seeds, seeds)
def test_seeds_differ(a: int, b: int) -> None:
    samples = data_set([[i % K] for i in range(200)])
    same = choose_labeled(samples, 50, a, K) == choose_labeled(samples, 50, b, K)
    assert same == (a == b)


def test_fill_is_fair() -> None:
    """Over many seeds, every image is chosen about equally often."""
    samples = data_set([[0]] * 40)
    counts = np.zeros(40)
    for seed in range(2000):
        counts[choose_labeled(samples, 10, seed, K)[0]] += 1
    assert np.abs(counts / 2000 - 0.25).max() < 0.05  # five standard deviations


def test_the_choice_is_pinned() -> None:
    """A change here changes every user's experiment; it must not happen unnoticed."""
    samples = data_set([[0, 1]] * 50 + [[2], [3], [4]])
    assert choose_labeled(samples, "10%", 0, K)[0] == [14, 34, 41, 50, 51, 52]


def test_the_choice_does_not_depend_on_the_process_or_the_folder() -> None:
    script = (
        "from tests.data.test_splits import *; "
        "print(choose_labeled([sample(i, [i % K], folder='else where') for i in range(99)], 20, 1, K)[0])"
    )
    root = Path(__file__).parents[2]
    out = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={"PYTHONHASHSEED": s, "PYTHONPATH": f"{root}:{root / 'tests' / 'data'}"},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for s in ("1", "2")
    ]
    here = choose_labeled([sample(i, [i % K]) for i in range(99)], 20, 1, K)[0]
    assert out == [str(here)] * 2


@pytest.mark.parametrize(
    ("spec", "n"), [("7%", 7), ("0.5 %", 3), ("29%", 29), ("100%", 100), (12, 12), ("12", 12), ("all", 100)]
)
def test_counts(spec: str | int, n: int) -> None:
    samples = data_set([[i % 3] for i in range(100)])
    labeled, unlabeled = choose_labeled(samples, spec, 0, K)
    assert (len(labeled), len(unlabeled)) == (n, 100 - n)


def test_crowd_boxes_do_not_stand_for_their_class() -> None:
    samples = [*data_set([[0]] * 30), sample(30, [1], crowd=True), sample(31, [1])]
    for seed in range(20):
        assert 31 in choose_labeled(samples, 2, seed, K)[0]


def test_rare_classes_on_real_data(real_data) -> None:
    yaml, folder = real_data("aquarium")
    samples = load_data(yaml, "train", path=folder).samples
    for seed in range(5):
        labeled, _ = choose_labeled(samples, "1%", seed, 7)
        assert (class_counts([samples[i] for i in labeled], 7) > 0).all()
        assert 5 <= len(labeled) <= 7


# ----------------------------------------------------------------- lists


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.txt", "0003.jpg\n0001.jpg\n\n"),
        ("l.txt", "0003\n0001"),
        ("l.txt", "images/0003.jpg\nimages/0001.jpg"),
        ("l.txt", "103\n101"),
        ("l.json", '["0003.jpg", "0001"]'),
        ("l.json", "[103, 101]"),
        ("l.json", '{"images": [{"file_name": "0003.jpg", "id": 9}, {"file_name": "images/0001.jpg", "id": 8}]}'),
    ],
)
def test_list(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    assert choose_labeled(data_set([[0]] * 5), str(file), 0, K) == ([1, 3], [0, 2, 4])


def test_folder_of_a_fold(tmp_path: Path) -> None:
    (tmp_path / "labeled.json").write_text('{"images": [{"file_name": "0002.jpg"}], "annotations": []}')
    assert choose_labeled(data_set([[0]] * 5), str(tmp_path), 0, K)[0] == [2]


def test_a_file_of_erased_boxes_is_no_list_of_labelled_images(tmp_path: Path) -> None:
    file = tmp_path / "labeled.json"
    file.write_text('{"info": {"kind": "sparse"}, "images": [{"file_name": "0002.jpg"}], "annotations": []}')
    with pytest.raises(UserError, match=r"boxes were erased .* data=.*data\.yaml"):
        choose_labeled(data_set([[0]] * 5), str(file), 0, K)


def test_list_of_names_that_repeat(tmp_path: Path) -> None:
    samples = [sample(1, [0], folder="a"), sample(1, [0], folder="b")]
    file = tmp_path / "list of ö.txt"
    file.write_text("b/0001.jpg")
    assert choose_labeled(samples, str(file), 0, K)[0] == [1]
    file.write_text("0001.jpg")
    with pytest.raises(UserError, match=r"may be a/0001\.jpg and b/0001\.jpg"):
        choose_labeled(samples, str(file), 0, K)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("some", "not understood"),
        ("10%%", "not understood"),
        ("-5", "not understood"),
        ("", "not understood"),
        ("0%", "above 0%"),
        ("101%", "at most 100%"),
        ("0", "choose 1 to 5"),
        ("6", "choose 1 to 5"),
        ("0.1", "did you mean labeled=10%"),
        ("gone.txt", "no such file"),
        ("nan%", "not understood"),
    ],
)
def test_bad_spec(spec: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        choose_labeled(data_set([[0]] * 5), spec, 0, K)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("l.txt", "\n", "empty"),
        ("l.txt", "0001\nx\ny\nz\nu", r"4 of its 5 images are not in the training set \(x, y, z, \.\.\.\)"),
        ("l.json", "{", "cannot be read"),
        ("l.json", json.dumps({"a": 1}), "a list of image names"),
        ("l.json", "[1.5]", "a list of image names"),
        ("l.json", '{"images": [{"id": 3}]}', "a list of image names"),
        ("l.json", '{"images": [7]}', "a list of image names"),
        ("l.txt", "0004", "not one box"),
    ],
)
def test_bad_list(tmp_path: Path, name: str, text: str, expected: str) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match=expected):
        choose_labeled(data_set([[0]] * 4 + [[]]), str(file), 0, K)
