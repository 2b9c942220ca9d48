"""Batch norm whose statistics never move, folded into the convolution before it where there is one.

An affine map after a convolution is itself a convolution with scaled weights. Doing that product on the weights at each
forward costs far less memory traffic than doing it on the feature maps, and gradients reach the weights through it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ssod.nn.conv import Conv2d


class FrozenNorm(nn.Module):
    """`act(x * scale + shift)` with the names a batch norm has in a checkpoint, all of them buffers.

    A norm may carry an activation (timm fuses the two); it stays here also when the affine part moves into a conv.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        values = {**dict(norm.named_parameters(recurse=False)), **dict(norm.named_buffers(recurse=False))}
        for name, value in values.items():
            self.register_buffer(name, value.detach())
        self.eps = norm.eps
        self.act = getattr(norm, "act", None) or nn.Identity()
        self.folded = False

    def affine(self) -> tuple[Tensor, Tensor]:
        """scale and shift, float32 [C] each."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        if not self.folded:
            scale, shift = self.affine()
            x = x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]
        return self.act(x)


class FoldedConv2d(Conv2d):
    """A convolution that applies the FrozenNorm after it on its own weights; made by `fold`."""

    norm: list[FrozenNorm]  # in a list, so that the norm stays registered (and saved) in one place only

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm[0].affine()
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        return self._conv_forward(x, weight, shift)


def freeze_norms(root: nn.Module, names: Iterable[str]) -> None:
    """Replace the batch norms of these module names in `root` by FrozenNorm, in place."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(root.get_submodule(parent), child, FrozenNorm(root.get_submodule(name)))  # type: ignore[arg-type]


@torch.no_grad()
def fold(root: nn.Module, probe: Callable[[], Iterable[Tensor]]) -> int:
    """Fold every FrozenNorm that directly follows a convolution into it, in place.

    probe  runs `root` on a small input and returns its outputs

    Which norm follows which convolution is observed, not guessed from names: the norm's input *is* the conv's output.
    Returns how many norms were folded; 0 where folding would change the outputs (they are compared).
    """
    produced: dict[int, tuple[Tensor, nn.Conv2d]] = {}  # keeps the tensor, so that its id stays its own
    pairs: list[tuple[nn.Conv2d, FrozenNorm]] = []

    def after_conv(module: nn.Module, _: tuple, output: Tensor) -> None:
        produced[id(output)] = (output, module)  # type: ignore[assignment]

    def before_norm(module: nn.Module, args: tuple) -> None:
        if id(args[0]) in produced:
            pairs.append((produced[id(args[0])][1], module))  # type: ignore[arg-type]

    hooks = [m.register_forward_hook(after_conv) for m in root.modules() if type(m) is nn.Conv2d]
    hooks += [m.register_forward_pre_hook(before_norm) for m in root.modules() if isinstance(m, FrozenNorm)]
    # A fresh norm has mean 0, variance 1 and often weight 0: too plain to notice a wrong fold.
    norms = [m for m in root.modules() if isinstance(m, FrozenNorm)]
    kept = [(m.running_mean.clone(), m.weight.clone()) for m in norms]
    for norm in norms:
        norm.running_mean.copy_(torch.linspace(-0.1, 0.1, len(norm.running_mean)))
        norm.weight.copy_(torch.linspace(0.5, 1.0, len(norm.weight)))
    try:
        before = [t.clone() for t in probe()]
        for hook in hooks:
            hook.remove()
        for conv, norm in pairs:
            conv.__class__ = FoldedConv2d
            conv.norm = [norm]  # type: ignore[assignment]
            norm.folded = True
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(before, probe(), strict=True))
        if not same:
            for conv, norm in pairs:
                conv.__class__ = nn.Conv2d
                norm.folded = False
    finally:
        for norm, (mean, weight) in zip(norms, kept, strict=True):
            norm.running_mean.copy_(mean)
            norm.weight.copy_(weight)
    return len(pairs) if same else 0
