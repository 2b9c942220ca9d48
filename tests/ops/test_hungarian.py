import subprocess
import sys
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from ssod.ops.hungarian import match_hungarian


@st.composite
def problems(draw, size=5):
    groups, queries, targets = draw(st.integers(1, 3)), draw(st.integers(0, size)), draw(st.integers(0, size))
    torch.manual_seed(draw(st.integers(0, 2**31 - 1)))
    cost = torch.randn(groups, queries, targets)
    if draw(st.booleans()):
        cost = cost.round()  # many ties
    return cost, torch.rand(groups, targets) < draw(st.sampled_from([0.0, 0.5, 1.0]))


def cheapest(cost: torch.Tensor) -> float:
    """Least total over every way to match min(Q, n) pairs of cost [Q, n]."""
    if cost.shape[0] < cost.shape[1]:
        cost = cost.T
    rows, columns = cost.shape
    table = cost.double().tolist()
    return min(
        sum(table[r][c] for r, c in zip(chosen, range(columns), strict=True))
        for subset in combinations(range(rows), columns)
        for chosen in permutations(subset)
    )


@settings(max_examples=150, deadline=None)
@given(problems())
def test_one_to_one_complete_and_cheapest(problem):
    cost, valid = problem
    matched = match_hungarian(cost, valid)
    assert matched.dtype == torch.int64
    assert matched.shape == cost.shape[:2]
    for group, row, real in zip(cost, matched, valid, strict=True):
        query = (row >= 0).nonzero().squeeze(1)
        target = row[query]
        assert (row[row < 0] == -1).all()
        assert real[target].all()
        assert len(target.unique()) == len(target) == min(len(group), int(real.sum()))
        total = float(group[query, target].double().sum())
        assert total == pytest.approx(cheapest(group[:, real]), abs=1e-5)


@settings(max_examples=100, deadline=None)
@given(problems(), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.floats(0, 1))
def test_non_finite_costs_are_the_last_resort(problem, fault, share):
    cost, valid = problem
    broken = torch.rand(cost.shape) < share
    matched = match_hungarian(cost.masked_fill(broken, fault), valid)
    for group, bad, row, real in zip(cost, broken, matched, valid, strict=True):
        query = (row >= 0).nonzero().squeeze(1)
        assert len(query) == min(len(group), int(real.sum()))
        assert int(bad[query, row[query]].sum()) == cheapest(bad[:, real].float())
        # what is matched at a finite cost could not be had for less: compare with a penalty far above all of it
        penalised = group.double().masked_fill(bad, 1000.0)
        assert float(penalised[query, row[query]].sum()) == pytest.approx(cheapest(penalised[:, real]), abs=1e-4)


def test_by_hand():
    cost = torch.tensor([[[1.0, 2], [0, 5], [9, 9]], [[3, -8], [1, -9], [2, -9]]])
    valid = torch.tensor([[True, True], [True, False]])
    # first: 2 + 0 beats 1 + 5; second: only target 0 exists and query 1 is the cheapest
    assert match_hungarian(cost, valid).tolist() == [[1, 0, -1], [-1, 0, -1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_gradients_do_not_matter(dtype):
    cost = torch.tensor([[[4.0, 1], [1, 4]]], dtype=dtype, requires_grad=True)
    matched = match_hungarian(cost, torch.ones(1, 2, dtype=torch.bool))
    assert matched.tolist() == [[1, 0]]
    assert not matched.requires_grad


def test_the_cost_matrix_leaves_the_device_once(monkeypatch):
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t, *a, **k: copies.append(t.shape) or original(t, *a, **k))
    cost = torch.rand(12, 30, 7)
    assert (match_hungarian(cost, torch.rand(12, 7) < 0.7) >= 0).any()
    assert copies == [(12, 31, 7)]


def test_scipy_is_not_loaded_with_the_module():
    code = "import sys, ssod.ops.hungarian; sys.exit('scipy.optimize' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_equal_to_one_solve_per_image():
    rng = np.random.default_rng(0)
    cost, counts = rng.normal(size=(6, 100, 20)).astype(np.float32), [20, 0, 5, 1, 13, 20]
    matched = match_hungarian(torch.from_numpy(cost), torch.arange(20) < torch.tensor(counts)[:, None])
    for one, row, count in zip(cost, matched, counts, strict=True):
        expected = np.full(100, -1)
        query, target = linear_sum_assignment(one[:, :count])
        expected[query] = target
        assert row.tolist() == expected.tolist()
