"""Time and peak memory of one training step of each strategy, against a supervised step and against the floor.

    python tests/bench/bench_strategies.py --arms mean_teacher prc --rounds 5 [--device cuda] [--weights FILE]

A semi-supervised step cannot do with less than its parts: forward, loss and backward on the labelled images, the same
on the strong view of the unlabelled ones, and one inference of the teacher on their weak view. These three, measured in
the same run with the arm's own detector, are its floor. The inference is one by the detector's defaults: a strategy may
do with less, as with the regions of `detector.pseudo_proposals`. "Floor in F" counts instead: with as many images of
each kind 3F + 3F + 1F, where F, a forward, is a third of a supervised step.
Strategies that look at half-size images (`detector.half_scale`) cannot do without forward, loss and backward on the
strong view at half size either, 0.75F. Co-mining has no teacher and learns from two views of labelled images, 6F.
Everything above the floor is the strategy's: thresholds, mapping, the teacher's second opinion, weights, moving
average. The optimizer's step is in none of them.

Arms are those of a grid (see study_grid.py), without its data: pictures are the demo set's, drawn anew. Each detector
is first fitted to its pictures, so that the teacher finds about as many boxes as are there; how many is printed.
Time: all alternate in one process; on a CPU process time at one thread, on CUDA wall time after a synchronisation;
medians over the rounds. Memory: a fresh process for each, its peak above what the imports took (CPU), or the
allocator's peak (CUDA).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from bench_step import alternate, status
from common import Row, common_options, save
from peers import DETECTORS
from peers_semi import flipped, mirrored
from study_grid import read_grid
from torch import Tensor

from ssod.config import validate
from ssod.data.shapes import draw_image
from ssod.detectors.base import Detector
from ssod.engine.setup import build_student
from ssod.modes import TrainConfig
from ssod.nn.ema import frozen_copy
from ssod.nn.precision import amp_dtype, autocast, lay_out
from ssod.ops.half import half_size
from ssod.strategies import build_strategy, strategy_class
from ssod.strategies.base import Plan, Strategy
from ssod.structures import Instances, SemiBatch, View

GOAL = 1.08  # times the floor
GRID = Path(__file__).parent / "grids" / "bccd10.yaml"
STEP = 5000  # far behind burn-in and ramps
FIT_LR = 5e-4
OF_METHOD = ("half_scale", "codec", "buckets", "rank_by_quality")  # detector's options that a strategy is made of
IN_F = {"labelled": 3, "unlabelled": 3, "teacher": 1, "half size": 0.75, "labelled, half size": 0.25, "two views": 6}
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--arms", nargs="+", help="arms of the grid besides its control; default: all")
    parser.add_argument("--weights", help="backbone's weights; default: random ones, frozen batch norm all the same")
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--size", type=int, help="side of the pictures, pixels; default: the grid's imgsz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--fit", type=int, default=60, help="steps of fitting each detector to the pictures")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--detector", choices=DETECTORS, help="this one, by its defaults, in place of the grid's")
    parser.add_argument("--backbone", help="in place of the grid's")
    common_options(parser)
    parser.add_argument("--memory-of", nargs=2, metavar=("ARM", "STATE"), help="print bytes and leave")
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.fit = 64, 1, 1
    torch.set_num_threads(1)
    grid = read_grid(args.grid, {})
    values, control = grid.arms, grid.control
    if args.memory_of:
        arm, state = args.memory_of
        print(json.dumps(peak_memory(config_of(values[arm], args), state, args)))
        return
    arms = [control, *(a for a in args.arms or values if a != control)]
    configs = {arm: config_of(values[arm], args) for arm in arms}
    print_head(configs[control], args)

    with tempfile.TemporaryDirectory() as folder:
        states: dict[str, Path] = {}  # fitted weights of each distinct detector
        steps: dict[tuple[str, str], Step] = {}
        strategies: dict[str, Strategy] = {}
        for arm, config in configs.items():
            key = detector_key(config)
            if key not in states:
                states[key] = Path(folder) / f"{len(states)}.pt"
                torch.save(fit(config, args), states[key])
                for part, step in parts(config, states[key], args).items():
                    steps[key, part] = step
            strategies[arm] = strategy_of(config, states[key], args)
            steps[arm, "step"] = strategy_step(strategies[arm], config, args)
        times = alternate(steps, args)
        memory = {arm: memory_in_fresh_process(arm, states[detector_key(c)], args) for arm, c in configs.items()}
        boxes = {arm: pseudo_boxes(strategies[arm], configs[arm], args) for arm in arms}

    rows = []
    print("| arm | ms | / control | floor, ms | / floor | / floor in F | pseudo boxes an image | peak GB | / control |")
    print("|---|---|---|---|---|---|---|---|---|")
    for arm, config in configs.items():
        taken = times[arm, "step"]
        own = {p: times[detector_key(config), p] for p in parts_of(strategies[arm], config)}
        floor = sum(own.values())
        if arm != control:
            rows.append(Row(f"{arm} on {config.detector.name} / its floor", taken, floor, GOAL))
        print(
            f"| {arm} | {taken:.0f} | {taken / times[control, 'step']:.2f} | {floor:.0f} | {taken / floor:.2f} | "
            f"{3 * taken / times[control, 'step'] / sum(map(IN_F.__getitem__, own)):.2f} | "
            f"{'-' if boxes[arm] is None else f'{boxes[arm]:.1f}'} | {memory[arm] / 1e9:.2f} | "
            f"{memory[arm] / memory[control]:.2f} |"
        )
    print("\n| parts, ms | " + " | ".join(IN_F) + " |\n|---|" + "---|" * len(IN_F))
    for key in states:
        arms_of = ", ".join(arm for arm, config in configs.items() if detector_key(config) == key)
        cells = (f"{times[key, p]:.0f}" if (key, p) in times else "-" for p in IN_F)
        print(f"| {arms_of} | " + " | ".join(cells) + " |")
    save(rows, args.json)


def print_head(config: TrainConfig, args: argparse.Namespace) -> None:
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {where}, 1 thread, load {os.getloadavg()[0]:.1f}, "
        f"{time.strftime('%Y-%m-%d')}; {config.detector.name} on {config.backbone}, {config.imgsz} px, "
        f"{config.batch} + {config.unlabeled_per_step} images, medians of {args.rounds} rounds\n"
    )


def config_of(values: Mapping[str, Any], args: argparse.Namespace) -> TrainConfig:
    """An arm's config for synthetic pictures: frozen batch norm as with the weights that the grid expects."""
    given: dict[str, Any] = {"weights": args.weights, "frozen_norm": True}
    if args.size:
        given["imgsz"] = args.size
    if args.backbone:
        given["backbone"] = args.backbone
    if args.detector:
        own = {k: v for k, v in values["detector"].items() if k in OF_METHOD}
        given["detector"] = {"name": args.detector, **own}
    config: TrainConfig = validate(TrainConfig, {**values, **given}, "")
    return config


