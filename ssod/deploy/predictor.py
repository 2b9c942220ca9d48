"""Images in, `Results` out, by a model of any format. Needs no strategy and no trainer; for ONNX and OpenVINO files no
torch either: it is imported where a checkpoint, TorchScript or an engine is loaded, never at the top."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ssod.data.sizes import Size, sides
from ssod.deploy.array_model import ArrayModel, OnArrays
from ssod.deploy.asked import Asked, asked, check_weights, fit_of
from ssod.deploy.formats import kind_of
from ssod.deploy.results import Boxes, Results
from ssod.deploy.sources import Source, is_live, pictures
from ssod.deploy.stream import Stream
from ssod.deploy.tiles import Tiling
from ssod.errors import UserError, did_you_mean, first_line
from ssod.zoo.fetch import resolve

if TYPE_CHECKING:
    from ssod.deploy.exported import Loaded
    from ssod.deploy.infer import OnTensors
    from ssod.detectors.base import Detector

_HEAVY = 1 << 30  # bytes of video frames that a list of results may hold before it is told of
_SHOWN = 5  # unreadable images that a warning names
_MANY = 1000  # detections kept before some classes are picked: others must not crowd out the wanted ones


def load_detector(path: str | Path, weights: str = "auto") -> tuple[Detector, dict[str, Any]]:
    """Build the detector a checkpoint records, in eval mode on the CPU, and return it with the checkpoint.

    weights: "student", "teacher" or "auto" (the one that scored better, as the checkpoint says).
    Raises CheckpointError for an unusable file, UserError when it holds no such network.
    """
    from ssod.checkpoint import CheckpointError, check_networks, load_checkpoint
    from ssod.detectors import build_detector

    content = load_checkpoint(path)
    check_networks(content, path)
    use = content["use"] if weights == "auto" else weights
    if use not in content["networks"]:
        raise UserError(f"{path} holds no {use}, only {', '.join(content['networks'])}. Leave out weights={weights}.")
    try:
        detector = build_detector(**content["spec"])
        detector.load_state_dict(content["networks"][use])
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise CheckpointError(
            f"{path} holds no network that this version of ssod can build: {first_line(error)}"
        ) from None
    return detector.eval(), content


def open_arrays(path: Path, device: str | int = "auto") -> ArrayModel:
    """Open an .onnx file or an OpenVINO model. Raises UserError for one that cannot be used."""
    if kind_of(path) == "onnx":
        from ssod.deploy.onnx_model import OnnxModel

        return OnnxModel(path, device)
    from ssod.deploy.openvino_model import OpenVinoModel

    return OpenVinoModel(path, device)


def open_model(path: str | Path, weights: str = "auto", device: str | int = "auto") -> ArrayModel | Loaded:
    """Open a model for a Predictor, its format by the ending (see ssod.deploy.formats), or one of the zoo by its name.

    Raises UserError for a file that cannot be used, another network than that in it, and a missing device.
    """
    path = resolve(path)
    if kind_of(path) in ("onnx", "openvino"):
        model = open_arrays(path, device)
        check_weights(model.card, path, weights)
        return model
    from ssod.deploy.exported import load_model

    return load_model(path, weights, device)


class Predictor:
    """Detect objects on images.

    model    a checkpoint written by `ssod train`, a model written by `ssod export`, a name of the zoo, or a model that
             `open_model` opened
    weights  "auto", "student" or "teacher"
    device   "auto", "cpu", "cuda", "cuda:0" or 0; for .onnx also "tensorrt"
    imgsz    long side of the image, pixels; None = as trained
    conf     lowest score, None = 0.25; iou  class-wise NMS threshold, None = 0.6; max_det  most detections of an
             image, or of each of its tiles, None = 100. In an exported model they are fixed: None takes its own, conf
             may be higher and max_det smaller than that
    classes  keep only these classes, names or numbers
    batch    images at once; workers  threads that read and resize the next images while the model looks at these; 0:
             none, for a source that must not be asked for more than a batch
    tile     side in pixels: what is larger is looked at in tiles of this side, which share `overlap` (0 .. 0.9) of it
             with their neighbours, see ssod.deploy.tiles; None = every image as a whole
    bgr      arrays are BGR, as OpenCV reads them

    Raises UserError for a file, device or class that does not exist, and for what an exported model cannot give.
    """

    def __init__(
        self,
        model: str | Path | ArrayModel | Loaded,
        *,
        weights: str = "auto",
        device: str | int = "auto",
        imgsz: Size | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        classes: Sequence[int | str] | None = None,
        batch: int = 8,
        workers: int = 2,
        tile: int | None = None,
        overlap: float = 0.2,
        bgr: bool = False,
    ) -> None:
        _check(imgsz, conf=conf, iou=iou, max_det=max_det, batch=batch, workers=workers)
        self.model = open_model(model, weights, device) if isinstance(model, str | Path) else model
        self.names = self.model.names
        self.asked = asked(self.model.card, self.model.path, conf, iou, max_det)
        self.classes = None if classes is None else [self._class_number(c) for c in classes]
        self.imgsz, self.batch, self.workers, self.bgr = imgsz, batch, workers, bgr
        self.tiling = None if tile is None else Tiling(tile, overlap)
        self.unreadable: list[tuple[str, str]] = []  # (path, reason) of sources skipped by the last call

    def __call__(self, source: Source) -> list[Results]:
        """`stream` as a list. A long video takes much memory so, which is warned of; a webcam never ends.
        Images that cannot be read are warned of, too.

        Raises UserError as `stream` does, and for a webcam.
        """
        return listed(self, source, self.stream(source))

    def stream(self, source: Source) -> Iterator[Results]:
        """Detect on a source (see ssod.deploy.sources.pictures): files, folders, globs, URLs, videos, webcams, arrays,
        tensors, Pillow images or a list or iterator of them. Results come one by one in the order of the sources.

        However long the source is, no more than some batches of it are in memory. Images of one size make a batch,
        so a result may wait for `4 * batch` further images; of a webcam each image is looked at as it comes.
        Images that cannot be read are left out and listed in `unreadable`. Raises UserError when there is no image.
        """
        batch, workers = (1, 0) if is_live(source) else (self.batch, self.workers)
        self.unreadable = []
        stream = Stream(self._runner(batch), self.tiling, self._wanted, self.asked.iou, workers)
        nothing = True
        for found in stream.find(pictures(source, self.bgr), self.unreadable):
            nothing = False
            yield Results(found.boxes, found.picture.path, self.names, found.speed, found.pixels, found.picture.frame)
        if nothing:
            first, reason = self.unreadable[0]
            raise UserError(f"none of the {len(self.unreadable)} images can be read; the first, {first}: {reason}.")

    def _runner(self, batch: int) -> OnArrays | OnTensors:
        if isinstance(self.model, ArrayModel):
            return OnArrays(self.model, fit_of(self.model.card, self.model.path, self.imgsz), batch)
        from ssod.deploy.infer import OnTensors

        wanted = self.asked
        if self.classes is not None and self.model.card is None:
            wanted = Asked(wanted.conf, wanted.iou, max(_MANY, wanted.max_det))
        return OnTensors(self.model.detector, self.model.how(wanted, self.imgsz, batch, workers=0))

    def _wanted(self, boxes: Boxes) -> Boxes:
        keep = boxes.conf >= self.asked.conf
        if self.classes is not None:
            keep &= np.isin(boxes.cls, self.classes)
        return boxes[keep][: self.asked.max_det]

    def _class_number(self, name: int | str) -> int:
        if isinstance(name, int) and 0 <= name < len(self.names):
            return name
        if name in self.names:
            return self.names.index(str(name))
        raise UserError(
            f"classes: the model has no class {name!r}.{did_you_mean(str(name), self.names)} "
            f"It knows {', '.join(self.names)}."
        )


_RANGES = {"conf": (0, 1), "iou": (0, 1), "max_det": (1, None), "batch": (1, None), "workers": (0, None)}


def _check(imgsz: Size | None, **given: float | None) -> None:
    """Raises UserError for what is out of its range; the command line has looked already."""
    for key, value in given.items():
        low, high = _RANGES[key]
        if value is not None and not (low <= value and (high is None or value <= high)):
            wanted = f"{low} or more" if high is None else f"{low} .. {high}"
            raise UserError(f"{key}={value!r} does not fit: it should be {wanted}.")
    if imgsz is not None and sides(imgsz)[0] < 32:
        raise UserError(f"imgsz={imgsz}: give a long side of at least 32 pixels, or [short, long] such as [800, 1333].")


def listed(predictor: Predictor, source: Source, results: Iterator[Results]) -> list[Results]:
    """Those results of a source as a list: `Predictor.__call__` says the rest. Warnings name its caller's caller."""
    if is_live(source):
        raise UserError(f"source={source} is a webcam, which never ends: use stream=True and stop when you like.")
    found: list[Results] = []
    held = 0  # bytes
    for result in results:
        before, held = held, held + (result.orig_img.nbytes if result.frame else 0)
        if before <= _HEAVY < held:
            told = f"the frames of {result.path} take more than {_HEAVY >> 30} GiB of memory as a list of results."
            warnings.warn(f"{told} stream=True gives one after the other.", UserWarning, stacklevel=3)
        found.append(result)
    if predictor.unreadable:
        warnings.warn(left_out(predictor.unreadable), UserWarning, stacklevel=3)
    return found


def left_out(unreadable: Sequence[tuple[str, str]]) -> str:
    """A sentence about images (path, reason) that have no results."""
    shown = "; ".join(f"{path}: {reason}" for path, reason in unreadable[:_SHOWN])
    more = f"; and {len(unreadable) - _SHOWN} more" if len(unreadable) > _SHOWN else ""
    count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
    return f"{count} could not be read and have no results ({shown}{more}); `unreadable` lists them."
