"""Convolutions and linear layers that are computed otherwise where that is faster on a CPU: see `ssod.ops.winograd` and
`ssod.ops.products`."""

from __future__ import annotations

from torch import Tensor, nn

from ssod.ops import products, winograd

UNIT = {"stride": (1, 1), "dilation": (1, 1), "groups": 1}
KINDS = {  # what a convolution must be to take another form
    3: {"kernel_size": (3, 3), "padding": (1, 1), **UNIT},
    1: {"kernel_size": (1, 1), "padding": (0, 0), **UNIT},
}


class Conv2d(nn.Conv2d):
    """torch's, with the same values but for rounding; made by `choose_forms`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.is_kind(3) and winograd.pays(input, weight):
            return winograd.conv3x3(input, weight, bias)
        if self.is_kind(1) and products.pays_as_convolution(input, weight):
            return products.convolve(input, weight, bias)
        return super()._conv_forward(input, weight, bias)

    def is_kind(self, side: int) -> bool:
        return self.padding_mode == "zeros" and all(getattr(self, k) == v for k, v in KINDS[side].items())


class Linear(nn.Linear):
    """torch's, with the same values but for rounding; made by `choose_forms`."""

    def forward(self, input: Tensor) -> Tensor:
        if products.pays(input, self.weight):
            return products.linear(input, self.weight, self.bias)
        return super().forward(input)


def choose_forms(root: nn.Module) -> None:
    """Let every convolution and linear layer of `root` choose by the size of what it is given, in place."""
    for module in root.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
        elif type(module) is nn.Linear:
            module.__class__ = Linear
