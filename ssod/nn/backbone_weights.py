"""Weights of a classification network into a backbone, by timm's or torchvision's names."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssod.errors import UserError
from ssod.nn.backbone import Backbone

INNER = ("state_dict", "model", "model_state_dict")  # where trainers put the weights in their own files
PREFIXES = ("module.", "backbone.", "encoder.")


@dataclass
class LoadReport:
    """What a weights file gave a backbone.

    loaded    how many of its tensors were copied
    left_out  names of those without a place in a backbone: the classifier
    """

    path: str
    loaded: int
    left_out: list[str]

    def __str__(self) -> str:
        text = f"{self.loaded} tensors of the backbone loaded from {self.path}"
        if self.left_out:
            text += f"; {shortened(self.left_out)} left out"
        return text


def load_backbone_weights(backbone: Backbone, path: str | Path) -> LoadReport:
    """Copy a classification checkpoint (.safetensors, .pth, .pt, .bin) into a backbone.

    The file holds timm's or torchvision's names, plain or under "state_dict" or "model"; its classifier is left out.
    Raises UserError when the file cannot be read, belongs to another network, or holds none of its weights.
    """
    return copy_backbone_weights(backbone, read_tensors(path), path)


def copy_backbone_weights(backbone: Backbone, tensors: Mapping[str, Tensor], path: str | Path) -> LoadReport:
    """`load_backbone_weights` of tensors already read from `path`."""
    target = backbone.net.state_dict()
    source, left_out = placed(backbone, tensors)
    if not source:
        raise UserError(f"{path} holds no weights of this backbone; its first tensors are {shortened(list(tensors))}.")
    for name, value in source.items():
        if target[name].shape != value.shape:
            raise UserError(
                f"{path} does not fit this backbone: '{name}' is {tuple(value.shape)} there "
                f"and {tuple(target[name].shape)} here."
            )
    missing = [k for k in target if k not in source and not k.endswith("num_batches_tracked")]
    if missing:
        raise UserError(
            f"{path} is not of this backbone: it lacks {len(missing)} of its {len(target)} tensors, "
            f"such as {shortened(missing)}."
        )
    backbone.net.load_state_dict(source, strict=False)
    return LoadReport(str(path), len(source), left_out)


def placed(backbone: Backbone, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """(those tensors of a classifier that have a place in `backbone.net`, under its names; names of the others)."""
    source = dict(tensors)
    for prefix in PREFIXES:
        source = {k.removeprefix(prefix): v for k, v in source.items()}
    target = backbone.net.state_dict()
    inner = getattr(backbone.net, "model", None)
    if inner is None:
        children = {name for name, _ in backbone.net.named_children()}
        renamed = {_flattened(k, children): v for k, v in source.items()}
    else:  # a whole network under a feature getter; timm itself fits positions and patches of another image size
        adapt = getattr(sys.modules[type(inner).__module__], "checkpoint_filter_fn", None)
        if adapt is not None and any(f"model.{k}" in target for k in source):
            source = adapt(source, inner)
        renamed = {f"model.{k}": v for k, v in source.items()}
    left_out = [k.removeprefix("model.") for k in renamed if k not in target]
    return {k: v for k, v in renamed.items() if k in target}, left_out


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; nothing in the file is executed.

    Raises UserError when there is no such file, it cannot be read, or it holds no named tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Weights file {path} does not exist.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(str(path))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each format has its own errors, all of which mean the same to the user
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Weights file {path} cannot be read: {said[0]}") from error
    content = content if isinstance(content, dict) else {}
    content = next((content[k] for k in INNER if isinstance(content.get(k), dict)), content)
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if not tensors:
        raise UserError(f"Weights file {path} holds no named tensors, only {shortened([str(k) for k in content])}.")
    return tensors


def shortened(names: list[str], most: int = 4) -> str:
    """The first few of many names."""
    shown = ", ".join(names[:most]) or "nothing"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


def _flattened(name: str, children: set[str]) -> str:
    """timm writes "blocks.0.x" as "blocks_0.x" in some feature networks."""
    first, _, rest = name.partition(".")
    second, _, tail = rest.partition(".")
    joined = f"{first}_{second}"
    return f"{joined}.{tail}" if joined in children else name
