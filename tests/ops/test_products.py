"""Products by oneDNN: the values and gradients of linear layers and 1x1 convolutions, and only where they pay."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from other_forms import assert_float32_on_a_cpu_only, learned

from ssod.ops import products
from ssod.ops.products import convolve, linear, pays, pays_as_convolution, product

pytestmark = pytest.mark.skipif(not products._there(), reason="this torch has no oneDNN")


def assert_same(ours, expected):
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), right, atol=1e-5 * (1 + right.abs().max().item()), rtol=0)


def test_by_hand():
    x, weight = torch.tensor([[1.0, 2], [3, 4]]), torch.tensor([[1.0, 10], [100, 1000], [0, -1]])
    assert linear(x, weight, torch.tensor([0.5, 0, 0])).tolist() == [[21.5, 2100, -2], [43.5, 4300, -4]]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    c=st.integers(1, 40),
    k=st.integers(1, 40),
    bias=st.booleans(),
)
def test_linear(sizes, c, k, bias):
    draw = torch.Generator().manual_seed(c + 100 * k)
    shapes = [(*sizes, c), (k, c), *([(k,)] if bias else [])]
    inputs = [torch.randn(s, generator=draw) for s in shapes]
    grad = torch.randn(*sizes, k, generator=draw)
    expected = learned(F.linear, [t.double() for t in inputs], grad.double())
    assert_same(learned(linear, inputs, grad), expected)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 4),
    c=st.integers(1, 20),
    k=st.integers(1, 20),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_convolve(b, c, k, h, w, bias, last):
    draw = torch.Generator().manual_seed(b + c * k)
    shapes = [(b, c, h, w), (k, c, 1, 1), *([(k,)] if bias else [])]
    inputs = [torch.randn(s, generator=draw) for s in shapes]
    grad = torch.randn(b, k, h, w, generator=draw)
    expected = learned(F.conv2d, [t.double() for t in inputs], grad.double())
    if last:
        inputs[0], grad = (t.contiguous(memory_format=torch.channels_last) for t in (inputs[0], grad))
    got = learned(convolve, inputs, grad)
    assert_same(got, expected)
    assert got[0].is_contiguous(memory_format=torch.channels_last)


def test_matrices_with_gaps():
    # oneDNN computes some of these a hundred times as slowly, so they are copied.
    wide = torch.randn(30, 64)
    cut = wide[:, :32]
    assert not cut.is_contiguous()
    for a, b in ((cut, cut.t()), (cut.t(), cut), (wide[::2], wide[::2].t()), (cut, torch.randn(32).expand(5, 32).t())):
        torch.testing.assert_close(product(a, b).double(), a.double() @ b.double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
@pytest.mark.parametrize("form", [linear, convolve])
def test_only_the_gradients_that_are_asked_for(form, wanted):
    maps = form is convolve
    inputs = [torch.randn(2, 5, 3, 4) if maps else torch.randn(6, 5), torch.randn(4, 5), torch.randn(4)]
    inputs[1] = inputs[1][..., None, None] if maps else inputs[1]
    plain = F.conv2d if maps else F.linear
    expected = learned(plain, [t.double() for t in inputs], torch.ones(2, 4, 3, 4) if maps else torch.ones(6, 4))[1:]
    for t, asked in zip(inputs, wanted, strict=True):
        t.requires_grad_(asked)
    form(*inputs).sum().backward()
    for t, asked, right in zip(inputs, wanted, expected, strict=True):
        if asked:
            assert_same([t.grad], [right])
        else:
            assert t.grad is None


def test_a_convolution_may_be_changed_in_place():
    inputs = [torch.randn(2, 5, 3, 4), torch.randn(4, 5, 1, 1), torch.randn(4)]
    grad = torch.randn(2, 4, 3, 4)
    got = learned(lambda *a: convolve(*a).relu_(), inputs, grad)
    assert_same(got, learned(lambda *a: F.conv2d(*a).relu(), [t.double() for t in inputs], grad.double()))


def test_gradients_of_gradients_are_refused():
    x = torch.randn(3, 5, requires_grad=True)
    (grad,) = torch.autograd.grad(linear(x, torch.randn(4, 5)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.fixture
def wide(monkeypatch):
    """512-bit vectors, one thread."""
    monkeypatch.setattr(products, "wide_vectors", lambda: True)
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 1)


def test_it_pays_where_there_is_enough_to_do(wide, monkeypatch):
    x, weight = torch.randn(256, 128), torch.randn(128, 128)
    assert pays(x, weight)
    assert not pays(x[:200], weight)
    assert pays_as_convolution(x, weight)
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 2)
    assert pays(x, weight)
    assert not pays_as_convolution(x, weight)
    monkeypatch.setattr(products, "wide_vectors", lambda: False)
    assert not pays(x, weight)


def test_it_does_not_where_something_else_computes(wide, monkeypatch):
    x, weight = torch.randn(256, 128), torch.randn(128, 128)
    assert_float32_on_a_cpu_only(pays, x, weight)
    monkeypatch.setattr(products, "_there", lambda: False)
    assert not pays(x, weight)
