"""Run a detector over images on disk: the one loop behind validation and `predict`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ssod.data.evalset import EvalLoader
from ssod.data.samples import Sample
from ssod.data.views.geometry import Size
from ssod.detectors.base import Detector
from ssod.errors import UserError, did_you_mean
from ssod.nn.precision import autocast
from ssod.ops.views import map_boxes
from ssod.structures import Instances


@dataclass(frozen=True)
class Inference:
    """How images go in and detections come out.

    imgsz  long side, pixels, or (short, long); batch  images at once
    conf  lowest score; iou  NMS threshold; max_det  per image
    """

    imgsz: Size
    device: torch.device
    dtype: torch.dtype | None = None
    batch: int = 8
    workers: int = 0
    conf: float = 0.05
    iou: float = 0.6
    max_det: int = 100


def detect(
    detector: Detector, samples: Sequence[Sample], how: Inference, bad: list[tuple[str, str]] | None = None
) -> Iterator[tuple[int, Instances]]:
    """Yield (position in `samples`, detections in source image pixels on the CPU), images of one shape together.

    Runs in eval mode and puts the detector's mode back. Images that cannot be read yield nothing; `bad` receives
    their (path, reason).
    """
    was_training = detector.training
    detector.eval()
    loader = EvalLoader(samples, how.imgsz, how.batch, how.workers, pin=how.device.type == "cuda")
    try:
        for view in loader:
            images, sizes = view.images.to(how.device), view.sizes.to(how.device)
            with torch.inference_mode(), autocast(how.dtype, how.device):
                found = detector(images, sizes, conf=how.conf, iou=how.iou, max_det=how.max_det)
            for i, index in enumerate(view.indices):
                yield index, to_source(found[i].to("cpu"), view.matrices[i], samples[index])
    finally:
        detector.train(was_training)
        if bad is not None:
            bad += loader.bad


def to_source(found: Instances, matrix: torch.Tensor, sample: Sample) -> Instances:
    """Detections in view pixels -> source image pixels, clipped to the image. matrix [3, 3]: source -> view."""
    boxes = map_boxes(found.boxes, torch.linalg.inv(matrix))
    limit = boxes.new_tensor([sample.width, sample.height, sample.width, sample.height])
    return found.with_boxes(torch.minimum(boxes.clamp(min=0), limit))


def pick_device(choice: str | int) -> torch.device:
    """auto -> cuda if there is one, else cpu. Raises UserError for a device this machine does not have."""
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
