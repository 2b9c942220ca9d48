"""A detector's parts through torch.compile, in place: `compile=true`.

Each child is compiled on its own (backbone, neck, towers, layers): checkpoints keep their names, a part that a strategy
takes out and puts into a twin stays right, and what lies between them, sampling and NMS, stays Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ssod.errors import UserError, first_line

# All compiled modules share one limit, beyond which the rest would silently run as they are: student and teacher, with
# and without gradient, a few sizes of image.
FORMS = 128


def compile_networks(networks: Iterable[nn.Module], device: torch.device) -> None:
    """Compile the children of each network, in place; what is compiled is so at its first call, which takes minutes.

    Raises UserError where torch cannot compile for this device: no C++ compiler for a CPU, no Triton for CUDA.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    _try(device)
    for network in networks:
        for part in _parts(network):
            part.compile()


def _parts(network: nn.Module) -> Iterator[nn.Module]:
    for child in network.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        elif not isinstance(child, nn.ParameterDict | nn.ParameterList):
            yield child


def _try(device: torch.device) -> None:
    @torch.compile
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        twice(torch.ones(2, device=device))
    except RuntimeError as error:  # of which all of torch's own about compiling are
        wants = "Triton, which torch's CUDA builds bring" if device.type == "cuda" else "a C++ compiler, such as g++"
        raise UserError(
            f"compile=true: torch cannot compile for {device}, which takes {wants}. Install it, or leave "
            f"compile=false. torch says: {first_line(error)}"
        ) from error
