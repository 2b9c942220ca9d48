"""Which convolutions of a network choose their form, and that their values stay."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ssod.detectors import build_detector
from ssod.engine.profile import operations
from ssod.nn import conv as module
from ssod.nn.conv import Conv2d, fewer_products
from ssod.nn.frozen_norm import FoldedConv2d
from ssod.ops import winograd


@pytest.fixture
def calls(monkeypatch):
    """Shapes that Winograd's form was used for; on any machine, and for narrow ones, too."""
    seen = []

    def seeing(x, weight, bias):
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return winograd.conv3x3(x, weight, bias)

    monkeypatch.setattr(module, "conv3x3", seeing)
    monkeypatch.setattr(winograd.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 8)
    monkeypatch.setattr(winograd, "LEAST_PLACES", 100)
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
    fewer_products(other)
    x = torch.randn(2, 8, 16, 16)
    torch.testing.assert_close(other(x), plain(x), atol=1e-5, rtol=0)
    assert calls == ([((2, 8, 16, 16), (8, 8, 3, 3))] if fits else [])
    assert other.state_dict().keys() == plain.state_dict().keys()


def test_other_classes_of_convolutions_stay():
    class Own(nn.Conv2d):
        pass

    root = nn.Sequential(Own(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3))
    fewer_products(root)
    assert type(root[0]) is Own
    assert type(root[1]) is nn.ConvTranspose2d


@pytest.mark.parametrize("frozen_norm", [False, True])
def test_a_detector_learns_the_same(calls, monkeypatch, frozen_norm):
    torch.manual_seed(0)
    net = build_detector("fcos", 3, "resnet18", {"fpn_channels": 32}, frozen_norm=frozen_norm).eval()
    kinds = {type(m) for m in net.modules() if isinstance(m, nn.Conv2d)}
    assert kinds == ({Conv2d, FoldedConv2d} if frozen_norm else {Conv2d})
    images = torch.randint(0, 256, (2, 3, 128, 160), dtype=torch.uint8)

    def learn():
        net.zero_grad()
        maps = net.features(images).maps
        sum(m.square().mean() for m in maps.values()).backward()
        return {k: p.grad for k, p in net.named_parameters() if p.grad is not None}

    fast = learn()
    assert {shape[2:] for shape, _ in calls} >= {(32, 40), (16, 20)}  # backbone and pyramid
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 10**6)
    calls.clear()
    plain = learn()
    assert not calls
    assert fast.keys() == plain.keys()
    for key, grad in plain.items():
        torch.testing.assert_close(fast[key], grad, atol=3e-4 * grad.abs().max().item(), rtol=0)


def test_operations_are_counted_of_convolutions_as_such(calls):
    net = build_detector("fcos", 3, "resnet18", {"fpn_channels": 32, "head_convs": 1}).eval()
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(images)
    assert calls
    counted, _ = operations(net, images)
    assert counted > 1.2 * counter.get_total_flops()


def test_compiled_and_traced_networks_hold_convolutions(calls):
    net = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    fewer_products(net)
    x = torch.randn(2, 8, 16, 16)
    traced = torch.jit.trace(net, x, check_trace=False)
    assert "aten::_convolution" in str(traced.inlined_graph)
    exported = torch.export.export(net, (x,))
    assert [str(n.target) for n in exported.graph.nodes if n.op == "call_function"] == ["aten.conv2d.default"]
    assert not calls
