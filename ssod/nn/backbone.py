"""Any timm network as a backbone: feature maps by stride for images of any size, frozen stages and norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from ssod.errors import UserError, did_you_mean
from ssod.nn.frozen_norm import fold, freeze_norms
from ssod.nn.vit_pyramid import BASE, LEVELS, ViTPyramid

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# How networks are told to take images of any size. Each knows only some of these words; swin must also keep its windows
# as they are in its weights where a map is smaller than a window.
ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"strict_img_size": False, "always_partition": True},
    {"strict_img_size": False},
    {"dynamic_img_size": True},
    {},
)


class MissingStrides(UserError):
    """A backbone without feature maps of the strides that are asked for."""


class Backbone(nn.Module):
    """A timm classification network without its head.

    name          any name of `timm.list_models()`, e.g. "resnet50"; starts from random weights
    strides       which maps to return, e.g. (8, 16, 32)
    frozen_norm   batch norms keep their statistics and affine weights (what small batches on trained weights want)
    freeze        0 = train all; n = the stem and the first n stages get no gradient and frozen batch norms, that is all
                  that the map of stride 2^(n + 1) depends on; of plain transformers the embeddings and n quarters of
                  the blocks
    caffe_stride  the stride of a stage's first bottleneck sits in its 1x1 convolution (He et al., 2015, and weights
                  converted from caffe) instead of its 3x3 one

    channels  {stride: C} of the returned maps
    multiple  images are padded to multiples of this many pixels inside, and the maps cropped again; 1 = never

    Plain transformers with patches of 16 pixels get a `ViTPyramid`. Parameters that no returned map depends on get no
    gradient. Raises UserError for an unknown name, for a network made for one image size only, for freeze or
    caffe_stride where they do not fit, and MissingStrides for a network without maps of these strides.
    """

    net: Any  # timm's feature networks have no common type
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        strides: Sequence[int],
        frozen_norm: bool = False,
        freeze: int = 0,
        caffe_stride: bool = False,
    ) -> None:
        super().__init__()
        if not timm.is_model(name):
            raise UserError(f"'{name}' is not a backbone that timm knows.{did_you_mean(name, timm.list_models())}")
        self.net = _create(name)
        if caffe_stride:
            _move_strides(self.net, name)

        reductions, widths = self.net.feature_info.reduction(), self.net.feature_info.channels()
        self.indices = {stride: i for i, stride in enumerate(reductions)}  # of equal strides, the deepest
        self.plain = len(reductions) > 1 and set(reductions) == {BASE}
        offered = LEVELS if self.plain else sorted(self.indices)
        if not set(strides) <= set(offered):
            raise MissingStrides(
                f"Backbone '{name}' has feature maps of strides {list(offered)} but the detector needs "
                f"{list(strides)}; choose another backbone, e.g. 'resnet50', or a plain transformer with patches of "
                "16 pixels."
            )
        self.strides = tuple(sorted(strides))
        self.multiple, self.channels_last = self._fit(name, reductions, widths)
        self.pyramid = ViTPyramid(widths[-1], strides) if self.plain else None
        self.channels = (
            self.pyramid.out_channels if self.pyramid else {s: widths[self.indices[s]] for s in self.strides}
        )

        config = timm.get_pretrained_cfg(name)
        mean, std = (config.mean, config.std) if config is not None else (IMAGENET_MEAN, IMAGENET_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1) * 255, persistent=False)
        self._freeze(name, frozen_norm, freeze)

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
        """Normalised images [B, 3, H, W] -> {stride: [B, C, ceil(H / stride), ceil(W / stride)]}, ascending."""
        height, width = x.shape[-2:]
        if self.multiple > 1:
            x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple))
        outputs = self.net(x)
        if self.channels_last:
            outputs = [m.permute(0, 3, 1, 2) for m in outputs]
        if self.pyramid is not None:
            maps = self.pyramid(outputs[self.indices[BASE]])
        else:
            maps = {s: outputs[self.indices[s]] for s in self.strides}
        if self.multiple > 1:
            maps = {s: m[:, :, : -(-height // s), : -(-width // s)] for s, m in maps.items()}
        return maps

    # ---- what a small image tells about the network

    def _fit(self, name: str, reductions: list[int], widths: list[int]) -> tuple[int, bool]:
        """(multiple, channels_last): the least padding with which every map has its size, and whether maps come as
        [B, H, W, C], as some transformers give them."""
        config = timm.get_pretrained_cfg(name)
        native = 1 if config is None else max(config.input_size[1:])
        for multiple in sorted({BASE if self.plain else 1, max(reductions), native}):
            # Not square, wider than what it was made for, and where no padding is tried no multiple of any stride.
            self.probe_size = (33, native + 33) if multiple == 1 else (multiple, (native // multiple + 1) * multiple)
            try:
                shapes = [tuple(m.shape[1:]) for m in self._probe()]
            except (RuntimeError, AssertionError, ValueError, IndexError):
                continue
            cells = [tuple(-(-n // s) for n in self.probe_size) for s in reductions]
            for last in (False, True):
                if shapes == [(*c, w) if last else (w, *c) for c, w in zip(cells, widths, strict=True)]:
                    return multiple, last
        raise UserError(f"Backbone '{name}' takes images of one fixed size only; try 'resnet50'.")

    def _probe_image(self) -> Tensor:
        height, width = self.probe_size
        return torch.linspace(-2, 2, 3 * height * width).sin().view(1, 3, height, width)

    @torch.no_grad()
    def _probe(self) -> list[Tensor]:
        """Outputs of the network on a small fixed image, without touching any statistics."""
        was_training = self.net.training
        outputs = self.net.eval()(self._probe_image())
        self.net.train(was_training)
        return list(outputs)

    # ---- what does not learn

    def _freeze(self, name: str, frozen_norm: bool, freeze: int) -> None:
        with torch.enable_grad():
            self.eval()
            used = self._reached(list(self(self._probe_image()).values()))
            frozen = self._reached([self._stage_end(name, freeze)]) if freeze else set()
            self.train()
        for key, parameter in self.named_parameters():
            parameter.requires_grad_(key in used and key not in frozen)
        norms = [
            k
            for k, m in self.net.named_modules()
            if isinstance(m, nn.BatchNorm2d) and (frozen_norm or f"net.{k}.weight" in frozen)
        ]
        if norms:
            freeze_norms(self.net, norms)
            fold(self.net, self._probe)

    def _stage_end(self, name: str, freeze: int) -> Tensor:
        """The last thing that `freeze` stages compute from the probe image."""
        image = self._probe_image()
        if self.plain:
            model = self.net.model
            if freeze > 4:
                raise UserError(f"freeze={freeze} does not fit backbone '{name}': choose 0 (train all), 1, 2, 3, 4.")
            last = len(model.blocks) * freeze // 4 - 1
            found: Tensor = model.forward_intermediates(image, indices=[last], intermediates_only=True)[0]
            return found
        stride = 2 ** (freeze + 1)
        if stride not in self.indices:
            fit = ", ".join(str(s.bit_length() - 2) for s in sorted(self.indices) if s >= 4)
            raise UserError(f"freeze={freeze} does not fit backbone '{name}': choose 0 (train all), {fit}.")
        output: Tensor = self.net(image)[self.indices[stride]]
        return output

    def _reached(self, maps: list[Tensor]) -> set[str]:
        """Names of the parameters that `maps` depend on, as autograd recorded it."""
        known = dict(self.named_parameters())
        grads = torch.autograd.grad([m.sum() for m in maps], list(known.values()), allow_unused=True)
        return {name for name, grad in zip(known, grads, strict=True) if grad is not None}


def _create(name: str) -> Any:
    for words in ANY_SIZE:
        try:
            return timm.create_model(name, pretrained=False, features_only=True, **words)
        except TypeError as error:  # it does not know the word
            reason: Exception = error
        except (RuntimeError, AttributeError, AssertionError, ValueError, KeyError) as error:
            reason = error
            break
    raise UserError(f"Backbone '{name}' offers no feature maps (timm: {reason}); try 'resnet50'.") from reason


def _move_strides(net: nn.Module, name: str) -> None:
    """From the 3x3 to the first 1x1 convolution of every bottleneck that has a stride."""
    strided = [m for m in net.modules() if isinstance(m, Bottleneck) and m.conv2.stride != (1, 1)]
    if not strided or any(not isinstance(m.aa, nn.Identity) for m in strided):
        raise UserError(
            f"caffe_stride=true does not fit backbone '{name}': it has no bottlenecks whose stride could move; "
            "leave it out, or choose e.g. 'resnet50'."
        )
    for block in strided:
        block.conv1.stride, block.conv2.stride = block.conv2.stride, (1, 1)


MakeBackbone = Callable[[Sequence[int]], Backbone]  # strides -> backbone: a detector knows no more of it
