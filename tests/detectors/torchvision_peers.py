"""torchvision's detectors with random but telling weights, and ours with the same weights. For parity tests."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fcos_resnet50_fpn

from ssod.detectors.base import Detector
from ssod.structures import Instances

FCOS_NAMES = [
    (r"^backbone\.body\.", "backbone.net."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", lambda m: f"fpn.lateral.{8 << int(m[1])}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", lambda m: f"fpn.smooth.{8 << int(m[1])}."),
    (r"^backbone\.fpn\.extra_blocks\.p6\.", "fpn.extra.first."),
    (r"^backbone\.fpn\.extra_blocks\.p7\.", "fpn.extra.second."),
    (r"^head\.classification_head\.conv\.", "cls_tower."),
    (r"^head\.regression_head\.conv\.", "box_tower."),
    (r"^head\.classification_head\.cls_logits\.", "cls_logits."),
    (r"^head\.regression_head\.bbox_reg\.", "box_codes."),
    (r"^head\.regression_head\.bbox_ctrness\.", "centerness."),
]
FASTER_RCNN_NAMES = [
    (r"^backbone\.body\.", "backbone.net."),
    (r"^backbone\.fpn\.inner_blocks\.(\d)\.0\.", lambda m: f"fpn.lateral.{4 << int(m[1])}."),
    (r"^backbone\.fpn\.layer_blocks\.(\d)\.0\.", lambda m: f"fpn.smooth.{4 << int(m[1])}."),
    (r"^rpn\.head\.conv\.0\.0\.", "rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_logits."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_codes."),
    (r"^roi_heads\.box_head\.fc6\.", "fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "fc2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_logits."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_codes."),
]


def peer_fcos(num_classes: int, size: int) -> nn.Module:
    peer = fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=num_classes, min_size=size, max_size=size, score_thresh=0.05
    )
    return _telling(peer, scale=3)


def peer_faster_rcnn(num_classes: int, size: int) -> nn.Module:
    """Everything is sampled, so that neither side draws at random."""
    peer = fasterrcnn_resnet50_fpn(
        weights=None,
        weights_backbone=None,
        num_classes=num_classes + 1,
        min_size=size,
        max_size=size,
        rpn_batch_size_per_image=100_000,
        box_batch_size_per_image=100_000,
    )
    return _telling(peer, scale=8)


def _telling(peer: nn.Module, scale: float) -> nn.Module:
    """Statistics that are not the identity, and predictions strong enough for some to pass the threshold."""
    generator = torch.Generator().manual_seed(3)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.05, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            module.weight.data.uniform_(0.7, 1.1, generator=generator)
    for name, value in peer.named_parameters():
        if re.search(r"(cls_logits|cls_score|bbox_reg|bbox_pred|bbox_ctrness)\.weight", name):
            value.data.mul_(scale)
        if "bbox_reg.bias" in name:
            value.data.fill_(1.5)
    return peer.eval()


def copy_weights(peer: nn.Module, ours: Detector) -> None:
    fcos = not hasattr(peer, "rpn")
    state: dict[str, Tensor] = {}
    for name, value in peer.state_dict().items():
        if not fcos and "box_predictor" in name:
            # theirs: background first, with codes of its own; ours: background last, without codes
            value = torch.cat([value[1:], value[:1]]) if "cls_score" in name else value[4:]
        for pattern, new in FCOS_NAMES if fcos else FASTER_RCNN_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = value
    ours.load_state_dict(state)


def peer_targets(targets: list[Instances], first_label: int) -> list[dict[str, Tensor]]:
    return [{"boxes": t.boxes, "labels": t.labels + first_label} for t in targets]
