"""A checkpoint becomes a predictor: files in, `Results` out. Needs no strategy and no trainer."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssod.checkpoint import load_checkpoint
from ssod.data.annotations.listing import find_images
from ssod.data.image import ImageError, image_size
from ssod.data.samples import Sample
from ssod.data.views.geometry import Size
from ssod.deploy.infer import Inference, detect, pick_device
from ssod.deploy.results import Results
from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.errors import UserError, did_you_mean
from ssod.nn.precision import amp_dtype, lay_out


def load_detector(path: str | Path, weights: str = "auto") -> tuple[Detector, dict[str, Any]]:
    """Build the detector a checkpoint records, in eval mode on the CPU, and return it with the checkpoint.

    weights: "student", "teacher" or "auto" (the one that scored better, as the checkpoint says).
    Raises CheckpointError for an unusable file, UserError when it holds no such network.
    """
    content = load_checkpoint(path)
    use = content["use"] if weights == "auto" else weights
    if use not in content["networks"]:
        raise UserError(f"{path} holds no {use}, only {', '.join(content['networks'])}. Leave out weights={weights}.")
    detector = build_detector(**content["spec"])
    detector.load_state_dict(content["networks"][use])
    return detector.eval(), content


class Predictor:
    """Detect objects on images.

    model    a checkpoint written by `ssod train`
    weights  "auto", "student" or "teacher"
    device   "auto", "cpu", "cuda", "cuda:0" or 0
    imgsz    long side of the image, pixels; None = as trained
    conf     lowest score; iou  class-wise NMS threshold; max_det  most detections of an image
    classes  keep only these classes, names or numbers

    Raises UserError for a file, device or class that does not exist.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        weights: str = "auto",
        device: str | int = "auto",
        imgsz: Size | None = None,
        conf: float = 0.25,
        iou: float = 0.6,
        max_det: int = 100,
        classes: Sequence[int | str] | None = None,
        batch: int = 8,
        workers: int = 0,
    ) -> None:
        detector, content = load_detector(model, weights)
        where = pick_device(device)
        self.detector = detector.to(where)
        self.names: list[str] = content["names"]
        self.classes = None if classes is None else [self._class_number(c) for c in classes]
        dtype = amp_dtype("auto", where, detector) if where.type == "cuda" else None
        lay_out(self.detector, dtype)
        self.max_det = max_det
        most = max_det if classes is None else max(1000, max_det)  # other classes must not crowd out the wanted ones
        self.how = Inference(imgsz or content["imgsz"], where, dtype, batch, workers, conf, iou, most)
        self.unreadable: list[tuple[str, str]] = []  # (path, reason) of sources skipped by the last call

    def __call__(self, source: str | Path | Sequence[str | Path]) -> list[Results]:
        """Detect on an image, a folder, a text list, a glob or a list of these; results in the order of the sources.

        Images that cannot be read are left out and listed in `unreadable`. Raises UserError when there is no image.
        """
        samples = self._samples(source)
        results: dict[int, Results] = {}
        for index, found, ms in self._timed(samples):
            s = samples[index]
            results[index] = Results(found, s.path, self.names, (s.height, s.width), {"inference": ms})
        return [results[i] for i in sorted(results)]

    def _samples(self, source: str | Path | Sequence[str | Path]) -> list[Sample]:
        paths = find_images(source)
        self.unreadable = []
        samples: list[Sample] = []
        for path in paths:
            try:
                width, height = image_size(path)
            except ImageError as error:
                self.unreadable.append((str(path), error.reason))
                continue
            samples.append(Sample.unlabeled(path, len(samples) + 1, width, height))
        if not samples:
            first, reason = self.unreadable[0]
            raise UserError(f"none of the {len(paths)} images can be read; the first, {first}: {reason}.")
        return samples

    def _timed(self, samples: list[Sample]) -> Iterator[tuple[int, Any, float]]:
        """Detections with each image's milliseconds: a batch's time falls on its first image's arrival, so the
        running mean is what is reported."""
        start = time.monotonic()
        found_of = detect(self.detector, samples, self.how, self.unreadable)
        for seen, (index, found) in enumerate(found_of, 1):
            if self.classes is not None:
                keep = torch.isin(found.labels, torch.tensor(self.classes, dtype=torch.int64))
                found = found[keep][: self.max_det]
            yield index, found, (time.monotonic() - start) * 1000 / seen

    def _class_number(self, name: int | str) -> int:
        if isinstance(name, int) and 0 <= name < len(self.names):
            return name
        if name in self.names:
            return self.names.index(str(name))
        raise UserError(
            f"classes: the model has no class {name!r}.{did_you_mean(str(name), self.names)} "
            f"It knows {', '.join(self.names)}."
        )
