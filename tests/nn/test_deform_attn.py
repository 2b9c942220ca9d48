import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ssod.errors import UserError
from ssod.nn import deform_attn_cpu
from ssod.nn.deform_attn import attention_form, deform_attn

Inputs = tuple[torch.Tensor, list[tuple[int, int]], torch.Tensor, torch.Tensor]
OTHERS = ["gather", "bags"]
CASES = {  # shapes, queries, points, heads, channels of a head
    "four levels": ([(8, 8), (4, 4), (2, 2), (1, 1)], 85, 4, 4, 8),
    "one level": ([(5, 7)], 35, 4, 2, 8),
    "one cell": ([(1, 1)], 3, 1, 1, 4),
    "more samples than cells": ([(3, 2), (2, 5)], 200, 3, 2, 5),
    "wide and tall": ([(1, 16), (16, 1), (2, 3)], 9, 2, 3, 16),
    "few queries": ([(20, 30), (10, 15)], 4, 4, 2, 8),
}


def make(shapes, queries, points, heads, dim, batch=2, dtype=torch.float32, seed=0) -> Inputs:
    torch.manual_seed(seed)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, dim, dtype=dtype)
    # a third of the samples lies outside their map, some far
    locations = torch.rand(batch, queries, heads, len(shapes), points, 2, dtype=dtype) * 1.4 - 0.2
    weights = torch.rand(batch, queries, heads, len(shapes), points, dtype=dtype)
    return value, shapes, locations, weights / weights.sum(dim=(-1, -2), keepdim=True)


