"""Training methods by name. A new one is a file here, a line in STRATEGIES, a test and a YAML."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from ssod.config import validate
from ssod.detectors import DETECTORS, detector_class
from ssod.detectors.base import Detector
from ssod.errors import UserError, did_you_mean
from ssod.strategies.base import Plan, Strategy

STRATEGIES = {
    "supervised": "ssod.strategies.supervised:Supervised",
    "mean_teacher": "ssod.strategies.mean_teacher:MeanTeacher",
    "unbiased_teacher": "ssod.strategies.unbiased_teacher:UnbiasedTeacher",
    "soft_teacher": "ssod.strategies.soft_teacher:SoftTeacher",
    "rpl": "ssod.strategies.rpl:RPL",
    "prc": "ssod.strategies.prc:PRC",
    "sed": "ssod.strategies.sed:SED",
    "lsm": "ssod.strategies.lsm:LSM",
    "comining": "ssod.strategies.comining:CoMining",
}


def strategy_class(name: str) -> type[Strategy]:
    if name not in STRATEGIES:
        raise UserError(
            f"'{name}' is not a strategy.{did_you_mean(name, STRATEGIES)} Strategies: {', '.join(STRATEGIES)}."
        )
    module, _, cls = STRATEGIES[name].partition(":")
    return getattr(importlib.import_module(module), cls)


def build_strategy(name: str, student: Detector, options: Mapping[str, Any], plan: Plan) -> Strategy:
    """Build a strategy around a student. Raises UserError for unknown names and options, and for a pair that
    cannot work (the detector lacks a capability the strategy needs)."""
    cls = strategy_class(name)
    for capability in cls.needs:
        if not isinstance(student, capability):
            raise UserError(
                f"strategy={name} needs a detector with {capability.__name__}, "
                f"which {type(student).__name__} does not have; choose {' or '.join(_able(capability))}."
            )
    return cls(student, validate(cls.Options, options, "strategy."), plan)  # type: ignore[call-arg]


def _able(capability: type[Any]) -> list[str]:
    """The detectors that have a capability, by name."""
    verbs = [n for n, value in vars(capability).items() if callable(value) and not n.startswith("_")]
    return [name for name in DETECTORS if all(hasattr(detector_class(name), verb) for verb in verbs)]
