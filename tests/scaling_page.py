# ruff: noqa: E501 - lines of a page
"""docs/scaling.md: what a step costs on 8 and 64 GPUs, and what labelling 100 million images costs, on paper.

python tests/scaling_page.py > docs/scaling.md
python tests/scaling_page.py fcos=0.21 faster_rcnn=0.25   with seconds of a semi-supervised step measured on one GPU
"""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Detector:
    """ResNet-50, 80 classes. weights: parameters that learn, counted in the built model; flops: of features and head
    on one image of 640 x 640, counted by torch's FlopCounterMode (a multiplication and an addition are two); cpu:
    seconds of a supervised step of 2 images on one thread in bf16, from docs/performance.md."""

    weights: int
    flops: float
    cpu: float


DETECTORS = {
    "fcos": Detector(32_244_245, 163.5e9, 2.402),
    "retinanet": Detector(33_786_804, 189.9e9, 2.667),
    "faster_rcnn": Detector(41_699_936, 153.6e9, 2.529),
    "deformable_detr": Detector(41_161_740, 162.6e9, 4.673),
}
SEMI = 2.25  # measured: a step of mean_teacher on 4 + 4 images by a supervised one on 4, docs/performance.md
PAIRS = 386  # measured: weak and strong pairs a second and core, 640 x 480 JPEGs, docs/performance.md
ONNX = 0.148  # measured: seconds of an image, FCOS in onnxruntime, 320 px, one thread, docs/performance.md
LISTED = 16e-6  # measured: seconds a path of the plan of `ssod label`, docs/label.md
PLANNED = 51  # measured: bytes a path of it, docs/label.md

PEAK = 312e12  # published: bf16 operations a second of an A100
USED = 0.3  # assumed: share of it that a detector's training reaches
NVLINK = 300e9  # published: bytes a second and direction of an A100's NVLink
WIRE = {"100 Gbit/s Ethernet": 12.5e9, "8 x 200 Gbit/s InfiniBand": 200e9}  # published: bytes a second of a machine
REACHED = 0.7  # assumed: share of a link that an all-reduce reaches
BATCH = 4  # labelled images a GPU, and as many unlabelled ones
BACKWARD = 2 / 3  # share of a forward and backward pass; buckets are sent during it
IMAGES = 100_000_000
BYTES = 100_000  # assumed: of an image file
DISK = 1e9  # assumed: bytes a second of the storage


def gpu_seconds(name: str) -> float:
    """A semi-supervised step of 4 + 4 images on one GPU, assumed: forward and backward are three times the forward
    operations, the teacher looks once at every unlabelled image."""
    return DETECTORS[name].flops * BATCH * (3 + 3 + 1) / (PEAK * USED)


