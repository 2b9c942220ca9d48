"""Which convolutions of a network choose their form, and that their values stay."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssod.detectors import build_detector
from ssod.engine.profile import operations
from ssod.nn.conv import Conv2d, Linear, LinearOfMaps, choose_forms
from ssod.nn.frozen_norm import FoldedConv2d
from ssod.ops import products, winograd
from ssod.ops.forms import graph_for, plain_forms


@pytest.fixture
def calls(monkeypatch):
    """Shapes that Winograd's form was used for; on any machine, and for narrow ones, too."""
    monkeypatch.setattr(winograd.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(winograd, "wide_vectors", lambda: False)
    monkeypatch.setattr(products, "wide_vectors", lambda: False)
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)
    monkeypatch.setattr(winograd, "LEAST_PLACES", 100)
    return spied(monkeypatch, (winograd, "conv3x3"))


@pytest.fixture
def multiplied(monkeypatch):
    """Shapes that oneDNN's products were used for; on any machine, at one thread, and for small ones, too."""
    if not products._there():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "wide_vectors", lambda: True)
    monkeypatch.setattr(winograd, "wide_vectors", lambda: True)
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 1)
    return spied(monkeypatch, (products, "convolve"), (products, "linear"))


def spied(monkeypatch, *forms):
    seen = []

    def spy(form):
        def seeing(x, weight, bias):
            seen.append((tuple(x.shape), tuple(weight.shape)))
            return form(x, weight, bias)

        return seeing

    for module, name in forms:
        monkeypatch.setattr(module, name, spy(getattr(module, name)))
    return seen


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ({"kernel_size": 3, "padding": 1}, True),
        ({"kernel_size": 3, "padding": 1, "bias": False}, True),
        ({"kernel_size": 3, "padding": 0}, False),
        ({"kernel_size": 3, "padding": "same"}, False),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, False),
        ({"kernel_size": 3, "padding": 2, "dilation": 2}, False),
        ({"kernel_size": 3, "padding": 1, "groups": 8}, False),
        ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, False),
        ({"kernel_size": 1}, False),
        ({"kernel_size": (3, 1), "padding": (1, 0)}, False),
    ],
)
def test_only_standard_convolutions(calls, words, fits):
    plain = nn.Sequential(nn.Conv2d(8, 8, **words))
    other = copy.deepcopy(plain)
    choose_forms(other)
    x = torch.randn(2, 8, 16, 16)
    torch.testing.assert_close(other(x), plain(x), atol=1e-5, rtol=0)
    assert calls == ([((2, 8, 16, 16), (8, 8, 3, 3))] if fits else [])
    assert other.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"padding": 1}, False),
        ({"stride": 2}, False),
        ({"groups": 2}, False),
        ({"kernel_size": (1, 3), "padding": (0, 1)}, False),
    ],
)
def test_only_1x1_convolutions_of_one_thread_are_products(multiplied, monkeypatch, words, fits):
    plain = nn.Sequential(nn.Conv2d(8, 6, **{"kernel_size": 1, **words}))
    other = copy.deepcopy(plain)
    choose_forms(other)
    x = torch.randn(2, 8, 5, 7)
    torch.testing.assert_close(other(x), plain(x), atol=1e-5, rtol=0)
    assert multiplied == ([((2, 8, 5, 7), (6, 8, 1, 1))] if fits else [])
    multiplied.clear()
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: 2)
    other(x)
    assert not multiplied


@pytest.mark.parametrize("threads", [1, 2])
def test_linear_layers(multiplied, monkeypatch, threads):
    monkeypatch.setattr(products.torch, "get_num_threads", lambda: threads)
    plain = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3, bias=False))
    other = copy.deepcopy(plain)
    choose_forms(other)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(other(x), plain(x), atol=1e-5, rtol=0)
    assert multiplied == [((2, 5, 8), (6, 8)), ((2, 5, 6), (3, 6))]
    assert other.state_dict().keys() == plain.state_dict().keys()


