"""Every network of the table in docs/backbones.md: `python tests/nn/test_backbone_table.py` measures and writes it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from ssod.detectors import build_detector
from ssod.errors import UserError
from ssod.structures import Instances

PAGE = Path(__file__).resolve().parents[2] / "docs" / "backbones.md"
BEGIN, END = "<!-- table: tests/nn/test_backbone_table.py -->", "<!-- end of table -->"
NAMES = (
    *("resnet18", "resnet50", "resnet101", "resnet50d", "seresnet50", "resnext50_32x4d", "regnety_004", "resnest14d"),
    *("mobilenetv2_100", "mobilenetv3_large_100", "mobilenetv4_conv_small", "mobilenetv4_hybrid_medium"),
    *("efficientnet_b0", "tf_efficientnet_lite0", "tf_efficientnetv2_s", "convnext_tiny", "convnextv2_nano"),
    *("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "pvt_v2_b1", "twins_svt_small"),
    *("davit_tiny", "maxvit_rmlp_pico_rw_256", "hrnet_w18_small", "densenet121", "dla34", "fastvit_t8", "repvit_m0_9"),
    *("vit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch16_dinov3", "xcit_nano_12_p16_224"),
)
REFUSED = (
    "hiera_tiny_224",
    "mvitv2_tiny",
    "beit_base_patch16_224",
    "coatnet_0_224",
    "vit_small_patch14_dinov2",
    "levit_128",
)
SIZE = 256  # pixels a side
TARGETS = [Instances(torch.tensor([[20.0, 30, 150, 200]]), torch.tensor([0])), Instances.empty()]


def measure(name: str) -> str:
    """A row of the table: a forward of the backbone on an image, a training step of FCOS on two; raises if it fails."""
    detector = build_detector("fcos", 2, name, {"fpn_channels": 64, "head_convs": 1})
    backbone = detector.backbone
    parameters = sum(p.numel() for p in backbone.parameters()) / 1e6
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)

    detector.eval()
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            backbone(backbone.normalize(images[:1]))
            times.append(time.perf_counter() - start)

    detector.train()
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-3)
    losses = detector.loss(detector.head(detector.features(images)), TARGETS)
    sum(losses.values()).backward()
    assert all(torch.isfinite(v) for v in losses.values())
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.requires_grad)
    optimizer.step()
    strides = "4, 8, 16, 32" if backbone.plain else ", ".join(map(str, sorted(backbone.indices)))
    notes = ["plain transformer, simple pyramid"] if backbone.plain else []
    notes += [f"pads to multiples of {backbone.multiple}"] if backbone.multiple > 1 else []
    return f"| `{name}` | {parameters:.1f} | {strides} | {min(times) * 1000:.0f} | yes | {'; '.join(notes)} |"


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        build_detector("fcos", 2, name)
    return f"| `{name}` | | | | no | {error.value} |"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_each_network_of_the_table(name: str) -> None:
    assert f"`{name}`" in measure(name)


@pytest.mark.parametrize("name", [*NAMES, *REFUSED])
def test_the_page_has_each_network(name: str) -> None:
    assert f"| `{name}` |" in PAGE.read_text(encoding="utf-8")


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        "| backbone | parameters (M) | strides | forward (ms) | one step | notes |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    rows += [refusal(name) for name in REFUSED]
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n" + "\n".join(rows) + f"\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
