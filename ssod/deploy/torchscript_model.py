"""TorchScript: written by a trace of the graph of pure tensor operations, run as tensors in, tensors out."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ssod.deploy.contract import Card
from ssod.deploy.graph import Graph
from ssod.detectors.base import Detector
from ssod.errors import UserError, first_line
from ssod.ops.forms import graph_for

EXTRA = "ssod.json"  # the card, among the file's extra files


def write_torchscript(detector: Detector, path: Path, card: Card) -> None:
    """A detector as TorchScript, traced at its fixed size for any batch, with the card inside."""
    assert card.size is not None
    graph = Graph(copy.deepcopy(detector).requires_grad_(False), card.conf, card.iou, card.max_det).eval()
    images = torch.rand(2, 3, *card.size)
    sizes = (torch.tensor([card.size] * 2, dtype=torch.int32),) if "sizes" in card.inputs else ()
    with torch.no_grad(), graph_for("tensorrt"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FutureWarning of torch, and of sizes that the trace holds fast, as it should
        script = torch.jit.trace(graph, (images, *sizes), check_trace=False)
        torch.jit.save(script, str(path), _extra_files={EXTRA: card.dumps()})


class TorchScriptModel:
    """A .torchscript file that `ssod export` wrote.

    Raises ForeignModel for a file of another program, UserError for a damaged one.
    """

    def __init__(self, path: str | Path, device: torch.device) -> None:
        self.device = device
        extra = {EXTRA: ""}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch would rather have torch.export
                self._module = torch.jit.load(str(path), map_location=device, _extra_files=extra).eval()
        except (RuntimeError, ValueError) as error:
            raise UserError(f"{path} is not a TorchScript model, or it is cut off: {first_line(error)}") from None
        text: str | bytes = extra[EXTRA]
        self.card = Card.loads(text.decode() if isinstance(text, bytes) else text, path)

    def __call__(self, images: Tensor, sizes: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """images float32 [B, 3, H, W], sizes int32 [B, 2] or None -> num_dets, boxes, scores, labels."""
        return self._module(images) if sizes is None else self._module(images, sizes)
