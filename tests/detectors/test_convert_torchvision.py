"""Files of torchvision give a detector their weights, and say what they gave."""

import re

import pytest
import torch
import torchvision
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_peers import peer_of
from weight_files import fresh, load

from ssod.detectors.fetch import sha256
from ssod.detectors.names_torchvision import NETWORKS, network_of
from ssod.errors import UserError
from ssod.ops.forms import plain_forms

NETWORK = {name: network for network, name in NETWORKS.items()}
IOU = {"fcos": 0.6, "retinanet": 0.5, "faster_rcnn": 0.5}


@pytest.fixture(scope="module", params=NETWORK)
def torchvision_file(request, tmp_path_factory):
    """A detector of torchvision with 3 classes, and its state dict in a file."""
    torch.manual_seed(0)
    peer = peer_of(request.param, 3, 128)
    path = tmp_path_factory.mktemp("torchvision") / f"{request.param}.pth"
    torch.save(peer.state_dict(), path)
    return request.param, peer, path


def test_a_torchvision_file_gives_torchvision_detections(torchvision_file):
    name, peer, path = torchvision_file
    ours = fresh(name, ["x", "y", "z"]).eval()
    report = load(ours, path, ["x", "y", "z"])
    assert str(report).startswith(f"torchvision's {NETWORK[name]} from {path}: ")
    assert "all 3 classes found by their order, as the file names none" in str(report)
    assert report.loaded == len(ours.state_dict())
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = peer(list(images))
    with plain_forms():  # others round otherwise
        found = ours(images, conf=0.05, iou=IOU[name], max_det=2000)
    first = 1 if name == "faster_rcnn" else 0
    for a, b in zip(theirs, found, strict=True):
        assert len(b) == len(a["boxes"]) > 20
        torch.testing.assert_close(b.scores, a["scores"], atol=1e-5, rtol=1e-4)
        same = (b.labels[:, None] + first == a["labels"]) & ((b.scores[:, None] - a["scores"]).abs() < 1e-4)
        far = (b.boxes[:, None] - a["boxes"]).abs().amax(-1)
        assert far.where(same, torch.inf).amin(1).max() < 0.01


def shallow(name, rows):
    """A torchvision detector on a ResNet-18, as a user may have trained one."""
    if name == "faster_rcnn":
        return FasterRCNN(resnet_fpn_backbone(backbone_name="resnet18", weights=None), rows + 1)
    levels = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    body = resnet_fpn_backbone(backbone_name="resnet18", weights=None, **levels)
    return (FCOS if name == "fcos" else RetinaNet)(body, rows)


def older(name, key):
    """The names that torchvision's published files have."""
    key = re.sub(r"(inner_blocks|layer_blocks)\.(\d)\.0\.", r"\1.\2.", key).replace(
        "rpn.head.conv.0.0.", "rpn.head.conv."
    )
    if name == "retinanet":
        key = re.sub(r"_head\.conv\.(\d)\.0\.", lambda m: f"_head.conv.{2 * int(m[1])}.", key)
    return key


@pytest.mark.parametrize("name", NETWORK)
def test_the_older_names_of_the_published_files_are_read_alike(name, tmp_path):
    peer = shallow(name, 3)
    state = peer.state_dict()
    renamed = {older(name, k): v for k, v in state.items()}
    assert renamed.keys() != state.keys()
    torch.save(renamed, tmp_path / "old.pth")
    again = shallow(name, 3)
    again.load_state_dict(torch.load(tmp_path / "old.pth", weights_only=True))  # torchvision reads them, too
    assert torch.equal(next(again.backbone.fpn.parameters()), next(peer.backbone.fpn.parameters()))
    torch.save(state, tmp_path / "new.pth")
    one, other = fresh(name, "xyz", "resnet18"), fresh(name, "xyz", "resnet18")
    load(one, tmp_path / "new.pth", "xyz")
    load(other, tmp_path / "old.pth", "xyz")
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


def coco_state(name):
    """Predictions of a COCO head whose numbers are those of their rows, on a network of 3 classes' other tensors."""
    state = shallow(name, 3).state_dict()
    if name == "faster_rcnn":
        rows = torch.arange(91.0)
        state["roi_heads.box_predictor.cls_score.weight"] = rows[:, None].expand(-1, 1024).clone()
        state["roi_heads.box_predictor.cls_score.bias"] = rows
        codes = torch.arange(364.0)
        state["roi_heads.box_predictor.bbox_pred.weight"] = codes[:, None].expand(-1, 1024).clone()
        state["roi_heads.box_predictor.bbox_pred.bias"] = codes
    else:
        rows = torch.arange(91.0 * (9 if name == "retinanet" else 1))
        state["head.classification_head.cls_logits.weight"] = rows[:, None, None, None].expand(-1, 256, 3, 3).clone()
        state["head.classification_head.cls_logits.bias"] = rows
    return state


