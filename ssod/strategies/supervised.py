"""The control: labelled images only. With `ema` it also keeps a moving average, as the other strategies do."""

from __future__ import annotations

from pydantic import Field

from ssod.detectors.base import Detector
from ssod.strategies.base import Plan, Strategy, StrategyOptions


class Supervised(Strategy):
    class Options(StrategyOptions):
        ema: bool = Field(False, description="also keep (and evaluate, as `teacher`) a moving average of the student")

    options: Options
    uses_unlabeled = False

    def __init__(self, student: Detector, options: Options, plan: Plan) -> None:
        super().__init__(student, options, plan, with_teacher=options.ema)