def with_gradients(form, inputs: Inputs) -> list[torch.Tensor]:
    """The result, and the gradients of value, locations and weights for one fixed upstream gradient."""
    value, shapes, *rest = inputs
    leaves = [t.detach().clone().requires_grad_() for t in (value, *rest)]
    with attention_form(form) if form else nullcontext():
        out = deform_attn(leaves[0], shapes, *leaves[1:])
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def assert_same(one, other, tolerance=1e-4):
    for a, b in zip(one, other, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def test_plain_is_the_definition():
    """Every sample by hand, one at a time."""
    value, shapes, locations, weights = make([(3, 4), (2, 1)], 4, 2, 2, 3)
    batch, queries, heads, _, points, _ = locations.shape
    expected = torch.zeros(batch, queries, heads, 3)
    for b, q, m, t in torch.cartesian_prod(*(torch.arange(n) for n in (batch, queries, heads, points))).tolist():
        start = 0
        for level, (h, w) in enumerate(shapes):
            x = float(locations[b, q, m, level, t, 0]) * w - 0.5
            y = float(locations[b, q, m, level, t, 1]) * h - 0.5
            for row in range(h):
                for column in range(w):
                    share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                    cell = value[b, start + row * w + column, m]
                    expected[b, q, m] += share * weights[b, q, m, level, t] * cell
            start += h * w
    with attention_form("plain"):
        got = deform_attn(value, shapes, locations, weights)
    torch.testing.assert_close(got, expected.flatten(2))


def test_equal_to_transformers():
    module = pytest.importorskip("transformers.models.deformable_detr.modeling_deformable_detr")
    value, shapes, locations, weights = make(*CASES["four levels"])
    theirs = module.MultiScaleDeformableAttention()(value, None, shapes, None, locations, weights, 64)
    torch.testing.assert_close(deform_attn(value, shapes, locations, weights), theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", OTHERS)
def test_forms_agree_forward_and_backward(form, case):
    inputs = make(*CASES[case])
    assert_same(with_gradients(form, inputs), with_gradients("plain", inputs))


@pytest.mark.parametrize("piece", [1, 40, 10**6])
@pytest.mark.parametrize("case", ["four levels", "few queries"])
def test_the_size_of_the_pieces_does_not_matter(monkeypatch, piece, case):
    inputs = make(*CASES[case])
    monkeypatch.setattr(deform_attn_cpu, "PIECE", piece)
    assert_same(with_gradients("bags", inputs), with_gradients("plain", inputs))


@pytest.mark.parametrize("form", OTHERS)
def test_samples_on_cells_and_borders_and_far_away(form):
    """Where a sample sits exactly on a cell the slope jumps: all forms must take the same side.

    Sizes are powers of two, so that every place is exact.
    """
    shapes = [(4, 8), (1, 2)]
    steps = torch.tensor([-1e4, -3.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 1.5, 4.0, 7.5, 8.0, 8.5, 9.0, 50.0]) / 8
    places = torch.cartesian_prod(steps, steps)  # [256, 2]
    value, _, _, weights = make(shapes, 16, 8, 2, 4, batch=1)
    locations = places.view(1, 16, 2, 1, 8, 2).repeat(1, 1, 1, 2, 1, 1)
    inputs = value, shapes, locations, weights
    assert_same(with_gradients(form, inputs), with_gradients("plain", inputs))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    *(st.integers(1, n) for n in (30, 5, 3, 9)),
    st.integers(0, 1000),
)
def test_forms_agree_at_any_size(shapes, queries, points, heads, dim, seed):
    inputs = make(shapes, queries, points, heads, dim, seed=seed)
    expected = with_gradients("plain", inputs)
    for form in OTHERS:
        assert_same(with_gradients(form, inputs), expected, 3e-4)


def test_derivatives_of_bags_are_those_of_its_values():
    value, shapes, locations, weights = make([(3, 4), (2, 2)], 3, 2, 2, 3, batch=1, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (value, locations, weights)]

    def run(v, at, w):
        with attention_form("bags"):
            return deform_attn(v, shapes, at, w)

    assert torch.autograd.gradcheck(run, leaves, eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["plain", *OTHERS])
def test_half_precision_values(form):
    """Only the values are rounded: places stay float32, sums too."""
    value, shapes, locations, weights = make(*CASES["four levels"])
    rounded = value.bfloat16()
    got = with_gradients(form, (rounded, shapes, locations, weights))
    assert [t.dtype for t in got] == [torch.bfloat16] * 2 + [torch.float32] * 2
    # the upstream gradient is rounded as well; beyond that only the last rounding to bfloat16 may differ
    exact = with_gradients("plain", (rounded.float(), shapes, locations, weights))
    torch.testing.assert_close(got[0].float(), exact[0], atol=1e-3, rtol=2**-8)
    for a, b in zip(got[1:], exact[1:], strict=True):
        assert (a.float() - b).norm() < 0.01 * b.norm()


@pytest.mark.parametrize("form", ["plain", *OTHERS])
def test_autocast_changes_nothing(form):
    inputs = make(*CASES["four levels"])
    with torch.autocast("cpu", torch.bfloat16):
        inside = with_gradients(form, inputs)
    assert_same(inside, with_gradients(form, inputs), 1e-6)


@pytest.mark.parametrize("wanted", ["value", "locations", "weights"])
def test_one_gradient_alone(wanted):
    value, shapes, locations, weights = make(*CASES["four levels"])
    leaves = {"value": value, "locations": locations, "weights": weights}
    leaves[wanted].requires_grad_()

    def gradient(form):
        with attention_form(form):
            out = deform_attn(leaves["value"], shapes, leaves["locations"], leaves["weights"])
        return torch.autograd.grad(out.square().sum(), [leaves[wanted]])

    assert_same(gradient("bags"), gradient("plain"))


@pytest.mark.parametrize("form", ["plain", *OTHERS])
def test_no_queries(form):
    shapes = [(3, 4), (2, 2)]
    out, *grads = with_gradients(form, make(shapes, 0, 2, 2, 3))
    assert out.shape == (2, 0, 6)
    assert all((g == 0).all() for g in grads)


def test_a_location_that_is_not_a_number_is_seen_and_harms_no_other():
    value, shapes, locations, weights = make(*CASES["four levels"])
    locations[1, 3, 2, 0, 0] = torch.nan
    out = with_gradients("bags", (value, shapes, locations, weights))[0]
    bad = torch.zeros_like(out, dtype=torch.bool).view(2, 85, 4, 8)
    bad[1, 3, 2] = True
    assert torch.equal(out.isnan(), bad.flatten(2))


@pytest.mark.parametrize("form", ["plain", *OTHERS])
def test_training_after_inference_mode(form):
    shapes = [(3, 11), (5, 4)]  # of no other test: what is remembered of them comes from inference mode
    inputs = make(shapes, 6, 2, 2, 3)
    with torch.inference_mode(), attention_form(form):
        out = deform_attn(*inputs)
    torch.testing.assert_close(with_gradients(form, inputs)[0], out.clone())


def test_bags_keep_less_than_plain_for_the_backward_pass():
    inputs = make([(20, 20), (10, 10)], 500, 4, 4, 32)

    def kept(form):
        storages = {}
        pack = lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t)  # noqa: E731
        value, shapes, *rest = (t.requires_grad_() if isinstance(t, torch.Tensor) else t for t in inputs)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), attention_form(form):
            deform_attn(value, shapes, *rest)
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    assert kept("bags") < 0.5 * kept("plain")


