"""Images for validation, test and prediction: keep-ratio resize, nothing random, every image as if alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

from torch.utils.data import DataLoader, Dataset

from ssod.data.batching import objects_of, parcel, stack, targets_in
from ssod.data.image import ImageError
from ssod.data.loader import Bad, as_is, named_failures, worker_options
from ssod.data.reader import read_frame
from ssod.data.samples import Sample
from ssod.data.sizes import Fit, Size
from ssod.data.views.geometry import resize_to
from ssod.data.views.operations import Frame
from ssod.structures import View


class EvalLoader:
    """Yields a View per batch; `View.indices` say which samples it holds, `View.matrices` lead back to them.

    Images are resized to a long side of `imgsz`, or to within (short, long), and padded to multiples of `pad_to`.
    With `frame`, the (H, W) of a network whose input is fixed, they are resized to what fits in it instead; sides of
    the frame are multiples of `pad_to`, and who runs the network pads to it.
    A batch holds only images of one padded size, so no image is padded more for its neighbours' sake and its result
    never depends on them. The order is that of the samples within each size. Targets are the samples' boxes, crowds
    left out.

    bad  (path, reason) of the images that could not be read so far; they are in no batch
    Iterating raises LoaderError when a worker dies or gives nothing for `timeout` seconds.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: Size,
        batch: int,
        workers: int = 0,
        pin: bool = False,
        timeout: float = 120,
        pad_to: int = 32,
        frame: tuple[int, int] | None = None,
    ) -> None:
        self.bad: Bad = []
        fit = Fit(imgsz, pad_to, frame)
        self._plan = _plan(samples, fit, batch)
        self._loader: DataLoader[tuple[list[View], Bad]] = DataLoader(
            _EvalDataset(samples, fit, self._plan),
            collate_fn=as_is,
            **worker_options(workers, pin, timeout),
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[View]:
        self.bad = []
        for views, bad in named_failures(iter(self._loader), self._loader.timeout):
            self.bad += bad
            yield from views


def _plan(samples: Sequence[Sample], fit: Fit, batch: int) -> list[list[int]]:
    """Indices of each batch: by padded size as the samples announce it, in order of their last member."""
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    plan = []
    for index, sample in enumerate(samples):
        size = _padded(fit, *fit.resized(sample.height, sample.width))
        waiting[size].append(index)
        if len(waiting[size]) == batch:
            plan.append(waiting.pop(size))
    return plan + list(waiting.values())


def _padded(fit: Fit, height: int, width: int) -> tuple[int, int]:
    """Size of the batch that a resized image goes into; only to multiples also where the frame is larger."""
    return Fit(fit.imgsz, fit.multiple).padded(height, width)


class _EvalDataset(Dataset[tuple[list[View], Bad]]):
    """Item i is planned batch i: a View per padded size found, one unless a file differs from its record."""

    def __init__(self, samples: Sequence[Sample], fit: Fit, plan: list[list[int]]) -> None:
        self.samples, self.fit, self.plan = samples, fit, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, item: int) -> tuple[list[View], Bad]:
        read: list[tuple[int, Frame]] = []
        bad: Bad = []
        for index in self.plan[item]:
            try:
                frame = read_frame(self.samples[index].path)
            except ImageError as error:
                bad.append((str(error.path), error.reason))
                continue
            size = self.fit.resized(*frame.image.shape[1:])
            read.append((index, frame.moved(*resize_to(frame.image, *size))))
        groups = groupby(sorted(read, key=self._size), key=self._size)
        return [parcel(self._view(list(group))) for _, group in groups], bad

    def _size(self, entry: tuple[int, Frame]) -> tuple[int, int]:
        return _padded(self.fit, *entry[1].image.shape[1:])

    def _view(self, group: list[tuple[int, Frame]]) -> View:
        indices = [index for index, _ in group]
        frames = [frame for _, frame in group]
        targets = [targets_in(objects_of(self.samples[i]), frame) for i, frame in group]
        return stack(frames, targets, indices, self.fit.multiple)
