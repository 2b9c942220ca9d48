"""The training loader: item t of the dataset is the whole SemiBatch of step t, made in a worker.

Everything in it follows from (seed, t, rank): the samples from `streams.Stream`, the augmentation from
(seed, stream, epoch, index, view). So any number of workers gives the same bits, and resuming is starting at
another step.
"""

from __future__ import annotations

import gc
import re
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ssod.data.batching import parcel, stack, targets_in
from ssod.data.cache import open_cache
from ssod.data.image import ImageError
from ssod.data.reader import Reader
from ssod.data.samples import Sample, SampleTable
from ssod.data.streams import Stream, generator
from ssod.data.views.geometry import Size, cv2, laid_out
from ssod.data.views.mixing import Mixing, Source
from ssod.data.views.operations import Frame, Rng
from ssod.data.views.transforms import Chain, Views
from ssod.errors import Fault, UserError
from ssod.structures import Instances, SemiBatch, View

T = TypeVar("T")
Bad = list[tuple[str, str]]

MAX_BAD_IN_A_ROW = 100
WEAK = 0  # the number of the weak view among the views of an image; the others count from 1
MIXING = 2**16  # and that of the draws of mosaic and mixup
SAME = Chain((), from_weak=True)  # the weak view itself


class LoaderError(Fault):
    """A worker of the loader died or gave nothing for `timeout` seconds."""


class ViewMaker:
    """The views of one stream's images, by position of the stream."""

    def __init__(self, reader: Reader, stream: Stream, number: int, weak: Chain, mixing: Sequence[Mixing] = ()) -> None:
        self.reader, self.stream, self.number, self.weak, self.mixing = reader, stream, number, weak, mixing

    def draw(self, position: int, chains: Sequence[Chain], bad: Bad) -> tuple[Source, list[Frame]]:
        """(the source image, a frame per chain); unreadable images are noted in `bad` and passed over."""
        n = self.stream.n
        epoch, source = self._readable((self.stream.at(position, skip) for skip in range(n)), bad)
        index = source.index
        if self.mixing:
            source = self._mixed(source, self._rng(epoch, index, MIXING), bad)
        weak = source.frame
        if any(chain.from_weak for chain in chains):
            weak = self.weak(source.frame, self._rng(epoch, index, WEAK))
            weak = weak.painted(laid_out(weak.image))  # once for all views
        starts = [weak if chain.from_weak else source.frame for chain in chains]
        views = enumerate(zip(chains, starts, strict=True), WEAK + 1)
        return source, [chain(start, self._rng(epoch, index, view)) for view, (chain, start) in views]

    def _mixed(self, source: Source, rng: Rng, bad: Bad) -> Source:
        n = self.stream.n

        def other() -> Source:
            first = int(rng.integers(n))
            return self._readable(((0, (first + skip) % n) for skip in range(n)), bad)[1]

        for mix in self.mixing:
            source = mix(source, other, rng)
        return source

    def _readable(self, places: Iterable[tuple[int, int]], bad: Bad) -> tuple[int, Source]:
        """(epoch, source) of the first of some (epoch, index) whose image can be read."""
        for epoch, index in islice(places, MAX_BAD_IN_A_ROW):
            try:
                return epoch, Source(index, self.reader[index])
            except ImageError as error:
                bad.append((str(error.path), error.reason))
        tries = min(MAX_BAD_IN_A_ROW, self.stream.n)
        path, reason = bad[-1]
        raise UserError(f"{tries} images in a row cannot be read, the last one {path} ({reason}); check the data.")

    def _rng(self, epoch: int, index: int, view: int) -> Rng:
        return generator(self.stream.seed, self.number, epoch, index, view)


