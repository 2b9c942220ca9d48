"""The same weights and images give transformers' logits, boxes, losses, gradients and detections."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrImageProcessorPil,
    ResNetConfig,
)
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

from ssod.detectors import build_detector
from ssod.detectors.names_transformers import backbone_name, from_transformers, loss_options
from ssod.errors import UserError
from ssod.ops.forms import plain_forms
from ssod.ops.set_matching import to_centers
from ssod.structures import Instances

K = 3
FORMS = {
    "single_scale": {"num_feature_levels": 1},
    "multi_scale": {},
    "box_refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
SMALL = {
    "backbone": "resnet18",
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_n_points": 3,
    "decoder_n_points": 3,
    "num_queries": 20,
    "two_stage_num_proposals": 20,
}
SIZES = torch.tensor([[128, 96], [90, 128]])  # in a frame of 128 x 128
TARGETS = [
    Instances(torch.tensor([[10.0, 20, 60, 80], [50, 30, 90, 100], [5, 5, 25, 120]]), torch.tensor([1, 0, 2])),
    Instances(torch.tensor([[30.0, 40, 110, 85]]), torch.tensor([2])),
]


def make_peer(**config):
    torch.manual_seed(0)
    peer = DeformableDetrForObjectDetection(
        DeformableDetrConfig(num_labels=K, dropout=0.0, auxiliary_loss=True, **config)
    )
    if peer.config.with_box_refine:  # transformers 5 makes some layers share their heads, which would prove less
        width, count = peer.config.d_model, len(peer.class_embed)
        peer.class_embed = nn.ModuleList(nn.Linear(width, K) for _ in range(count))
        peer.bbox_embed = nn.ModuleList(type(peer.bbox_embed[0])(width, width, 4, 3) for _ in range(count))
        peer.model.decoder.bbox_embed = peer.bbox_embed
        if peer.config.two_stage:
            peer.model.decoder.class_embed = peer.class_embed
    # Fresh weights have zeros and ones in the places where mistakes would show. Wide networks get less of it: else each
    # layer magnifies rounding so much that the peer in float32 is as far from itself in float64 as from ours.
    part = 64 / peer.config.d_model
    with torch.no_grad():
        for name, value in peer.named_parameters():
            if value.dim() == 1:
                value.add_(torch.randn_like(value) * 0.2)
            elif "sampling_offsets" in name or "attention_weights" in name:
                value.normal_(std=0.3 * part)
            elif "backbone" not in name:
                value.add_(torch.randn_like(value) * 0.05 * part)
        for name, value in peer.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(std=0.05)
            elif name.endswith(("running_var", "bn1.weight", "bn2.weight", "bn3.weight")):
                value.uniform_(0.6, 1.1)
    return peer.train()  # nothing in it depends on the mode without dropout


def make_ours(peer, **options):
    config = peer.config.to_dict()
    architecture, classes, state = from_transformers(peer.state_dict(), config)
    options = architecture | loss_options(config) | options
    name = backbone_name(peer.state_dict(), config)
    ours = build_detector("deformable_detr", classes, name, options, frozen_norm=True, freeze=1)
    ours.load_state_dict(state)
    return ours.train()


def peer_inputs(ours, images, sizes):
    """What transformers takes: normalised pixels and a mask of the valid ones."""
    rows = torch.arange(images.shape[2]) < sizes[:, :1]
    columns = torch.arange(images.shape[3]) < sizes[:, 1:]
    return {
        "pixel_values": ours.backbone.normalize(images, sizes),
        "pixel_mask": (rows[:, :, None] & columns[:, None]).long(),
    }


def peer_labels(targets, sizes):
    scale = sizes.flip(1).repeat(1, 2)
    pairs = zip(targets, scale, strict=True)
    return [{"boxes": to_centers(t.boxes / s), "class_labels": t.labels} for t, s in pairs]


@pytest.fixture(scope="module", params=FORMS)
def pair(request):
    peer = make_peer(**SMALL, **FORMS[request.param])
    ours = make_ours(peer)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    theirs = peer(**peer_inputs(ours, images, SIZES), labels=peer_labels(TARGETS, SIZES))
    return peer, ours, theirs, ours.head(ours.features(images, SIZES))


def test_logits_boxes_and_embeddings(pair):
    peer, _, theirs, output = pair
    torch.testing.assert_close(output.logits[-1], theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.boxes[-1], theirs.pred_boxes, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output.embeddings, theirs.last_hidden_state, atol=1e-4, rtol=1e-4)
    for layer, aux in enumerate(theirs.auxiliary_outputs):
        torch.testing.assert_close(output.logits[layer], aux["logits"], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.boxes[layer], aux["pred_boxes"], atol=1e-5, rtol=1e-4)
    assert output.logits[-1].std() > 0.1
    assert output.boxes[-1].std() > 0.02
    if peer.config.two_stage:
        torch.testing.assert_close(output.dense.logits, theirs.enc_outputs_class, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output.dense.codes, theirs.enc_outputs_coord_logits, atol=1e-4, rtol=1e-4)


def test_losses_by_name(pair):
    peer, ours, theirs, output = pair
    losses = ours.loss(output, TARGETS)
    named = {"cls": ("loss_ce", 1), "l1": ("loss_bbox", 5), "giou": ("loss_giou", 2)}
    for mine, (other, coefficient) in named.items():
        assert losses[mine].item() == pytest.approx(coefficient * theirs.loss_dict[other].item(), rel=1e-4), mine
    earlier = sum(c * theirs.loss_dict[f"{n}_{i}"] for n, c in named.values() for i in range(2))
    assert losses["aux"].item() == pytest.approx(earlier.item(), rel=1e-4)
    assert sum(losses.values()).item() == pytest.approx(theirs.loss.item(), rel=1e-4)
    assert ("encoder" in losses) == peer.config.two_stage


def test_gradients(pair):
    peer, ours, theirs, output = pair
    ours.zero_grad()
    peer.zero_grad()
    sum(ours.loss(output, TARGETS).values()).backward(retain_graph=True)
    theirs.loss.backward(retain_graph=True)
    wanted = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in peer.named_parameters(remove_duplicate=False)
    }
    wanted = peer.state_dict() | wanted
    _, _, wanted = from_transformers(wanted, peer.config.to_dict())
    scale = max(p.grad.abs().max() for p in ours.parameters() if p.grad is not None)
    assert scale > 0.01
    checked = 0
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        bound = 1e-4 * max(1.0, wanted[name].abs().max().item())
        assert (parameter.grad - wanted[name]).abs().max() < bound, name
        checked += 1
    assert checked > 100


@pytest.mark.parametrize("pair", ["two_stage"], indirect=True)
def test_the_proposals_learn_as_the_same_criterion_says(pair):
    """transformers has no loss for them; its criterion on the encoder's outputs, as in the published code, is one."""
    peer, _, theirs, output = pair
    outputs = {"logits": theirs.enc_outputs_class, "pred_boxes": theirs.enc_outputs_coord_logits.sigmoid()}
    labels = [{**t, "class_labels": torch.zeros_like(t["class_labels"])} for t in peer_labels(TARGETS, SIZES)]
    matcher = DeformableDetrHungarianMatcher(class_cost=1, bbox_cost=5, giou_cost=2)
    found = DeformableDetrImageLoss(matcher, K, 0.25, ["labels", "boxes"])(outputs, labels)
    theirs_total = found["loss_ce"] + 5 * found["loss_bbox"] + 2 * found["loss_giou"]
    with_encoder = make_ours(peer, encoder_coef=1.0)
    assert with_encoder.loss(output, TARGETS)["encoder"].item() == pytest.approx(theirs_total.item(), rel=1e-4)


