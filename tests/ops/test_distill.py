"""Soft targets: weights, losses and gradients by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssod.ops.boxes import iou
from ssod.ops.distill import foreground_weight, heavy, soft_bce, soft_kl


def logit(*values: list[float]) -> Tensor:
    return torch.tensor(values).logit()


def test_a_candidate_weighs_its_best_foreground_class() -> None:
    assert foreground_weight(logit([0.2, 0.7], [0.1, 0.05]), exclusive=False).tolist() == pytest.approx([0.7, 0.1])
    # the background, last, is no foreground class
    regions = torch.tensor([[0.2, 0.1, 0.7], [0.6, 0.3, 0.1]]).log()
    assert foreground_weight(regions, exclusive=True).tolist() == pytest.approx([0.2, 0.6])


def test_weighted_bce_and_its_gradient() -> None:
    # BCE(p = 0.5, t = 0.8) = ln 2 = 0.693147; BCE(p = 0.2, t = 0.2) = -(0.2 ln 0.2 + 0.8 ln 0.8) = 0.500402
    # 0.8 * (0.693147 + 0.500402) + 0.1 * (-(0.1 ln 0.4 + 0.9 ln 0.6) + ln 2) = 0.954839 + 0.1 * (0.551372 + 0.693147)
    logits = logit([0.5, 0.2], [0.4, 0.5]).requires_grad_()
    target = logit([0.8, 0.2], [0.1, 0.3]).requires_grad_()
    weight = torch.tensor([0.8, 0.1], requires_grad=True)
    loss = soft_bce(logits, target, weight)
    assert loss.item() == pytest.approx(0.954839 + 0.124452, abs=1e-5)
    loss.backward()
    # w (p - t): 0.8 * (0.5 - 0.8), 0; 0.1 * (0.4 - 0.1), 0.1 * (0.5 - 0.3)
    assert logits.grad is not None
    assert logits.grad.tolist() == [pytest.approx([-0.24, 0], abs=1e-6), pytest.approx([0.03, 0.02], abs=1e-6)]
    assert target.grad is None
    assert weight.grad is None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 300), st.integers(1, 80), st.integers(0, 99))
def test_bce_in_pieces_is_the_plain_one(count: int, classes: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (5 * torch.randn(count, classes, generator=generator)).requires_grad_()
    target, weight = torch.randn(count, classes, generator=generator), torch.rand(count, generator=generator)
    plain = F.binary_cross_entropy_with_logits(logits, target.sigmoid(), reduction="none").sum(1) @ weight
    (expected,) = torch.autograd.grad(plain, logits)
    loss = soft_bce(logits, target, weight)
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(2 * loss, logits)[0], 2 * expected)


def test_several_pieces_are_one_sum() -> None:
    # 5 x 40,000 logits are taken in five pieces of one row: each row is ln 2 * 40,000
    logits = torch.zeros(5, 40_000, requires_grad=True)
    loss = soft_bce(logits, torch.zeros(5, 40_000), torch.tensor([1.0, 2, 3, 4, 0]))
    assert loss.item() == pytest.approx(10 * 40_000 * math.log(2), rel=1e-5)


def test_half_precision_logits_get_gradients_of_their_kind() -> None:
    logits = torch.tensor([[1.0, -2.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = soft_bce(logits, torch.zeros(1, 2, dtype=torch.bfloat16), torch.ones(1))
    assert loss.dtype == torch.float32
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16
    assert logits.grad.float()[0].tolist() == pytest.approx([0.2311, -0.3808], abs=3e-3)  # sigmoid - 0.5


def test_weighted_kl() -> None:
    # KL((0.5, 0.25, 0.25) || (0.25, 0.25, 0.5)) = 0.5 ln 2 - 0.25 ln 2 = 0.173287, times 0.5; the second is alike: 0
    logits = torch.tensor([[0.25, 0.25, 0.5], [0.1, 0.1, 0.8]]).log().requires_grad_()
    target = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]).log().requires_grad_()
    loss = soft_kl(logits, target, torch.tensor([0.5, 0.1]))
    assert loss.item() == pytest.approx(0.0866434, abs=1e-6)
    loss.backward()
    assert logits.grad is not None
    # w (p - t)
    assert logits.grad.flatten().tolist() == pytest.approx([-0.125, 0, 0.125, 0, 0, 0], abs=1e-6)
    assert target.grad is None


@pytest.mark.parametrize("logits", [[[80.0, -80.0]], [[-200.0, 200.0]]])
def test_extreme_logits_stay_finite(logits: list[list[float]]) -> None:
    x = torch.tensor(logits, requires_grad=True)
    loss = soft_bce(x, -x.detach(), torch.ones(1)) + soft_kl(x, -x.detach(), torch.ones(1))
    assert torch.isfinite(loss)
    loss.backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_no_candidates() -> None:
    none = torch.zeros(0, 3, requires_grad=True)
    (soft_bce(none, none.detach(), torch.zeros(0)) + soft_kl(none, none.detach(), torch.zeros(0))).backward()
    assert none.grad is not None
    assert foreground_weight(none, exclusive=True).shape == (0,)
    assert heavy(torch.zeros(0), 0.01).tolist() == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=50), st.sampled_from([0.01, 0.1, 0.5]))
def test_what_is_left_out_weighs_little(weights: list[float], neglect: float) -> None:
    weight = torch.tensor(weights, dtype=torch.float64)
    kept = heavy(weight, neglect)
    assert weight.sum() - weight[kept].sum() <= neglect * weight.sum() + 1e-12
    assert heavy(torch.ones(7), 0.01).all()


def test_overlap_of_pairs() -> None:
    # 10 x 10 and 10 x 10 shifted by 5: 50 / 150; apart: 0; both empty: 0
    a = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [3, 3, 3, 3]])
    b = torch.tensor([[5.0, 0, 15, 10], [20, 20, 30, 30], [3, 3, 3, 3]])
    assert iou(a, b).tolist() == pytest.approx([1 / 3, 0, 0])
