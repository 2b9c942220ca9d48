"""Any timm network as a backbone: feature maps by stride, frozen stages, weights from a local file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ssod.errors import UserError, did_you_mean
from ssod.nn.frozen_norm import fold, freeze_norms

PROBE_SIZE = 64  # pixels: two cells on a map of stride 32
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A timm classification network without its head.

    name         any name of `timm.list_models()`, e.g. "resnet50"; starts from random weights
    strides      which maps to return, e.g. (8, 16, 32)
    frozen_norm  batch norms keep their statistics and affine weights (what small batches on trained weights want)
    freeze       0 = train all; n = the stem and the first n stages get no gradient and frozen batch norms,
                 that is all up to the map of stride 2^(n + 1)

    channels  {stride: C} of the returned maps
    Raises UserError for an unknown name and for a network without maps of these strides.
    """

    net: Any  # timm's feature networks have no common type
    mean: Tensor
    std: Tensor

    def __init__(self, name: str, strides: Sequence[int], frozen_norm: bool = False, freeze: int = 0) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"'{name}' is not a backbone that timm knows.{did_you_mean(name, timm.list_models())}")
        try:
            self.net = timm.create_model(name, pretrained=False, features_only=True)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UserError(f"Backbone '{name}' offers no feature maps (timm: {error}); try 'resnet50'.") from error

        info = self.net.feature_info
        index = {stride: i for i, stride in enumerate(info.reduction())}  # of equal strides, the deepest
        missing = [s for s in strides if s not in index]
        if missing:
            raise UserError(
                f"Backbone '{name}' has feature maps of strides {sorted(index)} "
                f"but the detector needs {list(strides)}; choose another backbone, e.g. 'resnet50'."
            )
        self.indices = {s: index[s] for s in strides}
        self.channels = {s: info.channels()[index[s]] for s in strides}
        self.channels_last = self._probe_layout(name)

        config = timm.get_pretrained_cfg(name)
        mean, std = (config.mean, config.std) if config is not None else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)

        stem = self._executed_until(name, freeze, index) if freeze else set()
        for module in stem:
            self.net.get_submodule(module).requires_grad_(False)
        norms = [k for k, m in self.net.named_modules() if isinstance(m, nn.BatchNorm2d) and (frozen_norm or k in stem)]
        if norms:
            freeze_norms(self.net, norms)
            fold(self.net, self._probe)

    def normalize(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """uint8 0..255 or float 0..1 [B, 3, H, W] RGB -> float32, zero mean, unit variance, zero in the padding.

        sizes  int64 [B, 2] valid (h, w), or None where there is no padding
        """
        if images.dtype == torch.uint8:
            x = (images.float() - self.mean) / self.std
        else:
            x = (images.float() - self.mean / 255) / (self.std / 255)
        if torch.is_autocast_enabled(x.device.type):  # half-precision kernels are faster on this layout, float32's not
            x = x.contiguous(memory_format=torch.channels_last)
        if sizes is None:
            return x
        row = torch.arange(x.shape[2], device=x.device) < sizes[:, :1]  # [B, H]
        column = torch.arange(x.shape[3], device=x.device) < sizes[:, 1:]  # [B, W]
        return x * (row[:, None, :, None] & column[:, None, None, :])

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """Normalised images [B, 3, H, W] -> {stride: [B, C, ceil(H / stride), ceil(W / stride)]}."""
        outputs = self.net(x)
        maps = {stride: outputs[i] for stride, i in self.indices.items()}
        return {s: m.permute(0, 3, 1, 2) for s, m in maps.items()} if self.channels_last else maps

    @torch.no_grad()
    def _probe(self) -> list[Tensor]:
        """Outputs on a small fixed image, without touching any statistics."""
        image = torch.linspace(-2, 2, 3 * PROBE_SIZE * PROBE_SIZE).sin().view(1, 3, PROBE_SIZE, PROBE_SIZE)
        was_training = self.net.training
        outputs = self.net.eval()(image)
        self.net.train(was_training)
        return list(outputs)

    def _probe_layout(self, name: str) -> bool:
        """Whether the maps come as [B, H, W, C], as some transformers give them."""
        try:
            maps = self._probe()
        except (RuntimeError, AssertionError, ValueError) as error:
            raise UserError(f"Backbone '{name}' takes images of one fixed size only; try 'resnet50'.") from error
        stride, i = next(iter(self.indices.items()))
        cells = PROBE_SIZE // stride
        return tuple(maps[i].shape[1:]) == (cells, cells, self.channels[stride])

    def _executed_until(self, name: str, freeze: int, index: dict[int, int]) -> set[str]:
        """Names of the leaf modules that run before the map of stride 2^(freeze + 1) is complete."""
        stride = 2 ** (freeze + 1)
        if stride not in index:
            most = max(s.bit_length() - 2 for s in index)
            raise UserError(f"freeze={freeze} does not fit backbone '{name}': choose 0 to {most}.")
        last = self.net.feature_info.module_name()[index[stride]]
        known = dict(self.net.named_modules())
        found = [k for k in (last, last.replace(".", "_"), f"model.{last}") if k in known]
        if not found:
            raise UserError(f"Backbone '{name}' cannot be frozen in stages; use freeze=0.")

        executed: set[str] = set()
        done: list[bool] = []

        def record(key: str) -> None:
            if not done:
                executed.add(key)

        leaves = [(k, m) for k, m in known.items() if next(m.children(), None) is None or isinstance(m, nn.BatchNorm2d)]
        hooks = [m.register_forward_pre_hook(lambda _m, _x, key=k: record(key)) for k, m in leaves]
        hooks.append(known[found[0]].register_forward_hook(lambda *_: done.append(True)))
        self._probe()
        for hook in hooks:
            hook.remove()
        return executed


MakeBackbone = Callable[[Sequence[int]], Backbone]  # strides -> backbone: a detector knows no more of it


@dataclass
class LoadReport:
    """What a weights file gave a backbone: tensors copied, tensors it lacked, tensors without a place here."""

    path: str
    loaded: int
    missing: list[str]
    left_out: list[str]

    def __str__(self) -> str:
        text = f"{self.loaded} tensors of the backbone loaded from {self.path}"
        for label, names in (("missing there", self.missing), ("left out", self.left_out)):
            if names:
                text += f"; {len(names)} {label}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}"
        return text


def load_backbone_weights(backbone: Backbone, path: str | Path) -> LoadReport:
    """Copy a classification checkpoint (.safetensors, .pth, .pt, .bin) into a backbone.

    The file holds timm's or torchvision's names, plain or under "state_dict" or "model"; its classifier is left out.
    Raises UserError when the file cannot be read, belongs to another network, or holds none of its weights.
    """
    path = Path(path)
    source = {_without_prefix(k): v for k, v in _read_tensors(path).items()}
    target = backbone.net.state_dict()
    children = {name for name, _ in backbone.net.named_children()}

    accepted, left_out = {}, []
    for name, value in source.items():
        key = _flattened(name, children)
        if key not in target:
            left_out.append(name)
        elif target[key].shape != value.shape:
            raise UserError(
                f"{path} does not fit this backbone: '{name}' is {tuple(value.shape)} there "
                f"and {tuple(target[key].shape)} here."
            )
        else:
            accepted[key] = value
    if not accepted:
        raise UserError(f"{path} holds no weights of this backbone; its first tensor is '{next(iter(source), '')}'.")
    backbone.net.load_state_dict(accepted, strict=False)
    missing = [k for k in target if k not in accepted and not k.endswith("num_batches_tracked")]
    return LoadReport(str(path), len(accepted), missing, left_out)


def _read_tensors(path: Path) -> dict[str, Tensor]:
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
        raise UserError(f"Weights file {path} cannot be read: {str(error).splitlines()[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            break
    return {k: v for k, v in content.items() if isinstance(v, Tensor)}


def _without_prefix(name: str) -> str:
    for prefix in ("module.", "backbone.", "encoder."):
        name = name.removeprefix(prefix)
    return name


def _flattened(name: str, children: set[str]) -> str:
    """timm writes "blocks.0.x" as "blocks_0.x" in some feature networks."""
    first, _, rest = name.partition(".")
    second, _, tail = rest.partition(".")
    joined = f"{first}_{second}"
    return f"{joined}.{tail}" if joined in children else name
