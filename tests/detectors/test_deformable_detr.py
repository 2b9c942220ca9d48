"""Deformable DETR's own behaviour; what it shares with other detectors is in test_detectors.py."""

import math

import pytest
import torch
from torch import nn

from ssod.detectors import build_detector
from ssod.detectors.names_transformers import from_transformers
from ssod.errors import UserError
from ssod.nn.deformable_transformer import Levels
from ssod.nn.position import sine, sine_grid
from ssod.ops.boxes import iou_matrix
from ssod.structures import Instances, Pyramid, Weights

K = 3
TINY = {"width": 32, "heads": 2, "feed_forward": 32, "encoder_layers": 1, "decoder_layers": 2, "queries": 12}
FORMS = {
    "two_stage": {},
    "refine": {"two_stage": False},
    "plain": {"two_stage": False, "box_refine": False},
    "single": {"two_stage": False, "box_refine": False, "levels": 1},
}
TARGETS = [
    Instances(torch.tensor([[8.0, 8, 40, 48], [30, 20, 120, 110]]), torch.tensor([0, 2])),
    Instances(torch.tensor([[20.0, 60, 90, 100]]), torch.tensor([1])),
]


def tiny(**options):
    torch.manual_seed(0)
    return build_detector("deformable_detr", K, "test_resnet", TINY | {"dropout": 0.0} | options)


