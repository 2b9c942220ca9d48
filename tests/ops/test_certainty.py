"""RPL's Eq. 6 with numbers computed by hand, and what must hold for any numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssod.ops.certainty import TAU_RANGE, class_sums, class_thresholds, class_weights, relative_certainty

# p * v of three candidates of class 0 and one of class 1; class 2 is never seen.
LABELS = torch.tensor([0, 1, 0, 0])
CERTAINTY = torch.tensor([0.8, 0.5, 0.6, 0.4])
SUMS = class_sums(LABELS, CERTAINTY, 3)


def test_sums_by_hand() -> None:
    # c_0 = 0.8 + 0.6 + 0.4 = 1.8 of 3 candidates, c_1 = 0.5 of 1, c_2 = 0 of 0
    torch.testing.assert_close(SUMS, torch.tensor([[1.8, 0.5, 0.0], [3.0, 1.0, 0.0]]))
    # n = (3 + 1 + 0) / 3 = 4/3: 1.8 / (4/3) = 1.35, 0.5 / (4/3) = 0.375, 0
    torch.testing.assert_close(relative_certainty(SUMS), torch.tensor([1.35, 0.375, 0.0]))


def test_thresholds_by_hand() -> None:
    # 1.35^0.05 = exp(0.05 * 0.300105) = 1.015118, 0.375^0.05 = exp(0.05 * -0.980829) = 0.952142, 0^0.05 = 0
    # times 0.7: 0.710583, 0.666500, 0 -> 0.4
    torch.testing.assert_close(class_thresholds(SUMS, 0.7, 0.05), torch.tensor([0.710583, 0.666500, 0.4]))


def test_weights_by_hand() -> None:
    # 1.35^-0.6 = exp(-0.6 * 0.300105) = 0.835222, 0.375^-0.6 = exp(0.6 * 0.980829) = 1.801287, never seen -> the bound
    torch.testing.assert_close(class_weights(SUMS, 0.6, 10.0), torch.tensor([0.835222, 1.801287, 10.0]))
    torch.testing.assert_close(class_weights(SUMS, 0.6, 1.5), torch.tensor([0.835222, 1.5, 1.5]))


def test_a_single_class_by_hand() -> None:
    # n is its own count, so c / n is its mean certainty 0.6: 0.6^0.05 * 0.7 = 0.974785 * 0.7, 0.6^-0.6 = 1.358665
    sums = class_sums(torch.zeros(2, dtype=torch.int64), torch.tensor([0.5, 0.7]), 1)
    torch.testing.assert_close(class_thresholds(sums, 0.7, 0.05), torch.tensor([0.682349]))
    torch.testing.assert_close(class_weights(sums, 0.6, 10.0), torch.tensor([1.358665]))


def test_thresholds_stop_at_both_ends() -> None:
    # of 40 classes one has all candidates, certain to 1: c / n = 40, 40^0.05 = 1.2026, times 0.8 = 0.962 -> 0.9;
    # one in 100,000 of another class: 40 * 0.00001 * 0.5 = 0.0002, 0.0002^0.05 = 0.653, times 0.6 = 0.392 -> 0.4
    sums = torch.zeros(2, 40)
    sums[:, 0] = 99_999
    sums[:, 1] = torch.tensor([0.5, 1.0])
    assert class_thresholds(sums, 0.8, 0.05)[0].item() == pytest.approx(0.9)
    assert class_thresholds(sums, 0.6, 0.05)[1].item() == pytest.approx(0.4)


def test_without_foreground_nothing_is_weighed() -> None:
    sums = class_sums(torch.zeros(0, dtype=torch.int64), torch.zeros(0), 3)
    assert sums.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert class_thresholds(sums, 0.7, 0.05).tolist() == pytest.approx([0.7] * 3)
    assert class_weights(sums, 0.6, 10.0).tolist() == [1, 1, 1]


def test_candidates_without_any_certainty_are_like_a_class_never_seen() -> None:
    sums = class_sums(torch.tensor([0, 1]), torch.tensor([0.0, 0.9]), 2)
    assert class_thresholds(sums, 0.7, 0.05)[0].item() == pytest.approx(0.4)
    assert class_weights(sums, 0.6, 10.0)[0].item() == 10.0


def test_gamma_0_turns_each_off() -> None:
    assert class_thresholds(SUMS, 0.95, 0.0).tolist() == pytest.approx([0.95] * 3)  # not even clipped
    assert class_weights(SUMS, 0.0, 10.0).tolist() == [1, 1, 1]


def test_what_is_not_finite_does_not_stay() -> None:
    sums = class_sums(torch.tensor([0, 0, 1]), torch.tensor([math.nan, 0.5, math.inf]), 2)
    assert sums.tolist() == [[0.5, 0.0], [2.0, 1.0]]


counts = st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1, width=32)), min_size=1, max_size=20)


@given(counts, st.floats(0.4, 0.9), st.floats(0, 1), st.floats(0, 2), st.floats(1, 50))
def test_thresholds_and_weights_of_any_sums(
    classes: list[tuple[int, float]], tau: float, gamma1: float, gamma2: float, most: float
) -> None:
    sums = torch.tensor([[n * mean for n, mean in classes], [float(n) for n, _ in classes]])
    thresholds, weights = class_thresholds(sums, tau, gamma1), class_weights(sums, gamma2, most)
    low, high = TAU_RANGE
    assert bool(((thresholds >= low - 1e-6) & (thresholds <= high + 1e-6)).all())
    assert bool(((weights > 0) & (weights <= most + 1e-4)).all())
    # A more certain or more frequent class has no lower threshold and no greater weight.
    order = relative_certainty(sums).argsort()
    assert bool((thresholds[order].diff() >= -1e-6).all())
    assert bool((weights[order].diff() <= 1e-4).all())
    # Only the proportions count: the decay of the sums changes nothing.
    torch.testing.assert_close(class_thresholds(sums * 0.5, tau, gamma1), thresholds)
    torch.testing.assert_close(class_weights(sums * 0.5, gamma2, most), weights)
