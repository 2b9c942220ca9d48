"""Entry points for torch.hub: `torch.hub.load("OWNER/ssod", NAME, ...)`, or of a folder: `source="local"`.

fcos, retinanet, faster_rcnn, deformable_detr   a detector, with random weights or those of the zoo
custom                                          a model of your own, from its file
predictor                                       what takes photographs and paths instead of tensors
and each name of the zoo (`ssod zoo` lists them)

All but `predictor` give a `torch.nn.Module`. It is called with images [B, 3, H, W], RGB, uint8 0..255 or float 0..1,
padded at the right and the bottom, and `sizes` [B, 2], how much of each is image (height, width; None: all). It returns
B `Instances`: boxes float32 [N, 4] xyxy pixels, labels int64 [N], scores float32 [N] 0..1, by descending score. Modules
of trained weights are in eval mode, the others in train mode.

Nothing is downloaded, but for names of the zoo whose weights do not come with the package.
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
    num_classes: int | None = None,
    backbone: str | None = None,
    pretrained: str | bool = False,
    strategy: str | None = None,
    data: str | None = None,
    **options: _Any,
) -> _Module:
    """FCOS; see `_detector`, which says what the arguments mean."""
    return _detector("fcos", num_classes, backbone, pretrained, strategy, data, options)


def retinanet(
    num_classes: int | None = None,
    backbone: str | None = None,
    pretrained: str | bool = False,
    strategy: str | None = None,
    data: str | None = None,
    **options: _Any,
) -> _Module:
    """RetinaNet; see `_detector`, which says what the arguments mean."""
    return _detector("retinanet", num_classes, backbone, pretrained, strategy, data, options)


def faster_rcnn(
    num_classes: int | None = None,
    backbone: str | None = None,
    pretrained: str | bool = False,
    strategy: str | None = None,
    data: str | None = None,
    **options: _Any,
) -> _Module:
    """Faster R-CNN; see `_detector`, which says what the arguments mean."""
    return _detector("faster_rcnn", num_classes, backbone, pretrained, strategy, data, options)


def deformable_detr(
    num_classes: int | None = None,
    backbone: str | None = None,
    pretrained: str | bool = False,
    strategy: str | None = None,
    data: str | None = None,
    **options: _Any,
) -> _Module:
    """Deformable DETR; see `_detector`, which says what the arguments mean."""
    return _detector("deformable_detr", num_classes, backbone, pretrained, strategy, data, options)


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
    name: str,
    num_classes: int | None,
    backbone: str | None,
    pretrained: str | bool,
    strategy: str | None,
    data: str | None,
    options: dict[str, _Any],
) -> _Module:
    """A detector.

    num_classes  None: 80, or as many as the pretrained weights know; another number keeps all but the class head, which
                 starts anew
    backbone     timm's name; None: resnet50, or that of the weights
    pretrained   a name of the zoo whose detector this is; True: the one entry of this detector that `strategy`, `data`
                 and `backbone` leave; False: random weights
    strategy     of pretrained weights: what they were trained by, such as "mean_teacher"
    data         of pretrained weights: what they were trained on, such as "bccd" or "bccd.yaml"
    options      of the detector, as in a training YAML: fpn_channels=128, ...
    Raises UserError for unknown names and options, for weights that do not fit, where not exactly one entry is asked
    for, and for `strategy` or `data` of random weights.
    """
    from ssod.detectors import build_detector

    if pretrained is False:
        _refuse_untrained(name, strategy=strategy, data=data)
        return build_detector(name, 80 if num_classes is None else num_classes, backbone or "resnet50", options)
    entry = _entry_of(name, pretrained, strategy, data, backbone)
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


def _refuse_untrained(name: str, **given: str | None) -> None:
    from ssod.errors import UserError

    for key, value in given.items():
        if value is not None:
            raise UserError(
                f"{key}={value!r}: a {name} of random weights has seen no {key}. Leave {key}= out, or ask for weights "
                "of the zoo with pretrained=True."
            )


def _entry_of(name: str, pretrained: str | bool, strategy: str | None, data: str | None, backbone: str | None) -> _Any:
    """The entry of the zoo that is asked for, by its name or by what it is."""
    from ssod import zoo
    from ssod.errors import UserError, did_you_mean

    here = {e.name: e for e in zoo.entries().values() if e.detector == name}
    there = f"it has {'; '.join(map(_about, here.values()))}" if here else f"there is none of {name} so far"
    asked = {"strategy": strategy, "data": data}
    if pretrained is True:
        asked["backbone"] = backbone  # of a named entry another backbone may be tried: what fits is loaded
    elif pretrained not in here:
        near = did_you_mean(str(pretrained), here)
        raise UserError(f"pretrained={pretrained!r} does not name weights of {name} in the zoo: {there}.{near}")
    given = {key: value for key, value in asked.items() if value is not None}
    fitting = {e.name: e for e in here.values() if all(value in _words(e)[key] for key, value in given.items())}
    wish = " and ".join(f"{key}={value!r}" for key, value in given.items())
    if pretrained is not True:
        if pretrained not in fitting:
            raise UserError(f"pretrained={pretrained!r} contradicts {wish}: it is {_about(here[str(pretrained)])}.")
        return fitting[str(pretrained)]
    if not fitting:
        raise UserError(f"the zoo has no {name}{' with ' + wish if wish else ''}: {there}.")
    if len(fitting) > 1:
        raise UserError(
            f"pretrained=True{' with ' + wish if wish else ''} fits {len(fitting)} of the zoo's {name}; give the name "
            f"of one as pretrained=, or what tells them apart: {'; '.join(map(_about, fitting.values()))}."
        )
    return next(iter(fitting.values()))


def _words(entry: _Any) -> dict[str, tuple[str, ...]]:
    """What an entry may be asked for by; its data with and without the ending of the YAML."""
    data = (entry.data, entry.data.removesuffix(".yaml"))
    return {"strategy": (entry.strategy,), "data": data, "backbone": (entry.backbone,)}


def _about(entry: _Any) -> str:
    return f"{entry.name} ({entry.strategy} on {entry.data}, {entry.backbone})"


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
