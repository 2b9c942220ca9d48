"""Run a detector over images: behind validation, labelling, and `predict` with PyTorch."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ssod.data.batching import stack
from ssod.data.evalset import EvalLoader
from ssod.data.samples import Sample
from ssod.data.sizes import Fit, Size
from ssod.data.views.geometry import from_hwc, resize_to
from ssod.data.views.operations import Frame
from ssod.deploy.results import Boxes
from ssod.deploy.stream import STAGES, Seen
from ssod.detectors.base import Detector
from ssod.errors import UserError, did_you_mean
from ssod.nn.precision import autocast
from ssod.ops.views import map_boxes
from ssod.structures import Instances, View

if TYPE_CHECKING:
    from ssod.deploy.exported import Exported


@dataclass(frozen=True)
class Inference:
    """How images go in and detections come out.

    imgsz  long side, pixels, or (short, long); batch  images at once
    conf  lowest score; iou  NMS threshold; max_det  per image
    frame  (H, W) of an exported model whose input is fixed, else None; multiple  what sides are padded to
    """

    imgsz: Size
    device: torch.device
    dtype: torch.dtype | None = None
    batch: int = 8
    workers: int = 0
    conf: float = 0.05
    iou: float = 0.6
    max_det: int = 100
    frame: tuple[int, int] | None = None
    multiple: int = 32


def detect(
    detector: Detector | Exported, samples: Sequence[Sample], how: Inference, bad: list[tuple[str, str]] | None = None
) -> Iterator[tuple[int, Instances]]:
    """Yield (position in `samples`, detections in source image pixels on the CPU), images of one shape together.

    Runs in eval mode and puts the detector's mode back. Images that cannot be read yield nothing; `bad` receives
    their (path, reason).
    """
    was_training = detector.training
    detector.eval()
    pin = how.device.type == "cuda"
    loader = EvalLoader(samples, how.imgsz, how.batch, how.workers, pin, pad_to=how.multiple, frame=how.frame)
    try:
        for view in loader:
            for index, found, matrix in zip(view.indices, look(detector, view, how), view.matrices, strict=True):
                yield index, to_source(found, matrix, (samples[index].height, samples[index].width))
    finally:
        detector.train(was_training)
        if bad is not None:
            bad += loader.bad


def look(detector: Detector | Exported, view: View, how: Inference) -> list[Instances]:
    """Detections of each image of a batch, in pixels of the view, on the CPU."""
    images, sizes = view.images.to(how.device), view.sizes.to(how.device)
    with torch.inference_mode(), autocast(how.dtype, how.device):
        return [f.to("cpu") for f in detector(images, sizes, conf=how.conf, iou=how.iou, max_det=how.max_det)]


class OnTensors:
    """A detector as `predict` uses it, with the pixels of validation: see ssod.deploy.stream.Runner."""

    def __init__(self, detector: Detector | Exported, how: Inference) -> None:
        self.detector, self.how, self.batch = detector.eval(), how, how.batch
        self.fit = Fit(how.imgsz, how.multiple, how.frame)

    def ready(self, pixels: np.ndarray) -> Ready:
        own = np.require(pixels, requirements=["C", "W"])  # torch takes no other memory
        image, matrix = resize_to(from_hwc(own), *self.fit.resized(*own.shape[:2]))
        return Ready(Frame(image, matrix), (own.shape[0], own.shape[1]))

    def size(self, item: Ready) -> Hashable:
        return self.fit.padded(*item.frame.image.shape[1:])

    def see(self, items: list[Ready]) -> Seen:
        start = time.perf_counter()
        nothing = [Instances.empty()] * len(items)
        view = stack([item.frame for item in items], nothing, list(range(len(items))), self.how.multiple)
        stacked = time.perf_counter()
        found = look(self.detector, view, self.how)
        ran = time.perf_counter()
        mapped = [to_source(f, m, item.shape) for f, m, item in zip(found, view.matrices, items, strict=True)]
        boxes = [_boxes(own, item.shape) for own, item in zip(mapped, items, strict=True)]
        times = (stacked - start, ran - stacked, time.perf_counter() - ran)
        return Seen(boxes, {stage: seconds * 1000 for stage, seconds in zip(STAGES, times, strict=True)})


class Ready(NamedTuple):
    """frame: the resized image, with the way there; shape: (height, width) before."""

    frame: Frame
    shape: tuple[int, int]


def _boxes(found: Instances, shape: tuple[int, int]) -> Boxes:
    assert found.scores is not None
    return Boxes(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy(), shape)


def to_source(found: Instances, matrix: torch.Tensor, shape: tuple[int, int]) -> Instances:
    """Detections in view pixels -> pixels of a source image of `shape` (height, width), clipped to it.

    matrix [3, 3]: source -> view.
    """
    boxes = map_boxes(found.boxes, torch.linalg.inv(matrix))
    height, width = shape
    return found.with_boxes(torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height])))


def pick_device(choice: str | int) -> torch.device:
    """auto -> cuda if there is one, else cpu. Raises UserError for a device this machine does not have."""
    if "," in str(choice):
        raise UserError(
            f"device={choice}: several devices are for the commands `ssod train` and `ssod label`; give one."
        )
    name = f"cuda:{choice}" if isinstance(choice, int) or choice.isdigit() else choice
    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(
            f"device={choice} is not a device.{did_you_mean(name, ['auto', 'cpu', 'cuda'])} Use auto, cpu, cuda or 0."
        ) from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device={choice}: this machine has {torch.cuda.device_count()} CUDA devices. Use device=cpu.")
    return device
