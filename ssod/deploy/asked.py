"""What a user asks of a model beside its images, held against what is fixed in an exported file. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ssod.data.sizes import Fit, Size, sides
from ssod.deploy.contract import Card
from ssod.errors import UserError

CONF, IOU, MAX_DET = 0.25, 0.6, 100  # what `predict` does where nobody says


@dataclass(frozen=True)
class Asked:
    """conf: lowest score, 0..1; iou: threshold of the class-wise NMS, 0..1; max_det: most detections of an image."""

    conf: float
    iou: float
    max_det: int


def asked(
    card: Card | None,
    path: object,
    conf: float | None = None,
    iou: float | None = None,
    max_det: int | None = None,
    default_conf: float = CONF,
) -> Asked:
    """Fill in what is None; of an exported model (with a card) from what is fixed in it.

    Raises UserError, naming `path`, for what the file cannot give: it has no boxes below its own threshold any more.
    """
    if card is None:
        return Asked(
            default_conf if conf is None else conf, IOU if iou is None else iou, MAX_DET if max_det is None else max_det
        )
    if conf is not None and conf < card.conf:
        _refuse(path, f"keeps scores of {card.conf:g} and more", f"conf={conf:g}")
    if iou is not None and abs(iou - card.iou) > 1e-6:
        _refuse(path, f"has the NMS threshold {card.iou:g} in it", f"iou={iou:g}")
    if max_det is not None and max_det > card.max_det:
        _refuse(path, f"gives at most {card.max_det} detections of an image", f"max_det={max_det}")
    return Asked(
        max(default_conf, card.conf) if conf is None else conf, card.iou, card.max_det if max_det is None else max_det
    )


def _refuse(path: object, fixed: str, words: str) -> None:
    raise UserError(f"{path} {fixed}, so {words} cannot be had of it. Leave it out, or `ssod export ... {words}` anew.")


def fit_of(card: Card, path: object, imgsz: Size | None) -> Fit:
    """How images get the size that an exported model takes. Raises UserError for another `imgsz` than a fixed one."""
    fit = Fit(card.imgsz if imgsz is None else imgsz, card.multiple, card.size)
    if imgsz is not None and card.size is not None and sides(imgsz)[0] != max(card.size):
        h, w = card.size
        raise UserError(
            f"the input of {path} is fixed at {h} x {w} pixels (height x width), so imgsz={imgsz} cannot be had of it. "
            f"Leave it out, or `ssod export ... imgsz={imgsz}` anew."
        )
    return fit


def check_weights(card: Card, path: object, weights: str) -> None:
    """Raises UserError where the other network than the exported one is asked for."""
    if weights not in ("auto", card.weights):
        raise UserError(
            f"{path} holds the {card.weights} alone. Leave out weights={weights}, or export the checkpoint's {weights}."
        )
