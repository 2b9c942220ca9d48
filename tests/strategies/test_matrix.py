"""Every strategy on every detector: a few steps of training, what is saved, what is detected, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import support_table
import torch
import yaml
from small import SIZE, K
from support_table import COMBINATIONS, IMPOSSIBLE, built, fitting, needs, pairs, parsed, refusal

from ssod.strategies import STRATEGIES
from ssod.strategies.base import Strategy
from ssod.structures import SemiBatch

PAGE = Path(__file__).parents[2] / "docs" / "strategies" / "README.md"
GAUSSIAN = ("detector.codec=gaussian",)
# What networks that have not learned reach: without it no box would teach.
LOW: dict[str, dict[str, Any]] = {
    "mean_teacher": {"tau": 0.2},
    "unbiased_teacher": {"tau": 0.2},
    "soft_teacher": {"candidates": 0.2, "tau": 0.2, "spread": 1.0},
    "rpl": {"tau": 0.1, "gamma1": 0.0, "max_weight": 1.0},  # the labelled loss keeps its scale from step 0 on
    "prc": {"tau": 0.2},
    "lsm": {"tau": 0.25, "alpha": 0.15},
    "comining": {"tau": 0.2},
}
# Options that take another path through a strategy than the table's.
VARIANTS = [
    ("unbiased_teacher", "faster_rcnn", ("detector.roi_focal_gamma=1.5",)),
    ("soft_teacher", "faster_rcnn", (*GAUSSIAN, "detector.class_agnostic=true", "strategy.jitters=2")),
    ("rpl", "fcos", ("detector.codec=bucket", "strategy.ensemble=2", "strategy.teacher=ema")),
    ("prc", "faster_rcnn", (*GAUSSIAN, "strategy.prc=false")),
    ("prc", "faster_rcnn", (*GAUSSIAN, "strategy.ler=false")),
    ("lsm", "fcos", ("strategy.pim=false", "strategy.distill=false")),
]
TRAINED = [(kind, name, needs(kind, name)) for kind, name in pairs() if (kind, name) not in IMPOSSIBLE]
STEPS = 4


def made(kind: str, name: str, keys: tuple[str, ...]) -> Strategy:
    options = parsed(keys)
    return built(kind, name, options["detector"], burn_in=1, **LOW.get(kind, {}) | options["strategy"])


def train(s: Strategy, batch: SemiBatch) -> tuple[list[dict[str, float]], set[str]]:
    """Steps 0 (labelled images only, burn-in) to STEPS - 1, each on the same images: its losses and statistics, and the
    names of the parameters that had a gradient other than 0."""
    optimizer = torch.optim.SGD([p for p in s.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    seen, reached = [], set()
    for step in range(STEPS):
        torch.manual_seed(step)
        out = s(batch if step else SemiBatch(batch.labeled), step)
        total = torch.stack(list(out.losses.values())).sum()
        assert torch.isfinite(total)
        optimizer.zero_grad()
        total.backward()
        # Several processes want a gradient of each in every step.
        assert [n for n, p in s.named_parameters() if p.requires_grad and p.grad is None] == []
        reached |= {n for n, p in s.named_parameters() if p.grad is not None and p.grad.any()}
        torch.nn.utils.clip_grad_norm_(s.parameters(), 10)
        optimizer.step()
        s.after_step(step)
        seen.append(
            {k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in (out.losses | out.stats).items()}
        )
    return seen, reached


def teachers(s: Strategy) -> list[tuple[str, torch.Tensor]]:
    return [(n, p) for n, p in s.named_parameters() if n.startswith("teacher")]


@pytest.mark.parametrize(("kind", "name", "keys"), [*TRAINED, *VARIANTS], ids=lambda v: str(v) if v else "")
def test_a_pair_trains_is_saved_and_detects(kind: str, name: str, keys: tuple[str, ...]) -> None:
    s, batch = made(kind, name, keys), fitting(keys)
    start = {k: v.clone() for k, v in s.state_dict().items()}
    seen, reached = train(s, batch)

    # Both kinds of images teach, and the labelled ones are learned.
    assert not any(k.startswith("unsup/") for k in seen[0])
    assert any(k.startswith("unsup/") and v > 0 for k, v in seen[-1].items()) == (kind != "supervised")
    torch.manual_seed(0)  # as in the first step: the samplers' draws
    with torch.no_grad():
        after = copy.deepcopy(s)(SemiBatch(batch.labeled), 0).losses
    assert sum(after.values()) < sum(v for k, v in seen[0].items() if k.startswith("sup/"))
    found = {k: v for k, v in seen[-1].items() if k in ("pseudo/per_image", "mined/per_image")}
    assert all(v > 0 for v in found.values())
    assert found or kind in ("supervised", "sed")  # SED has no pseudo boxes

    # All of the student learns; the teacher follows, or stays as stage one left it, without a gradient.
    assert reached == {n for n, p in s.named_parameters() if p.requires_grad}
    assert all(p.grad is None and not p.requires_grad for _, p in teachers(s))
    state = s.state_dict()
    moved = [n for n, _ in teachers(s) if not torch.equal(state[n], start[n])]
    assert len(moved) >= 0.7 * len(teachers(s))  # some steps are too small for a float to show
    assert all(torch.isfinite(v).all() for v in state.values())

    same_after_loading(s, made(kind, name, keys), batch)
    detects(s, batch)


def same_after_loading(s: Strategy, fresh: Strategy, batch: SemiBatch) -> None:
    """The next step of a strategy that another one's state was loaded into is that one's own."""
    state = {k: v.clone() for k, v in s.state_dict().items()}
    losses = []
    for one in (s, fresh):
        one.load_state_dict(state)
        torch.manual_seed(STEPS)
        losses.append(one(batch, STEPS).losses)
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][k], losses[1][k]) for k in losses[0])


def detects(s: Strategy, batch: SemiBatch) -> None:
    """Every network that could be deployed, and several together, find boxes within the images."""
    s.eval()
    for network in (s.networks() | s.together()).values():
        found = network(batch.labeled.images, batch.labeled.sizes, conf=0.02)
        assert len(found) == len(batch.labeled)
        assert sum(map(len, found)) > 0
        for one in found:
            assert one.scores is not None
            assert 0.02 <= one.scores.min() <= one.scores.max() <= 1
            assert 0 <= one.boxes.min() <= one.boxes.max() <= SIZE
            assert 0 <= one.labels.min() <= one.labels.max() < K


@pytest.mark.parametrize(("kind", "name"), sorted(IMPOSSIBLE))
def test_other_pairs_are_refused_in_one_sentence(kind: str, name: str) -> None:
    sentence = refusal(kind, name, ())
    assert sentence is not None
    assert "\n" not in sentence
    assert kind in sentence
    assert sentence.endswith("choose faster_rcnn.")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=lambda c: c.title)
def test_a_combination_of_the_page_trains(combination: support_table.Combination) -> None:
    config = yaml.safe_load(combination.yaml)
    detector, strategy = config["detector"], config["strategy"]
    name, kind = detector.pop("name"), strategy.pop("name")
    s = built(kind, name, detector, burn_in=1, **LOW[kind] | strategy)
    last = train(s, fitting(()))[0][-1]
    assert ("pseudo/tau_min" in last) == ("gamma1" in strategy)
    assert any("half/" in k for k in last) == ("scale_weight" in strategy)


def test_every_strategy_has_a_page_of_its_own() -> None:
    assert all((PAGE.parent / f"{kind}.md").is_file() for kind in STRATEGIES if kind != "supervised")


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == support_table.page()
