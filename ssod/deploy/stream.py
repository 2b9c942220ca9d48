"""The loop of `predict`: pictures in, what was found on them out, in their order. Needs no torch.

Pictures are read ahead by threads, cut into tiles where that is asked for, collected by padded size and looked at in
batches of one size, so that no result depends on its neighbours. However many pictures come, no more than a window of
them is in memory: where a size is so rare that its batch does not fill up within the window, it is looked at as it is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ssod.data.image import ImageError
from ssod.deploy.results import Boxes
from ssod.deploy.sources import Picture
from ssod.deploy.tiles import Place, Tiling, merged

WINDOW = 4  # batches that are in memory at once, at most
STAGES = ("preprocess", "inference", "postprocess")

T = TypeVar("T")
R = TypeVar("R")


class Seen(NamedTuple):
    """What a model found on a batch. boxes: of each image, in pixels of what `ready` was given; ms: of each stage, of
    the whole batch."""

    boxes: list[Boxes]
    ms: dict[str, float]


class Runner(Protocol[T]):
    """A model and how it wants its images. batch: images at once, at most."""

    batch: int

    def ready(self, pixels: np.ndarray) -> T:
        """Bring uint8 [H, W, 3] RGB to the size the model wants. Called by several threads."""

    def size(self, item: T) -> Hashable:
        """What images that go into one batch have in common."""

    def see(self, items: list[T]) -> Seen:
        """Find objects on images of one size."""


class Found(NamedTuple):
    """What was found on a picture.

    pixels  uint8 [H, W, 3] of a picture that is in no file, else None; speed: milliseconds, see `Results`
    """

    picture: Picture
    pixels: np.ndarray | None
    boxes: Boxes
    speed: dict[str, float]


@dataclass
class _Open:
    """A picture on its way; `parts` are the boxes on its places, as far as they have been looked at."""

    picture: Picture
    pixels: np.ndarray | None
    shape: tuple[int, int]
    places: list[Place]
    parts: dict[int, Boxes] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


class _Piece(NamedTuple):
    """One place of a picture, ready for the model. ms: what getting it ready took."""

    of: _Open
    number: int
    item: Any
    ms: float


class _Read(NamedTuple):
    """A decoded picture: its only piece, or the pixels that its pieces are to be cut from."""

    of: _Open
    piece: _Piece | None
    pixels: np.ndarray | None


class Stream:
    """Finds objects on one picture after the other, once.

    tiling   None: every picture as a whole
    select   which boxes count, called for each place
    iou      above which two boxes of neighbouring tiles are one object
    workers  threads that read and resize ahead, 0 = none
    """

    def __init__(
        self, runner: Runner[Any], tiling: Tiling | None, select: Callable[[Boxes], Boxes], iou: float, workers: int
    ) -> None:
        self.runner, self.tiling, self.select, self.iou, self.workers = runner, tiling, select, iou, workers
        self._window = WINDOW * runner.batch
        self._open: deque[_Open] = deque()
        self._waiting: dict[Hashable, list[_Piece]] = {}  # by size, that of the oldest piece first

    def find(self, pictures: Iterable[Picture], unreadable: list[tuple[str, str]]) -> Iterator[Found]:
        """In the order of the pictures. `unreadable` receives (name, reason) of those that cannot be read."""
        with ExitStack() as stack:
            pool = ThreadPoolExecutor(self.workers) if self.workers else None
            if pool is not None:
                stack.callback(pool.shutdown, cancel_futures=True)
            # Of pictures for tiles, which are large, few are ahead; else a batch is read while the last one is seen.
            depth = self.workers if self.tiling else max(2 * self.workers, self.runner.batch)
            for read in _ahead(pool, self._read, pictures, depth):
                if not isinstance(read, _Read):
                    unreadable.append(read)
                    continue
                self._open.append(read.of)
                for piece in self._pieces(read, pool):
                    self._add(piece)
                yield from self._finished()
                while len(self._open) >= self._window:
                    self._see_oldest()
                    yield from self._finished()
            while self._waiting:
                self._see_oldest()
                yield from self._finished()

    def _read(self, picture: Picture) -> _Read | tuple[str, str]:
        start = time.perf_counter()
        try:
            pixels = picture.read()
        except ImageError as error:
            return picture.name, error.reason
        height, width = pixels.shape[:2]
        places = [Place(0, 0, width, height)] if self.tiling is None else self.tiling.places(height, width)
        of = _Open(picture, None if picture.in_file else pixels, (height, width), places)
        of.speed["preprocess"] = _ms_since(start)
        if len(places) > 1:
            return _Read(of, None, pixels)
        return _Read(of, self._piece(of, pixels, 0), None)

    def _piece(self, of: _Open, pixels: np.ndarray, number: int) -> _Piece:
        start = time.perf_counter()
        item = self.runner.ready(of.places[number].crop(pixels))
        return _Piece(of, number, item, _ms_since(start))

    def _pieces(self, read: _Read, pool: ThreadPoolExecutor | None) -> Iterator[_Piece]:
        if read.piece is not None:
            yield read.piece
        if read.pixels is not None:
            cut = partial(self._piece, read.of, read.pixels)
            yield from _ahead(pool, cut, range(len(read.of.places)), 2 * self.workers)

    def _add(self, piece: _Piece) -> None:
        size = self.runner.size(piece.item)
        group = self._waiting.setdefault(size, [])
        group.append(piece)
        if len(group) == self.runner.batch:
            self._see(size)
        elif sum(map(len, self._waiting.values())) >= self._window:
            self._see_oldest()

    def _see_oldest(self) -> None:
        """The oldest picture that is open still waits, so this brings it on."""
        self._see(next(iter(self._waiting)))

    def _see(self, size: Hashable) -> None:
        group = self._waiting.pop(size)
        seen = self.runner.see([piece.item for piece in group])
        for piece, boxes in zip(group, seen.boxes, strict=True):
            piece.of.parts[piece.number] = self.select(boxes)
            piece.of.speed["preprocess"] += piece.ms
            for stage, ms in seen.ms.items():
                piece.of.speed[stage] += ms / len(group)

    def _finished(self) -> Iterator[Found]:
        while self._open and len(self._open[0].parts) == len(self._open[0].places):
            done = self._open.popleft()
            start = time.perf_counter()
            boxes = merged([done.parts[i] for i in range(len(done.places))], done.places, done.shape, self.iou)
            done.speed["postprocess"] += _ms_since(start)
            yield Found(done.picture, done.pixels, boxes, done.speed)


def _ahead(pool: ThreadPoolExecutor | None, work: Callable[[T], R], things: Iterable[T], depth: int) -> Iterator[R]:
    """`map`, in order, with so many results under way: as many as without threads come before an error of `things`.
    Decoding and resizing let other threads run."""
    if pool is None:
        yield from map(work, things)
        return
    jobs: deque[Future[R]] = deque()
    error: Exception | None = None
    coming = iter(things)
    while error is None:
        try:
            thing = next(coming)
        except StopIteration:
            break
        except Exception as fault:
            error = fault
        else:
            jobs.append(pool.submit(work, thing))
            if len(jobs) > depth:
                yield jobs.popleft().result()
    while jobs:
        yield jobs.popleft().result()
    if error is not None:
        raise error


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