class Called(nn.Module):
    """Two levels, the second half as large, from a map of any even size."""

    def forward(self, image, locations, weights):  # [B, M * D, H, W], [B, Q, M, 2, T, 2], [B, Q, M, 2, T]
        halved = image[:, :, ::2, ::2]
        shapes = [tuple(x.shape[2:]) for x in (image, halved)]
        value = torch.cat([x.flatten(2) for x in (image, halved)], dim=2).transpose(1, 2).unflatten(2, (2, -1))
        return deform_attn(value, shapes, locations, weights)


def called_with(batch, h, w, queries):
    torch.manual_seed(batch)
    image = torch.randn(batch, 8, h, w)
    _, _, locations, weights = make([(h, w), (h // 2, w // 2)], queries, 3, 2, 4, batch)
    return image, locations, weights


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch 2.11 ties the number of queries to itself and refuses")
@pytest.mark.parametrize(
    ("form", "mark"), [(None, "grid_sampler"), ("plain", "grid_sampler"), ("gather", "index_select")]
)
def test_exported_with_dynamic_sizes(form, mark):
    batch, h, w, queries = (torch.export.Dim(n, min=2, max=64) for n in ("batch", "h", "w", "queries"))
    dynamic = ({0: batch, 2: 2 * h, 3: 2 * w}, {0: batch, 1: queries}, {0: batch, 1: queries})
    with attention_form(form) if form else nullcontext():
        program = torch.export.export(Called(), called_with(2, 8, 12, 5), dynamic_shapes=dynamic)
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert any(mark in name for name in called)
    assert not any(other in name for name in called for other in {"grid_sampler", "index_select", "bag"} - {mark})
    inputs = called_with(3, 6, 16, 7)
    torch.testing.assert_close(program.module()(*inputs), Called()(*inputs), atol=1e-5, rtol=1e-5)


def test_compiled_it_takes_the_kernels_of_the_device_and_plain_has_no_break(monkeypatch):
    from ssod.nn import deform_attn as module

    if torch.compile(lambda x: torch.compiler.is_exporting(), backend="eager")(torch.ones(1)):
        pytest.skip("this torch says of whatever it compiles that it exports, and gets `plain`")
    names = []
    for name, form in module.FORMS.items():
        monkeypatch.setitem(module.FORMS, name, lambda *a, n=name, f=form: names.append(n) or f(*a))
    inputs = called_with(2, 8, 12, 5)
    with torch.no_grad():
        compiled = torch.compile(Called(), dynamic=True, backend="eager")(*inputs)
    assert set(names) == {"bags"}
    torch.testing.assert_close(compiled, Called()(*inputs), atol=1e-5, rtol=1e-5)

    monkeypatch.undo()
    with attention_form("plain"):
        whole = torch.compile(Called(), fullgraph=True, dynamic=True, backend="eager")
        for inputs in (called_with(2, 8, 12, 5), called_with(3, 6, 16, 7)):
            torch.testing.assert_close(whole(*inputs), Called()(*inputs), atol=1e-5, rtol=1e-5)


def chosen(value: torch.Tensor, monkeypatch) -> str:
    from ssod.nn import deform_attn as module

    names = []
    for name, form in module.FORMS.items():
        monkeypatch.setitem(module.FORMS, name, lambda *a, n=name, f=form: names.append(n) or f(*a))
    _, shapes, locations, weights = make(*CASES["one level"])
    deform_attn(value, shapes, locations.to(value), weights.to(value))
    return names[0]


def test_the_form_fits_the_device_and_the_precision(monkeypatch):
    value = make(*CASES["one level"])[0]
    assert chosen(value, monkeypatch) == "bags"
    assert chosen(value.double(), monkeypatch) == "plain"


def test_an_unknown_form_is_refused_and_a_forced_one_ends_with_its_block(monkeypatch):
    with pytest.raises(UserError, match="Did you mean 'gather'"), attention_form("gathr"):
        pass
    value = make(*CASES["one level"])[0]
    with attention_form("gather"):
        assert chosen(value, monkeypatch) == "gather"
    with pytest.raises(RuntimeError), attention_form("plain"):
        raise RuntimeError  # an error inside must not leave the form behind
    assert chosen(value, monkeypatch) == "bags"


IN_THE_INTERPRETER = """
import torch
from ssod.nn.deform_attn import attention_form, deform_attn
from tests.nn.test_deform_attn import assert_same, make, with_gradients
for case in [([(6, 4), (3, 2), (1, 1)], 5, 3, 2, 6), ([(2, 3)], 3, 4, 1, 8)]:
    inputs = make(*case)
    assert_same(with_gradients("triton", inputs), with_gradients("plain", inputs))
with torch.inference_mode(), attention_form("triton"):
    deform_attn(*make([(4, 4)], 3, 2, 2, 4))
value, *rest = make([(4, 4)], 3, 2, 2, 4)
out, on_value, on_locations, on_weights = with_gradients("triton", (value.half(), *rest))
assert out.dtype == on_value.dtype == torch.float16 and on_locations.dtype == on_weights.dtype == torch.float32
torch.testing.assert_close(out.float(), with_gradients("plain", (value, *rest))[0], atol=2e-3, rtol=2e-3)
print("equal")
"""


def test_the_kernels_in_the_interpreter():
    """The same kernels, carried out by numpy: what they compute, not how it compiles."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", IN_THE_INTERPRETER]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "equal", done.stderr


@pytest.mark.parametrize(("value", "kernel"), [("fp32", "_forward"), ("bf16", "_backward"), ("fp16", "_backward")])
def test_the_kernels_compile_without_a_gpu(value, kernel):
    """The interpreter takes Python that the compiler refuses."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    from ssod.nn import deform_attn_triton

    function = getattr(deform_attn_triton, kernel)
    sizes = {"heads": 8, "dim": 32, "points": 4, "samples": 16, "block_samples": 16, "block_dim": 32}
    types = dict.fromkeys(function.arg_names, "*fp32") | dict.fromkeys(("value", "out", "upstream"), f"*{value}")
    types |= {"maps": "*i32", "cells": "i32", "queries": "i32"} | dict.fromkeys(sizes, "constexpr")
    source = triton.compiler.ASTSource(
        fn=function,
        signature={name: types[name] for name in function.arg_names},
        constexprs={(function.arg_names.index(name),): size for name, size in sizes.items()},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    assert compiled.asm["cubin"]
    atomic = any(f"{word}.global" in compiled.asm["ptx"] for word in ("red", "atom"))
    assert atomic == (kernel == "_backward")  # its sums


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_on_a_gpu(case):
    value, shapes, locations, weights = make(*CASES[case])
    on_gpu = value.cuda(), shapes, locations.cuda(), weights.cuda()
    expected = with_gradients("plain", (value, shapes, locations, weights))
    for form in ("triton", "gather", None):
        assert_same([t.cpu() for t in with_gradients(form, on_gpu)], expected)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = value.to(dtype)
        got = with_gradients("triton", (rounded.cuda(), *on_gpu[1:]))
        exact = with_gradients("plain", (rounded.float(), shapes, locations, weights))
        for a, b in zip(got, exact, strict=True):
            assert (a.cpu().float() - b).norm() < 0.01 * b.norm()


@pytest.mark.gpu
def test_the_choice_on_a_gpu(monkeypatch):
    value = make(*CASES["one level"])[0].cuda()
    assert chosen(value, monkeypatch) == "triton"
    torch.use_deterministic_algorithms(True)
    try:
        assert chosen(value, monkeypatch) == "gather"
    finally:
        torch.use_deterministic_algorithms(False)