def all_reduce(size: float, gpus: int, wire: float) -> float:
    """Seconds of a ring within each machine of 8, and of one between machines: each link carries 2 (n - 1) / n."""
    machines = max(1, gpus // 8)
    within = 2 * (8 - 1) / 8 * size / (NVLINK * REACHED)
    return within + 2 * (machines - 1) / machines * size / (wire * REACHED)


def share(step: float, message: float) -> tuple[float, float]:
    """(least, most) of the ideal speed: nothing of the message hidden behind the backward pass, or all that fits."""
    hidden = max(0.0, message - BACKWARD * step)
    return step / (step + message), step / (step + hidden)


def percent(pair: tuple[float, float]) -> str:
    low, high = (f"{100 * v:.0f}" for v in pair)
    return f"{low} %" if low == high else f"{low} to {high} %"


def page(measured: dict[str, float]) -> str:
    ethernet, infiniband = WIRE.values()
    lines = [TOP]
    for name, d in DETECTORS.items():
        size = 4 * d.weights
        step = measured.get(name, gpu_seconds(name))
        one, wide, wider = (all_reduce(size, n, w) for n, w in ((8, ethernet), (64, ethernet), (64, infiniband)))
        lines.append(
            f"| {name} | {size / 1e6:.0f} | {1000 * step:.0f} {'measured' if name in measured else 'assumed'} "
            f"| {1000 * one:.1f} | {percent(share(step, one))} | {1000 * wide:.0f} | {percent(share(step, wide))} "
            f"| {1000 * wider:.1f} | {percent(share(step, wider))} |"
        )
    lines.append(MIDDLE)
    for name, d in DETECTORS.items():
        step, size = SEMI * d.cpu, 4 * d.weights
        message = 2 * size / (ethernet * REACHED)  # however many processes
        cores = 2 * BATCH / PAIRS / measured.get(name, gpu_seconds(name))
        lines.append(f"| {name} | {step:.1f} | {1000 * message:.0f} | {percent(share(step, message))} | {cores:.1f} |")
    lines.append(LABEL)
    cores = IMAGES * ONNX / 3600
    decode = IMAGES / PAIRS / 3600
    look = DETECTORS["fcos"].flops * IMAGES / (PEAK * USED) / 3600
    for what, kind, hours, eight, many in (
        ("looking, on CPU cores", "measured, 320 px", cores, cores / 8, cores / 64),
        ("looking, on GPUs", "assumed, 640 px", look, look / 8, look / 64),
        ("decoding, on CPU cores", "measured as pairs of views, so an upper bound", decode, decode / 8, decode / 64),
    ):
        lines.append(f"| {what} | {kind} | {hours:,.0f} | {eight:,.1f} | {many:,.1f} |")
    read = IMAGES * BYTES / DISK / 3600
    lines.append(f"| reading {IMAGES * BYTES / 1e12:.0f} TB | assumed, {DISK / 1e9:.0f} GB/s in all | {read:.1f} | {read:.1f} | {read:.1f} |")  # fmt: skip
    plan = IMAGES * LISTED / 3600
    lines.append(f"| listing the images | measured to a million | {plan:.2f} | {plan:.2f} | {plan:.2f} |")
    lines.append(END.format(plan=IMAGES * PLANNED / 1e9, cores=decode / look, even=look / read))
    return "\n".join(lines) + "\n"


TOP = f"""# Scaling on paper
Nothing here has run on more than two processes of one CPU, and nothing on a GPU: these are formulas with measured figures of
one device in them, so that the bounds can be seen before a cluster is rented. `tests/scaling_page.py` writes this page, and
takes the seconds of a step once somebody has measured them (`python tests/scaling_page.py fcos=0.21`).

**Counted** in the built models: weights that learn, operations of a forward pass. **Measured** on one thread of a CPU
([performance](performance.md), [label](label.md)): steps, pairs of views a second, exported models, the plan of `ssod label`.
**Published**: {PEAK / 1e12:.0f} Tflop/s in bf16 and {NVLINK / 1e9:.0f} GB/s of NVLink a direction (A100), 12.5 GB/s of 100 Gbit/s Ethernet, 200 GB/s of eight
200 Gbit/s InfiniBand cards a machine. **Assumed**: {100 * USED:.0f} % of the operations and {100 * REACHED:.0f} % of a link are reached; {BACKWARD:.2f} of a step is the
backward pass, behind which messages hide; machines of 8 GPUs.

## A step of 8 and of 64 GPUs
ResNet-50, 640 px, `mean_teacher` on {BATCH} labelled and {BATCH} unlabelled images a GPU, gradients in fp32. A step takes
`operations x {BATCH} x (3 + 3 + 1) / ({PEAK / 1e12:.0f}e12 x {USED})`: forward and backward on both, the teacher's look at one. An all-reduce
of n links takes `2 (n - 1) / n x bytes / bandwidth`, within the machines and then between them. "Ideal" is the share of n times
one GPU's speed, from no hiding of messages to all that fits behind the backward pass.

| | MB all-reduced a step | ms of a step on one GPU | 8 GPUs: ms of messages | ideal | 64, Ethernet: ms | ideal | 64, InfiniBand: ms | ideal |
|---|---|---|---|---|---|---|---|---|"""
MIDDLE = f"""
Beside the gradients a step all-reduces some kB: normalisers of the losses, counts by class, and the running statistics of batch
norms that learn (ResNet-50: 0.2 MB). The moving average of the teacher is computed by every process and sent by none.

**What bounds it.** In one machine nothing of the network: messages are some percent of a step. Between machines 100 Gbit/s
is the bound as soon as messages do not hide; `accumulate=4` sends a quarter as often. Faster GPUs, and smaller batches, make it
worse in proportion. The loader is no bound while a GPU has a core or two of its own: last column below.

The same from what was measured: a step on one CPU thread ({SEMI} times the supervised one), one process a machine on Ethernet,
however many; and the CPU cores that one GPU of the table above keeps busy with decoding and augmenting, at {PAIRS} pairs
of views a second and core (a labelled image counts as a pair, so this is an upper bound).

| | s of a step on a CPU thread, measured | ms of messages | ideal | cores a GPU for its images |
|---|---|---|---|---|"""
LABEL = f"""
`augment_on=device` takes colour, blur and erasing off these cores.

## Labelling {IMAGES:,} images
`ssod label` sends no gradients: processes share parts of the list and never wait for each other but at its two ends, so the
hours divide by their number, as long as the storage keeps up. FCOS on ResNet-50.

| | | hours on one | on 8 | on 64 |
|---|---|---|---|---|"""
END = """
**What bounds it.** On a few GPUs their own looking, as long as each has {cores:.1f} cores that decode. From {even:.0f} GPUs on the storage, if
it gives 1 GB/s: reading does not divide. At the two ends the first process works alone: it lists the images (51 MB a million
paths, {plan:.1f} GB here), and at last it joins the parts to one file, an image at a time; how long that takes for so many has not
been measured. Stopped at any time, it goes on from the parts that are done.
"""


if __name__ == "__main__":
    given = dict(word.split("=") for word in sys.argv[1:])
    if unknown := sorted(set(given) - set(DETECTORS)):
        sys.exit(f"no detector of this page: {', '.join(unknown)}; there are {', '.join(DETECTORS)}")
    print(page({name: float(seconds) for name, seconds in given.items()}), end="")