def test_detections(pair):
    _, ours, theirs, output = pair
    found = ours.decode(output, conf=0.3, max_det=30)
    processor = DeformableDetrImageProcessorPil()
    expected = processor.post_process_object_detection(theirs, threshold=0.3, target_sizes=SIZES, top_k=30)
    for mine, other, (h, w) in zip(found, expected, SIZES.tolist(), strict=True):
        assert len(mine) == len(other["scores"]) > 5
        limit = torch.tensor([w, h, w, h])
        torch.testing.assert_close(mine.scores, other["scores"], atol=1e-5, rtol=0)
        torch.testing.assert_close(mine.boxes, other["boxes"].clamp(min=0).minimum(limit), atol=0.01, rtol=0)
        assert torch.equal(mine.labels, other["labels"])


# ---- checkpoints


@pytest.mark.parametrize("form", FORMS)
def test_saved_files_give_the_same_network(form, tmp_path):
    """save_pretrained writes the names of versions before 5, leaves out shared tensors and default config values."""
    peer = make_peer(**SMALL | {"encoder_n_points": 4, "decoder_n_points": 4}, **FORMS[form])
    peer.save_pretrained(tmp_path)
    saved, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
    options, classes, state = from_transformers(peer.state_dict(), peer.config.to_dict())
    assert saved.keys() != peer.state_dict().keys()
    assert any(".conv_encoder." in name for name in saved)
    for found in (from_transformers(saved, config), from_transformers(saved, None)):
        guess, count, tensors = found
        assert count == classes == K
        assert tensors.keys() == state.keys()
        assert all(torch.equal(tensors[k], state[k]) for k in state)
        unknown = {"dropout", "queries"} if form == "two_stage" else {"dropout"}
        assert {k: v for k, v in guess.items() if k not in unknown} == {
            k: v for k, v in options.items() if k not in unknown
        }
    assert from_transformers(saved, config)[0] == options
    assert backbone_name(saved, config) == backbone_name(saved, None) == "resnet18"


def test_the_resnet_of_transformers_is_read_too():
    resnet = ResNetConfig(
        layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], out_indices=[2, 3, 4]
    )
    peer = make_peer(**{k: v for k, v in SMALL.items() if k != "backbone"}, backbone_config=resnet)
    ours = make_ours(peer)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = peer(**peer_inputs(ours, images, SIZES))
        output = ours.head(ours.features(images, SIZES))
    torch.testing.assert_close(output.logits[-1], theirs.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.boxes[-1], theirs.pred_boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dilation": True}, "has dilation=True; only False can be loaded"),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"decoder_n_points": 2}, "encoder_n_points=4 and decoder_n_points=2"),
    ],
)
def test_parts_that_are_not_offered_are_refused(config, message):
    state = make_peer(**SMALL).state_dict()
    with pytest.raises(UserError, match=message):
        from_transformers(state, config)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["multi_scale", "two_stage"])
def test_the_published_size(form):
    peer = make_peer(backbone="resnet50", **FORMS[form])
    ours = make_ours(peer)
    images = torch.rand(2, 3, 256, 288, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[256, 200], [180, 288]])
    theirs = peer(**peer_inputs(ours, images, sizes), labels=peer_labels(TARGETS, sizes))
    with plain_forms():  # of 300 proposals some score alike: rounding otherwise, two of them may change places
        output = ours.head(ours.features(images, sizes))
    torch.testing.assert_close(output.logits[-1], theirs.logits, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(output.boxes[-1], theirs.pred_boxes, atol=1e-4, rtol=1e-3)
    assert sum(ours.loss(output, TARGETS).values()).item() == pytest.approx(theirs.loss.item(), rel=1e-4)