@pytest.mark.parametrize("name", NETWORK)
def test_rows_of_a_coco_head_go_to_the_classes_of_the_same_name(name, tmp_path):
    torch.save({"model": {f"module.{k}": v for k, v in coco_state(name).items()}}, tmp_path / "coco.pth")
    names = ["drone", "Person", "dog", "N/A", "teddy bear"]  # COCO's ids: 1, 18 and 88
    ours = fresh(name, names, "resnet18")
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    text = str(load(ours, tmp_path / "coco.pth", names))
    assert "3 of 5 classes found by name (Person, dog, teddy bear), 2 start anew (drone, N/A)" in text
    known = {1: 1, 2: 18, 4: 88}
    state = ours.state_dict()
    if name == "faster_rcnn":
        for part in ("weight", "bias"):
            logits, codes = state[f"roi_logits.{part}"], state[f"roi_codes.{part}"].unflatten(0, (5, 4))
            assert (logits[5] == 0).all()  # theirs has the background first
            for k, j in known.items():
                assert (logits[k] == j).all()
                assert (codes[k].reshape(4, -1)[:, 0] == torch.arange(4 * j, 4 * j + 4)).all()
            for k in (0, 3):
                assert torch.equal(logits[k], before[f"roi_logits.{part}"][k])
                assert torch.equal(codes[k], before[f"roi_codes.{part}"].unflatten(0, (5, 4))[k])
    else:
        anchors = 9 if name == "retinanet" else 1
        for part in ("weight", "bias"):
            here = state[f"cls_logits.{part}"].reshape(anchors, 5, -1)[..., 0]
            start = before[f"cls_logits.{part}"].reshape(anchors, 5, -1)[..., 0]
            for a in range(anchors):
                for k, j in known.items():
                    assert here[a, k] == 91 * a + j
                assert torch.equal(here[a, [0, 3]], start[a, [0, 3]])


@pytest.mark.parametrize("name", NETWORK)
def test_without_names_only_an_equal_number_of_rows_is_taken(name, tmp_path):
    path = tmp_path / "three.pth"
    torch.save(shallow(name, 3).state_dict(), path)
    ours = fresh(name, ["a", "b"], "resnet18")
    report = load(ours, path, ["a", "b"])
    if name == "faster_rcnn":  # whose rows do not count the background
        assert "all 2 classes start anew, none found as the file has 3 rows without names" in str(report)
    else:
        assert "all 2 classes found by their order after the background, as the file names none" in str(report)
        theirs = torch.load(path, weights_only=True)["head.classification_head.cls_logits.bias"]
        assert torch.equal(ours.cls_logits.bias.view(-1, 2), theirs.view(-1, 3)[:, 1:])


def test_norms_of_the_published_weights_have_no_epsilon(tmp_path):
    """torchvision gives the norms of these two networks an epsilon of 0: tiny variances make it matter."""
    peer = shallow("retinanet", 3)
    for norm in peer.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            norm.eps = 0.0
            norm.running_var[::3] = 1e-6
            norm.weight[::3] *= 1e-3
    path = tmp_path / "published.pth"
    torch.save(peer.state_dict(), path)
    addresses = {f"retinanet-{sha256(path)[:8]}.pth": True, "retinanet-00000000.pth": False}
    image = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        theirs = list(peer.eval().backbone.body(image).values())
        for address, published in addresses.items():
            ours = fresh("retinanet", "xyz", "resnet18", frozen_norm=True).eval()
            text = str(load(ours, path, "xyz", url_of=lambda *_, a=address: f"https://somewhere/{a}"))
            assert ("batch norms without epsilon" in text) == published
            far = [(a - b).norm() / a.norm() for a, b in zip(theirs, ours.backbone(image).values(), strict=True)]
            assert (max(far) < 1e-4) == published


def meta_state(make, **kwargs):
    with torch.device("meta"):
        return make(weights=None, weights_backbone=None, **kwargs).state_dict()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("fasterrcnn_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2"),
        ("retinanet_resnet50_fpn_v2", "retinanet_resnet50_fpn_v2"),
        ("maskrcnn_resnet50_fpn", "Mask R-CNN"),
        ("maskrcnn_resnet50_fpn_v2", "Mask R-CNN"),
        ("keypointrcnn_resnet50_fpn", "Keypoint R-CNN"),
        ("ssd300_vgg16", "SSD"),
        ("ssdlite320_mobilenet_v3_large", "SSD"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "a detector on MobileNet"),
    ],
)
def test_other_detectors_of_torchvision_are_named_and_refused(name, said):
    state = meta_state(torchvision.models.get_model_builder(name))
    with pytest.raises(UserError, match=f"torchvision's {said}; of its detectors fcos_resnet50_fpn, retin") as error:
        network_of(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "swin_t"])
def test_classifiers_are_no_detectors(name):
    with torch.device("meta"):
        assert network_of(torchvision.models.get_model(name, weights=None).state_dict()) is None
