"""What a model is, in a few figures. Needs torch for detectors alone, not for exported files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssod.data.sizes import Size, sides
from ssod.deploy.contract import Card

if TYPE_CHECKING:
    from ssod.detectors.base import Detector


@dataclass(frozen=True)
class Info:
    """layers      modules that hold no others
    parameters  numbers that are or were learned
    gflops      10^9 operations (convolutions and matrix products) of one square image of `imgsz` pixels
    precision   "fp32", "fp16" or "int8"

    layers, parameters and gflops are None of an exported model: its file does not tell.
    """

    detector: str
    backbone: str
    names: list[str]
    imgsz: Size
    layers: int | None = None
    parameters: int | None = None
    gflops: float | None = None
    precision: str = "fp32"

    def text(self) -> str:
        told = [f"{self.detector} on {self.backbone}: {len(self.names)} classes, imgsz {self.imgsz}, {self.precision}"]
        if self.layers is not None:
            told.append(f"{self.layers} layers, {self.parameters:,} parameters, {self.gflops:.2f} GFLOPs")
        return "\n".join(told)


def info_of_detector(detector: Detector, names: list[str], imgsz: Size) -> Info:
    import torch

    from ssod.engine.profile import operations

    side = sides(imgsz)[0]
    device = next(detector.parameters()).device
    flops, _ = operations(detector, torch.zeros(1, 3, side, side, dtype=torch.uint8, device=device))
    layers = sum(1 for module in detector.modules() if not any(module.children()))
    parameters = sum(p.numel() for p in detector.parameters())
    spec = detector.spec
    return Info(spec["name"], spec["backbone"], names, imgsz, layers, parameters, flops / 1e9)


def info_of_card(card: Card) -> Info:
    return Info(card.detector, card.backbone, card.names, card.imgsz, precision=card.precision)
