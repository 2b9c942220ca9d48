"""Files of torchvision, transformers and our own give a detector their weights, and say what they gave."""

import json
import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision_peers import peer_of
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from ssod.checkpoint import FORMAT, save_checkpoint
from ssod.detectors import build_detector
from ssod.detectors.convert import load_weights, read_weights
from ssod.detectors.fetch import sha256
from ssod.detectors.names_torchvision import NETWORKS, coco_names, network_of
from ssod.errors import UserError

NETWORK = {name: network for network, name in NETWORKS.items()}
IOU = {"fcos": 0.6, "retinanet": 0.5, "faster_rcnn": 0.5}
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
    return fresh(name, names, "resnet10t", SMALL[name] | changes)


def save_own(detector, names, path: Path) -> Path:
    content = {"format": FORMAT, "spec": detector.spec, "names": list(names), "imgsz": 64, "use": "student"}
    save_checkpoint(content | {"metrics": {}, "networks": {"student": detector.state_dict()}}, path)
    return path


# ---- torchvision


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


# ---- transformers


@pytest.fixture(scope="module", params=[{}, {"with_box_refine": True, "two_stage": True}], ids=["plain", "two_stage"])
def transformers_folder(request, tmp_path_factory):
    torch.manual_seed(0)
    names = {0: "N/A", 1: "person", 2: "bicycle", 3: "car"}
    config = DeformableDetrConfig(
        backbone="resnet18",
        use_pretrained_backbone=False,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=10,
        two_stage_num_proposals=10,
        id2label=names,
        **request.param,
    )
    peer = DeformableDetrForObjectDetection(config)
    with torch.no_grad():
        for head in peer.class_embed:
            head.bias.copy_(torch.tensor([10.0, 11, 12, 13]))
    folder = tmp_path_factory.mktemp("transformers") / "detr"
    peer.save_pretrained(folder)
    two_stage = bool(request.param)
    options = SMALL["deformable_detr"] | {"box_refine": two_stage, "two_stage": two_stage}
    return folder, options, peer


def test_a_transformers_folder_and_its_file(transformers_folder, tmp_path):
    folder, options, peer = transformers_folder
    names = ["car", "kite", "person"]
    for source in (folder, folder / "model.safetensors"):
        ours = fresh("deformable_detr", names, "resnet18", options)
        start = ours.cls_heads[0].bias[1].item()
        text = str(load(ours, source, names))
        assert text.startswith(f"transformers' Deformable DETR from {source}: ")
        assert "2 of 3 classes found by name (car, person), 1 start anew (kite)" in text
        assert ours.cls_heads[0].bias.tolist() == [13, start, 11]
        assert torch.equal(ours.encoder[0].feed_forward.inner.weight, peer.model.encoder.layers[0].mlp.fc1.weight)
        if options["two_stage"]:
            assert ours.cls_heads[-1].bias[0] == 10  # the first row of the encoder's head is the objectness

    # The same as a torch file without its config: as many rows, but no names.
    (tmp_path / "bare").mkdir()
    torch.save(peer.state_dict(), tmp_path / "bare" / "pytorch_model.bin")
    if not options["two_stage"]:
        names = ["a", "b", "c", "d"]
        ours = fresh("deformable_detr", names, "resnet18", options)
        with pytest.raises(UserError, match="give the former"):  # without a config, 4 points a head are assumed
            load(fresh("deformable_detr", names, "resnet18", options | {"points": 2}), tmp_path / "bare", names)
        text = str(load(ours, tmp_path / "bare", names))
        assert "by their order" in text


def test_a_deformable_detr_of_other_options_says_which(transformers_folder):
    folder, options, _ = transformers_folder
    wrong = options | {"width": 64}
    with pytest.raises(UserError, match=r"was made with detector.width=32, this run has .*=64: give the") as e:
        load(fresh("deformable_detr", "abcd", "resnet18", wrong), folder, "abcd")
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="has backbone=resnet18, this run backbone=resnet34: give backbone=resnet18"):
        load(fresh("deformable_detr", "abcd", "resnet34", options), folder, "abcd")


def test_91_rows_without_a_config_are_coco_ids():
    assert len(coco_names()) == 91
    assert coco_names()[0] == coco_names()[12] == ""
    assert (coco_names()[1], coco_names()[18], coco_names()[90]) == ("person", "dog", "toothbrush")


