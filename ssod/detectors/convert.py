"""Weights to start from, of whatever kind, into a detector: recognised by what the file holds, never by its name.

Accepted are our own checkpoints, torchvision's detectors, transformers' Deformable DETR, and classification networks
(for the backbone alone). Nothing in a file is executed: torch files are read as plain weights, others are safetensors.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssod.checkpoint import is_checkpoint, load_checkpoint
from ssod.detectors import detector_class
from ssod.detectors.base import Detector
from ssod.detectors.class_rows import ClassMatch, is_class_tensor, match_classes, with_rows
from ssod.detectors.fetch import SCHEME, UrlOf, expected_hash, fetch, published_url, sha256
from ssod.detectors.names_torchvision import (
    COCO_ROWS,
    NETWORKS,
    coco_names,
    from_torchvision,
    network_of,
    row_names,
    without_epsilon,
)
from ssod.detectors.names_transformers import backbone_name, from_transformers
from ssod.errors import UserError
from ssod.nn.backbone_weights import LoadReport, copy_backbone_weights, placed, read_tensors, shortened

ACCEPTED = (
    "an ssod checkpoint, torchvision's " + ", ".join(NETWORKS) + ", transformers' Deformable DETR (its folder or "
    "file), or a classification network of timm or torchvision that is the backbone"
)
# Options that change what the same tensors mean; of the others, those that shapes depend on show in the shapes.
MEANING = ("codec", "anchor_scale", "lowest_stride", "class_agnostic", "head_groups", "bucket_scale") + (
    *("levels", "heads", "points", "box_refine", "two_stage"),
)
SAMPLING = re.compile(r"(samples|nms|proposals)$")  # whole numbers that shape no tensor
# The level below the lowest, which only detectors with half_scale have: it may be new, or not needed.
HALF_SCALE = re.compile(r"(fpn\.lateral|fpn\.smooth|project|level_embed)\.(\d+)(\.|$)")


@dataclass
class DetectorWeights:
    """A whole detector as a file holds it, in our names.

    what         the file's kind, for people
    detector     name of ours that it fits
    rows         class rows of its heads, without the background's
    names        class of each row ("" = none), or None where the file does not say
    options      detector options that the tensors were made with, as far as the file says
    backbone     timm's name, or None where the file does not say
    frozen_norm  whether its batch norms were kept fixed in training
    background   whether a first row without a name is the background's
    """

    what: str
    path: str
    detector: str
    rows: int
    names: list[str] | None
    state: dict[str, Tensor]
    options: dict[str, Any]
    backbone: str | None
    frozen_norm: bool = True
    caffe_stride: bool = False
    background: bool = False


@dataclass
class BackboneWeights:
    """Tensors of something else, to be tried on the backbone."""

    path: str
    tensors: dict[str, Tensor]
    frozen_norm: bool = True


@dataclass
class WeightsReport:
    """What a file gave a detector.

    loaded    how many of its tensors were copied, as they were or in part (class rows)
    classes   which class rows were found
    anew      names of tensors that the file lacks and that keep their fresh start
    left_out  names of its tensors without a place here
    other     "key=there (here: here)" of options that differ without changing what the tensors mean
    """

    what: str
    path: str
    loaded: int
    classes: ClassMatch
    anew: list[str]
    left_out: list[str]
    other: list[str]

    def __str__(self) -> str:
        text = f"{self.what} from {self.path}: {self.loaded} tensors loaded; class head: {self.classes}"
        for label, names in (("anew", self.anew), ("left out", self.left_out), ("other options there", self.other)):
            text += f"; {label}: {shortened(names)}" if names else ""
        return text


def read_weights(source: str, url_of: UrlOf = published_url) -> DetectorWeights | BackboneWeights:
    """What `weights=` names: a file, a folder of transformers, or `torchvision://NAME`.

    url_of  torchvision's addresses, whose file names carry hashes
    Raises UserError when there is no such file, it cannot be read, or it is a detector that cannot be loaded.
    """
    path = fetch(source, url_of) if source.startswith(SCHEME) else Path(source)
    if path.is_dir():
        return _transformers(path, _tensors_in(path), _config_beside(path))
    if not path.is_file():
        raise UserError(f"weights={source}: there is no such file.")
    if is_checkpoint(path):
        return _own(path)
    tensors = {k.removeprefix("module."): v for k, v in read_tensors(path).items()}
    try:
        network = network_of(tensors)
    except UserError as error:
        raise UserError(f"weights={source}: {error}") from None
    if network is not None:
        return _torchvision(path, network, tensors, url_of)
    if any(k.endswith("level_embed") for k in tensors) and any(".sampling_offsets." in k for k in tensors):
        return _transformers(path, tensors, _config_beside(path.parent))
    return BackboneWeights(str(path), tensors)


def load_weights(
    detector: Detector, found: DetectorWeights | BackboneWeights, names: Sequence[str]
) -> WeightsReport | LoadReport:
    """Copy what was found into a fresh detector of the classes `names`; what to print about it is returned.

    Class rows go by name; classes that the file does not know keep their random start.
    Raises UserError, and changes nothing, when the file is of another detector, backbone or architecture.
    """
    if isinstance(found, BackboneWeights):
        if not placed(detector.backbone, found.tensors)[0]:
            raise UserError(
                f"weights={found.path} holds nothing for backbone={detector.spec['backbone']}: its first tensors are "
                f"{shortened(list(found.tensors))}. Accepted are {ACCEPTED}."
            )
        return copy_backbone_weights(detector.backbone, found.tensors, found.path)

    _check_architecture(detector, found)
    here = detector.state_dict()
    match = match_classes(names, found.names, found.rows, found.background)
    new, left_out = {}, []
    for key, there in found.state.items():
        if key not in here:
            left_out.append(key)
        elif is_class_tensor(detector, key):
            rows = with_rows(detector, key, here[key], there, found.rows, match)
            if rows is None:
                raise _misfit(detector, found, key)
            new[key] = rows
        elif here[key].shape != there.shape:
            raise _misfit(detector, found, key)
        else:
            new[key] = there
    anew = [k for k in here if k not in new and not k.endswith("num_batches_tracked")]
    for key in (*anew, *left_out):
        if not _is_extra_level(detector, found, key):
            raise _misfit(detector, found, key)
    detector.load_state_dict(here | new)
    return WeightsReport(found.what, found.path, len(new), match, anew, left_out, _other_options(detector, found))


# ---- kinds of files


def _own(path: Path) -> DetectorWeights:
    content = load_checkpoint(path)
    spec = content["spec"]
    return DetectorWeights(
        what=f"{content['use']} of an ssod checkpoint",
        path=str(path),
        detector=spec["name"],
        rows=spec["num_classes"],
        names=list(content["names"]),
        state=content["networks"][content["use"]],
        options=spec["options"],
        backbone=spec["backbone"],
        frozen_norm=spec.get("frozen_norm", False),
        caffe_stride=spec.get("caffe_stride", False),
    )


def _torchvision(path: Path, network: str, tensors: dict[str, Tensor], url_of: UrlOf) -> DetectorWeights:
    """The published Faster R-CNN and RetinaNet are known by their hash: torchvision gives their norms no epsilon."""
    what = f"torchvision's {network}"
    if network != "fcos_resnet50_fpn":
        published = expected_hash(url_of(network, "COCO_V1"))
        if published is not None and sha256(path).startswith(published):
            tensors = without_epsilon(tensors)
            what += " (published weights, batch norms without epsilon)"
    detector, rows, state = from_torchvision(tensors)
    defaults = {k: f.default for k, f in detector_class(detector).Options.model_fields.items()}
    return DetectorWeights(
        what=what,
        path=str(path),
        detector=detector,
        rows=rows,
        names=row_names(detector, rows),
        state=state,
        options={k: defaults[k] for k in MEANING if k in defaults},
        backbone=backbone_name(state, None),
        background=detector != "faster_rcnn",
    )


def _transformers(path: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None) -> DetectorWeights:
    try:
        options, rows, state = from_transformers(tensors, config)
    except UserError as error:
        raise UserError(f"weights={path}: {error}") from None
    labels = (config or {}).get("id2label") or {}
    named = ["" if n == "N/A" else str(n) for n in (labels.get(str(i), "") for i in range(rows))]
    names: list[str] | None = named
    if not any(named) or all(re.fullmatch(r"LABEL_\d+", n) for n in named):
        names = coco_names() if rows == COCO_ROWS else None
    return DetectorWeights(
        what="transformers' Deformable DETR",
        path=str(path),
        detector="deformable_detr",
        rows=rows,
        names=names,
        state=state,
        options=options,
        backbone=backbone_name(tensors, config),
    )


def _tensors_in(folder: Path) -> dict[str, Tensor]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return read_tensors(folder / name)
    raise UserError(
        f"weights={folder}: the folder has neither model.safetensors nor pytorch_model.bin; accepted are {ACCEPTED}."
    )


def _config_beside(folder: Path) -> dict[str, Any] | None:
    """The config.json of a Deformable DETR, where there is one."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from None
    return config if isinstance(config, dict) and config.get("model_type") == "deformable_detr" else None