def detector_key(config: TrainConfig) -> str:
    return ", ".join([config.detector.name, *(f"{k}={v}" for k, v in config.detector.options.items())])


def parts_of(strategy: Strategy, config: TrainConfig) -> tuple[str, ...]:
    """What a step of the strategy cannot do without."""
    if strategy.mines:
        return ("two views",)
    if not strategy.uses_unlabeled:
        return ("labelled",)
    if not looks_at_half_size(config):
        return ("labelled", "unlabelled", "teacher")
    # LSM's auxiliary classifier, which must never be without a gradient, learns from labelled images, too.
    auxiliary = ("labelled, half size",) if getattr(strategy, "aux", None) is not None else ()
    return ("labelled", "unlabelled", "teacher", "half size", *auxiliary)


def looks_at_half_size(config: TrainConfig) -> bool:
    return bool(config.detector.options.get("half_scale"))


def twice(view: View) -> View:
    """Two views of the same partly labelled images, here equal ones."""
    both = [torch.cat([t, t]) for t in (view.images, view.sizes, view.matrices)]
    return View(both[0], both[1], both[2], view.targets * 2, view.indices * 2, [False] * 2 * len(view))


def pictures(count: int, seed: int, config: TrainConfig, args: argparse.Namespace) -> View:
    """Drawn images of the demo set, enlarged, with their annotations."""
    side = config.imgsz
    assert isinstance(side, int)
    images, targets = [], []
    for i in range(count):
        drawn, boxes, labels = draw_image(np.random.default_rng([seed, i]))
        pixels = torch.from_numpy(drawn).permute(2, 0, 1)[None].float()
        images.append(F.interpolate(pixels, (side, side), mode="bilinear").round().byte()[0])
        places = torch.as_tensor(boxes).float() * (side / drawn.shape[0])
        targets.append(Instances(places, torch.as_tensor(labels).long() % args.classes))
    stack = torch.stack(images)
    sizes = torch.tensor([[side, side]]).expand(count, 2)
    matrices = torch.eye(3, dtype=torch.float64).expand(count, 3, 3)
    return View(stack, sizes, matrices, targets, list(range(count))).to(args.device)


def unlabeled_of(config: TrainConfig) -> int:
    """Unlabelled images for fitting, also where a step has none."""
    return config.unlabeled_per_step or config.batch


def batch_of(config: TrainConfig, args: argparse.Namespace) -> tuple[SemiBatch, list[Instances]]:
    """A step's images, and the true boxes of the strong view: the mirrored weak one."""
    labeled, weak = pictures(config.batch, 0, config, args), pictures(unlabeled_of(config), 1, config, args)
    strong = mirrored(weak)
    hidden = View(weak.images, weak.sizes, weak.matrices, strong.targets, weak.indices)
    return SemiBatch(labeled, hidden, strong), [flipped(t, weak.images.shape[-1]) for t in weak.targets]


def new_student(config: TrainConfig, args: argparse.Namespace, state: Path | None) -> Detector:
    torch.manual_seed(0)
    student, _ = build_student(config, [f"class {i}" for i in range(args.classes)])
    if state is not None:
        student.load_state_dict(torch.load(state, weights_only=True))
    student.to(args.device).train()
    lay_out(student, amp_dtype(config.amp, torch.device(args.device), student))
    return student


