"""A run of several processes ends when one of them hangs, instead of waiting for it.

A process that dies is seen by the launcher. One that hangs is not: the others wait for it in their next all-reduce, for
minutes. So each process has a thread that beats through the launcher's store and listens to the beats of the others,
and that also watches its own loop.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from ssod import dist

INTERVAL = 1.0  # seconds between beats
SILENCE = 15.0  # seconds without a beat after which a process counts as hung
STALL = 20.0  # seconds without a step, and SLOWER times the longest step, after which the loop counts as hung
SLOWER = 10.0


class Pulse:
    """Beats while it is entered; nothing where there is one process. `step` after every step, `rest` before what takes
    its own time, such as a validation: until the next step the loop is not watched then."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._last: float | None = None  # when the loop last made a step
        self._longest = 0.0  # seconds between two steps
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Pulse:
        if dist.world() > 1:
            self._thread = threading.Thread(target=self._beat, args=(dist.store(),), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def step(self) -> None:
        now = time.monotonic()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now

    def rest(self) -> None:
        self._last = None

    def _beat(self, store: Any) -> None:
        own, world = dist.rank(), dist.world()
        who = f"{socket.gethostname()}:{os.getpid()}"
        for r in range(world):  # whoever comes first makes the keys, so that nobody waits for them
            store.compare_set(f"pulse/{r}", "", "")
        heard: dict[int, tuple[str, float]] = {}  # rank -> what it last said, and when that was new
        for count in itertools.count():  # the first beat at once: who never beat is not missed
            store.set(f"pulse/{own}", f"{who}:{count}")
            if self._stop.wait(INTERVAL):
                return
            now = time.monotonic()
            for r, said in enumerate(store.multi_get([f"pulse/{r}" for r in range(world)])):
                text = said.decode()
                if r not in heard or heard[r][0] != text:
                    heard[r] = text, now
                elif r != own and text and now - heard[r][1] > SILENCE:
                    _end(f"rank {r} has been silent for {SILENCE:.0f} s", text)
            if self._last is not None and now - self._last > max(STALL, SLOWER * self._longest):
                _end(f"rank {own} has made no step for {now - self._last:.0f} s", "")


def _end(reason: str, silent: str) -> None:
    """Say why and end this process at once: its main thread waits in a call that does not come back. The launcher then
    ends the others; a silent one on this machine is ended here, as it may not hear the launcher's signal either."""
    host, _, rest = silent.partition(":")
    if host == socket.gethostname():
        os.kill(int(rest.split(":")[0]), signal.SIGKILL)
    print(
        f"ssod: {reason}, so the run ends; `ssod train resume=...` goes on from its last checkpoint.", file=sys.stderr
    )
    sys.stderr.flush()
    os._exit(1)
