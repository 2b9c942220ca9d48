"""Which strategy trains which detector, what a pair needs for it, and the page that says so:

python tests/strategies/support_table.py > docs/strategies/README.md
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import yaml
from small import OPTIONS, K, batch, view

from ssod.detectors import DETECTORS, build_detector
from ssod.errors import UserError
from ssod.strategies import STRATEGIES, build_strategy, strategy_class
from ssod.strategies.base import Plan, Strategy
from ssod.structures import SemiBatch, View

# Keys of the command line without which a strategy is refused: on every detector, or on one of them in particular.
NEEDS: dict[str, tuple[str, ...]] = {
    "rpl": ("detector.codec=bucket",),
    "rpl on deformable_detr": ("strategy.certainty=false",),
    "prc": ("detector.codec=gaussian",),
    "prc on deformable_detr": ("strategy.ler=false",),
    "sed": ("detector.half_scale=true",),
    "lsm": ("detector.half_scale=true",),
    "comining": ("augment=comining",),
}
IMPOSSIBLE = {("soft_teacher", name) for name in ("fcos", "retinanet", "deformable_detr")}  # refused whatever is set


class Part(NamedTuple):
    """Something of one paper that others can use: the keys that switch it on, and an option of who has it."""

    title: str
    keys: str
    option: str
    text: str


PARTS = (
    Part(
        "RPL's thresholds and weights by class",
        "`strategy.gamma1`, `strategy.gamma2`",
        "gamma1",
        "Eq. 6 of RPL; see [prc](prc.md#with-rpls-thresholds-and-weights) for what v is there.",
    ),
    Part(
        "SED's half-size branch",
        "`strategy.scale_weight`, `detector.half_scale=true`",
        "scale_weight",
        "The student on the strong view at half size learns the teacher's soft predictions of the weak view at full "
        "size. The weight is within w_u: the loss is `w_u (L_u + scale_weight L_half)`. The teacher looks once.",
    ),
)


class Combination(NamedTuple):
    title: str
    yaml: str


COMBINATIONS = (
    Combination(
        "LER/PRC with RPL's thresholds and weights",
        """\
detector:
  name: faster_rcnn
  codec: gaussian
strategy:
  name: prc
  gamma1: 0.05
  gamma2: 0.6
""",
    ),
    Combination(
        "Mean teacher with the half-size branch",
        """\
detector:
  name: fcos
  half_scale: true
strategy:
  name: mean_teacher
  scale_weight: 1.0
""",
    ),
    Combination(
        "LER/PRC with both",
        """\
detector:
  name: faster_rcnn
  codec: gaussian
  half_scale: true
strategy:
  name: prc
  gamma1: 0.05
  gamma2: 0.6
  scale_weight: 1.0
