"""Convolutions that are computed with fewer products where that is faster: see `ssod.ops.winograd`."""

from __future__ import annotations

from torch import Tensor, nn

from ssod.ops.winograd import conv3x3, pays

STANDARD = {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}


class Conv2d(nn.Conv2d):
    """torch's, with the same values but for rounding; made by `fewer_products`."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.fits and pays(input, weight):
            return conv3x3(input, weight, bias)
        return super()._conv_forward(input, weight, bias)

    @property
    def fits(self) -> bool:
        return self.padding_mode == "zeros" and all(getattr(self, k) == v for k, v in STANDARD.items())


def fewer_products(root: nn.Module) -> None:
    """Let every convolution of `root` choose by the size of what it is given, in place."""
    for module in root.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
