"""Detectors by name, imported when asked for."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ssod.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from ssod.detectors.base import Detector

DETECTORS = {
    "fcos": "ssod.detectors.fcos:FCOS",
    "retinanet": "ssod.detectors.retinanet:RetinaNet",
    "faster_rcnn": "ssod.detectors.faster_rcnn:FasterRCNN",
    "deformable_detr": "ssod.detectors.deformable_detr:DeformableDETR",
}


def detector_class(name: str) -> type[Detector]:
    """The class of a detector name; UserError for an unknown one."""
    if name not in DETECTORS:
        raise UserError(
            f"'{name}' is not a detector; choose one of {', '.join(DETECTORS)}.{did_you_mean(name, DETECTORS)}"
        )
    module, _, attribute = DETECTORS[name].partition(":")
    found: type[Detector] = getattr(import_module(module), attribute)
    return found


def build_detector(
    name: str,
    num_classes: int,
    backbone: str = "resnet50",
    options: dict[str, Any] | None = None,
    **body: Any,
) -> Detector:
    """A detector with random weights; `build_detector(**detector.spec)` makes the same architecture again.

    options  values of the detector's own `Options`, e.g. {"fpn_channels": 128}
    body     how the backbone is made, e.g. frozen_norm=True: see `ssod.nn.backbone.Backbone`

    Raises UserError for an unknown detector, backbone or option, and for fewer than one class.
    """
    from ssod.nn.backbone import Backbone
    from ssod.nn.conv import choose_forms

    cls = detector_class(name)
    if num_classes < 1:
        raise UserError(f"num_classes={num_classes} leaves nothing to detect: give at least 1 class.")
    parsed = _options(cls, name, options or {})
    detector = cls(num_classes, partial(Backbone, backbone, **body), parsed)
    choose_forms(detector)
    detector.spec = {
        "name": name,
        "num_classes": num_classes,
        "backbone": backbone,
        "options": parsed.model_dump(),
        **body,
    }
    return detector


def _options(cls: type[Detector], name: str, values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    known = cls.Options.model_fields
    for key in values:
        if key not in known:
            raise UserError(
                f"detector.{key} is not an option of {name}; it has {', '.join(known)}.{did_you_mean(key, known)}"
            )
    try:
        return cls.Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"detector.{key}={first['input']!r} is not valid for {name}: {first['msg']}.") from error
