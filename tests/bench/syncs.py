"""Host synchronisations of a whole training step on CUDA, counted on a CPU: forward, loss, backward, clipping,
optimizer, moving average, watching.

    python tests/bench/syncs.py [--detectors fcos ...] [--strategies soft_teacher ...] [--where]

Every tensor of the step says that it is on CUDA and lies in CPU memory, so the code takes its CUDA branches, and each
operator passes through `Syncs`. It counts what makes the host wait for the device there:
- a number or a tensor read back (`item`, `bool`, `tolist`, `cpu`),
- a tensor copied to the device without `non_blocking`, such as `torch.tensor(list, device=...)`,
- operators whose result has a size that the host must know (`nonzero`, a boolean mask as index, `masked_select`,
  `unique`, NMS, `repeat_interleave` without `output_size`), and checks of a result (`inv`).
A tensor on the host that meets one on the device is an error, as on CUDA. What a kernel does within itself is known
from its source, not measured.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ssod.config import load_config
from ssod.data import shapes
from ssod.detectors.base import Detector
from ssod.engine.log import Averages
from ssod.engine.optim import build_optimizer
from ssod.engine.trainer import SemiTrainer
from ssod.nn.deform_attn import attention_form
from ssod.nn.held import running_statistics

CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]
# Operators that wait once or more often. torchvision's NMS ends in a masked_select; bincount reads minimum and maximum.
WAITS = {
    "aten._local_scalar_dense": 1,
    "aten.nonzero": 1,
    "aten.masked_select": 1,
    "aten._unique2": 1,
    "aten.unique_dim": 1,
    "aten.unique_consecutive": 1,
    "aten.equal": 1,
    "aten.bincount": 2,
    "aten._linalg_check_errors": 1,
    "torchvision.nms": 1,
}
INDEXING = ("aten.index", "aten.index_put", "aten.index_put_", "aten._unsafe_index")
COPIES = ("aten._to_copy", "aten.copy_", "aten.lift_fresh", "aten._foreach_copy_")
READS = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu)

DETECTORS: dict[str, dict[str, Any]] = {
    "fcos": {"fpn_channels": 32, "head_convs": 1},
    "retinanet": {"fpn_channels": 32, "head_convs": 1},
    "faster_rcnn": {"fpn_channels": 32, "box_head_width": 64, "train_pre_nms": 200, "test_pre_nms": 200}
    | {"test_proposals": 40},  # of 6 classes each: no more boxes than a trained network is sure of
    "deformable_detr": {"width": 32, "queries": 20, "encoder_layers": 1, "decoder_layers": 2, "feed_forward": 32},
}
# Thresholds as low as the scores of networks that have not learned, so that there are pseudo boxes.
STRATEGIES: dict[str, dict[str, Any]] = {
    "supervised": {},
    "mean_teacher": {"tau": 0.005, "tau_low": 0.001},
    "unbiased_teacher": {"tau": 0.005},
    "soft_teacher": {"candidates": 0.05, "tau": 0.05},
    "rpl": {"tau": 0.05, "max_weight": 1.0},
    "prc": {"tau": 0.005},
    "sed": {},
    "lsm": {"tau": 0.005, "alpha": 0.001},
    "comining": {"tau": 0.005},
}
# What a strategy asks of the detector; Deformable DETR has no such codecs, and does without.
CODECS = {"rpl": "bucket", "prc": "gaussian"}
WITHOUT = {"rpl": {"certainty": False}, "prc": {"ler": False}}
HALF = ("sed", "lsm")
PAIRS = [(d, s) for d in DETECTORS for s in STRATEGIES if s != "soft_teacher" or d == "faster_rcnn"]


class OnDevice(Tensor):
    """A tensor on CUDA, for all that Python sees; `inner` holds its numbers."""

    inner: Tensor
    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnDevice:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return within(func, args, kwargs or {})


def within(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator on the numbers within; results are on the device, and what was written to is the tensor given."""
    owners: dict[int, OnDevice] = {}

    def inside(value: Any) -> Any:
        if not isinstance(value, OnDevice):
            return value
        owners[id(value.inner)] = value
        return value.inner

    def outside(value: Any) -> Any:
        return owners[id(value)] if id(value) in owners else OnDevice(value) if isinstance(value, Tensor) else value

    plain, named = tree_map(inside, (args, kwargs))
    out = func(*plain, **named)
    return tree_map(outside, out) if owners else out


