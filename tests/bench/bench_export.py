"""Inference on one thread of a CPU: our exported files against our detectors, eager and compiled, and against
torchvision's own export.

    python tests/bench/bench_export.py --size 320 --rounds 9 [--nodes 8]

End to end on every side: an image in, final boxes out, normalisation and NMS included. Ours is the graph of `ssod
export`; theirs is what torchvision supports, `torch.onnx.export(..., dynamo=False)`, of its own detector with the same
weights and limits, so both have to find as much. Both files run in onnxruntime with the same options. transformers'
Deformable DETR ends before NMS and boxes in pixels, so ours has no peer here.

The weights are random but telling (tests/detectors/torchvision_peers.py): with fresh ones no score passes the threshold
and there is nothing to sort or suppress. How many pass is printed; `--shift`, added to the class logits, changes it.

int8 is calibrated on the one image: this is about time. Where OpenVINO is installed its files are timed, too; that of
half precision computes in bf16 on CPUs that can.

--beside FILE.onnx times other programs' files of one image input in the same rounds, such as ultralytics'
`YOLO("yolo11x.yaml").export(format="onnx", imgsz=320, nms=True)`, which is no dependency of anything here.

All alternate in one process; the figure is process CPU time, the median over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # for every runtime, before it loads
sys.path.append(str(Path(__file__).resolve().parent.parent / "detectors"))

import numpy as np
import onnxruntime
import torch
import torchvision
from common import Row, common_options, save
from peers import DETECTORS, IOU, MAX_DET, NUM_CLASSES, set_limits
from torch import Tensor, nn
from torchvision_peers import FIRST_LABEL, copy_weights, peer_of

from ssod import __version__
from ssod.deploy.array_model import ArrayModel
from ssod.deploy.contract import Card
from ssod.deploy.graph import export_onnx
from ssod.deploy.onnx_model import OnnxModel
from ssod.deploy.openvino_model import OpenVinoModel, write_openvino
from ssod.deploy.quantize import quantize
from ssod.detectors import build_detector
from ssod.detectors.base import Detector
from ssod.nn.compiled import compile_networks

GOAL = 0.667  # 1.5 times as fast
CONF = 0.05
# What the table calls each of our files, and the side that runs it.
FILES = {
    "ONNX": "ours",
    "ONNX, int8": "int8",
    "OpenVINO": "openvino",
    "OpenVINO, half": "openvino half",
    "OpenVINO, int8": "openvino int8",
}
BACKGROUND = {"faster_rcnn": 1}  # rows of the class bias that are none of a class, in front


@dataclass(frozen=True)
class Side:
    """find: detects on the one image, returns how many; file, feed: of an ONNX file, what it is given."""

    find: Callable[[], int]
    file: Path | None = None
    feed: dict[str, np.ndarray] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="+", default=list(DETECTORS), choices=DETECTORS)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shift", type=float, default=-1.0, help="added to the class logits")
    parser.add_argument("--beside", nargs="*", default=[], type=Path, help="ONNX files of other programs")
    parser.add_argument("--nodes", type=int, default=0, help="also tell the kinds of node that cost most, so many")
    common_options(parser)
    args = parser.parse_args()
    if args.quick:
        args.size, args.rounds, args.detectors = 64, 1, ["fcos", "deformable_detr"]
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, onnxruntime {onnxruntime.__version__}, "
        f"{platform.processor() or platform.machine()}, 1 thread, load {os.getloadavg()[0]:.1f}, "
        f"{time.strftime('%Y-%m-%d')}; ResNet-50, {args.size} px, batch 1, {NUM_CLASSES} classes, logits "
        f"{args.shift:+g}, medians of {args.rounds} rounds"
    )
    lines, smaller, others, rows = [], [], [], []
    for name in args.detectors:
        with tempfile.TemporaryDirectory() as folder:
            sides, passing = make_sides(name, args.size, args.shift, Path(folder), compiled=not args.quick)
            sides |= {file.stem: other_file(file, args.size) for file in args.beside}
            counts = {who: side.find() for who, side in sides.items()}
            times = alternate(sides, args.rounds)
            print(
                f"\n{name}, {passing} candidates pass: "
                + ", ".join(f"{who} {times[who]:.1f} ms ({counts[who]} objects)" for who in sides),
                flush=True,
            )
            for who, side in sides.items():
                if args.nodes and side.file and side.feed:
                    print(f"  {who}: {costly(side.file, side.feed, args.rounds, args.nodes)}")
        lines.append(row(name, times))
        smaller.append(row_of_files(name, times))
        rows += table_rows(name, times)
        others += [f"{name} / {file.stem}: {times['ours'] / times[file.stem]:.2f}" for file in args.beside]
    print(
        "\n| | ours, eager | ours, compiled | ours, ONNX | torchvision's, eager | torchvision's, ONNX | "
        "ours: eager / ONNX | their eager / our ONNX | their ONNX / our ONNX |"
    )
    print("|---|---|---|---|---|---|---|---|---|\n" + "\n".join(lines))
    print("\nour eager / our files\n\n| | " + " | ".join(FILES) + " |\n|---" + "|---" * len(FILES) + "|")
    print("\n".join(smaller))
    save(rows, args.json)
    print("\n".join(others))
    print(f"load at the end {os.getloadavg()[0]:.1f}")


def row(name: str, times: dict[str, float]) -> str:
    eager, mine, peer = times["eager"], times["ours"], [times.get("theirs, eager"), times.get("theirs")]
    compiled, *shown = ["-" if t is None else f"{t:.0f}" for t in (times.get("compiled"), *peer)]
    ratios = ["-" if t is None else f"{t / mine:.2f}" for t in peer]
    cells = [f"{eager:.0f}", compiled, f"{mine:.0f}", *shown, f"{eager / mine:.2f}", *ratios]
    return f"| {name} | " + " | ".join(cells) + " |"


def row_of_files(name: str, times: dict[str, float]) -> str:
    """How many times as fast as our eager each of our files is."""
    cells = [f"{times['eager'] / times[who]:.2f}" if who in times else "-" for who in FILES.values()]
    return f"| {name} | " + " | ".join(cells) + " |"


def table_rows(name: str, times: dict[str, float]) -> list[Row]:
    mine, eager = times["ours"], times.get("theirs, eager")
    rows = [
        Row(f"{name}, {file} / our eager", times[who], times["eager"]) for file, who in FILES.items() if who in times
    ]
    if "compiled" in times:
        rows.append(Row(f"{name} compiled / our eager", times["compiled"], times["eager"]))
    if eager is not None:
        rows.append(Row(f"{name} in onnxruntime / torchvision's eager", mine, eager, GOAL))
        rows.append(Row(f"{name} in onnxruntime / torchvision's there", mine, times["theirs"]))
    return rows


def make_sides(name: str, size: int, shift: float, folder: Path, compiled: bool) -> tuple[dict[str, Side], int]:
    """Our detector, its file and torchvision's file of the same weights; and how many candidates pass the threshold."""
    torch.manual_seed(0)
    image = torch.rand(1, 3, size, size)
    detector = build_detector(name, NUM_CLASSES).eval()
    peer = None
    if name in FIRST_LABEL:
        peer = peer_of(name, NUM_CLASSES, size)
        shift_classes(peer, name, shift)
        copy_weights(peer, detector)
        set_limits(peer, name, CONF)
    passing = len(detector(image, conf=CONF, iou=1.0, max_det=1 << 30)[0])
    pixels, valid = image.numpy(), np.array([[size, size]], np.int32)
    sides = {"eager": Side(lambda: len(detector(image, conf=CONF, iou=IOU[name], max_det=MAX_DET)[0]))}
    sides |= our_files(detector, folder, card(name, detector, size), pixels, valid)
    if compiled:
        twin = copy.deepcopy(detector)
        compile_networks([twin], torch.device("cpu"))
        sides["compiled"] = Side(lambda: len(twin(image, conf=CONF, iou=IOU[name], max_det=MAX_DET)[0]))
    if peer is not None:
        file = folder / "theirs.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather not have the one way that torchvision supports
            torch.onnx.export(peer, ([image[0]],), str(file), opset_version=18, dynamo=False)
        session = open_session(file)
        feed = {session.get_inputs()[0].name: pixels[0]}
        sides["theirs, eager"] = Side(lambda: eager(peer, image[0]))
        sides["theirs"] = Side(lambda: len(session.run(None, feed)[0]), file, feed)
    return sides, passing


