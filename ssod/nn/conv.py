"""Convolutions and linear layers that are computed otherwise where that is faster on a CPU: see `ssod.ops.winograd` and
`ssod.ops.products`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ssod.ops import products, winograd
from ssod.ops.forms import graph_target, in_graph

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
        return _linear(input, self.weight, self.bias)


class LinearOfMaps(nn.Linear):
    """A linear layer of flattened maps: [M, C, h, w] -> [M, K], weights [K, C * h * w].

    Either maps that lie channels last are sorted before they can be flattened, or the weights are sorted as the maps
    lie. A graph for onnxruntime does the latter, where weights are sorted once and for all.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not self.sorts(input):
            return _linear(input.flatten(1), self.weight, self.bias)
        weight = self.weight.view(-1, *input.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return _linear(input.permute(0, 2, 3, 1).flatten(1), weight, self.bias)

    def sorts(self, input: Tensor) -> bool:
        """Whether the weights are sorted: outside of graphs where they are at most half as many as the features."""
        if in_graph():
            return graph_target() == "onnxruntime"
        return len(input) >= 2 * len(self.weight) and input.permute(0, 2, 3, 1).is_contiguous()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if products.pays(input, weight):
        return products.linear(input, weight, bias)
    return F.linear(input, weight, bias)


def choose_forms(root: nn.Module) -> None:
    """Let every convolution and linear layer of `root` choose by the size of what it is given, in place."""
    for module in root.modules():
        if type(module) is nn.Conv2d:
            module.__class__ = Conv2d
        elif type(module) is nn.Linear:
            module.__class__ = Linear