def test_other_classes_stay():
    class Own(nn.Conv2d):
        pass

    root = nn.Sequential(Own(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3), nn.MultiheadAttention(8, 2))
    choose_forms(root)
    assert type(root[0]) is Own
    assert type(root[1]) is nn.ConvTranspose2d
    assert type(root[2].out_proj) not in (nn.Linear, Linear)


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_a_detector_learns_the_same_by_winograd(calls, frozen_norm):
    torch.manual_seed(0)
    net = build_detector("fcos", 3, "resnet18", {"fpn_channels": 32}, frozen_norm=frozen_norm).eval()
    kinds = {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == ({Conv2d, FoldedConv2d} if frozen_norm else {Conv2d})
    assert_learns_the_same(net, calls)
    assert {shape[2:] for shape, _ in calls} >= {(32, 40), (16, 20)}  # backbone and pyramid


@pytest.mark.parametrize("name", ["faster_rcnn", "deformable_detr"])
@pytest.mark.parametrize("frozen_norm", [False, True])
def test_a_detector_learns_the_same_by_products(multiplied, name, frozen_norm):
    torch.manual_seed(0)
    net = build_detector(name, 3, "resnet10t", frozen_norm=frozen_norm).eval()
    if name == "deformable_detr":
        assert_learns_the_same(net, multiplied, lambda seen: net.head(seen).logits[-1])
    else:
        boxes = [torch.rand(40, 4) * 60 + torch.tensor([0, 0, 60, 60])] * 2
        assert_learns_the_same(net, multiplied, lambda seen: net.read(net.head(seen), boxes).logits)
    assert {len(weight) for _, weight in multiplied} == {2, 4}  # linear layers and convolutions


def assert_learns_the_same(net, seen, last=None):
    images = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)

    def learn():
        net.zero_grad()
        pyramid = net.features(images)
        outputs = list(pyramid.maps.values()) + ([last(pyramid)] if last else [])
        sum(m.square().mean() for m in outputs).backward()
        return {k: p.grad for k, p in net.named_parameters() if p.grad is not None}

    seen.clear()  # of the building
    with plain_forms():
        plain = learn()
    assert not seen
    fast = learn()
    assert fast.keys() == plain.keys()
    for key, grad in plain.items():
        assert (fast[key] - grad).abs().max() <= 3e-4 * grad.abs().max(), key


@pytest.mark.parametrize("forms", ["calls", "multiplied"])
def test_operations_are_counted_of_convolutions_as_such(request, forms):
    seen = request.getfixturevalue(forms)
    net = build_detector("fcos", 3, "resnet18", {"fpn_channels": 32, "head_convs": 1}).eval()
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    assert seen
    counted, _ = operations(net, images)
    assert counted > 1.002 * counter.get_total_flops()


def test_compiled_and_traced_networks_hold_convolutions(calls):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    choose_forms(net)
    x = torch.randn(2, 8, 16, 16)
    traced = torch.jit.trace(net, x, check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
    exported = torch.export.export(net, (x,))
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == ["aten.conv2d.default"]
    torch.compile(net, backend="eager", fullgraph=True)(x)
    assert not calls


def test_compiled_and_traced_networks_hold_linear_layers(multiplied):
    net = nn.Sequential(nn.Linear(8, 8))
    choose_forms(net)
    x = torch.randn(2, 8)
    assert "aten::linear" in str(torch.jit.trace(net, x, check_trace=False).inlined_graph)
    exported = torch.export.export(net, (x,))
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == ["aten.linear.default"]
    torch.compile(net, backend="eager", fullgraph=True)(x)
    assert not multiplied


@pytest.mark.parametrize(("rows", "last", "sorts"), [(8, True, True), (7, True, False), (8, False, False)])
def test_a_layer_of_flattened_maps_multiplies_them_as_they_lie(rows, last, sorts):
    torch.manual_seed(0)
    layer = LinearOfMaps(3 * 2 * 5, 4)
    layout = torch.channels_last if last else torch.contiguous_format
    maps = torch.randn(rows, 3, 2, 5).to(memory_format=layout).requires_grad_()
    assert layer.sorts(maps) == sorts
    with graph_for("onnx"):
        assert not layer.sorts(maps)
    with graph_for("onnxruntime"):
        assert layer.sorts(maps)

    def learn(function):
        layer.zero_grad()
        maps.grad = None
        out = function(maps)
        out.square().sum().backward()
        return out.detach(), maps.grad, layer.weight.grad, layer.bias.grad

    plain = learn(lambda x: nn.functional.linear(x.flatten(1), layer.weight, layer.bias))
    for own, expected in zip(learn(layer), plain, strict=True):
        torch.testing.assert_close(own, expected)