def test_folders_that_hold_no_weights(tmp_path):
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin; accepted are an ssod check"):
        read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "detr"}))
    torch.save({"model.query_position_embeddings.weight": torch.zeros(3, 3)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no weights of a transformers Deformable DETR: the first tensor is 'model.q"):
        read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config.json is not JSON"):
        read_weights(str(tmp_path))


# ---- our own


@pytest.mark.parametrize("name", SMALL)
def test_our_checkpoint_of_the_same_classes_comes_back_whole(name, tmp_path):
    one = small(name)
    with torch.no_grad():
        for value in one.parameters():
            value.add_(0.1)
    path = save_own(one, "abc", tmp_path / "best.pt")
    other = small(name)
    assert "all 3 classes found by name" in str(load(other, path, "abc"))
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key


@pytest.mark.parametrize("name", SMALL)
def test_our_checkpoint_of_other_classes_keeps_the_shared_ones(name, tmp_path):
    one = small(name)
    path = save_own(one, "abc", tmp_path / "best.pt")
    names = ["C", "new", "a", "other"]
    other = small(name, names)
    text = str(load(other, path, names))
    assert "2 of 4 classes found by name (C, a), 2 start anew (new, other)" in text
    head = {"faster_rcnn": "roi_logits", "deformable_detr": "cls_heads.0"}.get(name, "cls_logits")
    for part in ("weight", "bias"):
        here, there = other.state_dict()[f"{head}.{part}"], one.state_dict()[f"{head}.{part}"]
        if name == "faster_rcnn":
            assert torch.equal(here[-1], there[-1])
            here, there = here[:-1], there[:-1]
        here, there = here.reshape(-1, 4, here[0].numel()), there.reshape(-1, 3, there[0].numel())
        assert torch.equal(here[:, 0], there[:, 2])
        assert torch.equal(here[:, 2], there[:, 0])


def test_a_class_agnostic_box_head_is_taken_whole(tmp_path):
    one = small("faster_rcnn", class_agnostic=True)
    path = save_own(one, "abc", tmp_path / "best.pt")
    other = small("faster_rcnn", ["x", "a"], class_agnostic=True)
    nn.init.zeros_(other.roi_codes.weight)
    assert "1 of 2 classes found by name (a), 1 start anew (x)" in str(load(other, path, ["x", "a"]))
    assert torch.equal(other.roi_codes.weight, one.roi_codes.weight)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: small("retinanet"), "is student of an ssod checkpoint: give detector=fcos, not detector=retinanet"),
        (lambda: small("fcos", fpn_channels=64), r"made with detector.fpn_channels=32, this run has .*=64: give"),
        (lambda: small("fcos", head_convs=2), r"made with detector.head_convs=1, this run has detector.head_convs=2"),
        (lambda: small("fcos", codec="l1"), "made with detector.codec=giou, this run has detector.codec=l1"),
        (lambda: fresh("fcos", "abc", "resnet18", SMALL["fcos"]), "give backbone=resnet10t"),
    ],
)
def test_our_checkpoint_of_another_architecture_is_refused(other, message, tmp_path):
    path = save_own(small("fcos"), "abc", tmp_path / "best.pt")
    detector = other()
    before = {k: v.clone() for k, v in detector.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load(detector, path, "abc")
    assert "\n" not in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_caffe_stride_belongs_to_the_weights(tmp_path):
    options = SMALL["fcos"]
    path = save_own(fresh("fcos", "abc", "resnet26", options, caffe_stride=True), "abc", tmp_path / "best.pt")
    with pytest.raises(UserError, match="caffe_stride=true, this run has caffe_stride=false: give caffe_stride=true"):
        load(fresh("fcos", "abc", "resnet26", options), path, "abc")
    load(fresh("fcos", "abc", "resnet26", options, caffe_stride=True), path, "abc")


def test_options_of_training_alone_may_differ_and_are_said(tmp_path):
    path = save_own(small("fcos", focal_gamma=1.5), "abc", tmp_path / "best.pt")
    assert "other options there: focal_gamma=1.5 (here 2.0)" in str(load(small("fcos"), path, "abc"))


def test_the_level_of_half_scale_may_be_new_or_left_out(tmp_path):
    plain, half = small("fcos"), small("fcos", half_scale=True)
    text = str(load(half, save_own(plain, "abc", tmp_path / "plain.pt"), "abc"))
    assert "anew: fpn.lateral.4.weight, fpn.lateral.4.bias, fpn.smooth.4.weight, fpn.smooth.4.bias" in text
    assert torch.equal(half.fpn.lateral["8"].weight, plain.fpn.lateral["8"].weight)
    text = str(load(small("fcos"), save_own(half, "abc", tmp_path / "half.pt"), "abc"))
    assert "left out: fpn.lateral.4.weight" in text


def test_a_damaged_checkpoint_is_refused(tmp_path):
    path = save_own(small("fcos"), "abc", tmp_path / "best.pt")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    path.write_bytes(raw)
    with pytest.raises(UserError, match="is damaged"):
        read_weights(str(path))


# ---- classifiers and what is none of these


def test_a_classifier_goes_into_the_backbone(tmp_path):
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "resnet18.pth")
    ours = fresh("fcos", "abc", "resnet18", SMALL["fcos"])
    text = str(load(ours, tmp_path / "resnet18.pth", "abc"))
    assert text == f"120 tensors of the backbone loaded from {tmp_path / 'resnet18.pth'}; fc.weight, fc.bias left out"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"a.weight": torch.zeros(3), "b": torch.zeros(2)},
            "first tensors are a.weight, b. Accepted are an ssod",
        ),
        ({"epoch": 3}, "holds no named tensors, only epoch"),
        ([torch.zeros(3)], "holds no named tensors"),
        ({"conv1.weight": torch.zeros(3, 3)}, r"'conv1.weight' is \(3, 3\) there"),
        (torchvision.models.resnet18, "cannot be read"),  # a function: not a tensor, and not run
    ],
)
def test_files_that_fit_nothing(content, message, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(UserError, match=message) as error:
        load(fresh("fcos", "abc", "resnet18", SMALL["fcos"]), tmp_path / "x.pth", "abc")
    assert "\n" not in str(error.value)


def test_a_shallower_classifier_is_refused_and_not_half_loaded(tmp_path):
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    ours = fresh("fcos", "abc", "resnet101", SMALL["fcos"])
    with pytest.raises(UserError, match=r"is not of this backbone: it lacks \d+ of its \d+ tensors, such as layer3.6"):
        load(ours, tmp_path / "resnet50.pth", "abc")