""",
    ),
)


def pairs() -> list[tuple[str, str]]:
    return [(kind, name) for kind in STRATEGIES for name in DETECTORS]


def needs(kind: str, name: str) -> tuple[str, ...]:
    return NEEDS.get(f"{kind} on {name}", NEEDS.get(kind, ()))


def parsed(keys: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """`detector.codec=bucket` and the like -> {"detector": {"codec": "bucket"}, "strategy": {...}}."""
    found: dict[str, dict[str, Any]] = {"detector": {}, "strategy": {}}
    for key, _, value in (k.partition("=") for k in keys):
        if key != "augment":  # of the data, see `fitting`
            section, option = key.split(".")
            found[section][option] = yaml.safe_load(value)
    return found


def built(kind: str, name: str, detector: dict[str, Any] | None = None, burn_in: int = 0, **options: Any) -> Strategy:
    """The pair with the smallest networks of the tests, which find objects from the start: class scores near 0.3."""
    torch.manual_seed(0)
    student = build_detector(name, K, "resnet10t", OPTIONS[name] | (detector or {}))
    with torch.no_grad():
        for head in (getattr(student, "cls_logits", None), *getattr(student, "cls_heads", [])):
            if head is not None:
                head.bias += 3.75  # from a probability of 0.01
    return build_strategy(kind, student, options, Plan(10, burn_in, 0.9)).train()


def fitting(keys: tuple[str, ...]) -> SemiBatch:
    """Labelled and unlabelled images; with augment=comining labelled ones in two views, their boxes incomplete."""
    usual = batch()
    if "augment=comining" not in keys:
        return usual
    one, other = usual.labeled, view(1, [[4.0, 4, 30, 40], [30, 20, 60, 60]])
    other.images = other.images // 2 + 100
    sizes, matrices = one.sizes.repeat(2, 1), one.matrices.repeat(2, 1, 1)
    images = torch.cat([one.images, other.images])
    incomplete = torch.zeros(4, dtype=torch.bool)
    labeled = View(images, sizes, matrices, one.targets + other.targets, one.indices * 2, incomplete)
    return SemiBatch(labeled, usual.weak, usual.strong)


@functools.cache
def refusal(kind: str, name: str, keys: tuple[str, ...]) -> str | None:
    """The sentence with which a pair is refused, when it is built or at its first step; None if it trains."""
    options = parsed(keys)
    try:
        losses = built(kind, name, options["detector"], **options["strategy"])(fitting(keys), 0).losses
    except UserError as error:
        return str(error)
    torch.stack(list(losses.values())).sum().backward()
    return None


def page() -> str:
    """The text of docs/strategies/README.md; every entry is what a run said."""
    return "\n".join([*_head(), *_table(), *_sentences(), *_combining()])


def _head() -> Iterator[str]:
    yield "# Strategies and detectors"
    yield ""
    yield "This page is written by `tests/strategies/support_table.py`, which trains each pair; do not edit it."
    yield ""


def _table() -> Iterator[str]:
    yield "Which strategy trains which detector. Where keys are given, the pair needs them."
    yield ""
    yield f"| `strategy=` | {' | '.join(f'`{name}`' for name in DETECTORS)} |"
    yield f"|{'---|' * (1 + len(DETECTORS))}"
    for kind in STRATEGIES:
        cells = []
        for name in DETECTORS:
            keys = needs(kind, name)
            sentence = refusal(kind, name, keys)
            cells.append("no" if sentence else ", ".join(f"`{key}`" for key in keys) or "yes")
        title = kind if kind == "supervised" else f"[{kind}]({kind}.md)"
        yield f"| {title} | {' | '.join(cells)} |"
    yield ""


def _sentences() -> Iterator[str]:
    """Of each strategy what is said where its pair is refused, sentences that differ in the detector once each."""
    yield "## What is refused"
    yield "In one sentence, before anything is learned:"
    yield ""
    for kind in STRATEGIES:
        said: dict[str, list[str]] = {}
        for name in DETECTORS:
            sentence = refusal(kind, name, ())
            if sentence:
                said.setdefault(sentence, []).append(name)
        for sentence, names in said.items():
            yield f"- `{kind}` on {', '.join(names)}: {sentence}"
    yield ""


def _combining() -> Iterator[str]:
    yield "## Combining"
    yield "Parts of one paper that are options of other strategies, off unless they are that paper's own:"
    yield ""
    yield "| part | keys | strategies | |"
    yield "|---|---|---|---|"
    for part in PARTS:
        users = [kind for kind in STRATEGIES if part.option in strategy_class(kind).Options.model_fields]
        yield f"| {part.title} | {part.keys} | {', '.join(users)} | {part.text} |"
    yield ""
    yield "How boxes are coded (`detector.codec`), what ranks them (`detector.rank_by_quality`), the region head's"
    yield "focal loss (`detector.roi_focal_gamma`) and the views (`augment`) go with any strategy."
    for title, text in COMBINATIONS:
        yield ""
        yield f"{title}:"
        yield "```yaml"
        yield f"{text}```"
    yield ""


if __name__ == "__main__":
    print(page(), end="")
