"""Small detectors, and files of weights. For tests of what reads them."""

from pathlib import Path

import torch

from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.detectors import build_detector
from ssod.detectors.convert import load_weights, read_weights

SMALL = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64},
    "deformable_detr": {
        "width": 32,
        "heads": 2,
        "feed_forward": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "queries": 10,
        "dropout": 0.0,
    },
}


def load(detector, path, names, **kwargs):
    return load_weights(detector, read_weights(str(path), **kwargs), names)


def fresh(name, names, backbone="resnet50", options=None, **body):
    torch.manual_seed(0)
    return build_detector(name, len(names), backbone, options or {}, **body)


def small(name, names=("a", "b", "c"), **changes):
    return fresh(name, names, "test_resnet", SMALL[name] | changes)


def save_own(detector, names, path: Path) -> Path:
    content = {"format": FORMAT, "spec": detector.spec, "names": list(names), "imgsz": 64, "use": "student"}
    save_checkpoint(content | {"metrics": {}, "networks": {"student": detector.state_dict()}}, path)
    return path
