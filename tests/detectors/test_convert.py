"""Files of transformers and our own give a detector their weights, and say what they gave."""

import json

import pytest
import torch
import torchvision
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection
from weight_files import SMALL, fresh, load, save_own, small

from ssod.detectors.convert import read_weights
from ssod.detectors.names_torchvision import coco_names
from ssod.errors import UserError

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
        (lambda: fresh("fcos", "abc", "resnet18", SMALL["fcos"]), "give backbone=test_resnet"),
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
