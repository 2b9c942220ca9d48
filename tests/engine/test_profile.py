"""`ssod check model=...`: figures that can be counted are counted here too."""

from __future__ import annotations

import pytest

from ssod.cli import main
from ssod.config import load_config
from ssod.detectors import build_detector
from ssod.engine.profile import profile_model
from ssod.errors import UserError


def profile(**words: object):
    return profile_model(load_config("check", {"device": "cpu", "batch": 1, **words}))


def test_parameters_strides_and_operations_by_hand() -> None:
    small = profile(model="demo.yaml", imgsz=64, num_classes=3)
    detector = build_detector("fcos", 3, "resnet10t", {"fpn_channels": 64, "head_convs": 2})
    assert sum(small.parts.values()) == small.trained == sum(p.numel() for p in detector.parameters())
    assert small.parts["backbone"] == sum(p.numel() for p in detector.backbone.parameters())
    assert small.maps == {8: (8, 8), 16: (4, 4), 32: (2, 2), 64: (1, 1), 128: (1, 1)}
    # A convolution costs 2 operations per weight and output cell; four times the cells, four times the cost. The maps
    # of strides 64 and 128 have one cell at both sizes or grow from 1x1 to 2x2, so the ratio is a little below 4.
    large = profile(model="demo.yaml", imgsz=128, num_classes=3)
    assert 3.8 < large.flops / small.flops <= 4
    assert small.step > small.forward > 0
    assert large.memory > 0


def test_the_command_prints_it_without_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "model=fcos", "backbone=resnet10t", "imgsz=64", "batch=1", "device=cpu"]) == 0
    said = capsys.readouterr().out
    for word in ("fcos on resnet10t: 80 classes, 64 px", "parameters", "GFLOPs", "strides", "step", "peak"):
        assert word in said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ({"model": "fcoss"}, "Did you mean 'fcos'"),
        ({"model": "fcos", "backbone": "resnet5"}, "is not a backbone that timm knows"),
        ({"model": "none.pt"}, "there is no checkpoint none.pt"),
        ({"model": "none.yaml"}, "there is no YAML 'none.yaml'"),
    ],
)
def test_a_model_that_does_not_exist(words: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        profile(**words)