def fit(config: TrainConfig, args: argparse.Namespace) -> dict[str, Tensor]:
    """Weights of a detector that knows the pictures of the step, both views of the unlabelled ones included."""
    student = new_student(config, args, None)
    batch, true = batch_of(config, args)
    assert batch.strong is not None
    weak = pictures(unlabeled_of(config), 1, config, args)
    views = [(batch.labeled, batch.labeled.targets), (batch.strong, true), (weak, weak.targets)]
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], FIT_LR)
    for i in range(args.fit):
        view, targets = views[i % 3]
        losses_of(student, view, targets, config, args).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    return {k: v.cpu() for k, v in student.state_dict().items()}


def losses_of(
    student: Detector, view: View, targets: list[Instances], config: TrainConfig, args: argparse.Namespace
) -> Tensor:
    device = torch.device(args.device)
    with autocast(amp_dtype(config.amp, device, student), device):
        losses = student.loss(student.head(student.features(view.images, view.sizes)), targets)
    return torch.stack([v.float() for v in losses.values()]).sum()


def parts(config: TrainConfig, state: Path, args: argparse.Namespace) -> dict[str, Step]:
    """What no semi-supervised step can do without, each by itself."""
    student = new_student(config, args, state)
    teacher = frozen_copy(student)
    batch, true = batch_of(config, args)
    labeled, weak, strong = batch.labeled, batch.weak, batch.strong
    assert weak is not None
    assert strong is not None
    device = torch.device(args.device)

    def learn(view: View, targets: list[Instances]) -> Step:
        def step() -> None:
            student.zero_grad(set_to_none=True)
            losses_of(student, view, targets, config, args).backward()

        return step

    def teach() -> None:
        with autocast(amp_dtype(config.amp, device, teacher), device):
            teacher(weak.images, weak.sizes, conf=0.3)

    def learn_half() -> None:
        student.zero_grad(set_to_none=True)
        images, sizes = half_size(strong)
        with autocast(amp_dtype(config.amp, device, student), device):
            losses = student.loss(student.head(student.features(images, sizes, shift=1)), true)
        torch.stack([v.float() for v in losses.values()]).sum().backward()

    def see_half() -> None:
        images, sizes = half_size(labeled)
        with torch.no_grad(), autocast(amp_dtype(config.amp, device, student), device):
            student.loss(student.head(student.features(images, sizes, shift=1)), labeled.targets)

    both = twice(labeled)
    found = {"labelled": learn(labeled, labeled.targets), "unlabelled": learn(strong, true), "teacher": teach}
    found["two views"] = learn(both, both.targets)
    return found | ({"half size": learn_half, "labelled, half size": see_half} if looks_at_half_size(config) else {})


def strategy_of(config: TrainConfig, state: Path, args: argparse.Namespace) -> Strategy:
    name = config.strategy.name
    options = {k: v for k, v in config.strategy.options.items() if k != "ema"}  # the control without its average
    plan = Plan(2 * STEP, 1, config.ema_decay, strategy_class(name).two_stages)
    strategy = build_strategy(name, new_student(config, args, state), options, plan)
    return strategy.to(args.device).train()


def strategy_step(strategy: Strategy, config: TrainConfig, args: argparse.Namespace) -> Step:
    batch = batch_of(config, args)[0]
    if strategy.mines:
        batch = SemiBatch(twice(batch.labeled))
    elif not strategy.uses_unlabeled:
        batch = SemiBatch(batch.labeled)
    device = torch.device(args.device)

    def step() -> dict[str, Any]:
        strategy.zero_grad(set_to_none=True)
        with autocast(amp_dtype(config.amp, device, strategy), device):
            out = strategy(batch, STEP)
        torch.stack([v.float() for v in out.losses.values()]).sum().backward()
        strategy.after_step(STEP)
        return out.stats

    return step


def pseudo_boxes(strategy: Strategy, config: TrainConfig, args: argparse.Namespace) -> float | None:
    stats: Any = strategy_step(strategy, config, args)()
    return float(stats["pseudo/per_image"]) if "pseudo/per_image" in stats else None


def memory_in_fresh_process(arm: str, state: Path, args: argparse.Namespace) -> float:
    words = [sys.executable, __file__, "--memory-of", arm, str(state), "--grid", str(args.grid)]
    words += ["--classes", str(args.classes), "--device", args.device]
    for option in ("size", "weights", "detector", "backbone"):
        value = getattr(args, option)
        words += [f"--{option}", str(value)] if value else []
    found: float = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1])
    return found


def peak_memory(config: TrainConfig, state: str, args: argparse.Namespace) -> int:
    """Bytes at the peak of three steps: weights of student and teacher, gradients, activations."""
    before = 0 if args.device == "cuda" else status("VmRSS")
    step = strategy_step(strategy_of(config, Path(state), args), config, args)
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() if args.device == "cuda" else status("VmHWM") - before


if __name__ == "__main__":
    main()
