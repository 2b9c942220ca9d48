"""One semi-supervised step of the detectors of peers.py: ours by `strategy=mean_teacher`, theirs by the plainest loop.

Loss of the labelled images; the teacher's detections on the weak view, those above a threshold as targets of the strong
view, its mirror image; backward of both losses, SGD's update, the teacher's moving average. Theirs takes torch's and
the library's defaults, and the loop over state dicts of most published code. Both sides begin with the same random
weights and one threshold, above which the teacher finds as many boxes an image as the labelled ones have.
"""

from __future__ import annotations

import copy
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent / "detectors"))

import torch
from bench_ema import DECAY, naive
from peers import (
    IOU,
    MAX_DET,
    Context,
    Step,
    compile_parts,
    make_targets,
    ours,
    set_limits,
    their_loss,
    their_pixels,
    theirs,
)
from torch import Tensor, nn
from torchvision_peers import FIRST_LABEL, in_our_words, make_telling

from ssod.config import load_config
from ssod.detectors.base import Detector
from ssod.detectors.names_transformers import from_transformers
from ssod.engine.optim import build_optimizer
from ssod.nn.precision import lay_out
from ssod.strategies import build_strategy
from ssod.strategies.base import Plan
from ssod.structures import Instances, SemiBatch, View

BOXES = 7  # an image, as make_targets has
RATE = 1e-9  # the weights must stay what they are, the arithmetic is the same
STEP = 1000  # behind burn-in and ramp


@dataclass(frozen=True)
class Task:
    """What both sides are given: images uint8 [B, 3, H, W], labelled ones with their boxes and unlabelled ones in their
    weak view; tau: the threshold of pseudo boxes."""

    labeled: Tensor
    targets: list[Instances]
    weak: Tensor
    tau: float
    context: Context
    compiled: bool


def make_semi_step(name: str, who: str, mode: str, size: int, batch: int, device: str = "cpu") -> Step:
    """As `make_step`: one step with `batch` labelled and as many unlabelled images."""
    torch.manual_seed(0)
    labeled, weak = torch.randint(0, 256, (2, batch, 3, size, size), dtype=torch.uint8).to(device)
    targets = [t.to(device) for t in make_targets(batch, size, BOXES)]
    peer, student = pair_of(name, size, device)
    half = torch.bfloat16 if "bf16" in mode else None

    def context() -> AbstractContextManager[object]:
        return torch.autocast(device, half) if half is not None else nullcontext()

    tau = threshold(student.eval(), weak, IOU[name])
    task = Task(labeled, targets, weak, tau, context, "compile" in mode)
    if who == "ours":
        lay_out(student, half)
        return our_semi_step(name, student.train(), task)
    if "channels_last" in mode:
        peer.to(memory_format=torch.channels_last)
    return their_semi_step(name, peer.train(), task)


def pair_of(name: str, size: int, device: str) -> tuple[nn.Module, Detector]:
    """Theirs and ours with the same weights."""
    peer, student = theirs(name, size), ours(name)
    if name == "deformable_detr":
        _, _, state = from_transformers(peer.state_dict(), peer.config.to_dict())
    else:
        make_telling(peer, name)
        state = in_our_words(peer.state_dict())
    student.load_state_dict(student.state_dict() | state)  # frozen norms of torchvision do not count batches
    return peer.to(device), student.to(device)


@torch.no_grad()
def threshold(detector: Detector, images: Tensor, iou: float) -> float:
    """Halfway between two detections' scores: BOXES an image are above it, on average."""
    found = detector(images, conf=0.0, iou=iou, max_det=MAX_DET)
    scores = torch.cat([f.scores for f in found if f.scores is not None]).sort(descending=True).values
    count = BOXES * len(images)
    return float(scores[count - 1 : count + 1].mean())


def view_of(images: Tensor, targets: list[Instances] | None = None) -> View:
    count, side = len(images), images.shape[-1]
    sizes = torch.tensor([[side, side]], device=images.device).expand(count, 2)
    matrices = torch.eye(3, dtype=torch.float64, device=images.device).expand(count, 3, 3)
    own = targets or [Instances.empty(images.device) for _ in range(count)]
    return View(images, sizes, matrices, own, list(range(count)))


def mirrored(view: View) -> View:
    """The view from left to right, without annotations."""
    side = view.images.shape[-1]
    mirror = torch.tensor([[-1.0, 0, side], [0, 1, 0], [0, 0, 1]], dtype=torch.float64, device=view.matrices.device)
    none = [Instances.empty(view.images.device) for _ in view.targets]
    return View(view.images.flip(-1), view.sizes, mirror @ view.matrices, none, view.indices)


def our_semi_step(name: str, student: Detector, task: Task) -> Step:
    options = {"tau": task.tau, "ignore": False, "box_loss": True, "nms": IOU[name], "max_boxes": MAX_DET}
    strategy = build_strategy("mean_teacher", student, options, Plan(2 * STEP, 1, DECAY)).to(task.weak.device).train()
    if task.compiled:
        for network in (strategy.student, strategy.teacher):
            compile_parts(name, "ours", network)
    optimizer = build_optimizer(student, load_config("train", {"optimizer": "sgd", "lr0": RATE}))
    weak = view_of(task.weak)
    batch = SemiBatch(view_of(task.labeled, task.targets), weak, mirrored(weak))

    def step() -> None:
        optimizer.zero_grad()
        with task.context():
            out = strategy(batch, STEP)
        torch.stack(list(out.losses.values())).sum().backward()
        optimizer.step()
        strategy.after_step(STEP)

    return step


def their_semi_step(name: str, student: nn.Module, task: Task) -> Step:
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    set_limits(teacher, name, task.tau)
    if task.compiled:
        for network in (student, teacher):
            compile_parts(name, "theirs", network)
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, RATE, momentum=0.9, weight_decay=1e-4)
    size = task.weak.shape[-1]
    labeled, weak = their_pixels(name, task.labeled), their_pixels(name, task.weak)
    strong = weak.flip(-1)

    def step() -> None:
        optimizer.zero_grad()
        with task.context():
            with torch.no_grad():
                pseudo = [flipped(t, size) for t in find(teacher, name, weak, task.tau)]
            total = their_loss(name, student, labeled, task.targets) + their_loss(name, student, strong, pseudo)
        total.backward()
        optimizer.step()
        naive(teacher, student)

    return step


def find(teacher: nn.Module, name: str, images: Tensor, tau: float) -> list[Instances]:
    """Their detections above tau."""
    if name in FIRST_LABEL:
        return [
            Instances(d["boxes"].float(), d["labels"] - FIRST_LABEL[name], d["scores"]) for d in teacher(list(images))
        ]
    out, size, found = teacher(pixel_values=images), images.shape[-1], []
    for logits, boxes in zip(out.logits.float().sigmoid(), out.pred_boxes.float(), strict=True):
        scores, index = logits.flatten().topk(MAX_DET)
        center, side = boxes[index // logits.shape[1]].split(2, dim=1)
        corners = torch.cat([center - side / 2, center + side / 2], dim=1) * size
        sure = scores > tau
        found.append(Instances(corners[sure], (index % logits.shape[1])[sure], scores[sure]))
    return found


def flipped(found: Instances, size: int) -> Instances:
    x1, y1, x2, y2 = found.boxes.unbind(1)
    return Instances(torch.stack([size - x2, y1, size - x1, y2], dim=1), found.labels)
