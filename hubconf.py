"""Entry points for torch.hub: `torch.hub.load("OWNER/ssod", NAME, ...)`, or of a folder: `source="local"`.

fcos, retinanet, faster_rcnn, deformable_detr   a detector, with random weights or those of the zoo
custom                                          a model of your own, from its file
predictor                                       what takes photographs and paths instead of tensors
and each name of the zoo (`ssod zoo` lists them)

All but `predictor` give a `torch.nn.Module`. It is called with images [B, 3, H, W], RGB, uint8 0..255 or float 0..1,
padded at the right and the bottom, and `sizes` [B, 2], how much of each is image (height, width; None: all). It returns
B `Instances`: boxes float32 [N, 4] xyxy pixels, labels int64 [N], scores float32 [N] 0..1, by descending score. Modules
of trained weights are in eval mode, the others in train mode.

Nothing is downloaded, but for names of the zoo whose weights do not come with the package. There is no `strategy=`: how
a network was trained leaves no trace in what it is; `ssod zoo` tells of each entry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from typing import Any as _Any  # torch.hub lists what is callable here and has no _

dependencies = ["torch", "torchvision", "timm", "pydantic", "numpy", "PIL", "safetensors"]

if TYPE_CHECKING:
    from pathlib import Path as _Path

    from torch.nn import Module as _Module

    from ssod.deploy.predictor import Predictor as _Predictor


def fcos(
    num_classes: int | None = None, backbone: str | None = None, pretrained: str | bool = False, **options: _Any
) -> _Module:
    """FCOS; see `_detector`, which says what the arguments mean."""
    return _detector("fcos", num_classes, backbone, pretrained, options)


def retinanet(
    num_classes: int | None = None, backbone: str | None = None, pretrained: str | bool = False, **options: _Any
) -> _Module:
    """RetinaNet; see `_detector`, which says what the arguments mean."""
    return _detector("retinanet", num_classes, backbone, pretrained, options)


def faster_rcnn(
    num_classes: int | None = None, backbone: str | None = None, pretrained: str | bool = False, **options: _Any
) -> _Module:
    """Faster R-CNN; see `_detector`, which says what the arguments mean."""
    return _detector("faster_rcnn", num_classes, backbone, pretrained, options)


def deformable_detr(
    num_classes: int | None = None, backbone: str | None = None, pretrained: str | bool = False, **options: _Any
) -> _Module:
    """Deformable DETR; see `_detector`, which says what the arguments mean."""
    return _detector("deformable_detr", num_classes, backbone, pretrained, options)


def custom(path: str | _Path, weights: str = "auto", device: str | int = "cpu") -> _Module:
    """A model from its file: a checkpoint of `ssod train` (.pt) or what `ssod export` made of it.

    weights  which network of a checkpoint: "student", "teacher", or "auto", the one that scored better
    """
    from ssod.deploy.exported import load_model

    return load_model(path, weights, device).detector


def predictor(model: str | _Path, **how: _Any) -> _Predictor:
    """What is called with a path, folder, URL, array, Pillow image or a list of these, and returns a list of `Results`
    (.boxes.xyxy, .boxes.conf, .boxes.cls, .names, .plot(), ...): images are resized as the model was trained.

    model  a file as for `custom`, or a name of the zoo; how  conf, iou, classes, device, ...: ssod.Predictor
    """
    from ssod.deploy.predictor import Predictor

    return Predictor(model, **how)


def _detector(
    name: str, num_classes: int | None, backbone: str | None, pretrained: str | bool, options: dict[str, _Any]
) -> _Module:
    """A detector.

    num_classes  None: 80, or as many as the pretrained weights know; another number keeps all but the class head, which
                 starts anew
    backbone     timm's name; None: resnet50, or that of the weights
    pretrained   a name of the zoo whose detector this is; False: random weights
    options      of the detector, as in a training YAML: fpn_channels=128, ...
    Raises UserError for unknown names and options, and for weights that do not fit.
    """
    from ssod.detectors import build_detector

    if pretrained is False:
        return build_detector(name, 80 if num_classes is None else num_classes, backbone or "resnet50", options)
    entry = _entry_of(name, pretrained)
    if num_classes in (None, len(entry.names)) and backbone in (None, entry.backbone) and not options:
        return custom(entry.name)
    from ssod.detectors.convert import load_weights, read_weights
    from ssod.zoo.fetch import locate

    names = entry.names
    if num_classes not in (None, len(names)):
        names = [f"new class {i}" for i in range(num_classes or 0)]
    asked = {"num_classes": len(names), "backbone": backbone or entry.backbone}
    detector = build_detector(**entry.spec | asked | {"options": entry.spec["options"] | options})
    load_weights(detector, read_weights(str(locate(entry))), names)
    return detector.eval()


def _entry_of(name: str, pretrained: str | bool) -> _Any:
    from ssod import zoo
    from ssod.errors import UserError

    fitting = [e.name for e in zoo.entries().values() if e.detector == name]
    if pretrained in fitting:
        return zoo.find(str(pretrained))
    there = f"choose one of {', '.join(fitting)}" if fitting else f"there is none of {name} so far"
    raise UserError(f"pretrained={pretrained!r} does not name weights of {name} in the zoo: {there}.")


def _zoo_entry(name: str, about: str) -> _Any:
    def load(device: str | int = "cpu") -> _Module:
        return custom(name, device=device)

    load.__name__, load.__doc__ = name, about
    return load


def _add_zoo() -> None:
    """A function for each name of the zoo; reads a table and no weights."""
    from ssod import zoo

    for entry in zoo.entries().values():
        about = f"{entry.detector} on {entry.backbone}, trained on {entry.data} by {entry.strategy}: AP {entry.ap:.4f}"
        globals()[entry.name] = _zoo_entry(entry.name, about)


_add_zoo()