class Syncs:
    """Inside, `found` counts the synchronisations by place and operator."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self.on_device = False  # whether the call in progress has a tensor on the device: what it makes lies there, too
        self._modes = (_Calls(self), _Operators(self))

    def __enter__(self) -> Syncs:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, at)

    def count(self, what: str, times: int = 1) -> None:
        frame = sys._getframe()
        while frame.f_back is not None and "/ssod/" not in frame.f_code.co_filename:
            frame = frame.f_back
        file = frame.f_code.co_filename.rpartition("/ssod/")[2]
        self.found[f"{file}:{frame.f_lineno} {frame.f_code.co_name}: {what}"] += times


class _Calls(TorchFunctionMode):
    """What names a device or leaves it: made there, copied there, read back."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args else None
        if func in READS and isinstance(first, OnDevice):
            self.syncs.count(func.__name__)
            return func(first.detach().inner, *args[1:], **kwargs)
        device = kwargs.pop("device", None)
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], str | torch.device):
            device, args = args[1], (first, *args[2:])
        if func is torch.Tensor.new_tensor and device is None and isinstance(first, OnDevice):
            device = CUDA
        if device is None:
            return self._call(func, args, kwargs)
        if torch.device(device).type != "cuda":
            if isinstance(first, OnDevice):
                if sys._getframe(1).f_code.co_filename.endswith("clip_grad.py"):
                    return first  # torch sorts gradients by the device that its C++ side sees
                self.syncs.count("to(cpu)")
                args = (first.detach().inner, *args[1:])
            return func(*args, **kwargs, **({} if func is torch.Tensor.to else {"device": device}))
        if func is torch.Tensor.to:
            if not isinstance(first, OnDevice) and not kwargs.get("non_blocking", False):
                self.syncs.count("to(cuda)")
            out = func(*args, **kwargs) if len(args) > 1 or set(kwargs) - {"non_blocking", "copy"} else first
        else:
            if func in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and not isinstance(first, OnDevice):
                self.syncs.count(f"{func.__name__} on the device")
            elif func is torch.Tensor.new_tensor:
                self.syncs.count("new_tensor on the device")
            out = func(*args, **kwargs)
        return out if isinstance(out, OnDevice) else OnDevice(out)

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        before = self.syncs.on_device
        self.syncs.on_device = any(isinstance(v, OnDevice) for v in tree_leaves((args, kwargs)))
        try:
            if func is torch.Tensor.backward:
                with self:  # Python code in the backward pass, too
                    return torch.autograd.backward(args[0])
            return func(*args, **kwargs)
        finally:
            self.syncs.on_device = before


class _Operators(TorchDispatchMode):
    """Runs each operator on the numbers within, and counts those that wait."""

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        every = tree_leaves((args, kwargs or {}))
        if any(isinstance(v, OnDevice) for v in every):
            name = str(func).rpartition(".")[0]
            if times := self._waits(name, str(func), args, kwargs or {}):
                self.syncs.count(name, times)
            hosts = [tuple(v.shape) for v in every if isinstance(v, Tensor) and not isinstance(v, OnDevice) and v.dim()]
            if hosts and name not in (*INDEXING, *COPIES):
                raise RuntimeError(f"{func} of tensors on the host {hosts} and one on the device")
        elif self.syncs.on_device and not any(isinstance(v, Tensor) for v in every):
            return OnDevice(func(*args, **(kwargs or {})))
        return within(func, args, kwargs or {})

    def _waits(self, name: str, full: str, args: Any, kwargs: Any) -> int:
        if name in INDEXING:
            indices = [i for i in args[1] if i is not None]
            masks = sum(i.dtype in (torch.bool, torch.uint8) for i in indices)
            fills = name.startswith("aten.index_put") and not isinstance(args[2], OnDevice) and args[2].numel() == 1
            return (0 if fills and masks == len(indices) == 1 else masks) + sum(
                not isinstance(i, OnDevice) for i in indices
            )
        if full == "aten.repeat_interleave.Tensor":
            return int(kwargs.get("output_size") is None)
        if name == "aten.copy_":
            blocking = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            return int(
                isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice) and blocking and args[1].dim() > 0
            )
        return WAITS.get(name, 0)


