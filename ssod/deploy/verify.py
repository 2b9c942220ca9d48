"""An exported model is compared with its detector before anyone gets it: same images, both programs, box by box."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from ssod.data.image import ImageError, read_image
from ssod.data.samples import Sample
from ssod.data.shapes import SIZE, draw_image
from ssod.data.sizes import Fit
from ssod.deploy.compare import Difference, compare
from ssod.deploy.contract import Card, Outputs
from ssod.deploy.prepare import prepare
from ssod.detectors.base import Detector
from ssod.structures import Instances

BATCHES = (1, 2, 5)
PICTURES = 7  # as many as these batches take, but for the one without anything to see
Run = Callable[[np.ndarray, np.ndarray], Outputs]


def pictures(samples: Sequence[Sample]) -> tuple[list[np.ndarray], str]:
    """PICTURES images, uint8 [h, w, 3] RGB, evenly from the samples, or drawn ones without any; and which they are."""
    found: list[np.ndarray] = []
    for i in range(min(PICTURES, len(samples))):
        try:
            found.append(read_image(samples[i * len(samples) // min(PICTURES, len(samples))].path))
        except ImageError:
            continue  # the doctor's business
    if found:
        return found, f"{len(found)} images of the data"
    drawn = [draw_image(np.random.default_rng([1, i]))[0] for i in range(PICTURES)]
    return drawn, f"{PICTURES} drawn images of {SIZE} pixels"


def verify(detector: Detector, card: Card, run: Run, shown: Sequence[np.ndarray], tolerance: float) -> Difference:
    """Largest differences between the detector and `run`, over batches of 1, 2 and 5 and, where the input has no fixed
    size, over several sizes. tolerance: see `compare`."""
    difference = Difference()
    for images, sizes in _batches(card, shown):
        mine, theirs = reference(detector, card, images, sizes), run(images, sizes)
        if len(images) == max(BATCHES):
            # All cells of an empty image look alike: which of them are the best, and so where the queries of a DETR
            # start, is a matter of rounding. It must be answered, not answered alike.
            empty = Outputs(*(values[-1] for values in theirs))
            if not all(np.isfinite(values).all() for values in empty):
                return Difference(math.inf, math.inf)
            mine, theirs = (Outputs(*(values[:-1] for values in o)) for o in (mine, theirs))
        difference = difference.merge(compare(mine, theirs, card.conf, tolerance))
    return difference


@torch.no_grad()
def reference(detector: Detector, card: Card, images: np.ndarray, sizes: np.ndarray) -> Outputs:
    """What the detector itself finds, as an exported model would say it."""
    valid = torch.from_numpy(sizes).long() if "sizes" in card.inputs else None
    found = detector(torch.from_numpy(images), valid, conf=card.conf, iou=card.iou, max_det=card.max_det)
    return filled(found, card.max_det)


def filled(found: Sequence[Instances], max_det: int) -> Outputs:
    """Lists of detections as fixed shapes, see `ssod.deploy.contract`."""
    count = len(found)
    outputs = Outputs(
        np.zeros((count, 1), np.int32),
        np.zeros((count, max_det, 4), np.float32),
        np.zeros((count, max_det), np.float32),
        np.full((count, max_det), -1, np.int32),
    )
    for b, one in enumerate(found):
        assert one.scores is not None
        n = len(one)
        outputs.num_dets[b] = n
        outputs.boxes[b, :n], outputs.scores[b, :n], outputs.labels[b, :n] = one.boxes, one.scores, one.labels
    return outputs


def _batches(card: Card, shown: Sequence[np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """images float32 [B, 3, H, W] and sizes int32 [B, 2] as the model takes them."""
    taken = 0
    for frame, batch in _shapes(card):
        fit = Fit(card.imgsz, card.multiple, frame)
        ready = [prepare(shown[(taken + i) % len(shown)], fit, card.mean) for i in range(batch)]
        taken += batch
        images, sizes = np.stack([p.image for p in ready]), np.array([p.size for p in ready], np.int32)
        if batch == max(BATCHES):
            images[-1] = np.reshape(card.mean, (3, 1, 1))
            sizes[-1] = frame
        yield images, sizes


def _shapes(card: Card) -> list[tuple[tuple[int, int], int]]:
    """(H, W) and batch of everything that is tried."""
    if card.size is not None:
        return [(card.size, batch) for batch in BATCHES]
    long = card.imgsz if isinstance(card.imgsz, int) else max(card.imgsz)

    def cells(share: float) -> int:
        return max(1, round(long * share / card.multiple)) * card.multiple

    frames = [(cells(1), cells(1)), (cells(0.75), cells(1)), (cells(0.5), cells(0.4))]
    return list(zip(frames, BATCHES, strict=True))
