import copy

import pytest
import torch
from torch import nn

from ssod.errors import UserError
from ssod.nn.backbone import Backbone
from ssod.nn.backbone_weights import load_backbone_weights
from ssod.nn.frozen_norm import FoldedConv2d, FrozenNorm

STRIDES = (8, 16, 32)
# One small network of each family, and what images are padded to inside.
FAMILIES = {
    "resnet10t": 1,
    "resnext26ts": 1,
    "mobilenetv2_035": 1,
    "mobilenetv3_small_050": 1,
    "mobilenetv4_conv_small_035": 1,
    "efficientnet_lite0": 1,
    "convnext_atto": 32,
    "hrnet_w18_small": 32,
    "pvt_v2_b0": 1,
    "swin_tiny_patch4_window7_224": 32,
    "twins_svt_small": 32,
    "maxvit_rmlp_pico_rw_256": 256,
    "vit_tiny_patch16_224": 16,
    "vit_small_patch16_dinov3": 16,
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    return request.param, Backbone(request.param, (4, *STRIDES))


@pytest.mark.parametrize("size", [(96, 160), (97, 131), (32, 640)])
def test_maps_have_their_strides_and_channels_for_any_size(family, size):
    name, backbone = family
    assert backbone.multiple == FAMILIES[name]
    with torch.no_grad():
        maps = backbone.eval()(torch.randn(1, 3, *size))
    assert list(maps) == [4, 8, 16, 32]
    for stride, x in maps.items():
        assert x.shape == (1, backbone.channels[stride], *(-(-n // stride) for n in size))
        assert x.std() > 0


def test_a_step_reaches_every_parameter_also_in_bf16(family):
    backbone = family[1]
    backbone.zero_grad()
    images = torch.randn(2, 3, 64, 96)
    exact = backbone.eval()(images)
    with torch.autocast("cpu", torch.bfloat16):
        half = backbone(images)
    for stride, x in exact.items():
        assert (half[stride].float() - x).norm() < 0.1 * x.norm(), stride
    sum(x.square().mean() for x in backbone.train()(images).values()).backward()
    for key, p in backbone.named_parameters():
        assert p.requires_grad
        assert p.grad is not None, key  # a parameter without a gradient stops DDP
        assert torch.isfinite(p.grad).all(), key


def test_freezing_two_stages_leaves_what_comes_after_them(family):
    name, backbone = family
    frozen = Backbone(name, (4, *STRIDES), freeze=2)
    learns = {k for k, p in frozen.named_parameters() if p.requires_grad}
    assert 0 < len(learns) < len(list(backbone.parameters()))
    assert not any("stem" in k or "patch_embed." in k or "pos_embed" in k for k in learns)
    before = {k: v.clone() for k, v in frozen.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        shallow = frozen.eval()(x)[8]
    optimizer = torch.optim.SGD(frozen.parameters(), lr=0.1, weight_decay=0.1)
    sum(m.square().mean() for m in frozen.train()(x).values()).backward()
    optimizer.step()
    moved = {k for k, v in frozen.state_dict().items() if not torch.equal(v, before[k])}
    parameters = {k for k, _ in frozen.named_parameters()}
    assert parameters & moved <= learns
    assert len(parameters & moved) > len(learns) / 2  # behind a weight that starts at 0 some wait for the second step
    if not frozen.plain and name != "hrnet_w18_small":  # their fine maps depend on trained parts, too
        with torch.no_grad():
            assert torch.equal(frozen.eval()(x)[8], shallow)


def test_a_classifier_of_the_same_network_gives_all_its_weights(family, tmp_path):
    import timm

    name, backbone = family
    classifier = timm.create_model(name, pretrained=False)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    report = load_backbone_weights(backbone, tmp_path / "weights.pth")
    here, there = backbone.net.state_dict(), classifier.state_dict()
    assert report.loaded == len(here)
    assert {*report.left_out} < {*there}
    kept = [v for k, v in there.items() if k not in report.left_out]
    assert sorted(v.double().sum().item() for v in kept) == sorted(v.double().sum().item() for v in here.values())


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match=r"'resnet5O' is not a backbone.*resnet50"):
        Backbone("resnet5O", STRIDES)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("vit_small_patch14_dinov2", r"strides \[14\] but the detector needs \[8, 16, 32\].*with patches of 16 pixels"),
        ("levit_128", r"strides \[16, 32, 64\] but the detector needs \[8, 16, 32\]"),
        ("coatnet_rmlp_0_rw_224", "takes images of one fixed size only"),
        ("mvitv2_tiny", "takes images of one fixed size only"),  # smaller ones also, but no larger one
        ("mixer_s16_224", "takes images of one fixed size only"),
    ],
)
def test_a_network_without_such_maps_is_refused(name, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        Backbone(name, STRIDES)
    assert "\n" not in str(error.value)


def test_unused_stages_do_not_wait_for_gradients():
    backbone = Backbone("csatv2", STRIDES)  # it has a stride 64, too
    backbone(torch.randn(2, 3, 64, 64))[32].sum().backward()
    idle = {k.split(".")[1] for k, p in backbone.named_parameters() if not p.requires_grad}
    assert idle == {"stages_3"}


def test_caffe_stride_moves_the_stride_into_the_first_convolution():
    torch.manual_seed(0)
    plain, caffe = (
        Backbone("resnet26", (4, *STRIDES)).eval(),
        Backbone("resnet26", (4, *STRIDES), caffe_stride=True).eval(),
    )
    caffe.load_state_dict(plain.state_dict())
    for layer in ("layer2", "layer3", "layer4"):
        first, second = caffe.net.get_submodule(layer)[:2]
        assert (first.conv1.stride, first.conv2.stride) == ((2, 2), (1, 1))
        assert second.conv1.stride == second.conv2.stride == (1, 1)
    x = torch.randn(1, 3, 97, 131)
    ours, theirs = caffe(x), plain(x)
    assert torch.equal(ours[4], theirs[4])  # the first stage has no stride
    assert ours[8].shape == theirs[8].shape
    block = plain.net.layer2[0]  # by hand: every second cell of the first convolution's input is all it sees
    thin = theirs[4][:, :, ::2, ::2]
    y = block.act1(block.bn1(block.conv1(thin)))
    y = block.bn2(torch.nn.functional.conv2d(y, block.conv2.weight, padding=1))
    y = block.bn3(block.conv3(block.act2(y)))
    expected = block.act3(y + block.downsample(theirs[4]))
    for later in plain.net.layer2[1:]:
        expected = later(expected)
    torch.testing.assert_close(ours[8], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_035", "resnetaa50d", "vit_tiny_patch16_224"])
def test_caffe_stride_needs_plain_bottlenecks(name):
    with pytest.raises(UserError, match=f"caffe_stride=true does not fit backbone '{name}'"):
        Backbone(name, STRIDES, caffe_stride=True)


def test_normalize_uint8_equals_float_and_clears_the_padding():
    backbone = Backbone("resnet10t", STRIDES)
    pixels = torch.randint(0, 256, (2, 3, 8, 10), dtype=torch.uint8)
    sizes = torch.tensor([[8, 10], [5, 4]])
    x = backbone.normalize(pixels, sizes)
    torch.testing.assert_close(x, backbone.normalize(pixels / 255, sizes))
    # ImageNet, red: mean 0.485, std 0.229
    assert x[0, 0, 0, 0].item() == pytest.approx((pixels[0, 0, 0, 0].item() / 255 - 0.485) / 0.229, abs=1e-4)
    assert (x[1, :, 5:] == 0).all()
    assert (x[1, :, :, 4:] == 0).all()
    assert (x[1, :, :5, :4] != 0).any()


def scramble(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.uniform_(0.5, 1.5, generator=generator)
            elif value.is_floating_point() and value.dim() == 1:
                value.add_(torch.empty_like(value).normal_(std=0.1, generator=generator))


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_100", "hrnet_w18_small"])
def test_frozen_norm_is_folded_and_equals_batch_norm_in_eval(name):
    plain = Backbone(name, STRIDES).eval()
    scramble(plain)
    frozen = Backbone(name, STRIDES, frozen_norm=True).train()  # train() must not wake it
    frozen.load_state_dict(plain.state_dict())  # the same names
    norms = [m for m in frozen.modules() if isinstance(m, FrozenNorm)]
    assert norms
    assert all(m.folded for m in norms)

    x = torch.randn(2, 3, 64, 64, requires_grad=True)
    for a, b in zip(plain(x).values(), frozen(x).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    weights = [next(p for p in m.net.parameters() if p.dim() == 4) for m in (plain, frozen)]
    grads = [torch.autograd.grad(m(x)[32].square().mean(), w)[0] for m, w in zip((plain, frozen), weights, strict=True)]
    assert (grads[0] - grads[1]).norm() < 0.01 * grads[0].norm()  # single entries sit on the kinks of ReLU6


def test_a_copy_is_independent():
    frozen = Backbone("resnet10t", STRIDES, frozen_norm=True)
    twin = copy.deepcopy(frozen)
    x = torch.randn(1, 3, 64, 64)
    before = frozen(x)[32].clone()
    scramble(twin)
    assert torch.equal(frozen(x)[32], before)
    assert not torch.allclose(twin(x)[32], before)
    assert twin.state_dict().keys() == frozen.state_dict().keys()


def test_freeze_stops_gradients_and_statistics_of_the_first_stages():
    backbone = Backbone("resnet10t", STRIDES, freeze=1).train()
    kept = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone(torch.randn(2, 3, 64, 64))[32].sum().backward()
    trained = {k.split(".")[1] for k, p in backbone.named_parameters() if p.requires_grad}
    assert trained == {"layer2", "layer3", "layer4"}
    moved = {k.split(".")[1] for k, v in backbone.state_dict().items() if not torch.equal(v, kept[k])}
    assert moved == {"layer2", "layer3", "layer4"}  # running statistics of the rest still move
    assert isinstance(backbone.net.conv1[0], FoldedConv2d)


def test_freeze_beyond_the_network_is_refused():
    with pytest.raises(
        UserError, match=r"freeze=5 does not fit backbone 'resnet10t': choose 0 \(train all\), 1, 2, 3, 4"
    ):
        Backbone("resnet10t", STRIDES, freeze=5)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_come_from_a_local_classifier_file(tmp_path, suffix):
    import safetensors.torch
    import timm

    classifier = timm.create_model("mobilenetv2_100", pretrained=False, num_classes=7)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in classifier.state_dict().items()}}, path)
    else:
        safetensors.torch.save_file(classifier.state_dict(), str(path))
    backbone = Backbone("mobilenetv2_100", STRIDES, frozen_norm=True)
    report = load_backbone_weights(backbone, path)
    assert any("classifier" in name for name in report.left_out)
    assert torch.equal(backbone.net.conv_stem.weight, classifier.conv_stem.weight)
    assert f"{report.loaded} tensors" in str(report)


def test_weights_of_another_network_are_refused(tmp_path):
    backbone = Backbone("resnet10t", STRIDES)
    torch.save({"conv1.0.weight": torch.zeros(3, 3)}, tmp_path / "wrong.pth")
    with pytest.raises(UserError, match=r"'conv1.0.weight' is \(3, 3\) there"):
        load_backbone_weights(backbone, tmp_path / "wrong.pth")
    torch.save({"x": torch.zeros(3)}, tmp_path / "none.pth")
    with pytest.raises(UserError, match="holds no weights of this backbone"):
        load_backbone_weights(backbone, tmp_path / "none.pth")
    with pytest.raises(UserError, match="does not exist"):
        load_backbone_weights(backbone, tmp_path / "nowhere.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone_weights(backbone, tmp_path / "text.pth")
