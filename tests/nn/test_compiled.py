"""compile=true: the same numbers, the same checkpoints, and one sentence where torch cannot compile."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.engine.trainer import SemiTrainer
from ssod.errors import UserError
from ssod.nn.compiled import FORMS, _parts, compile_networks
from ssod.structures import Instances

CPU = torch.device("cpu")
SMALL = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64},
    "deformable_detr": {"width": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0},
}


def losses_and_gradient(network: Detector, images: Tensor) -> tuple[list[float], Tensor]:
    torch.manual_seed(3)  # Faster R-CNN draws its samples
    targets = [Instances(torch.tensor([[5.0, 6.0, 40.0, 50.0]]), torch.tensor([i % 3])) for i in range(len(images))]
    losses = network.loss(network.head(network.features(images)), targets)
    network.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    gradients = [p.grad.flatten() for p in network.parameters() if p.grad is not None]
    return [float(v) for v in losses.values()], torch.cat(gradients)


@pytest.mark.parametrize("name", SMALL)
@torch._dynamo.config.patch(recompile_limit=FORMS)
def test_each_part_is_one_graph(name: str) -> None:
    """Where the compiler must hand back to Python a part falls into pieces, at worst one a layer, without a word."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    network = build_detector(name, 3, "mobilenetv2_100", SMALL[name])
    for part in _parts(network):
        part.compile(backend="eager")  # traced as ever, and then run as it is
    losses_and_gradient(network, torch.zeros(2, 3, 64, 64, dtype=torch.uint8))
    assert counters["stats"]["unique_graphs"] >= 6
    # On a CPU deformable attention stays as it is, on purpose: the compiler's form of it is slower.
    assert [why for why in counters["graph_break"] if "_bags" not in why] == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_compiled_detector_is_the_same_detector(name: str) -> None:
    torch.manual_seed(0)
    network = build_detector(name, 3, "test_resnet", SMALL[name]).eval()  # eval: the same running statistics twice
    pictures = [torch.randint(0, 256, (n, 3, 64, side), dtype=torch.uint8) for n, side in ((2, 64), (1, 96))]
    names = list(network.state_dict())
    before = [losses_and_gradient(network, p) for p in pictures]
    seen = [network(p, conf=0.0) for p in pictures]

    compile_networks([network], CPU)
    counters = torch._dynamo.utils.counters
    counters.clear()
    for picture, (losses, gradient), found in zip(pictures, before, seen, strict=True):
        now, slope = losses_and_gradient(network, picture)
        assert now == pytest.approx(losses, rel=1e-4)
        assert torch.allclose(slope, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
        for one, other in zip(network(picture, conf=0.0), found, strict=True):
            assert torch.allclose(one.scores.sort().values, other.scores.sort().values, atol=1e-4)
    assert counters["stats"]["unique_graphs"] >= 4  # it did compile
    assert list(network.state_dict()) == names


@pytest.mark.slow
def test_a_compiled_run_learns_the_same_and_its_checkpoint_is_an_ordinary_one(tiny: dict[str, object]) -> None:
    runs = {}
    for on in (False, True):
        trainer = SemiTrainer(load_config("train", {**tiny, "compile": on, "name": f"compile_{on}"}))
        runs[on] = (trainer.train(), load_checkpoint(Path(trainer.folder) / "weights" / "last.pt"))
    eager, compiled = (content["networks"]["student"] for _, content in (runs[False], runs[True]))
    assert list(eager) == list(compiled)
    for name, value in eager.items():
        assert torch.allclose(value.float(), compiled[name].float(), rtol=1e-3, atol=1e-3), name
    assert all(math.isfinite(summary["best"]["AP"]) for summary, _ in runs.values())


def test_graphs_are_of_cuda_alone() -> None:
    with pytest.raises(UserError, match=r"compile=graphs: .* this run is on cpu\. Use compile=true"):
        compile_networks([], CPU, graphs=True)


@pytest.mark.gpu
def test_a_teacher_of_cuda_graphs_teaches_the_same(tiny: dict[str, object]) -> None:
    runs = {}
    for on in (False, "graphs"):
        config = {**tiny, "compile": on, "name": f"compile_{on}", "strategy": "mean_teacher", "device": "cuda"}
        trainer = SemiTrainer(load_config("train", config | {"amp": False}))
        runs[on] = (trainer.train(), load_checkpoint(Path(trainer.folder) / "weights" / "last.pt"))
    eager, graphed = (content["networks"]["teacher"] for _, content in (runs[False], runs["graphs"]))
    for name, value in eager.items():
        assert torch.allclose(value.float(), graphed[name].float(), rtol=1e-2, atol=1e-2), name


def test_without_a_compiler_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch._inductor.config as inductor

    monkeypatch.setattr(inductor.cpp, "cxx", (None, "no-such-compiler"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing compiled before helps
    torch._dynamo.reset()
    with pytest.raises(UserError, match=r"compile=true: .* takes a C\+\+ compiler.*compile=false"):
        compile_networks([], CPU)