# ---- what does not fit


def _check_architecture(detector: Detector, found: DetectorWeights) -> None:
    """What must be equal even where all shapes are."""
    spec = detector.spec
    if found.detector != spec["name"]:
        raise UserError(
            f"weights={found.path} is {found.what}: give detector={found.detector}, not detector={spec['name']}."
        )
    if found.backbone is not None and _architecture(found.backbone) != _architecture(spec["backbone"]):
        raise UserError(
            f"weights={found.path} has backbone={found.backbone}, this run backbone={spec['backbone']}: "
            f"give backbone={found.backbone}."
        )
    caffe = spec.get("caffe_stride", False)
    if found.caffe_stride != caffe:
        raise UserError(
            f"weights={found.path} was made with caffe_stride={_yaml(found.caffe_stride)}, this run has "
            f"caffe_stride={_yaml(caffe)}: give caffe_stride={_yaml(found.caffe_stride)}."
        )
    for key, there in found.options.items():
        here = spec["options"].get(key, there)
        alike = found.detector != "fcos" and {here, there} == {"l1", "giou"}  # two losses of the same code
        if key in MEANING and here != there and not alike:
            raise UserError(_give_options(detector, found))


def _misfit(detector: Detector, found: DetectorWeights, key: str) -> UserError:
    """The error of a tensor that is on one side only or has another shape."""
    if _differing(detector, found, shaping=True):
        return UserError(_give_options(detector, found))
    shapes = [tuple(s[key].shape) if key in s else "missing" for s in (found.state, detector.state_dict())]
    return UserError(
        f"weights={found.path} ({found.what}) does not fit: '{key}' is {shapes[0]} there and {shapes[1]} here; it fits "
        f"backbone={found.backbone or 'of its own'} and the default options of detector={found.detector}."
    )