def images(size=128):
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def stir(model):
    """Weights that have left their first values, zeros above all."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05)
    return model


# ---- places


def test_levels_count_the_cells_whose_first_pixel_is_valid():
    maps = {8: torch.zeros(2, 4, 13, 12), 32: torch.zeros(2, 4, 4, 3), 256: torch.zeros(2, 4, 1, 1)}
    levels = Levels.of(Pyramid(maps, (100, 96), torch.tensor([[100, 96], [33, 1]])), (8, 16, 32))
    assert levels.strides == (8, 32)
    for (h, w), count in zip(levels.shapes, levels.counts.unbind(1), strict=True):
        for (height, width), (across, down) in zip([(100, 96), (33, 1)], count.tolist(), strict=True):
            assert down == sum(i * 100 // h < height for i in range(h))
            assert across == sum(j * 96 // w < width for j in range(w))
    assert (~levels.padding).sum(1).tolist() == (levels.counts.prod(-1)).sum(1).tolist()
    first = levels.places[:, : 13 * 12].view(2, 13, 12, 2)
    torch.testing.assert_close(first[0, 0, 0], torch.tensor([0.5 / 12, 0.5 / 13]))
    assert first[1, 0, 0, 0] == 0.5  # one valid column: its centre is the middle


def test_sine_embedding_by_hand():
    found = sine(torch.tensor([0.25]), 4)[0]
    angle = 2 * math.pi * 0.25
    assert found.tolist() == pytest.approx(
        [math.sin(angle), math.cos(angle), math.sin(angle / 100), math.cos(angle / 100)], abs=1e-6
    )
    level = torch.arange(8.0)
    grid = sine_grid((2, 3), torch.tensor([[3, 2], [2, 1]]), level).view(2, 2, 3, 8)
    torch.testing.assert_close(grid[0, 1, 2], torch.cat([sine(torch.tensor(v), 4) for v in (1.5 / 2, 2.5 / 3)]) + level)
    torch.testing.assert_close(grid[1, 0, 1], torch.cat([sine(torch.tensor(v), 4) for v in (0.5, 1.5 / 2)]) + level)


@pytest.mark.parametrize("levels", [4, 1])
def test_half_size_images_have_the_proposals_of_the_full_one(levels):
    model = stir(tiny(half_scale=True, levels=levels)).eval()
    strides = model.strides
    whole, half = torch.full((1, 3, 256, 256), 0.4), torch.full((1, 3, 128, 128), 0.4)
    size = torch.tensor([[256, 192]])
    full, shifted = model.features(whole, size), model.features(half, size // 2, shift=1)
    assert tuple(full.maps) == tuple(shifted.maps) == strides
    assert [m.shape for m in full.maps.values()] == [m.shape for m in shifted.maps.values()]
    # Constant features, of which a border would remain: what is compared is where things are.
    constant = [
        Pyramid({s: m[..., :1, :1].expand(m.shape) * 0 + s / 64 for s, m in p.maps.items()}, p.frame, p.sizes)
        for p in (full, shifted)
    ]
    one, other = (model.head(p) for p in constant)
    assert one.dense.spans == other.dense.spans
    assert torch.equal(one.dense.anchors, other.dense.anchors)
    assert torch.equal(one.dense.codes, other.dense.codes)
    assert torch.equal(one.boxes, other.boxes)


def test_half_size_images_without_the_option_have_fewer_levels():
    model = stir(tiny()).eval()
    shifted = model.features(images(64), shift=1)
    assert tuple(shifted.maps) == (16, 32, 64)
    output = model.head(shifted)
    assert list(output.dense.spans) == [16, 32, 64]
    full = model.head(model.features(images(128)))
    for stride in output.dense.spans:
        span, same = output.dense.spans[stride], full.dense.spans[stride]
        assert torch.equal(output.dense.anchors[span], full.dense.anchors[same])
    assert torch.isfinite(output.boxes).all()
    with pytest.raises(UserError, match=r"levels=1 leaves no map .*half_scale=true"):
        tiny(levels=1).features(images(64), shift=1)


def test_missing_levels_are_left_out_before_the_softmax():
    """With logits that shut the lowest stride out, its absence changes nothing."""
    attention = tiny().decoder[0].attention
    with torch.no_grad():
        attention.weights.bias.view(2, 4, -1)[:, 0] = -1e4
    maps = {s: torch.randn(1, 32, 64 // s, 64 // s) for s in (8, 16, 32, 64)}
    results = []
    for present in ((8, 16, 32, 64), (16, 32, 64)):
        levels = Levels.of(
            Pyramid({s: maps[s] for s in present}, (64, 64), torch.tensor([[64, 64]])), attention.strides
        )
        memory = torch.cat([maps[s].flatten(2).transpose(1, 2) for s in present], dim=1)
        reference = torch.full((1, 5, len(present), 2), 0.4)
        query = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(2))
        results.append(attention(query, reference, memory, levels))
    torch.testing.assert_close(results[0], results[1])
    assert results[0].abs().max() > 0.01


# ---- starting values


def test_first_values_are_the_papers():
    model = tiny()
    attention = model.decoder[0].attention
    assert attention.offsets.weight.abs().max() == attention.weights.weight.abs().max() == 0
    bias = attention.offsets.bias.view(2, 4, 4, 2)  # heads, levels, points
    torch.testing.assert_close(bias[0, 1], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(bias[1, 3], -bias[0, 1])
    parts = model.decoder[0].self_attention
    packed = nn.init.xavier_uniform_(torch.empty(3 * 32, 32)).std().item()
    assert parts.query_key.weight.std().item() == pytest.approx(packed, rel=0.1)
    assert parts.value.weight.std().item() == pytest.approx(packed, rel=0.1)
    for head in (*model.cls_heads, *tiny(two_stage=False).cls_heads):
        torch.testing.assert_close(head.bias.sigmoid(), torch.full((K,), 0.01))
    assert [h[-1].bias.tolist() for h in model.box_heads] == [[0, 0, 0, 0]] * 3
    assert [h[-1].bias.tolist() for h in tiny(two_stage=False).box_heads] == [[0, 0, -2, -2], [0, 0, 0, 0]]
    assert all(h[-1].weight.abs().max() == 0 for h in model.box_heads)


def test_untrained_queries_stay_where_they_start():
    output = tiny().head(tiny().features(images()))
    proposals = output.dense.codes.gather(
        1, output.dense.logits[..., 0].topk(12, dim=1).indices.unsqueeze(-1).expand(-1, -1, 4)
    )
    torch.testing.assert_close(output.boxes[-1], proposals.sigmoid(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("half_scale", [False, True])
def test_every_parameter_learns_in_every_form(form, half_scale):
    model = stir(tiny(half_scale=half_scale, **FORMS[form])).train()
    for targets in (TARGETS, [Instances.empty(), Instances.empty()]):
        model.zero_grad()
        losses = model.loss(model.head(model.features(images())), targets)
        assert all(torch.isfinite(v) for v in losses.values())
        sum(losses.values()).backward()
        assert [k for k, p in model.named_parameters() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert set(losses) == {"cls", "l1", "giou", "aux"} | ({"encoder"} if form == "two_stage" else set())


# ---- loss


def test_coefficients_multiply_their_terms_and_halved_weights_halve_them():
    plain = stir(tiny())
    output = plain.head(plain.features(images()))
    one = plain.loss(output, TARGETS)
    changed = stir(tiny(cls_coef=1.0, l1_coef=2.5, giou_coef=1.0, aux_coef=3.0, encoder_coef=0.0)).loss(output, TARGETS)
    for name in ("cls", "l1", "giou"):
        assert changed[name].item() == pytest.approx(one[name].item() / 2, rel=1e-5)
    assert changed["aux"].item() == pytest.approx(one["aux"].item() * 1.5, rel=1e-5)
    assert changed["encoder"].item() == 0
    half = plain.loss(
        output, TARGETS, lambda c: Weights(torch.full((len(c.boxes),), 0.5), torch.full((len(c.boxes),), 0.5))
    )
    for name, value in one.items():
        assert half[name].item() == pytest.approx(value.item() / 2, rel=1e-5)


def test_weigh_can_tell_queries_apart():
    model = stir(tiny())
    output = model.head(model.features(images()))
    seen = {}

    def only(chosen):
        def weigh(candidates):
            seen[candidates.stage] = candidates
            every = torch.zeros(len(candidates.boxes))
            if candidates.stage == "query":
                every[chosen] = 1.0
            return Weights(every, every)

        return weigh

    total = model.loss(output, TARGETS)["cls"]
    parts = [model.loss(output, TARGETS, only(slice(i * 12, (i + 1) * 12)))["cls"] for i in range(2)]
    assert sum(parts).item() == pytest.approx(total.item(), rel=1e-5)
    assert seen["query"].image.tolist() == [0] * 12 + [1] * 12
    assert len(seen["aux"].boxes) == 24
    assert len(seen["encoder"].boxes) == output.dense.codes.shape[:2].numel()
    boxes = output.boxes[-1].flatten(0, 1) * 128
    torch.testing.assert_close(seen["query"].boxes[:, :2], boxes[:, :2] - boxes[:, 2:] / 2)
    assert not seen["query"].boxes.requires_grad


def test_matched_queries_are_one_to_one_and_nan_does_not_stop_the_matching():
    model = stir(tiny())
    output = model.head(model.features(images()))
    output.logits[-1, 0, 3] = torch.nan
    seen = {}

    def weigh(candidates):
        seen[candidates.stage] = candidates
        return Weights()

    model.loss(output, TARGETS, weigh)
    matched = seen["query"].matched.view(2, 12)
    assert [sorted(m[m >= 0].tolist()) for m in matched] == [[0, 1], [0]]
    assert matched[0, 3] == -1


def test_more_targets_than_queries():
    model = stir(tiny(queries=2))
    many = Instances(torch.rand(9, 4) * 40 + torch.tensor([0.0, 0, 60, 60]), torch.arange(9) % K)
    losses = model.loss(model.head(model.features(images())), [many, Instances.empty()])
    assert all(torch.isfinite(v) for v in losses.values())


# ---- decode, capabilities


def test_a_query_may_give_several_classes_and_nms_is_an_option():
    model = stir(tiny())
    output = model.head(model.features(images()))
    every = model.decode(output, conf=0.0, iou=0.1, max_det=1000)
    assert [len(found) for found in every] == [12 * K, 12 * K]
    output.boxes[-1] = output.boxes[-1, :, :1]  # all queries at one place: one detection a class is left
    assert [len(f) for f in model.decode(output, conf=0.0, iou=0.1, max_det=1000)] == [12 * K, 12 * K]
    thinned = stir(tiny(nms=True)).decode(output, conf=0.0, iou=0.5, max_det=1000)
    assert [sorted(f.labels.tolist()) for f in thinned] == [[0, 1, 2]] * 2
    best = output.logits[-1].sigmoid().amax(1)
    torch.testing.assert_close(thinned[0].scores, best[0].sort(descending=True).values)


def test_dense_proposals_decode_to_the_boxes_of_the_encoder():
    model = stir(tiny())
    sizes = torch.tensor([[128, 128], [64, 100]])
    output = model.head(model.features(images(), sizes))
    dense = model.dense(output)
    boxes, _ = model.codec.decode(dense.codes, dense.anchors)
    real = dense.logits.squeeze(-1) > -20
    raw = output.dense.codes.sigmoid()
    extent = sizes.flip(1).repeat(1, 2)[:, None]
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    torch.testing.assert_close(centers[real], (raw * extent)[..., :2][real], atol=0.01, rtol=1e-4)
    torch.testing.assert_close(
        (boxes[..., 2:] - boxes[..., :2])[real], (raw * extent)[..., 2:][real], atol=0.01, rtol=1e-4
    )
    assert real[0].sum() > real[1].sum() > 0
    assert dense.logits.shape == (2, dense.anchors.shape[0], 1)
    plain = tiny(two_stage=False)
    output = plain.head(plain.features(images()))
    with pytest.raises(UserError, match="two_stage=true"):
        plain.dense(output)


@pytest.mark.parametrize("size", [(1, 1), (16, 40), (33, 64)])
def test_small_images_work(size):
    model = stir(tiny(queries=50)).train()
    nothing = model.head(model.features(torch.rand(2, 3, *size)))
    box = torch.tensor([[0.0, 0, size[1], size[0]]])
    losses = model.loss(nothing, [Instances(box, torch.tensor([1])), Instances.empty()])
    assert all(torch.isfinite(v) for v in losses.values())
    assert len(model.eval()(torch.rand(1, 3, *size), conf=0.0)) == 1


def test_dropout_acts_while_training_only():
    model = stir(tiny(dropout=0.5))
    pyramid = model.features(images())
    assert not torch.equal(model.train().head(pyramid).boxes, model.head(pyramid).boxes)
    assert torch.equal(model.eval().head(pyramid).boxes, model.head(pyramid).boxes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 2}, "levels=2 does not fit .* choose 1, 3, 4 or 5"),
        ({"box_refine": False}, "two_stage=true needs detector.box_refine=true"),
        ({"width": 100, "heads": 8}, "width=100 does not divide .* detector.width=96"),
        ({"dropout": 1.0}, "detector.dropout=1.0 is not valid"),
    ],
)
def test_wrong_options_are_said_in_one_sentence(options, message):
    with pytest.raises(UserError, match=message) as error:
        build_detector("deformable_detr", K, "test_resnet", options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("levels", [3, 5])
def test_other_numbers_of_levels(levels):
    model = tiny(levels=levels)
    output = model.head(model.features(images()))
    assert list(output.dense.spans) == [8, 16, 32, 64, 128][:levels]
    assert len([m for m in model.project if isinstance(m, str)]) == levels


def test_a_state_dict_of_another_model_is_refused():
    with pytest.raises(UserError, match="no weights of a transformers Deformable DETR: the first tensor is 'weight'"):
        from_transformers(nn.Linear(2, 2).state_dict(), None)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["two_stage", "refine", "plain"])
def test_two_images_are_learned_by_heart(form):
    model = tiny(width=64, heads=4, **FORMS[form]).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    for _ in range(150):
        total = sum(model.loss(model.head(model.features(images())), TARGETS).values())
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    for found, target in zip(model(images(), conf=0.3), TARGETS, strict=True):
        assert sorted(found.labels.tolist()) == sorted(target.labels.tolist())
        assert iou_matrix(target.boxes, found.boxes).amax(1).min() > 0.8
