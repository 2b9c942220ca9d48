"""Being asked to stop: the trainer finishes its step and saves."""

from __future__ import annotations

import signal
from typing import Any


class Stopped(Exception):
    """Asked to stop by a signal; the run is saved and `resume=True` goes on. code: 143 or 130."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


class SignalWatch:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that came
        self.old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.old[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller's business
                break
        return self

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None:
            raise KeyboardInterrupt
        self.asked = number

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
