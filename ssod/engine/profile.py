"""What a detector costs at one size: parameters, operations, strides, memory, and the time of one training step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.data.views.geometry import Size, sides
from ssod.deploy.infer import pick_device
from ssod.detectors import DETECTORS, build_detector
from ssod.detectors.base import Detector
from ssod.modes import CheckConfig, TrainConfig
from ssod.nn.precision import amp_dtype, autocast, lay_out
from ssod.ops.forms import plain_forms
from ssod.structures import Instances, Pyramid
from ssod.zoo.fetch import resolve

BOXES = 7  # per image, as in COCO
STEPS = 3  # timed, after one to warm up


@dataclass
class ModelReport:
    """Figures of one detector; times in seconds, memory in bytes, flops of one image's forward pass."""

    title: str
    parts: dict[str, int]
    trained: int
    flops: int
    maps: dict[int, tuple[int, int]]
    forward: float
    step: float
    memory: int

    def text(self) -> str:
        total = sum(self.parts.values())
        parts = ", ".join(f"{name} {_millions(count)}" for name, count in self.parts.items())
        maps = "  ".join(f"{stride} ({h}x{w})" for stride, (h, w) in self.maps.items())
        lines = [
            self.title,
            f"  parameters  {_millions(total)}, {_millions(self.trained)} of them trained: {parts}",
            f"  file        {total * 4 / 1e6:.0f} MB in float32",
            f"  forward     {self.flops / 1e9:.1f} GFLOPs an image (convolutions and matrix products), "
            f"{1000 * self.forward:.0f} ms an image",
            f"  strides     {maps}",
            f"  step        {1000 * self.step:.0f} ms (forward, loss, backward)"
            + (f", {self.memory / 1e9:.2f} GB at its peak" if self.memory else ""),
        ]
        return "\n".join(lines)


def profile_model(config: CheckConfig) -> ModelReport:
    """Measure the model that `model=` means: a checkpoint, a training YAML, or the name of a detector.

    Raises UserError where there is no such model.
    """
    assert config.model is not None
    device = pick_device(config.device)
    before = _memory(device)  # everything from here on counts: weights, gradients, activations
    detector, imgsz = _detector(config)
    size = sides(config.imgsz or imgsz)[0]
    dtype = amp_dtype("auto", device, detector)
    lay_out(detector.to(device).train(), dtype)
    spec = detector.spec
    title = (
        f"{spec['name']} on {spec['backbone']}: {spec['num_classes']} classes, {size} px, batch {config.batch}, "
        f"{_device_name(device)}, {str(dtype or torch.float32).removeprefix('torch.')}"
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (config.batch, 3, size, size), dtype=torch.uint8, generator=generator).to(device)
    targets = [_random_targets(size, detector.num_classes, generator).to(device) for _ in images]

    def forward() -> None:
        with torch.no_grad(), autocast(dtype, device):
            detector(images)

    def step() -> None:
        detector.zero_grad()
        with autocast(dtype, device):
            losses = detector.loss(detector.head(detector.features(images)), targets)
        sum(losses.values(), torch.zeros((), device=device)).backward()

    step_time = _timed(step, device)
    memory = _peak(device) - before
    forward_time = _timed(forward, device) / config.batch
    flops, pyramid = operations(detector, images[:1])
    return ModelReport(
        title,
        parts=_parts(detector),
        trained=sum(p.numel() for p in detector.parameters() if p.requires_grad),
        flops=flops,
        maps={stride: (m.shape[-2], m.shape[-1]) for stride, m in pyramid.maps.items()},
        forward=forward_time,
        step=step_time,
        memory=max(0, memory),
    )


def operations(detector: Detector, images: Tensor) -> tuple[int, Pyramid]:
    """Floating-point operations of a forward pass with decoding (convolutions and matrix products), and its maps.

    images  uint8 [B, 3, H, W]
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain_forms():
        pyramid = detector.features(images)
        detector.decode(detector.head(pyramid))
    return counter.get_total_flops(), pyramid


def _detector(config: CheckConfig) -> tuple[Detector, Size]:
    """The detector and the size it is meant for."""
    assert config.model is not None
    model = config.model if config.model in DETECTORS else str(resolve(config.model))
    suffix = Path(model).suffix
    if suffix in (".yaml", ".yml"):
        train: TrainConfig = load_config("train", {"cfg": config.model})
        body: dict[str, Any] = {"frozen_norm": bool(train.frozen_norm), "freeze": train.freeze}
        name, backbone, options, size = train.detector.name, train.backbone, train.detector.options, train.imgsz
        return build_detector(name, config.num_classes, backbone, options, **body), size
    if suffix or "/" in model:
        content = load_checkpoint(model)
        return build_detector(**content["spec"]), content["imgsz"]
    return build_detector(config.model, config.num_classes, config.backbone), 640


def _random_targets(size: int, num_classes: int, generator: torch.Generator) -> Instances:
    corner = torch.rand(BOXES, 2, generator=generator) * 0.6 * size
    side = (0.05 + 0.35 * torch.rand(BOXES, 2, generator=generator)) * size
    labels = torch.randint(0, num_classes, (BOXES,), generator=generator)
    return Instances(torch.cat([corner, corner + side], dim=1), labels)


def _parts(detector: Detector) -> dict[str, int]:
    """Parameters of the backbone, the neck and everything else, frozen norms' weights included."""
    counts: dict[str, int] = {}
    tensors: dict[str, Tensor] = dict(detector.named_parameters())
    for name, value in tensors.items():
        part = name.partition(".")[0]
        part = part if part in ("backbone", "fpn") else "head"
        counts[part] = counts.get(part, 0) + value.numel()
    return counts


def _timed(call: Any, device: torch.device) -> float:
    """Seconds of one call: the best of STEPS, after one that warms up."""
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _memory(device: torch.device) -> int:
    """Bytes in use now: of the device, or of this process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    return _process("VmRSS")


def _peak(device: torch.device) -> int:
    """Most bytes that were ever in use."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _process("VmHWM")


def _process(key: str) -> int:
    """Bytes of a line in the system's account of this process; 0 where there is none (outside of Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"
