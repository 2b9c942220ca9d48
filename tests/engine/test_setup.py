"""Where a run starts: weights of every kind through the config, and one sentence for what cannot start."""

import pytest
import torch
import torchvision

from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.cli import main
from ssod.config import load_config
from ssod.data.shapes import NAMES
from ssod.detectors import build_detector
from ssod.engine.setup import build_student
from ssod.errors import UserError
from ssod.nn.frozen_norm import FrozenNorm

SMALL = {"name": "fcos", "fpn_channels": 32, "head_convs": 1}


def student(names=("a", "b"), **words):
    words = {"detector": SMALL, "backbone": "test_resnet", **words}
    detector, report = build_student(load_config("train", words), list(names))
    return detector, str(report)


def checkpoint(path, names=("a", "b"), name="fcos", backbone="test_resnet", options=None, **body):
    torch.manual_seed(0)
    options = {"fpn_channels": 32, "head_convs": 1} if options is None else options
    detector = build_detector(name, len(names), backbone, options, **body)
    content = {"format": FORMAT, "spec": detector.spec, "names": list(names), "imgsz": 64, "use": "teacher"}
    save_checkpoint(content | {"metrics": {}, "networks": {"teacher": detector.state_dict()}}, path)
    return str(path)


def frozen(detector):
    return any(isinstance(m, FrozenNorm) for m in detector.modules())


def test_without_weights_all_is_random_and_learns():
    detector, note = student()
    assert note == "fcos on test_resnet, random weights"
    assert not frozen(detector)
    assert frozen(student(frozen_norm=True)[0])


def test_norms_are_as_in_a_checkpoint_and_frozen_with_other_weights(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    classifier = {"weights": str(tmp_path / "resnet18.pth"), "backbone": "resnet18"}
    assert frozen(student(**classifier)[0])
    assert not frozen(student(**classifier, frozen_norm=False)[0])
    for norm in (True, False):
        path = checkpoint(tmp_path / "best.pt", frozen_norm=norm)
        assert frozen(student(weights=path)[0]) == norm
        assert frozen(student(weights=path, frozen_norm=not norm)[0]) != norm


@pytest.mark.fault(32)
def test_a_checkpoint_of_other_classes_keeps_the_shared_rows(tmp_path):
    path = checkpoint(tmp_path / "best.pt", names=("dog", "person", "cat"))
    _, note = student(("Cat", "kite"), weights=path)
    assert note.startswith(f"teacher of an ssod checkpoint from {path}: ")
    assert note.endswith("class head: 1 of 2 classes found by name (Cat), 1 start anew (kite)")


def test_body_options_reach_the_spec_and_rebuild_the_same():
    detector, _ = student(backbone="resnet26", caffe_stride=True, freeze=1, frozen_norm=True)
    body = {k: detector.spec[k] for k in ("caffe_stride", "freeze", "frozen_norm")}
    assert body == {"caffe_stride": True, "freeze": 1, "frozen_norm": True}
    again = build_detector(**detector.spec)
    assert again.backbone.net.layer2[0].conv1.stride == (2, 2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"backbone": "resnet51"}, "'resnet51' is not a backbone that timm knows.* Did you mean 'resnet5"),
        ({"detector": {"name": "fcoss"}}, "'fcoss' is not a detector.* Did you mean 'fcos'"),
        ({"backbone": "vit_small_patch14_dinov2"}, r"strides \[14\] but the detector needs \[8, 16, 32\]"),
        ({"backbone": "coatnet_rmlp_0_rw_224"}, "takes images of one fixed size only"),
        ({"backbone": "resnet10t", "caffe_stride": True}, "caffe_stride=true does not fit backbone 'resnet10t'"),
        ({"freeze": 9}, "freeze=9 does not fit backbone 'test_resnet': choose 0"),
        ({"weights": "nowhere.pt"}, "weights=nowhere.pt: there is no such file"),
        ({"weights": "torchvision://resnet49"}, "resnet49 is none of torchvision's detectors"),
        ({"detector": {"name": "retinanet"}, "weights": "{own}"}, "give detector=fcos, not detector=retinanet"),
        (
            {"detector": {"name": "fcos"}, "weights": "{own}"},
            "made with detector.fpn_channels=32 detector.head_convs=1",
        ),
        ({"backbone": "resnet18", "weights": "{own}"}, "give backbone=test_resnet"),
        ({"backbone": "resnet34", "weights": "{resnet18}"}, "is not of this backbone: it lacks"),
        ({"backbone": "resnet50", "weights": "{resnet18}"}, "does not fit this backbone: 'layer1.0.conv1.weight'"),
        ({"weights": "{text}"}, "cannot be read"),
    ],
)
def test_what_cannot_start_is_said_in_one_sentence(words, message, tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    (tmp_path / "text.pth").write_text("hello")
    places = {"{own}": tmp_path / "own.pt", "{resnet18}": tmp_path / "resnet18.pth", "{text}": tmp_path / "text.pth"}
    if words.get("weights") == "{own}":
        checkpoint(tmp_path / "own.pt")
    words = {k: str(places.get(v, v)) if isinstance(v, str) else v for k, v in words.items()}
    with pytest.raises(UserError, match=message) as error:
        student(**words)
    assert "\n" not in str(error.value)


def test_no_classes_at_all():
    with pytest.raises(UserError, match="num_classes=0 leaves nothing to detect"):
        student(())


def test_the_command_line_says_it_and_ends_with_2(tmp_path, shapes_data, capsys):
    path = checkpoint(tmp_path / "best.pt", names=tuple(NAMES))
    words = [f"data={shapes_data}", "labeled=25%", "backbone=test_resnet", f"project={tmp_path / 'runs'}", "device=cpu"]
    assert main(["train", *words, f"weights={path}", "detector=faster_rcnn"]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == f"ssod: weights={path} is teacher of an ssod checkpoint: give detector=fcos, not detector=faster_rcnn.\n"
    )
