"""From single images to a batch, and from a worker to the trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ssod.data import slabs
from ssod.data.samples import Sample
from ssod.data.views.geometry import GREY, cv2, to_hwc
from ssod.data.views.operations import Frame
from ssod.ops.views import map_instances
from ssod.structures import Instances, View


def objects_of(sample: Sample) -> Instances:
    """The sample's boxes and labels in pixels of its file; crowds left out."""
    real = ~sample.crowd
    return Instances(torch.from_numpy(sample.boxes[real]).float(), torch.from_numpy(sample.labels[real]).long())


def targets_in(objects: Instances, frame: Frame) -> Instances:
    """Objects, given where the frame's matrix maps from, in its own pixels: clipped, dropped where clipped away."""
    h, w = frame.image.shape[1:]
    return map_instances(objects, torch.from_numpy(frame.matrix), (h, w))[0]


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def stack(frames: Sequence[Frame], targets: list[Instances], indices: list[int], pad_to: int, square: int = 0) -> View:
    """Pad frames at the right and the bottom to a common size, a multiple of `pad_to`, with GREY.

    The common size is the largest height and width among the frames, or at least `square` x `square`.
    """
    heights, widths = zip(*(frame.image.shape[1:] for frame in frames), strict=True)
    height, width = (round_up(max(*sides, square), pad_to) for sides in (heights, widths))
    shape = (len(frames), 3, height, width)
    # In a loader worker, images are born in the shared memory they will leave in.
    images = torch.empty(shape, dtype=torch.uint8) if get_worker_info() is None else slabs.blank(shape)
    for frame, padded, h, w in zip(frames, images, heights, widths, strict=True):
        _copy_planes(frame.image, padded[:, :h, :w])
        padded[:, h:] = GREY
        padded[:, :h, w:] = GREY
    return View(
        images,
        sizes=torch.tensor([heights, widths]).T.contiguous(),
        matrices=torch.from_numpy(np.stack([frame.matrix for frame in frames])),
        targets=targets,
        indices=indices,
    )


def _copy_planes(image: Tensor, out: Tensor) -> None:
    """Copy channels-last [3, h, w] into three planes; torch needs ten times as long for the transposition."""
    if cv2 is not None:
        cv2.split(np.ascontiguousarray(to_hwc(image)), [plane.numpy() for plane in out])
    else:
        for plane, channel in zip(out.numpy(), image.numpy(), strict=True):
            plane[...] = channel


# Every tensor that leaves a worker costs a shared memory segment and two file descriptors, far more than the
# few hundred bytes of a target list. So only the images travel as tensors; the rest is pickled as arrays.


def parcel(view: View) -> View:
    """In a loader worker, a stand-in that unpickles as this very view; elsewhere the view itself."""
    return cast(View, _Parcel(view)) if get_worker_info() is not None else view


@dataclass
class _Parcel:
    view: View

    def __reduce__(self) -> tuple[Callable[..., View], tuple[object, ...]]:
        view = self.view
        counts = [len(t) for t in view.targets]
        targets = Instances.cat(view.targets)
        arrays = [t.numpy() for t in (view.sizes, view.matrices, targets.boxes, targets.labels)]
        return _unpack, (slabs.outgoing(view.images), counts, *arrays, view.indices, view.complete)


def _unpack(
    images: slabs.Envelope,
    counts: list[int],
    sizes: np.ndarray,
    matrices: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    indices: list[int],
    complete: list[bool] | None,
) -> View:
    per_image = zip(torch.from_numpy(boxes).split(counts), torch.from_numpy(labels).split(counts), strict=True)
    targets = [Instances(b, c) for b, c in per_image]
    return View(images.open(), torch.from_numpy(sizes), torch.from_numpy(matrices), targets, indices, complete)
