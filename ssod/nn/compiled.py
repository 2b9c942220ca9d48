"""A detector's parts through torch.compile, in place: `compile=true`, or `graphs` for a teacher of CUDA graphs.

Each child is compiled on its own (backbone, neck, towers, layers): checkpoints keep their names, a part that a strategy
takes out and puts into a twin stays right, and what lies between them, sampling and NMS, stays Python.

A network without gradient, a teacher, may run as CUDA graphs: torch records the kernels of each size of image once and
starts them together from then on. What such a part returns lies in memory that the next step writes anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ssod.errors import UserError, first_line

# All compiled modules share one limit, beyond which the rest would silently run as they are: student and teacher, with
# and without gradient, a few sizes of image.
FORMS = 128


def compile_networks(networks: Iterable[nn.Module], device: torch.device, graphs: bool = False) -> None:
    """Compile the children of each network, in place; what is compiled is so at its first call, which takes minutes.

    graphs  CUDA graphs for networks none of whose parameters is trained; `begin_step` must then be called every step

    Raises UserError where torch cannot compile for this device: no C++ compiler for a CPU, no Triton for CUDA; and for
    graphs on another device than CUDA.
    """
    if graphs and device.type != "cuda":
        raise UserError(
            f"compile=graphs: CUDA graphs need a CUDA device, and this run is on {device}. Use compile=true."
        )
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    _try(device)
    for network in networks:
        fixed = graphs and not any(p.requires_grad for p in network.parameters())
        for part in _parts(network):
            part.compile(mode="reduce-overhead" if fixed else None)


def begin_step() -> None:
    """Says that nothing a CUDA graph returned before is needed any more: else every part would be a step of its own."""
    torch.compiler.cudagraph_mark_step_begin()


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