def _give_options(detector: Detector, found: DetectorWeights) -> str:
    differing = _differing(detector, found, shaping=True)
    theirs = " ".join(f"detector.{k}={_yaml(found.options[k])}" for k in differing)
    ours = " ".join(f"detector.{k}={_yaml(detector.spec['options'][k])}" for k in differing)
    return f"weights={found.path} ({found.what}) was made with {theirs}, this run has {ours}: give the former."


def _differing(detector: Detector, found: DetectorWeights, shaping: bool = False) -> list[str]:
    """Options of another value here; `shaping`: only those that can matter to the tensors."""
    here = detector.spec["options"]
    names = [k for k, v in found.options.items() if k in here and here[k] != v]
    return [k for k in names if not shaping or k in MEANING or not (isinstance(here[k], float) or SAMPLING.search(k))]


def _other_options(detector: Detector, found: DetectorWeights) -> list[str]:
    here = detector.spec["options"]
    return [f"{k}={_yaml(found.options[k])} (here {_yaml(here[k])})" for k in _differing(detector, found)]


def _is_extra_level(detector: Detector, found: DetectorWeights, key: str) -> bool:
    """Whether a tensor on one side only belongs to the lowest level, and only one side has half_scale."""
    match = HALF_SCALE.match(key)
    half = [bool(options.get("half_scale")) for options in (detector.spec["options"], found.options)]
    if match is None or half[0] == half[1]:
        return False
    levels = [m for k in (*detector.state_dict(), *found.state) if (m := HALF_SCALE.match(k))]
    return int(match[2]) == min(int(m[2]) for m in levels)


def _architecture(backbone: str) -> str:
    """timm's name without the tag of its weights."""
    return backbone.partition(".")[0]


def _yaml(value: Any) -> str:
    """As a user writes it in `key=value`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
