"""Convolutions in Winograd's form: a convolution's values and gradients, at every size, and only where it pays."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from other_forms import assert_float32_on_a_cpu_only, learned

from ssod.ops import winograd
from ssod.ops.winograd import bases, conv3x3, pays


def data(b=2, c=5, k=4, h=9, w=14, seed=0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, c, h, w), (k, c, 3, 3), (k,), (b, k, h, w)
    return [torch.randn(shape, generator=draw) for shape in shapes]


def exact(x, weight, bias, grad):
    inputs = [t.double() for t in (x, weight, bias)]
    return learned(lambda *a: F.conv2d(*a, padding=1), inputs, grad.double())


def assert_same(ours, expected):
    for mine, right in zip(ours, expected, strict=True):
        assert mine.dtype == torch.float32
        scale = right.abs().max().item()
        torch.testing.assert_close(mine.double(), right, atol=2e-5 * scale, rtol=0)


def test_the_bases_multiply_polynomials():
    # (1, 2, 3, 4, 5, 6) correlated with (1, 10, 100), by hand: 1 + 20 + 300, 2 + 30 + 400, ...
    inputs, kernels, outputs = bases()
    tile, kernel = np.arange(1.0, 7), np.array([1.0, 10, 100])
    np.testing.assert_allclose(outputs @ ((kernels @ kernel) * (inputs @ tile)), [321, 432, 543, 654], rtol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    b=st.integers(1, 4),
    c=st.integers(1, 6),
    k=st.integers(1, 6),
    h=st.integers(1, 19),
    w=st.integers(1, 19),
    part=st.sampled_from([1, 2000, 20000, 10**6]),
    last=st.booleans(),
)
def test_values_and_gradients_of_a_convolution(b, c, k, h, w, part, last):
    x, weight, bias, grad = data(b, c, k, h, w, seed=b + h * w)
    expected = exact(x, weight, bias, grad)
    if last:
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd, "PART", part)  # rows of one image, or several images, at a time
        assert_same(learned(conv3x3, (x, weight, bias), grad), expected)


def test_wide_convolutions_round_as_the_docs_say():
    x, weight, bias, grad = data(1, 256, 128, 24, 24)
    for mine, right in zip(learned(conv3x3, (x, weight, bias), grad), exact(x, weight, bias, grad), strict=True):
        assert (mine - right).abs().max() < 4e-6 * right.abs().max()


def test_the_result_is_dense_and_channels_last():
    for h, w in ((8, 12), (9, 14)):
        x, weight, bias, grad = data(h=h, w=w)
        out, _, of_weight, _ = learned(conv3x3, (x, weight, bias), grad)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert of_weight.is_contiguous()  # as the weight is: optimizers would copy it otherwise


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_the_gradients_that_are_asked_for(wanted):
    x, weight, bias, grad = data()
    expected = exact(x, weight, bias, grad)[1:]
    inputs = [t.requires_grad_(asked) for t, asked in zip((x, weight, bias), wanted, strict=True)]
    conv3x3(*inputs).backward(grad)
    for t, asked, right in zip(inputs, wanted, expected, strict=True):
        if asked:
            assert_same([t.grad], [right])
        else:
            assert t.grad is None


def test_a_result_may_be_changed_in_place():
    x, weight, bias, grad = data()
    got = learned(lambda *a: conv3x3(*a).relu_(), (x, weight, bias), grad)
    inputs = [t.double() for t in (x, weight, bias)]
    assert_same(got, learned(lambda *a: F.conv2d(*a, padding=1).relu(), inputs, grad.double()))


def test_without_a_bias():
    x, weight, bias, grad = data()
    out, *grads = learned(lambda x, weight: conv3x3(x, weight), (x, weight), grad)
    right = exact(x, weight, torch.zeros_like(bias), grad)
    assert_same([out, *grads], right[:3])


def test_gradients_of_gradients_are_refused():
    x, weight, bias, _ = data()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(conv3x3(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_inference_first_then_training():
    winograd._bases.cache_clear()
    x, weight, bias, grad = data()
    with torch.inference_mode():
        conv3x3(x, weight, bias)
    assert_same(learned(conv3x3, (x, weight, bias), grad), exact(x, weight, bias, grad))


WIDE = {"c": 128, "k": 128, "h": 40, "w": 40}


@pytest.fixture
def on_x86(monkeypatch):
    """Without 512-bit vectors."""
    monkeypatch.setattr(winograd.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(winograd, "wide_vectors", lambda: False)


def test_it_pays_where_maps_are_wide_and_large(on_x86):
    x, weight, *_ = data(**WIDE)
    assert pays(x, weight)
    assert not pays(x[:, :, :20, :20], weight)
    assert not pays(x, weight[:36])
    assert not pays(x[:, :64], weight[:, :64])


def test_it_does_not_where_something_else_computes(on_x86, monkeypatch):
    x, weight, *_ = data(**WIDE)
    assert_float32_on_a_cpu_only(pays, x, weight)
    with monkeypatch.context() as patch:
        patch.setattr(winograd.platform, "machine", lambda: "arm64")
        assert not pays(x, weight)
    monkeypatch.setattr(winograd, "wide_vectors", lambda: True)
    assert not pays(x, weight)