class StepDataset(Dataset[SemiBatch | UserError]):
    """Item t is the SemiBatch of step t. See `build_loader` for the parts."""

    def __init__(
        self,
        labeled: ViewMaker,
        samples: SampleTable,
        labeled_chains: Sequence[Chain],
        unlabeled: ViewMaker | None,
        strong: Chain,
        pad_to: int,
        square: int,
    ) -> None:
        self.labeled, self.samples, self.labeled_chains = labeled, samples, labeled_chains
        self.unlabeled, self.strong = unlabeled, strong
        self.pad_to, self.square = pad_to, square
        self.all_complete = bool(samples.complete.all())

    def __getitem__(self, step: int) -> SemiBatch | UserError:
        try:
            return self._batch(step)
        except UserError as error:
            return error  # as an item: raised in a worker, it would reach the user as a traceback

    def _batch(self, step: int) -> SemiBatch:
        bad: Bad = []
        labeled = self._labeled(step, bad)
        if self.unlabeled is None:
            return SemiBatch(parcel(labeled), bad=bad)
        weak, strong = self._unlabeled(self.unlabeled, step, bad)
        shown = parcel(weak)
        return SemiBatch(parcel(labeled), shown, shown if strong is weak else parcel(strong), bad)

    def _labeled(self, step: int, bad: Bad) -> View:
        maker = self.labeled
        drawn = [maker.draw(position, self.labeled_chains, bad) for position in maker.stream.positions(step)]
        # One view of all images, then the next view of all images.
        frames = [frames[v] for v in range(len(self.labeled_chains)) for _, frames in drawn]
        sources = [source for source, _ in drawn] * len(self.labeled_chains)
        indices = [source.index for source in sources]
        targets = [targets_in(s.objects(self.samples), f) for s, f in zip(sources, frames, strict=True)]
        view = stack(frames, targets, indices, self.pad_to, self.square)
        complete = None if self.all_complete else [s.complete(self.samples) for s in sources]
        return replace(view, complete=complete)

    def _unlabeled(self, maker: ViewMaker, step: int, bad: Bad) -> tuple[View, View]:
        """The two views; one View for both where they are the same, so that its pixels travel once."""
        chains = (SAME,) if self.strong == SAME else (SAME, self.strong)
        drawn = [maker.draw(position, chains, bad) for position in maker.stream.positions(step)]
        indices = [source.index for source, _ in drawn]
        views = [
            stack(list(frames), [Instances.empty() for _ in drawn], indices, self.pad_to, self.square)
            for frames in zip(*(frames for _, frames in drawn), strict=True)
        ]
        return views[0], views[-1]


class StepLoader(DataLoader[SemiBatch | UserError]):
    """A DataLoader over steps that names its own failures."""

    def __iter__(self) -> Iterator[SemiBatch]:  # type: ignore[override]
        return named_failures(super().__iter__(), self.timeout)


def named_failures(batches: Iterator[T | UserError], timeout: float) -> Iterator[T]:
    """The same batches; an item that is an error is raised, a dead or hung worker becomes a LoaderError."""
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except RuntimeError as error:
        if "DataLoader timed out" in str(error):
            raise LoaderError(
                f"No batch came from the loader workers within {timeout:g} s: one hangs, most often on slow or "
                "lost storage; workers=0 shows where."
            ) from error
        if re.search(r"DataLoader worker .*(exited|killed)", str(error)):
            raise LoaderError(
                f"A loader worker died, most often for lack of memory or of shared memory (/dev/shm): {error} "
                "Fewer workers may help."
            ) from error
        raise


