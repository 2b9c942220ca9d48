"""How long the loop waits for its data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


class DataClock:
    """The share of a loop's time that goes by before its next item is there."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured: what comes between is neither waiting nor work."""
        self._waited, self._since = 0.0, time.monotonic()

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """The same items, timed."""
        iterator = iter(items)
        while True:
            started = time.monotonic()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.monotonic() - started
            yield item

    def read(self) -> float:
        """0 .. 1, since the last reading."""
        share = self._waited / max(time.monotonic() - self._since, 1e-9)
        self.restart()
        return share