def our_files(detector: Detector, folder: Path, card: Card, pixels: np.ndarray, valid: np.ndarray) -> dict[str, Side]:
    """Our detector as `ssod export` would write it: ours.onnx in `folder`, and its other forms for a CPU."""

    def side(model: ArrayModel, file: Path | None = None) -> Side:
        return Side(lambda: int(model.run(pixels, valid).num_dets[0, 0]), file, model.feed(pixels, valid))

    fp32, plain, int8 = (folder / f"{name}.onnx" for name in ("ours", "plain", "int8"))
    export_onnx(detector, fp32, card)
    ours = OnnxModel(fp32, "cpu")
    feed = ours.feed(pixels, valid)
    export_onnx(detector, plain, replace(card, precision="int8"))  # what quantize takes
    quantize(plain, int8, [feed], "onnx")
    sides = {"ours": side(ours, fp32), "int8": side(OnnxModel(int8, "cpu"), int8)}
    if importlib.util.find_spec("openvino"):
        fp32, int8 = folder / "standard.onnx", folder / "standard.int8.onnx"
        export_onnx(detector, fp32, replace(card, target="onnx"))
        quantize(fp32, int8, [feed], "onnx")
        for who, precision, graph in (
            ("openvino", "fp32", fp32),
            ("openvino half", "fp16", fp32),
            ("openvino int8", "int8", int8),
        ):
            write_openvino(graph, folder / who, replace(card, target="onnx", precision=precision))
            sides[who] = side(OpenVinoModel(folder / who))
    return sides