def build_loader(
    labeled: Sequence[Sample],
    unlabeled: Sequence[Sample],
    *,
    batch: int,
    batch_unlabeled: int,
    imgsz: Size,
    labeled_view: Views,
    weak: Views,
    strong: Views,
    seed: int,
    start_step: int,
    steps: int,
    workers: int,
    rank: int = 0,
    world: int = 1,
    cache: bool | str = False,
    pin: bool = False,
    timeout: float = 120,
    rect: bool = True,
    pad_to: int = 32,
) -> StepLoader:
    """A loader that yields the SemiBatch of every step in `start_step .. steps - 1` for this rank.

    batch, batch_unlabeled  images of this rank per step; batch_unlabeled=0 leaves `weak` and `strong` None
    labeled_view            the views of labelled images; with V views the labelled batch holds V * batch images,
                            all of the first view, then all of the second
    weak, strong            one view each; a view that begins with "weak" shares the draw of `weak`
    cache                   keep decoded images: "ram" (or True) or "disk", see `ssod.data.cache`
    timeout                 seconds without a batch after which workers count as hung
    rect                    pad to the largest height and width in the batch; else to one fixed square
    pad_to                  padded sides are multiples of this, the largest stride of the detector

    Of `unlabeled` samples only paths and sizes are read. Iterating raises LoaderError when a worker dies or
    hangs, UserError when `MAX_BAD_IN_A_ROW` images in a row cannot be read.
    """
    if not labeled:
        raise UserError("There are no labelled images to train on; check `train` in the data YAML and `labeled`.")
    if batch_unlabeled and not unlabeled:
        raise UserError("There are no unlabelled images; add some, or set batch_unlabeled=0 to train without.")
    views = stream_views(labeled_view, weak, strong)

    def maker(samples: Sequence[Sample], number: int, size: int, mixing: Sequence[Mixing]) -> ViewMaker:
        table = SampleTable.of(samples)
        reader = Reader(table, views.longest, open_cache(cache, table, views.longest))
        return ViewMaker(reader, Stream(len(samples), seed, size, rank, world), number, views.weak, mixing)

    dataset = StepDataset(
        maker(labeled, 0, batch, views.labeled_mixing),
        SampleTable.of(labeled),
        labeled_view.chains,
        maker(unlabeled, 1, batch_unlabeled, views.weak.mixing) if batch_unlabeled else None,
        views.strong,
        pad_to,
        square=0 if rect else views.longest,
    )
    return StepLoader(
        dataset, sampler=range(start_step, steps), collate_fn=as_is, **worker_options(workers, pin, timeout)
    )


class StreamViews(NamedTuple):
    """weak, strong: the two chains of unlabelled images; labeled_mixing: what mixes labelled ones; longest: the
    longest side in pixels that any view resizes to."""

    weak: Chain
    strong: Chain
    labeled_mixing: Sequence[Mixing]
    longest: int


def stream_views(labeled: Views, weak: Views, strong: Views) -> StreamViews:
    """What the two streams do. Labelled images are mixed as their own list says, or, where all their views go on
    from the weak one, as the weak view's list says. Raises UserError when `weak` or `strong` is not one view."""
    for name, views in (("weak", weak), ("strong", strong)):
        if len(views.chains) != 1:
            raise UserError(f"`{name}` must be one view, got {len(views.chains)}.")
    chain = weak.as_weak()
    mixing = next((c.mixing for c in labeled.chains if c.mixing), ())
    if not mixing and all(c.from_weak for c in labeled.chains):
        mixing = chain.mixing
    longest = max(c.longest for c in (chain, strong.chains[0], *labeled.chains))
    return StreamViews(chain, strong.chains[0], mixing, longest)


def worker_options(workers: int, pin: bool, timeout: float) -> dict[str, Any]:
    """Options that every DataLoader here shares: items are whole batches, workers have one thread.

    The generator is its own, since a DataLoader draws a number each time it starts: taken from torch's global
    generator, that draw would make a resumed run differ from one that was never stopped.
    """
    options: dict[str, Any] = {"batch_size": None, "num_workers": workers, "pin_memory": pin}
    options["generator"] = torch.Generator()
    if workers:
        options |= {"timeout": timeout, "worker_init_fn": _start_worker, "prefetch_factor": 2}
    return options


def _start_worker(worker: int) -> None:
    # What the parent threw away is not for a fork to collect: onnxruntime waits there for threads that stayed behind.
    gc.freeze()
    torch.set_num_threads(1)
    if cv2 is not None:
        cv2.setNumThreads(0)
    # Ctrl-C reaches the whole group; the trainer finishes its step and needs the workers until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def as_is(item: T) -> T:
    """`collate_fn` for items that are whole batches already."""
    return item
