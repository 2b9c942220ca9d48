"""What is held does not move, and moves again afterwards."""

import pytest
import torch
from torch import nn

from ssod.nn.backbone import Backbone
from ssod.nn.held import parameters_held, statistics_held


def test_held_parameters_get_no_gradient_and_others_do() -> None:
    below, above = nn.Linear(3, 3), nn.Linear(3, 1)
    below.bias.requires_grad_(False)  # frozen by the user: it stays so
    x = torch.ones(2, 3)
    with parameters_held(below):
        hidden = below(x)
        loss = above(hidden).sum()
    assert not hidden.requires_grad  # no graph, so no backward pass
    loss.backward()
    assert below.weight.grad is None
    assert above.weight.grad is not None
    assert below.weight.requires_grad
    assert not below.bias.requires_grad
    below(x).sum().backward()
    assert below.weight.grad is not None


@pytest.mark.parametrize("frozen", [False, True])
def test_held_statistics(frozen: bool) -> None:
    torch.manual_seed(0)
    body = Backbone("test_resnet", (8, 16, 32), frozen_norm=frozen).train()
    x = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in body.state_dict().items()}
    with statistics_held(body):
        held = body(x)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    free = body(x)  # normalised by the batch both times
    assert all(torch.equal(held[s], free[s]) for s in held)
    moved = any(not torch.equal(v, before[k]) for k, v in body.state_dict().items())
    assert moved != frozen
    with statistics_held(body.eval()):
        by_running = body(x)
    assert all(torch.equal(by_running[s], body(x)[s]) for s in held)


def test_an_error_inside_lets_go() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.BatchNorm2d(1, track_running_stats=False))
    with pytest.raises(RuntimeError), parameters_held(net), statistics_held(net):
        net(torch.zeros(1, 2, 3, 3))
    assert all(p.requires_grad for p in net.parameters())
    assert [m.track_running_stats for m in net[1:]] == [True, False]
