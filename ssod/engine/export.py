"""`ssod export`: a checkpoint becomes one file that runs elsewhere, and is let through only when it finds the same."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssod import __version__
from ssod.data.annotations.sources import read_data_yaml
from ssod.data.image import ImageError, read_image
from ssod.data.samples import Dataset, Sample
from ssod.data.sizes import Fit
from ssod.deploy.asked import asked
from ssod.deploy.compare import GATES, Difference
from ssod.deploy.contract import Card, Outputs
from ssod.deploy.engine_sidecar import Sidecar
from ssod.deploy.exported import Exported, Loaded, load_model
from ssod.deploy.graph import check_installed, export_onnx
from ssod.deploy.predictor import load_detector
from ssod.deploy.prepare import prepare
from ssod.deploy.torchscript_model import write_torchscript
from ssod.deploy.trt import check_capabilities, load_trt
from ssod.deploy.verify import Run, pictures, verify
from ssod.detectors.base import Detector
from ssod.engine.evaluate import evaluate
from ssod.engine.setup import data_yaml, load_split
from ssod.errors import Fault, UserError
from ssod.modes import ExportConfig
from ssod.zoo.fetch import in_zoo, resolve

MULTIPLE = 32
SUFFIX = {"onnx": ".onnx", "engine": ".engine", "torchscript": ".torchscript", "openvino": "_openvino"}
GRAPH = {"onnx": "onnxruntime", "engine": "tensorrt", "torchscript": "tensorrt", "openvino": "onnx"}
AP_DROP = 0.05  # of 1: an int8 file that loses more is of no use to anyone
Say = Callable[[str], None]


@dataclass(frozen=True)
class Made:
    """path: the file or folder; card: what it says of itself; difference: from the detector; ap: (checkpoint's,
    file's) on the data, None without data or where the file does not run on this machine."""

    path: Path
    card: Card
    difference: Difference
    ap: tuple[float, float] | None


def export(config: ExportConfig, say: Say = print) -> Made:
    """Export, verify, and only then give the file its name; on any failure no file is left.

    Raises UserError for what cannot be exported, Fault for an export that finds other things than the detector.
    """
    check_installed()
    model = resolve(config.model)
    detector, content = load_detector(model, config.weights)
    card = _card(config, detector, content, model)
    out = _out(config, model, card)
    if config.format == "engine":  # before a minute is spent on the graph
        check_capabilities(load_trt(config.flavour, config.capabilities), config.capabilities)
    data = _data(config, card)
    samples = list(data.samples) if data else []
    trained = _long(content["imgsz"])
    if card.size is not None and max(card.size) > trained + MULTIPLE:
        say(f"NOTE: it was trained on images of {trained} pixels; at {card.size[0]} x {card.size[1]} it may find less.")
    say(f"{model}: the {card.weights} of {card.detector} on {card.backbone}, {len(card.names)} classes")
    with tempfile.TemporaryDirectory(prefix=".ssod-export-", dir=out.parent) as folder:
        start = time.monotonic()
        made = Path(folder) / out.name
        if config.format == "torchscript":
            write_torchscript(detector, made, card)
            difference = _compared(detector, card, _runs(made, "cpu"), samples, "TorchScript", say)
        else:
            graph = _onnx(config, detector, card, Path(folder), say)
            difference = _compared(detector, card, _runs(graph, "cpu"), samples, "onnxruntime", say)
            _convert(config, detector, card, graph, made, samples, say)
        ap = _scored(config, model, made, data, say)
        _settle(made, out)
    say(f"{out}: {_what(config, card)}, {_megabytes(out):.1f} MB, {time.monotonic() - start:.0f} s")
    return Made(out, card, difference, ap)


# ---- what is wanted


def _card(config: ExportConfig, detector: Detector, content: dict[str, Any], model: Path) -> Card:
    body, spec = detector.backbone, content["spec"]
    use = content["use"] if config.weights == "auto" else config.weights
    return Card(
        names=list(content["names"]),
        detector=spec["name"],
        backbone=spec["backbone"],
        weights=use,
        imgsz=content["imgsz"] if config.imgsz is None or not config.dynamic else _long(config.imgsz),
        size=None if config.dynamic else _size(config.imgsz, content["imgsz"]),
        multiple=MULTIPLE,
        mean=_three(body.mean),
        std=_three(body.std),
        conf=config.conf,
        iou=config.iou,
        max_det=config.max_det,
        target=_target(config),
        precision="fp16" if config.half else "int8" if config.int8 else "fp32",
        # Only its attention sees where an image ends; to the convolutions the mean colour is as good as nothing.
        inputs=("images", "sizes") if spec["name"] == "deformable_detr" else ("images",),
        opset=config.opset,
        versions={"ssod": __version__, "torch": torch.__version__},
        source=hashlib.sha256(model.read_bytes()).hexdigest(),
    )


def _target(config: ExportConfig) -> str:
    """Raises UserError for a graph that the format's program does not know."""
    if config.target == "onnxruntime" and config.format != "onnx":
        raise UserError(f"target=onnxruntime is for format=onnx; leave it out for format={config.format}.")
    if config.target != "auto":
        return config.target
    # fp16 is for GPUs, on which a loop waits for itself at every turn.
    return "onnx" if config.format == "onnx" and config.half else GRAPH[config.format]


def _three(values: torch.Tensor) -> tuple[float, float, float]:
    r, g, b = (values.flatten() / 255).tolist()
    return r, g, b


def _long(imgsz: int | list[int]) -> int:
    return imgsz if isinstance(imgsz, int) else max(imgsz)


def _size(wanted: int | list[int] | None, trained: int | list[int]) -> tuple[int, int]:
    """(H, W) of a fixed input. Raises UserError where training's [short, long] does not say which it is."""
    sides = [wanted] if isinstance(wanted, int) else wanted
    if sides is None:
        if not isinstance(trained, int) and len(trained) == 2:
            up = [-(-side // MULTIPLE) * MULTIPLE for side in trained]
            raise UserError(
                f"the model was trained on images of {trained[0]} pixels (short) to {trained[1]} (long); say "
                f"imgsz=[{up[0]},{up[1]}] (height, width) for landscapes, or dynamic=true for any size."
            )
        sides = [-(-_long(trained) // MULTIPLE) * MULTIPLE]
    return sides[0], sides[-1]


def _out(config: ExportConfig, model: Path, card: Card) -> Path:
    """Where the file goes. Raises UserError for a folder that is not there and a name that tells another format."""
    suffix = SUFFIX[config.format]
    kind = "" if card.precision == "fp32" else f".{card.precision}"
    kind += ".tensorrt" if config.format == "onnx" and card.target == "tensorrt" else ""
    beside = Path(model.name) if in_zoo(model) else model
    out = beside.with_name(f"{model.stem}{kind}{suffix}") if config.out is None else Path(config.out)
    if not out.name.endswith(suffix):
        raise UserError(f"out={out}: a file of format={config.format} is named NAME{suffix}.")
    if not out.parent.is_dir():
        raise UserError(f"out={out}: the folder {out.parent} does not exist.")
    return out


def _data(config: ExportConfig, card: Card) -> Dataset | None:
    """The split to compare and score on. Raises UserError for data of other classes."""
    if config.data is None:
        return None
    data = load_split(config.data, config.split, config.data_path, config.strict)
    if data.names != card.names:
        raise UserError(
            f"the model knows the classes {', '.join(card.names)} and the data {', '.join(data.names)}. "
            "Give data with the model's classes."
        )
    return data


# ---- the file


def _onnx(config: ExportConfig, detector: Detector, card: Card, folder: Path, say: Say) -> Path:
    """The ONNX file that everything else starts from, in the precision asked for."""
    import onnx

    plain = folder / "fp32.onnx"
    say(f"writing the graph ({'any size' if card.size is None else '{} x {}'.format(*card.size)}), half a minute ...")
    export_onnx(detector, plain, card)
    made = plain
    if card.precision == "fp16":
        from ssod.deploy.half_graph import to_half

        made = folder / "fp16.onnx"
        onnx.save(to_half(onnx.load(plain)), made)
    elif card.precision == "int8":
        from ssod.deploy.quantize import quantize

        made = folder / "int8.onnx"
        say(f"calibrating int8 on {config.calibration} images ...")
        quantize(plain, made, _calibration(config, card), "tensorrt" if card.target == "tensorrt" else "onnx")
    onnx.checker.check_model(onnx.load(made), full_check=True)
    return made


def _calibration(config: ExportConfig, card: Card) -> Iterator[dict[str, np.ndarray]]:
    """Images of the train split and of the unlabelled set in turns, one by one, as the model takes them."""
    splits = ["train"]
    if "unlabeled" in read_data_yaml(data_yaml(config.data), config.data_path).splits:
        splits.append("unlabeled")
    sets = [_shuffled(load_split(config.data, s, config.data_path, config.strict).samples) for s in splits]
    every = [sample for turn in zip_longest(*sets) for sample in turn if sample is not None]
    for sample in every[: config.calibration]:
        try:
            ready = prepare(read_image(sample.path), Fit(card.imgsz, card.multiple, card.size), card.mean)
        except ImageError:
            continue
        feed = {"images": ready.image[None], "sizes": np.array([ready.size], np.int32)}
        yield {name: feed[name] for name in card.inputs}


def _shuffled(samples: Sequence[Sample]) -> list[Sample]:
    """In an order in which a few stand for all of them, the same in every run."""
    order = np.random.default_rng(0).permutation(len(samples))
    return [samples[i] for i in order]


def _convert(
    config: ExportConfig, detector: Detector, card: Card, graph: Path, to: Path, samples: list[Sample], say: Say
) -> None:
    """From the ONNX file to the format asked for, and whether that finds the same, where it runs here."""
    if config.format == "onnx":
        os.replace(graph, to)
    elif config.format == "openvino":
        from ssod.deploy.openvino_model import write_openvino

        write_openvino(graph, to, card)
        _compared(detector, card, _runs(to, "cpu"), samples, "OpenVINO", say)
    else:
        from ssod.deploy.engine import build_engine

        say("building the engine ...")
        batch = (1, min(2, config.batch), config.batch)
        size = None if card.size is not None else _engine_sizes(card)
        cache = None if config.timing_cache is None else Path(config.timing_cache)
        sidecar = build_engine(
            graph,
            to,
            card=card,
            batch=batch,
            size=size,
            workspace=config.workspace,
            timing_cache=cache,
            flavour=config.flavour,
            capabilities=config.capabilities,
            verbose=config.verbose,
        )
        say(f"built by {sidecar.flavour} {sidecar.version} for {_gpus(sidecar)}")
        if torch.cuda.is_available():
            _compared(detector, card, _runs(to, "cuda"), samples, "TensorRT", say)
        else:
            say("the engine was not run: this machine has no GPU. Its ONNX graph was compared above.")


def _gpus(sidecar: Sidecar) -> str:
    if not sidecar.capabilities:  # its documented default
        return "GPUs from Ampere (sm80) on"
    return f"GPUs of {', '.join(sidecar.capabilities)}"


def _engine_sizes(card: Card) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Least, usual and largest (H, W) of an engine for any size: images of up to `imgsz`, either way round."""
    long = -(-_long(card.imgsz) // MULTIPLE) * MULTIPLE
    usual = -(-long * 3 // 4 // MULTIPLE) * MULTIPLE
    return (MULTIPLE, MULTIPLE), (usual, long), (long, long)


# ---- does it find the same


def _runs(path: Path, device: str) -> Run:
    """A file as a function on arrays, by the runtime that users get."""
    model = load_model(path, device=device).detector
    assert isinstance(model, Exported)

    def run(images: np.ndarray, sizes: np.ndarray) -> Outputs:
        where = torch.device(device)
        valid = torch.from_numpy(sizes).to(where) if "sizes" in model.card.inputs else None
        return Outputs(*(t.cpu().numpy() for t in model.call(torch.from_numpy(images).to(where), valid)))

    return run


def _compared(detector: Detector, card: Card, run: Run, samples: list[Sample], by: str, say: Say) -> Difference:
    """Raises Fault beyond the gate of the precision."""
    gate = GATES.get(card.precision)
    shown, which = pictures(samples)
    difference = verify(detector, card, run, shown, gate.score if gate else 0.0)
    tried = f"compared in {by} on {which} and an empty one, batches of 1, 2 and 5"
    if gate is None:
        near = difference.matched / max(1, difference.total)
        say(f"{tried}: {near:.0%} of the detections within half a pixel; {card.precision} is judged by its AP")
        return difference
    say(f"{tried}: {difference.text()}")
    if not difference.passes(gate):
        raise Fault(
            f"the export differs from the detector by more than {gate.box:g} px, {gate.score:g} in score and "
            f"{gate.unmatched:.0%} of the detections unmatched; no file was kept. Try another opset or precision, and "
            "please report it with the line above."
        )
    return difference


def _scored(
    config: ExportConfig, model: Path, made: Path, data: Dataset | None, say: Say
) -> tuple[float, float] | None:
    """AP of the checkpoint and of the file on the split. Raises Fault where the file loses more than AP_DROP."""
    if data is None:
        return None
    if config.format == "engine" and not torch.cuda.is_available():
        say("AP: not measured, since the engine does not run here.")
        return None
    before = _average_precision(load_model(model, config.weights), data, config)
    after = _average_precision(load_model(made), data, config)
    say(f"AP on {config.split}: checkpoint {before:.4f}, export {after:.4f}, difference {after - before:+.4f}")
    if before - after > AP_DROP:
        raise Fault(
            f"the export loses {before - after:.3f} AP, more than {AP_DROP}; no file was kept. "
            "Use half=true, or another calibration=."
        )
    return before, after


def _average_precision(model: Loaded, data: Dataset, config: ExportConfig) -> float:
    wanted = asked(model.card, model.path, config.conf, config.iou, config.max_det)
    how = model.how(wanted, None, 8, config.workers)
    return evaluate(model.detector, data.samples, data.names, how).ap


# ---- the end


def _settle(made: Path, out: Path) -> None:
    """Give it its name; what was there before goes only now."""
    beside = made.with_name(made.name + ".json")
    if beside.exists():
        os.replace(beside, out.with_name(out.name + ".json"))
    if made.is_dir():
        if out.is_dir():
            os.replace(out, made.with_name("old"))
        elif out.exists():
            out.unlink()
    os.replace(made, out)


def _what(config: ExportConfig, card: Card) -> str:
    size = f"any size (as trained: {card.imgsz})" if card.size is None else "{} x {}".format(*card.size)
    onnx = f"ONNX opset {card.opset}{' for a CPU' if card.target == 'onnxruntime' else ''}"
    kind = {"onnx": onnx, "engine": "TensorRT"}.get(config.format, config.format)
    batch = f"batch up to {config.batch}" if config.format == "engine" else "any batch"
    return f"{kind}, {card.precision}, input {size}, {batch}"


def _megabytes(path: Path) -> float:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(p.stat().st_size for p in files) / 1e6
