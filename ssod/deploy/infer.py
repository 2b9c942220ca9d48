"""Run a detector over images: the one loop behind validation, labelling and `predict` with PyTorch."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ssod.data.evalset import EvalLoader
from ssod.data.image import ImageError
from ssod.data.samples import Sample
from ssod.data.sizes import Size
from ssod.deploy.array_model import Found
from ssod.deploy.results import Boxes
from ssod.deploy.sources import Picture
from ssod.detectors.base import Detector
from ssod.errors import UserError, did_you_mean
from ssod.nn.precision import autocast
from ssod.ops.views import map_boxes
from ssod.structures import Instances

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


class Detected(NamedTuple):
    """number: position in the samples; found: in source image pixels, on the CPU; speed: see `Results`."""

    number: int
    found: Instances
    speed: dict[str, float]


def detect(
    detector: Detector | Exported, samples: Sequence[Sample], how: Inference, bad: list[tuple[str, str]] | None = None
) -> Iterator[tuple[int, Instances]]:
    """Yield (position in `samples`, detections in source image pixels on the CPU), images of one shape together.

    Runs in eval mode and puts the detector's mode back. Images that cannot be read yield nothing; `bad` receives
    their (path, reason).
    """
    for index, found, _ in detect_timed(detector, samples, how, [] if bad is None else bad):
        yield index, found


def detect_timed(
    detector: Detector | Exported,
    samples: Sequence[Sample],
    how: Inference,
    bad: list[tuple[str, str]],
    pixels: Mapping[int, np.ndarray] | None = None,
) -> Iterator[Detected]:
    """`detect` with each image's share of its batch's milliseconds. Waiting for the loader is preprocessing.

    pixels: {position: uint8 [h, w, 3] RGB} of samples that are in memory and no files.
    """
    was_training = detector.training
    detector.eval()
    pin = how.device.type == "cuda"
    loader = EvalLoader(
        samples, how.imgsz, how.batch, how.workers, pin, pad_to=how.multiple, frame=how.frame, pixels=pixels
    )
    try:
        start = time.perf_counter()
        for view in loader:
            images, sizes = view.images.to(how.device), view.sizes.to(how.device)
            loaded = time.perf_counter()
            with torch.inference_mode(), autocast(how.dtype, how.device):
                found = [f.to("cpu") for f in detector(images, sizes, conf=how.conf, iou=how.iou, max_det=how.max_det)]
            ran = time.perf_counter()
            mapped = [to_source(f, m, samples[i]) for f, m, i in zip(found, view.matrices, view.indices, strict=True)]
            seconds = (loaded - start, ran - loaded, time.perf_counter() - ran)
            parts = zip(("preprocess", "inference", "postprocess"), seconds, strict=True)
            speed = {name: part * 1000 / len(view) for name, part in parts}
            for index, one in zip(view.indices, mapped, strict=True):
                yield Detected(index, one, speed)
            start = time.perf_counter()
    finally:
        detector.train(was_training)
        bad += loader.bad


def find_on_tensors(
    detector: Detector | Exported, pictures: Sequence[Picture], how: Inference, unreadable: list[tuple[str, str]]
) -> Iterator[Found]:
    """What `find_on_arrays` is, for `detect`: pictures in files and in memory. `unreadable` receives (path, reason)."""
    samples: list[Sample] = []
    numbers: list[int] = []  # of each sample, that of its picture
    for number, picture in enumerate(pictures):
        try:
            height, width = picture.shape()
        except ImageError as error:
            unreadable.append((str(error.path), error.reason))
            continue
        samples.append(Sample.unlabeled(picture.path, len(samples) + 1, width, height))
        numbers.append(number)
    pixels = {i: p for i, number in enumerate(numbers) if (p := pictures[number].pixels) is not None}
    for index, found, speed in detect_timed(detector, samples, how, unreadable, pixels):
        assert found.scores is not None
        shape = (samples[index].height, samples[index].width)
        boxes = Boxes(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy(), shape)
        yield Found(numbers[index], boxes, speed)


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
