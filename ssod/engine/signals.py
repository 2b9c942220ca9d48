"""Being asked to stop: the trainer finishes its step and saves."""

from __future__ import annotations

import signal
import time
from typing import Any


class Stopped(Exception):
    """Asked to stop by a signal; the run is saved and `resume=True` goes on. code: 143 or 130."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.code = 128 + number


TWICE = 1.0  # seconds; what comes sooner is the same request: a launcher hands on what its workers have heard, too


class SignalWatch:
    """Notes SIGTERM and SIGINT instead of dying of them; a second one, later than TWICE, ends the process at once."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal that came
        self._since = 0.0
        self.old: dict[int, Any] = {}

    def __enter__(self) -> SignalWatch:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self.old[number] = signal.signal(number, self._ask)
            except ValueError:  # not in the main thread: the caller's business
                break
        return self

    def _ask(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._since = number, now
        elif now - self._since > TWICE:
            raise KeyboardInterrupt

    def __exit__(self, *_: Any) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
