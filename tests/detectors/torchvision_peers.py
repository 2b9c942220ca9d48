"""torchvision's detectors with random but telling weights, and ours with the same weights. For parity tests."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn, fcos_resnet50_fpn, retinanet_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from ssod.detectors.base import Detector
from ssod.detectors.names_torchvision import DENSE_NAMES, FASTER_RCNN_NAMES
from ssod.structures import Instances

LOSSES = {
    "fcos": {"cls": "classification", "box": "bbox_regression", "centerness": "bbox_ctrness"},
    "retinanet": {"cls": "classification", "box": "bbox_regression"},
    "faster_rcnn": {
        "rpn_cls": "loss_objectness",
        "rpn_box": "loss_rpn_box_reg",
        "cls": "loss_classifier",
        "box": "loss_box_reg",
    },
}
MAX_DET = 2000  # more than there are: a cut through equal scores would be arbitrary on both sides
FIRST_LABEL = {"fcos": 0, "retinanet": 0, "faster_rcnn": 1}
SCALE = {
    "fcos": 3.0,
    "retinanet": 30.0,
    "faster_rcnn": 8.0,
}  # of predictions' weights: some scores pass


def peer_of(name: str, num_classes: int, shorter_side: int) -> nn.Module:
    """A peer that resizes no image of this shorter side, and keeps every box of a score above 0.05 (up to MAX_DET)."""
    common = {"weights": None, "weights_backbone": None, "min_size": shorter_side, "max_size": 10 * shorter_side}
    if name == "fcos":
        peer = fcos_resnet50_fpn(num_classes=num_classes, score_thresh=0.05, detections_per_img=MAX_DET, **common)
    elif name == "retinanet":
        peer = retinanet_resnet50_fpn(num_classes=num_classes, score_thresh=0.05, detections_per_img=MAX_DET, **common)
    else:
        peer = fasterrcnn_resnet50_fpn(
            num_classes=num_classes + 1,
            rpn_batch_size_per_image=64,
            box_batch_size_per_image=64,
            box_detections_per_img=MAX_DET,
            **common,
        )
    make_telling(peer, name)
    return peer.eval()


def make_telling(peer: nn.Module, name: str) -> None:
    """Statistics that are not the identity, and predictions strong enough for some to pass the threshold."""
    generator = torch.Generator().manual_seed(3)
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            module.running_mean.normal_(std=0.05, generator=generator)
            module.running_var.uniform_(0.8, 1.2, generator=generator)
            module.weight.data.uniform_(0.7, 1.1, generator=generator)
    for key, value in peer.named_parameters():
        if re.search(r"(cls_logits|bbox_reg|bbox_pred|bbox_ctrness)\.weight", key):
            value.data.mul_(SCALE[name])
        if "bbox_reg.bias" in key and value.numel() == 4:  # FCOS: distances, which must be positive to count
            value.data.fill_(1.5)


def in_our_words(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a peer by our names and in our order: weights, or their gradients."""
    faster_rcnn = any(name.startswith("rpn.") for name in theirs)
    ours: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if "box_predictor" in name:
            # theirs: background first, with codes of its own; ours: background last, without codes
            value = torch.cat([value[1:], value[:1]]) if "cls_score" in name else value[4:]
        for pattern, new in FASTER_RCNN_NAMES if faster_rcnn else DENSE_NAMES:
            name = re.sub(pattern, new, name)
        ours[name] = value
    return ours


def copy_weights(peer: nn.Module, ours: Detector) -> None:
    ours.load_state_dict(in_our_words(peer.state_dict()))


def peer_targets(targets: list[Instances], name: str) -> list[dict[str, Tensor]]:
    return [{"boxes": t.boxes, "labels": t.labels + FIRST_LABEL[name]} for t in targets]


def as_batch(images: list[Tensor], multiple: int = 32) -> tuple[Tensor, Tensor]:
    """Images [3, h, w] of different sizes -> one batch, padded as theirs are, and the sizes [B, 2]."""
    sizes = torch.tensor([i.shape[1:] for i in images])
    height, width = (-(-sizes.amax(0) // multiple) * multiple).tolist()
    batch = torch.stack([nn.functional.pad(i, (0, width - i.shape[2], 0, height - i.shape[1])) for i in images])
    return batch, sizes
