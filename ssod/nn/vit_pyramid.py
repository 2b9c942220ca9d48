"""Simple feature pyramid: the one map of a plain vision transformer at four strides (Li et al., 2022, section 3)."""

from __future__ import annotations

from collections.abc import Sequence

from timm.layers import LayerNorm2d
from torch import Tensor, nn

BASE = 16  # stride of the transformer's map
LEVELS = (4, 8, 16, 32)


class ViTPyramid(nn.Module):
    """Strides 4, 8, 16 and 32 from the map of stride 16: up by transposed convolutions, down by max pooling.

    No level sees another one: a plain transformer's map is made of global attention and needs no lateral connections.
    The transformer's own last norm is not applied, so each level ends in a layer norm over the channels.

    channels  C of the map
    strides   levels to make, of 4, 8, 16, 32

    out_channels  {4: C / 4, 8: C / 2, 16: C, 32: C}, only the levels made
    """

    def __init__(self, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        half, quarter = channels // 2, channels // 4
        fine = [
            nn.ConvTranspose2d(channels, half, 2, stride=2),
            LayerNorm2d(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
        ]
        steps: dict[int, list[nn.Module]] = {
            4: fine,
            8: [nn.ConvTranspose2d(channels, half, 2, stride=2)],
            16: [],
            32: [nn.MaxPool2d(2, stride=2, ceil_mode=True)],
        }
        self.out_channels = {s: {4: quarter, 8: half}.get(s, channels) for s in sorted(strides)}
        self.levels = nn.ModuleDict(
            {str(s): nn.Sequential(*steps[s], LayerNorm2d(c)) for s, c in self.out_channels.items()}
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        """[B, C, h, w] of stride 16 -> {stride: [B, C_s, ceil(16 h / stride), ceil(16 w / stride)]}, ascending."""
        return {int(stride): level(x) for stride, level in self.levels.items()}
