"""Images for validation, test and prediction: keep-ratio resize, nothing random, every image as if alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby

from torch.utils.data import DataLoader, Dataset

from ssod.data.batching import objects_of, parcel, round_up, stack, targets_in
from ssod.data.image import ImageError
from ssod.data.loader import Bad, as_is, named_failures, worker_options
from ssod.data.reader import read_frame
from ssod.data.samples import Sample
from ssod.data.views.geometry import Size, fitted, resize, sides
from ssod.data.views.operations import Frame
from ssod.structures import View


class EvalLoader:
    """Yields a View per batch; `View.indices` say which samples it holds, `View.matrices` lead back to them.

    Images are resized to a long side of `imgsz`, or to within (short, long), and padded to multiples of `pad_to`.
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
    ) -> None:
        self.bad: Bad = []
        self._plan = _plan(samples, imgsz, batch, pad_to)
        self._loader: DataLoader[tuple[list[View], Bad]] = DataLoader(
            _EvalDataset(samples, imgsz, pad_to, self._plan), collate_fn=as_is, **worker_options(workers, pin, timeout)
        )

    def __len__(self) -> int:
        return len(self._plan)

    def __iter__(self) -> Iterator[View]:
        self.bad = []
        for views, bad in named_failures(iter(self._loader), self._loader.timeout):
            self.bad += bad
            yield from views


def _plan(samples: Sequence[Sample], imgsz: Size, batch: int, pad_to: int) -> list[list[int]]:
    """Indices of each batch: by padded size as the samples announce it, in order of their last member."""
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    plan = []
    for index, sample in enumerate(samples):
        h, w = (round_up(side, pad_to) for side in fitted(sample.height, sample.width, *sides(imgsz)))
        waiting[h, w].append(index)
        if len(waiting[h, w]) == batch:
            plan.append(waiting.pop((h, w)))
    return plan + list(waiting.values())


class _EvalDataset(Dataset[tuple[list[View], Bad]]):
    """Item i is planned batch i: a View per padded size found, one unless a file differs from its record."""

    def __init__(self, samples: Sequence[Sample], imgsz: Size, pad_to: int, plan: list[list[int]]) -> None:
        self.samples, self.imgsz, self.pad_to, self.plan = samples, imgsz, pad_to, plan

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
            read.append((index, frame.moved(*resize(frame.image, *sides(self.imgsz)))))
        groups = groupby(sorted(read, key=self._padded), key=self._padded)
        return [parcel(self._view(list(group))) for _, group in groups], bad

    def _padded(self, entry: tuple[int, Frame]) -> tuple[int, ...]:
        return tuple(round_up(side, self.pad_to) for side in entry[1].image.shape[1:])

    def _view(self, group: list[tuple[int, Frame]]) -> View:
        indices = [index for index, _ in group]
        frames = [frame for _, frame in group]
        targets = [targets_in(objects_of(self.samples[i]), frame) for i, frame in group]
        return stack(frames, targets, indices, self.pad_to)
