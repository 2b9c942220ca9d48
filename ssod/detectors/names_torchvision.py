"""Detection checkpoints of torchvision: their networks, names, class rows and batch norms in our words.

Names of today's torchvision and of the published files, which are older (`inner_blocks.0.weight`,
`rpn.head.conv.weight`, RetinaNet's `conv.2.weight`), are read alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor

from ssod.errors import UserError

# torchvision's network -> our detector
NETWORKS = {
    "fcos_resnet50_fpn": "fcos",
    "retinanet_resnet50_fpn": "retinanet",
    "fasterrcnn_resnet50_fpn": "faster_rcnn",
}
COCO_ROWS = 91  # of a COCO head: one a category id, with gaps

Renames = list[tuple[str, str | Callable[[re.Match[str]], str]]]


def _fpn(finest: int) -> Renames:
    return [
        (r"^backbone\.body\.", "backbone.net."),
        (r"^backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?", lambda m: f"fpn.lateral.{finest << int(m[1])}."),
        (r"^backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?", lambda m: f"fpn.smooth.{finest << int(m[1])}."),
        (r"^backbone\.fpn\.extra_blocks\.p6\.", "fpn.extra.first."),
        (r"^backbone\.fpn\.extra_blocks\.p7\.", "fpn.extra.second."),
    ]


DENSE_NAMES: Renames = [
    *_fpn(8),
    (r"^head\.classification_head\.conv\.(\d)\.0\.", lambda m: f"cls_tower.{2 * int(m[1])}."),
    (r"^head\.regression_head\.conv\.(\d)\.0\.", lambda m: f"box_tower.{2 * int(m[1])}."),
    (r"^head\.classification_head\.conv\.", "cls_tower."),
    (r"^head\.regression_head\.conv\.", "box_tower."),
    (r"^head\.classification_head\.cls_logits\.", "cls_logits."),
    (r"^head\.regression_head\.bbox_reg\.", "box_codes."),
    (r"^head\.regression_head\.bbox_ctrness\.", "centerness."),
]
FASTER_RCNN_NAMES: Renames = [
    *_fpn(4),
    (r"^rpn\.head\.conv\.(?:0\.0\.)?", "rpn_conv."),
    (r"^rpn\.head\.cls_logits\.", "rpn_logits."),
    (r"^rpn\.head\.bbox_pred\.", "rpn_codes."),
    (r"^roi_heads\.box_head\.fc6\.", "fc1."),
    (r"^roi_heads\.box_head\.fc7\.", "fc2."),
    (r"^roi_heads\.box_predictor\.cls_score\.", "roi_logits."),
    (r"^roi_heads\.box_predictor\.bbox_pred\.", "roi_codes."),
]
NAMES = {"fcos": DENSE_NAMES, "retinanet": DENSE_NAMES, "faster_rcnn": FASTER_RCNN_NAMES}
# What a network that is not offered has among its tensors.
OTHERS = {
    r"roi_heads\.mask_": "Mask R-CNN",
    r"roi_heads\.keypoint_": "Keypoint R-CNN",
    r"head\.classification_head\.module_list\.": "SSD",
    r"rpn\.head\.conv\.1\.": "fasterrcnn_resnet50_fpn_v2",
    r"roi_heads\.box_head\.0\.": "fasterrcnn_resnet50_fpn_v2",
    r"head\.classification_head\.conv\.\d\.1\.": "retinanet_resnet50_fpn_v2",
    r"backbone\.body\.\d": "a detector on MobileNet",
}


def network_of(state: dict[str, Tensor]) -> str | None:
    """The torchvision network a state dict is of, a key of NETWORKS; None when it is no torchvision detector.

    Raises UserError, which names what is accepted, for torchvision's other detectors.
    """
    detector = any(k.startswith(("roi_heads.", "head.classification_head.")) for k in state)
    if not detector or not any(k.startswith("backbone.") for k in state):
        return None
    for pattern, what in OTHERS.items():
        if any(re.match(pattern, k) for k in state):
            raise UserError(f"This is torchvision's {what}; of its detectors {', '.join(NETWORKS)} can be loaded.")
    if any(k.startswith("roi_heads.") for k in state):
        return "fasterrcnn_resnet50_fpn"
    dense = any(k.startswith("head.regression_head.bbox_ctrness.") for k in state)
    return "fcos_resnet50_fpn" if dense else "retinanet_resnet50_fpn"


def from_torchvision(state: dict[str, Tensor]) -> tuple[str, int, dict[str, Tensor]]:
    """A torchvision detector's state dict as (our detector's name, its class rows, state dict in our names).

    Faster R-CNN: theirs has the background first, with box codes of its own; ours has it last, without codes, and does
    not count it. Of the one-stage detectors all rows are kept: the first is the background, which has no boxes.
    Raises UserError for anything else.
    """
    network = network_of(state)
    if network is None:
        raise UserError(
            f"These are no weights of a torchvision detector: the first tensor is '{next(iter(state), '')}'."
        )
    name = NETWORKS[network]
    ours: dict[str, Tensor] = {}
    for key, value in state.items():
        if ".box_predictor.cls_score." in key:
            value = torch.cat([value[1:], value[:1]])
        elif ".box_predictor.bbox_pred." in key:
            value = value[4:]
        for pattern, new in NAMES[name]:
            key = re.sub(pattern, new, key)
        ours[key] = value
    if name == "faster_rcnn":
        return name, len(ours["roi_logits.bias"]) - 1, ours
    anchors = 1 if name == "fcos" else len(ours["box_codes.bias"]) // 4
    return name, len(ours["cls_logits.bias"]) // anchors, ours


def row_names(detector: str, rows: int) -> list[str] | None:
    """Names of a COCO head's class rows, "" for the background and for ids without a category; None for other heads."""
    first = 1 if detector == "faster_rcnn" else 0
    return coco_names()[first:] if rows == COCO_ROWS - first else None


def coco_names() -> list[str]:
    """Name of each COCO category id from 0 to 90, "" where there is none."""
    from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return ["" if n in ("__background__", "N/A") else n for n in names]


def without_epsilon(state: dict[str, Tensor], epsilon: float = 1e-5) -> dict[str, Tensor]:
    """Batch norms that were trained with an epsilon of 0, so that one of `epsilon` leaves their outputs as they were.

    torchvision runs its published Faster R-CNN and RetinaNet so. The factor goes into the weight, as it is no
    difference of small numbers there.
    """
    out = dict(state)
    for key, variance in state.items():
        if key.endswith(".running_var"):
            weight = key.replace("running_var", "weight")
            factor = ((variance + epsilon) / variance).sqrt().where(variance > 0, 1.0)
            out[weight] = state[weight] * factor
    return out
