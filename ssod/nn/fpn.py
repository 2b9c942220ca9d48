"""Feature pyramid network (Lin et al., 2017), keyed by stride."""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn


class ConvLevels(nn.Module):
    """Up to two more levels by 3x3 convolutions of stride 2, from the FPN's own top map (FCOS, section 4)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, top: Tensor, count: int) -> list[Tensor]:
        levels = [self.first(top)] if count > 0 else []
        return [*levels, self.second(levels[0].relu())] if count > 1 else levels


class PoolLevels(nn.Module):
    """More levels, each of every second cell of the one before (FPN, section 4.1, footnote)."""

    def forward(self, top: Tensor, count: int) -> list[Tensor]:
        return [top[:, :, :: 2**i, :: 2**i] for i in range(1, count + 1)]


class FPN(nn.Module):
    """Maps of one width at every stride.

    in_channels  {stride: C} of the backbone, ascending strides, each twice the one before
    channels     width of every output map
    extra        adds levels above the top one: ConvLevels or PoolLevels
    """

    def __init__(self, in_channels: dict[int, int], channels: int, extra: ConvLevels | PoolLevels) -> None:
        super().__init__()
        self.lateral = nn.ModuleDict({str(s): nn.Conv2d(c, channels, 1) for s, c in in_channels.items()})
        self.smooth = nn.ModuleDict({str(s): nn.Conv2d(channels, channels, 3, padding=1) for s in in_channels})
        self.extra = extra
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def of_level(self, stride: int) -> tuple[nn.Module, nn.Module]:
        """What only this level's map goes through."""
        return self.lateral[str(stride)], self.smooth[str(stride)]

    def forward(self, maps: dict[int, Tensor], strides: Collection[int]) -> dict[int, Tensor]:
        """{stride: [B, C_s, h, w]} -> {stride: [B, channels, h, w]}, ascending; no other level is computed.

        strides  those wanted, each twice the one before; what is finer than every map is left out
        """
        out: dict[int, Tensor] = {}
        inner: Tensor | None = None
        for stride in sorted((s for s in maps if s >= min(strides)), reverse=True):
            lateral = self.lateral[str(stride)](maps[stride])
            if inner is None:
                inner = lateral
            else:
                inner = lateral + F.interpolate(inner, size=lateral.shape[-2:], mode="nearest")
            out[stride] = self.smooth[str(stride)](inner)

        top = max(out)
        higher = sorted(s for s in strides if s > top)
        out |= dict(zip(higher, self.extra(out[top], len(higher)), strict=True))
        return dict(sorted(out.items()))
