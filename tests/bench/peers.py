"""The same detectors from the libraries people use, and one supervised step of each: forward, loss, backward.

Both sides: ResNet-50 with frozen batch norms, stem and first stage frozen, pyramid of 256 channels, 80 classes;
Deformable DETR with box refinement and two stages.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torchvision.models import resnet50
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import _default_anchorgen
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.nn.backbone import IMAGENET_MEAN, IMAGENET_STD
from ssod.nn.compiled import compile_networks
from ssod.nn.precision import lay_out
from ssod.structures import Instances

Step = Callable[[], object]
Context = Callable[[], AbstractContextManager[object]]  # autocast, or nothing
DETECTORS = ("fcos", "retinanet", "faster_rcnn", "deformable_detr")
NUM_CLASSES = 80
IOU = {"fcos": 0.6, "retinanet": 0.5, "faster_rcnn": 0.5, "deformable_detr": 0.5}  # torchvision's, of NMS
MAX_DET = 100
THEIR_MODES = ("fp32", "bf16", "bf16 channels_last")
OUR_MODES = ("fp32", "bf16")


def make_step(name: str, who: str, mode: str, size: int, batch: int, device: str = "cpu") -> Step:
    """One training step of a detector by "ours" or "theirs". "compile" in the mode: ours as by compile=true, of theirs
    backbone and neck."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
    targets = [t.to(device) for t in make_targets(batch, size)]
    model = ours(name) if who == "ours" else theirs(name, size)
    model.to(device).train()
    half = torch.bfloat16 if "bf16" in mode else None
    if who == "ours":
        lay_out(model, half)
    elif "channels_last" in mode:
        model.to(memory_format=torch.channels_last)
    if "compile" in mode:
        compile_parts(name, who, model)

    def context() -> AbstractContextManager[object]:
        return torch.autocast(device, half) if half is not None else nullcontext()

    if who == "ours":
        return our_step(model, images, targets, context)
    return their_step(name, model, images, targets, context)


def ours(name: str) -> Detector:
    # the reference's dropout, so that both sides do the same work
    options = {"dropout": 0.1} if name == "deformable_detr" else {}
    return build_detector(name, NUM_CLASSES, options=options, frozen_norm=True, freeze=1)


def theirs(name: str, size: int) -> nn.Module:
    if name == "deformable_detr":
        from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

        config = DeformableDetrConfig(
            num_labels=NUM_CLASSES, two_stage=True, with_box_refine=True, auxiliary_loss=True, class_cost=2
        )
        return DeformableDetrForObjectDetection(config)
    body = resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    if name == "faster_rcnn":
        return FasterRCNN(_resnet_fpn_extractor(body, 3), NUM_CLASSES + 1, min_size=size, max_size=size)
    extra = LastLevelP6P7(256, 256)
    backbone = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=extra)
    if name == "fcos":
        return FCOS(backbone, NUM_CLASSES, min_size=size, max_size=size)
    return RetinaNet(
        backbone, NUM_CLASSES, anchor_generator=_default_anchorgen(), min_size=size, max_size=size
    )  # nine anchors per cell, as in retinanet_resnet50_fpn


def set_limits(peer: nn.Module, name: str, conf: float) -> None:
    """What torchvision's detectors give at all; transformers leaves it to who reads the output."""
    if name != "deformable_detr":
        part = peer.get_submodule("roi_heads") if name == "faster_rcnn" else peer
        part.score_thresh, part.nms_thresh, part.detections_per_img = conf, IOU[name], MAX_DET


def compile_parts(name: str, who: str, model: nn.Module) -> None:
    if who == "ours":
        compile_networks([model], next(model.parameters()).device)
    elif name == "deformable_detr":
        encoder = model.model.backbone.conv_encoder if hasattr(model.model.backbone, "conv_encoder") else None
        assert encoder is not None, "transformers moved the backbone of Deformable DETR"
        encoder.model = torch.compile(encoder.model)
    else:
        model.backbone = torch.compile(model.backbone)


def our_step(model: Detector, images: Tensor, targets: list[Instances], context: Context) -> Step:
    def step() -> None:
        model.zero_grad()
        with context():
            losses = model.loss(model.head(model.features(images)), targets)
        sum(losses.values()).backward()

    return step


def their_step(name: str, model: nn.Module, images: Tensor, targets: list[Instances], context: Context) -> Step:
    pixels = their_pixels(name, images)

    def step() -> None:
        model.zero_grad()
        with context():
            loss = their_loss(name, model, pixels, targets)
        loss.backward()

    return step


def their_pixels(name: str, images: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] as theirs want it: torchvision's normalise inside, transformers' are given normalised ones."""
    pixels = images.float() / 255
    if name != "deformable_detr":
        return pixels
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def their_loss(name: str, model: nn.Module, pixels: Tensor, targets: list[Instances]) -> Tensor:
    if name == "deformable_detr":
        size, labels = pixels.shape[-1], []
        for t in targets:
            center, side = (t.boxes[:, :2] + t.boxes[:, 2:]) / 2, t.boxes[:, 2:] - t.boxes[:, :2]
            labels.append({"class_labels": t.labels, "boxes": torch.cat([center, side], dim=1) / size})
        loss: Tensor = model(pixel_values=pixels, labels=labels).loss
        return loss
    first = 1 if name == "faster_rcnn" else 0
    losses = model(list(pixels), [{"boxes": t.boxes, "labels": t.labels + first} for t in targets])
    return torch.stack(list(losses.values())).sum()


def make_targets(batch: int, size: int, per_image: int = 7) -> list[Instances]:
    targets = []
    for _ in range(batch):
        corner = torch.rand(per_image, 2) * size * 0.6
        side = size * (0.05 + 0.35 * torch.rand(per_image, 2))
        targets.append(Instances(torch.cat([corner, corner + side], 1), torch.randint(0, NUM_CLASSES, (per_image,))))
    return targets
