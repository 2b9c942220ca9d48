"""What an alarm is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

PATIENCE = 3  # log lines, or validations, in a row


@dataclass(frozen=True)
class Alarm:
    """One thing that goes wrong.

    code     its name in the files and in docs/diagnosis.md; a run says each code once
    level    "error": the run cannot come to what it is for, and strict=true stops it; "warning": it may
    text     the cause with its numbers, and the way out: which option to set to which value
    numbers  the numbers of the text, by name; what has several is a mapping by class name
    """

    code: str
    level: Literal["warning", "error"]
    text: str
    numbers: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
