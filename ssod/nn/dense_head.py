"""Parts of a head that predicts at every place of every map: towers of convolutions, and how predictions start."""

from __future__ import annotations

import math

from torch import Tensor, nn

from ssod.errors import UserError

PRIOR = 0.01  # first probability of every class: else the many negatives swamp the first steps (focal loss, 3.3)


def tower(channels: int, convs: int, groups: int | None) -> nn.Sequential:
    """`convs` 3x3 convolutions of one width, each with a group norm (groups=None: without) and a ReLU.

    Raises UserError for groups that do not divide the channels, or that leave one channel a group.
    """
    # one channel a group leaves nothing to normalise on a 1 x 1 map
    if groups is not None and (channels % groups or channels == groups):
        raise UserError(
            f"detector.head_groups={groups} does not divide detector.fpn_channels={channels} into groups of two or "
            f"more; choose e.g. head_groups={math.gcd(channels // 2, 32)}."
        )
    layers: list[nn.Module] = []
    for _ in range(convs):
        norm = [] if groups is None else [nn.GroupNorm(groups, channels)]
        layers += [nn.Conv2d(channels, channels, 3, padding=1), *norm, nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def start_convs(*parts: nn.Module) -> None:
    """Small random kernels and zero biases for every convolution of these modules."""
    for module in (m for part in parts for m in part.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def start_predictions(logits: nn.Conv2d, codes: nn.Conv2d, first: Tensor) -> None:
    """Set the biases of both layers: every class at its prior, every anchor's code at `first` [D]."""
    nn.init.constant_(logits.bias, -math.log((1 - PRIOR) / PRIOR))  # type: ignore[arg-type]
    codes.bias.data.copy_(first.repeat(codes.out_channels // len(first)))  # type: ignore[union-attr]


def per_anchor(x: Tensor, dim: int) -> Tensor:
    """[B, A * dim, h, w] -> [B, h * w * A, dim]."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, dim)