def move(module: nn.Module) -> None:
    """Parameters and buffers "to CUDA", in place."""
    for each in module.modules():
        for name, value in each._parameters.items():
            if value is not None:
                each._parameters[name] = nn.Parameter(OnDevice(value.detach()), value.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = OnDevice(buffer)


def needs(detector: str, strategy: str) -> dict[str, Any]:
    """Options of the detector without which the strategy is refused."""
    codec = CODECS.get(strategy) if detector != "deformable_detr" else None
    return ({"codec": codec} if codec else {}) | ({"half_scale": True} if strategy in HALF else {})


def class_biases(strategy: nn.Module) -> list[Tensor]:
    networks = [m for m in strategy.modules() if isinstance(m, Detector)]
    parts = [getattr(network, name) for network in networks for name in network.classifier]
    return [
        m.bias for part in parts for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.bias is not None
    ]


def step_counts(
    detector: str, strategy: str, data: Path, runs: Path, images: int = 4
) -> tuple[Counter[str], Counter[str]]:
    """The synchronisations of one step with so many labelled and as many unlabelled images, and of a line in the log.

    data: YAML of a drawn set of at least 4 * images images. The third step is counted: the first one is burn-in, the
    second fills caches.
    """
    without = WITHOUT.get(strategy, {}) if detector == "deformable_detr" else {}
    config = {
        "data": str(data),
        "labeled": images,
        "detector": {"name": detector, **DETECTORS[detector], **needs(detector, strategy)},
        "backbone": "test_resnet",
        "frozen_norm": True,
        "strategy": {"name": strategy, **STRATEGIES[strategy], **without},
        "imgsz": 64,
        "iters": 3,
        "burn_in": 1,
        "batch": images,
        "workers": 0,
        "amp": False,
        "warmup_iters": 0,
        "plots": False,
        **({"augment": "comining"} if strategy == "comining" else {}),
        "project": str(runs),
        "device": "cpu",
    }
    trainer = SemiTrainer(load_config("train", config))
    if strategy == "rpl":  # its lowest threshold is above the scores that a dense detector starts with
        for bias in class_biases(trainer.strategy):
            nn.init.constant_(bias, -1.0)
    move(trainer.strategy)
    trainer.device = CUDA
    trainer.optimizer = build_optimizer(trainer.strategy, trainer.config)
    trainer.statistics = running_statistics(trainer.strategy)
    averages = Averages()
    # The Triton kernels need a device; the form that takes their place here waits as little.
    with torch.autograd.set_multithreading_enabled(False), attention_form("plain"):
        for batches in trainer._batches():
            with Syncs() as step:
                trainer._step(trainer.strategy, batches, averages)
                trainer.step += 1
                trainer.callbacks.step_end(trainer)
            with Syncs() as line:
                averages.read()
    return step.found, line.found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES)
    parser.add_argument("--images", type=int, default=4, help="labelled images of a step, and as many unlabelled ones")
    parser.add_argument("--where", action="store_true", help="also print the places")
    parser.add_argument("--json", type=Path, help="write the counts here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes.COUNTS.update(train=24, val=4)  # of the whole demo set a few images are enough
    counts: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = shapes.shapes_yaml(Path(folder))
        for detector in args.detectors:
            for strategy in args.strategies:
                if (detector, strategy) not in PAIRS:
                    continue
                step, _ = step_counts(detector, strategy, data, Path(folder) / "runs", args.images)
                counts.setdefault(detector, {})[strategy] = step.total()
                if args.where:
                    print(f"\n{detector}, {strategy}: {step.total()}")
                    for place, times in step.most_common():
                        print(f"  {times:3} {place}")
    print("| | " + " | ".join(args.strategies) + " |\n|---|" + "---|" * len(args.strategies))
    for detector, row in counts.items():
        print(f"| {detector} | " + " | ".join(str(row.get(s, "-")) for s in args.strategies) + " |")
    if args.json:
        args.json.write_text(json.dumps(counts, indent=1))


if __name__ == "__main__":
    main()