@torch.no_grad()
def eager(peer: nn.Module, image: Tensor) -> int:
    return len(peer([image])[0]["scores"])


def shift_classes(peer: nn.Module, name: str, shift: float) -> None:
    layer = "roi_heads.box_predictor.cls_score" if name == "faster_rcnn" else "head.classification_head.cls_logits"
    bias = peer.get_submodule(layer).bias
    assert isinstance(bias, Tensor)
    bias.data[BACKGROUND.get(name, 0) :] += shift


def card(name: str, detector: Detector, size: int) -> Card:
    return Card(
        names=[str(k) for k in range(NUM_CLASSES)],
        detector=name,
        backbone="resnet50",
        weights="student",
        imgsz=size,
        size=(size, size),
        multiple=32,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        conf=CONF,
        iou=IOU[name],
        max_det=MAX_DET,
        target="onnxruntime",
        precision="fp32",
        inputs=("images", "sizes") if name == "deformable_detr" else ("images",),
        opset=18,
        versions={"ssod": __version__},
    )


def other_file(file: Path, size: int) -> Side:
    session = open_session(file)
    feed = {session.get_inputs()[0].name: torch.rand(1, 3, size, size).numpy()}
    return Side(lambda: len(session.run(None, feed)[0]), file, feed)


def open_session(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def alternate(sides: dict[str, Side], rounds: int) -> dict[str, float]:
    """Median milliseconds of CPU time of each; one warm-up round."""
    times: dict[str, list[float]] = {who: [] for who in sides}
    for i in range(rounds + 1):
        for who, side in sides.items():
            start = time.process_time()
            side.find()
            if i:
                times[who].append(1000 * (time.process_time() - start))
    return {who: median(values) for who, values in times.items()}


def costly(path: Path, feed: dict[str, np.ndarray], rounds: int, most: int) -> str:
    """The kinds of node that take longest, in milliseconds of one run, by onnxruntime's profiler."""
    session = open_session(path, profile=path.with_name("profile"))
    for _ in range(rounds):
        session.run(None, feed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    spent: Counter[str] = Counter()
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            spent[event["args"]["op_name"]] += event["dur"]
    return ", ".join(f"{kind} {us / 1000 / rounds:.1f}" for kind, us in spent.most_common(most))


if __name__ == "__main__":
    main()
