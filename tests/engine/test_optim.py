"""Learning rate, groups, number formats; the log's table."""

from __future__ import annotations

import copy
import csv
from pathlib import Path

import pytest
import torch
from torch import nn

from ssod.config import load_config
from ssod.detectors import build_detector
from ssod.engine.log import Averages, progress_text
from ssod.engine.optim import build_optimizer, lr_at, put_back, set_lr
from ssod.nn import precision
from ssod.nn.precision import amp_dtype, autocast, lay_out
from ssod.report.table import Table


def test_learning_rate_by_hand() -> None:
    config = load_config("train", {"lr0": 1.0, "warmup_iters": 10, "schedule": "multistep", "milestones": [0.6, 0.8]})
    assert lr_at(0, 100, config) == pytest.approx(0.001)
    assert lr_at(5, 100, config) == pytest.approx(0.001 + 0.999 / 2)
    assert [lr_at(s, 100, config) for s in (10, 59, 60, 80)] == pytest.approx([1, 1, 0.1, 0.01])
    assert lr_at(2, 20, config) == pytest.approx(1)  # warm-up is at most a tenth of the run
    cosine = load_config("train", {"lr0": 1.0, "warmup_iters": 0, "schedule": "cosine"})
    assert lr_at(50, 100, cosine) == pytest.approx(0.01 + 0.99 / 2)
    assert lr_at(0, 100, cosine) == pytest.approx(1)


def test_norms_and_biases_are_not_decayed_and_frozen_parameters_left_out() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2).requires_grad_(False))
    optimizer = build_optimizer(net, load_config("train", {"weight_decay": 0.3}))
    decayed, plain = optimizer.param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert decayed["weight_decay"] == 0.3
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0


def test_the_backbone_has_a_share_of_the_learning_rate() -> None:
    net = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 16})
    optimizer = build_optimizer(net, load_config("train", {"lr0": 0.5, "lr_backbone": 0.1}))
    set_lr(optimizer, 0.2)
    lr_of = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(lr_of) == len(list(net.parameters()))
    inside = {id(p) for p in net.backbone.parameters()}
    assert all(lr_of[i] == pytest.approx(0.02 if i in inside else 0.2) for i in lr_of)


def net_of(layout: torch.memory_format) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=layout)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        x = torch.rand(2, 3, 9, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("saved_in", LAYOUTS)
@pytest.mark.parametrize("saved_as", ["fused", "foreach"])
def test_a_resumed_optimizer_goes_on_in_any_layout(
    name: str, layout: torch.memory_format, saved_in: torch.memory_format, saved_as: str
) -> None:
    """The same as plain Python without a break, also from a file of another layout, or of a version without `fused`."""
    config = load_config("train", {"optimizer": name, "lr0": 0.01, "weight_decay": 0.1, "momentum": 0.9})
    plain = net_of(torch.contiguous_format)
    slow = build_optimizer(plain, config)
    for group in slow.param_groups:
        group.update(fused=None, foreach=False)
    expected = train(plain, slow, range(6))

    first = net_of(saved_in)
    optimizer = build_optimizer(first, config)
    if saved_as == "foreach":
        for group in optimizer.param_groups:
            group.update(fused=None, foreach=True)
    train(first, optimizer, range(3))
    second = net_of(layout)
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(second, config)
    put_back(resumed, copy.deepcopy(optimizer.state_dict()))
    assert all(group["fused"] and not group["foreach"] for group in resumed.param_groups)
    for found, wanted in zip(train(second, resumed, range(3, 6)), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_automatic_precision_avoids_bf16_for_depthwise_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    plain, depthwise = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: True)
    assert amp_dtype("auto", cpu, plain) == torch.bfloat16
    assert amp_dtype("auto", cpu, depthwise) is None
    assert amp_dtype("bf16", cpu, depthwise) == torch.bfloat16
    assert amp_dtype(False, cpu, plain) is None
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: False)
    assert amp_dtype("auto", cpu, plain) is None


@pytest.mark.parametrize(("dtype", "wide"), [(torch.bfloat16, False), (torch.bfloat16, True), (None, True)])
def test_kernels_and_their_gradients_share_a_layout(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype | None, wide: bool
) -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3))
    before = [p.clone() for p in net.parameters()]
    monkeypatch.setattr(precision, "wide_vectors", lambda: False)
    lay_out(net, None)
    assert net[0].weight.is_contiguous()
    monkeypatch.setattr(precision, "wide_vectors", lambda: wide)
    lay_out(net, dtype)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    with autocast(dtype, torch.device("cpu")):
        net(torch.rand(1, 8, 9, 9).contiguous(memory_format=torch.channels_last)).float().sum().backward()
    for kernel in (net[0].weight, net[2].weight):
        assert kernel.grad is not None
        assert kernel.stride() == kernel.grad.stride() != torch.empty(kernel.shape).stride()


def test_averages_are_means_of_what_was_there() -> None:
    a = Averages()
    a.add({"x": torch.tensor(1.0, requires_grad=True), "y": 2.0})
    a.add({"x": 3.0})
    assert a.read() == {"x": 2.0, "y": 2.0}
    assert a.read() == {}


def test_the_table_takes_new_columns_and_forgets_what_came_after_a_checkpoint(tmp_path: Path) -> None:
    t = Table(tmp_path / "r.csv")
    t.add({"step": 10, "a": 1.0})
    t.add({"step": 20, "b": 2.0})
    rows = list(csv.DictReader((tmp_path / "r.csv").read_text().splitlines()))
    assert rows == [{"step": "10", "a": "1", "b": ""}, {"step": "20", "a": "", "b": "2"}]
    again = Table(tmp_path / "r.csv", until_step=10)
    again.add({"step": 20, "a": 5.0})
    assert again.series("a") == ([10, 20], [1.0, 5.0])
    assert again.series("b") == ([], [])


def test_the_progress_line_shows_both_losses_and_what_the_teacher_gave() -> None:
    values = {"sup/cls": 0.5, "sup/box": 0.25, "unsup/cls": 0.125}
    values |= {"pseudo/per_image": 12.34, "pseudo/kept": 0.4, "pseudo/tau": 0.5}
    assert progress_text(values) == "sup 0.750 unsup 0.125 | 12.3 boxes/img, 40% kept, tau 0.50"
