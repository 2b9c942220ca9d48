import copy

import pytest
import torch
from torch import nn

from ssod.errors import UserError
from ssod.nn.backbone import Backbone, load_backbone_weights
from ssod.nn.frozen_norm import FoldedConv2d, FrozenNorm

STRIDES = (8, 16, 32)


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_100"])
def test_maps_have_their_strides_and_channels_for_any_size(name):
    backbone = Backbone(name, STRIDES).eval()
    maps = backbone(torch.zeros(1, 3, 72, 100))
    for stride in STRIDES:
        assert maps[stride].shape == (1, backbone.channels[stride], -(-72 // stride), -(-100 // stride))


def test_an_unknown_name_is_answered_with_close_ones():
    with pytest.raises(UserError, match=r"'resnet5O' is not a backbone.*resnet50"):
        Backbone("resnet5O", STRIDES)


def test_a_network_without_a_stride_is_refused():
    with pytest.raises(UserError, match=r"has feature maps of strides \[16\] but the detector needs \[8, 16, 32\]"):
        Backbone("vit_tiny_patch16_224", STRIDES)


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


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_100"])
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
    with pytest.raises(UserError, match="freeze=5 does not fit backbone 'resnet10t': choose 0 to 4"):
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
    assert report.missing == []
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
