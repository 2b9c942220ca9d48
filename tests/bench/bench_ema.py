"""The teacher's moving average of a Faster R-CNN with ResNet-50, against the usual loop over state dicts and against a
step of training; and its optimizer's update, against the same optimizer as torch makes it unless asked.

    python tests/bench/bench_ema.py [--rounds 15] [--size 640]

Both sides have the same networks; the loop goes through all tensors, ours through those that learn. The step is the
supervised one, forward, loss and backward, of two images, in fp32.
"""

from __future__ import annotations

import copy

import torch
from common import Row, alternate, arguments, finish, head
from peers import Step, make_step, ours
from torch import nn

from ssod.config import load_config
from ssod.engine.optim import build_optimizer
from ssod.nn.ema import Ema, frozen_copy

DECAY = 0.999


@torch.no_grad()
def naive(teacher: nn.Module, student: nn.Module) -> None:
    """As in most published code."""
    own = student.state_dict()
    for name, value in teacher.state_dict().items():
        if value.is_floating_point():
            value.mul_(DECAY).add_(own[name], alpha=1 - DECAY)
        else:
            value.copy_(own[name])


def optimizer_steps(student: nn.Module, name: str) -> tuple[Step, Step]:
    """Ours, and the peer's: the same groups on parameters of their own."""
    config = load_config("train", {"optimizer": name})
    mine, theirs = (build_optimizer(copy.deepcopy(student), config) for _ in range(2))
    for optimizer in (mine, theirs):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.full_like(p, 1e-4)
    for group in theirs.param_groups:
        group.update(fused=None, foreach=None)
    return mine.step, theirs.step


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    parser.add_argument("--size", type=int, default=640)
    args = parser.parse_args()
    if args.quick:
        args.size = 64
    head(args, "torchvision", what=f"Faster R-CNN on ResNet-50, {args.size} px, batch 2")
    torch.manual_seed(0)
    student = ours("faster_rcnn")
    teacher, other = frozen_copy(student), copy.deepcopy(student)
    ema = Ema(teacher, student)
    steps: dict[str, Step] = {"ours": lambda: ema.update(DECAY), "naive": lambda: naive(other, student)}
    for name in ("sgd", "adamw"):
        steps[name], steps[f"{name}, torch's default"] = optimizer_steps(student, name)
    times = alternate(steps, args)
    args.rounds = min(args.rounds, 3)
    step = alternate({"step": make_step("faster_rcnn", "ours", "fp32", args.size, 2)}, args)["step"]
    rows = [
        Row("moving average / loop over state dicts", times["ours"], times["naive"], 0.55),
        Row("moving average / supervised step", times["ours"], step, 0.01),
        *(Row(f"{n} / torch's default", times[n], times[f"{n}, torch's default"]) for n in ("sgd", "adamw")),
    ]
    finish(rows, args)


if __name__ == "__main__":
    main()
