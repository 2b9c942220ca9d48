"""The strategy that docs/adding.md shows, from the page itself: it trains on every detector, and weighs as it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small import OPTIONS, batch, detector

from ssod.strategies.base import Plan
from ssod.structures import Instances

PAGE = Path(__file__).parents[2] / "docs" / "adding.md"


def shown() -> Any:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    held: dict[str, Any] = {}
    exec(compile(block, PAGE.name, "exec"), held)  # the page is ours
    return held["ByScore"]


@pytest.mark.parametrize("name", OPTIONS)
def test_it_trains(name: str) -> None:
    kind = shown()
    strategy = kind(detector(name), kind.Options(tau=0.002), Plan(10, 0, 0.9)).train()
    out = strategy(batch(), 0)
    assert out.stats["pseudo/per_image"] > 0
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(p.grad is not None for p in strategy.student.parameters() if p.requires_grad)
    strategy.after_step(0)


def test_pseudo_boxes_count_by_their_score() -> None:
    kind = shown()
    strategy = kind(detector("fcos"), kind.Options(), Plan(10, 0, 0.9))
    scores = torch.tensor([0.5, 0.9])
    found = Instances(torch.tensor([[0.0, 0, 9, 9], [5, 5, 20, 20]]), torch.tensor([0, 1]), scores=scores)
    target = strategy.weighed(found)
    assert target.cls_weight is not None
    assert target.box_weight is not None
    assert torch.equal(target.cls_weight, scores)
    assert torch.equal(target.box_weight, scores)
