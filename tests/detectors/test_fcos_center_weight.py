"""The box loss of FCOS weighted by centerness, as Co-mining's code has it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from ssod.detectors import build_detector
from ssod.structures import DenseOutput, Instances

BOX = torch.tensor([[2.0, 2, 18, 10]])
# The points (4, 4) and (12, 4) of stride 8 learn BOX. Their distances to its sides are (2, 2, 14, 6) and (10, 2, 6, 6):
MIDDLE = (math.sqrt(2 / 14 * 2 / 6), math.sqrt(6 / 10 * 2 / 6))  # 0.2182, 0.4472
# Codes of 1 stride a side mean boxes of 16 x 16 around them: overlap with BOX (128 px^2) 10 x 8 and 14 x 8,
# union 304 and 272, hull 22 x 16 and 18 x 16:
GIOU = (1 - 80 / 304 + (352 - 304) / 352, 1 - 112 / 272 + (288 - 272) / 288)  # 0.8732, 0.6438


def model_and_output(**options: object):  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = build_detector("fcos", 2, "test_resnet", {"fpn_channels": 32, "head_convs": 1} | options).eval()
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with torch.no_grad():
        output: DenseOutput = model.head(model.features(images))
    codes = torch.ones_like(output.codes).requires_grad_()
    return model, replace(output, codes=codes)


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_points_count_as_much_as_they_are_in_the_middle(weight: float) -> None:
    target = Instances(BOX, torch.tensor([1]), box_weight=torch.tensor([weight]))
    for weighted, expected in (
        (False, sum(GIOU) / 2),
        (True, (MIDDLE[0] * GIOU[0] + MIDDLE[1] * GIOU[1]) / sum(MIDDLE)),  # 0.7190: the sum of centernesses divides
    ):
        model, output = model_and_output(center_weighted_box=weighted)
        loss = model.loss(output, [target])
        assert loss["box"].item() == pytest.approx(weight * expected, rel=1e-5)


def test_the_other_losses_stay() -> None:
    target = Instances(BOX, torch.tensor([1]))
    plain, weighted = (
        model.loss(output, [target])
        for model, output in (model_and_output(center_weighted_box=w) for w in (False, True))
    )
    assert plain["cls"].item() == weighted["cls"].item()
    assert plain["centerness"].item() == weighted["centerness"].item()


def test_without_a_box_it_is_zero() -> None:
    model, output = model_and_output(center_weighted_box=True)
    losses = model.loss(output, [Instances.empty()])
    assert losses["box"].item() == 0
    sum(losses.values()).backward()
    assert output.codes.grad is not None
    assert not output.codes.grad.any()
