"""ONNX -> TensorRT engine: one builder for `tensorrt` 8.6, 10 and 11 and for `tensorrt_rtx`.

Precision lives in the ONNX file: half-precision nodes, or QuantizeLinear and DequantizeLinear. The engine is a raw
plan, as trtexec reads and writes it; what ssod knows of it stands beside it (`engine_sidecar.py`).

Of the branches below, those of `tensorrt_rtx` 1.7 have been run; those that only `tensorrt` takes (its timing cache,
the generation of its GPU, the flags of 8.6) need a GPU and have not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssod.deploy.contract import OUTPUTS, Card, ForeignModel
from ssod.deploy.engine_sidecar import Profile, Shape, Sidecar, sidecar_path
from ssod.deploy.trt import (
    INSTALL,
    RTX,
    check_capabilities,
    has_capabilities,
    has_timing_cache,
    load_trt,
    log_of,
    network_flags,
    precision_flags,
    readable,
)
from ssod.errors import UserError
from ssod.files import replacing

Size = tuple[int, int]
_LEAST_WORKSPACE = 2.0  # GiB; with less, some layers at large sizes and batches find no room, and the build fails


def build_engine(
    onnx_path: Path,
    engine_path: Path,
    *,
    card: Card,
    batch: tuple[int, int, int],
    size: tuple[Size, Size, Size] | None = None,
    workspace: float | None = None,
    timing_cache: Path | None = None,
    flavour: str = "auto",
    capabilities: Sequence[str] = (),
    verbose: bool = False,
) -> Sidecar:
    """Build an engine of an ONNX file, write it and `NAME.engine.json`, and return what the latter says.

    batch         least, usual and most images at once
    size          least, usual and largest (H, W) in pixels; None: that of the ONNX file, which then has a fixed one
    workspace     GiB of GPU memory that a layer may use, at least 2; None: all there is
    timing_cache  file of measured kernel times, read where it exists and written; `tensorrt` only
    flavour       "tensorrt", "tensorrt_rtx" or "auto" (see `load_trt`)
    capabilities  GPU generations to build for, as "sm86"; `tensorrt_rtx` only; none: all but Turing
    verbose       print what TensorRT says while it builds

    Raises UserError, and leaves files as they were, where no engine can be built.
    """
    trt = load_trt(flavour, capabilities)
    names = check_capabilities(trt, capabilities)
    runs_on = names if has_capabilities(trt) else [own_capability(trt)]
    _refuse(trt, onnx_path, engine_path, workspace, timing_cache)
    log = log_of(trt)
    log.start(verbose)
    builder = _builder(trt, log)
    network, _parser = _parse(trt, log, builder, onnx_path, card)
    config = builder.create_builder_config()
    _configure(trt, log, config, card.precision, workspace, names, timing_cache)
    _allow(trt, config, network, card.precision)
    inputs = {t.name: tuple(t.shape) for t in map(network.get_input, range(network.num_inputs))}
    profile = profile_shapes(inputs, card, batch, size)
    _add_profile(builder, config, inputs, profile)

    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(_build_error(trt, log, network, onnx_path, card))
    sidecar = Sidecar(
        card=card,
        flavour=trt.__name__,
        version=trt.__version__,
        capabilities=runs_on,
        profile=profile,
        onnx_sha256=hashlib.sha256(onnx_path.read_bytes()).hexdigest(),
        plan_sha256=hashlib.sha256(plan).hexdigest(),
    )
    # The plan takes its name first: stopped between the two, it does not fit the old sidecar, and loading says so.
    with replacing(sidecar_path(engine_path)) as beside, replacing(engine_path) as file:
        file.write(plan)
        beside.write(sidecar.dumps().encode())
    if timing_cache is not None:
        with replacing(timing_cache) as file:
            file.write(config.get_timing_cache().serialize())
    return sidecar


def profile_shapes(
    inputs: Mapping[str, Shape], card: Card, batch: tuple[int, int, int], size: tuple[Size, Size, Size] | None
) -> Profile:
    """Least, usual and largest shape of every input of a network whose `inputs` have -1 where they are dynamic.

    Raises UserError for a batch or size that the network or the detector does not take.
    """
    if not 1 <= batch[0] <= batch[1] <= batch[2]:
        raise UserError(f"batch={batch}: give the least, usual and most images at once, in this order, from 1 on.")
    height, width = inputs["images"][2:]
    if size is None:
        fixed = card.size or ((height, width) if -1 not in (height, width) else None)
        if fixed is None:
            raise UserError("The ONNX file takes images of any size: give the least, usual and largest size as well.")
        size = (fixed, fixed, fixed)
    if any(not 1 <= least <= usual <= most for least, usual, most in zip(*size, strict=True)):
        raise UserError(f"size={size}: give the least, usual and largest (height, width), in this order.")
    for sides in size:
        if any(side % card.multiple for side in sides):
            raise UserError(f"size={sides}: height and width must be multiples of {card.multiple}.")
    wanted: dict[str, list[Shape]] = {
        "images": [(b, 3, h, w) for b, (h, w) in zip(batch, size, strict=True)],
        "sizes": [(b, 2) for b in batch],
    }
    for name, shape in inputs.items():
        for want in wanted[name]:
            if any(have not in (-1, side) for have, side in zip(shape, want, strict=True)):
                said = ", ".join("any" if side == -1 else str(side) for side in shape)
                raise UserError(
                    f"{name} of the shape {list(want)}: the ONNX file takes [{said}]. Give batch and size that fit, or "
                    "export with dynamic=true."
                )
    return {name: (wanted[name][0], wanted[name][1], wanted[name][2]) for name in inputs}


def _refuse(trt: Any, onnx_path: Path, engine_path: Path, workspace: float | None, timing_cache: Path | None) -> None:
    """What can be wrong before minutes are spent."""
    if not onnx_path.is_file():
        raise UserError(f"{onnx_path}: there is no such ONNX file.")
    if not engine_path.parent.is_dir():
        raise UserError(f"{engine_path}: the folder {engine_path.parent} does not exist.")
    if workspace is not None and workspace < _LEAST_WORKSPACE:
        raise UserError(f"workspace={workspace:g}: TensorRT needs {_LEAST_WORKSPACE:g} GiB or more; or leave it out.")
    if timing_cache is not None and not has_timing_cache(trt):
        raise UserError(
            f"timing_cache={timing_cache}: {trt.__name__} measures no kernels when it builds and has no timing cache; "
            "leave it out."
        )


def _builder(trt: Any, log: Any) -> Any:
    try:
        return trt.Builder(log)
    except (TypeError, RuntimeError) as error:  # the C++ side gave nothing: the driver, most often
        said = readable(log.errors[0]) if log.errors else str(error)
        raise UserError(
            f"{trt.__name__} {trt.__version__} cannot build on this machine: {said}. See whether the NVIDIA driver is "
            "recent enough for it."
        ) from None


def _parse(trt: Any, log: Any, builder: Any, path: Path, card: Card) -> tuple[Any, Any]:
    """The network of an ONNX file, and the parser, which must live as long as the network: it owns the weights."""
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise UserError(_parse_error(trt, log, parser, path, card))
    inputs = {network.get_input(i).name for i in range(network.num_inputs)}
    outputs = {network.get_output(i).name for i in range(network.num_outputs)}
    if inputs != set(card.inputs) or outputs != set(OUTPUTS):
        raise ForeignModel(
            f"{path} has the inputs {', '.join(sorted(inputs))} and the outputs {', '.join(sorted(outputs))}; a model "
            f"of ssod has {', '.join(card.inputs)} and {', '.join(OUTPUTS)}. Export a checkpoint with ssod."
        )
    return network, parser


def _parse_error(trt: Any, log: Any, parser: Any, path: Path, card: Card) -> str:
    error = parser.get_error(0)
    if hasattr(error, "node_operator"):
        op, node = error.node_operator(), error.node_name()
    else:  # 8.6 knows the node's number only, but its log names the operator and its first output
        op, node = node_in_log(log.errors)
    if not op:
        return f"{path} cannot be read as an ONNX file by {trt.__name__} {trt.__version__}: {readable(error.desc())}."
    return _refused(trt, path, card, op, node, readable(error.desc()), parser.num_errors - 1)


def node_in_log(errors: Sequence[str]) -> tuple[str, str]:
    """Operator and first output of the node that the parser stopped at; ("", "") where it stopped at none."""
    for message in errors:
        found = re.search(r'node number \d+ \[(\w+) -> "([^"]*)"', message)
        if found is not None:
            return found[1], found[2]
    return "", ""


def _build_error(trt: Any, log: Any, network: Any, path: Path, card: Card) -> str:
    """A build names a layer, which has the name of the ONNX node, at times with a number behind it."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    for said in map(readable, log.errors):
        for layer in layers:
            if layer.name and re.search(rf"(?<![\w/]){re.escape(layer.name)}(?![\w/])", said):
                return _refused(trt, path, card, str(layer.type).rpartition(".")[2], layer.name, said, 0)
    said = readable(log.errors[0]) if log.errors else "it gave no reason"
    return f"{path}: {trt.__name__} {trt.__version__} cannot build an engine: {said}.{_way_out(card)}"


def _refused(trt: Any, path: Path, card: Card, op: str, node: str, said: str, others: int) -> str:
    more = f", nor {others} other nodes" if others else ""
    return (
        f"{path}: {trt.__name__} {trt.__version__} does not take the operator {op} (node {node}{more}): {said}."
        f"{_way_out(card)}"
    )


def _way_out(card: Card) -> str:
    if card.target == "tensorrt":
        return ""
    return " The file was exported for other programs; format=engine exports one of operators that TensorRT has."


def _configure(
    trt: Any,
    log: Any,
    config: Any,
    precision: str,
    workspace: float | None,
    capabilities: Sequence[str],
    timing_cache: Path | None,
) -> None:
    if workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(workspace * 2**30))
    if precision == "fp32" and hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, ten bits of mantissa: not what fp32 says
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, name in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)
    if timing_cache is not None:
        _read_cache(log, config, timing_cache)


def _allow(trt: Any, config: Any, network: Any, precision: str) -> None:
    """8.6: allow half precision, but hold what the ONNX file computes in float32, the decoding of boxes, to it."""
    flags = precision_flags(trt, precision)
    for flag in flags:
        config.set_flag(flag)
    if flags and precision == "fp16":
        for layer in map(network.get_layer, range(network.num_layers)):
            if {layer.get_output(i).dtype for i in range(layer.num_outputs)} == {trt.float32}:
                layer.precision = trt.float32


def _read_cache(log: Any, config: Any, path: Path) -> None:
    """Raises UserError for a file that another TensorRT or GPU wrote: it would be overwritten at the end."""
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        said = readable(log.errors[0]) if log.errors else "it does not fit"
        raise UserError(f"timing_cache={path} is of another TensorRT or GPU ({said}); name another file.")


def _add_profile(builder: Any, config: Any, inputs: Mapping[str, Shape], profile: Profile) -> None:
    dynamic = [name for name, shape in inputs.items() if -1 in shape]
    if not dynamic:
        return
    shapes = builder.create_optimization_profile()
    for name in dynamic:
        shapes.set_shape(name, *profile[name])
    config.add_optimization_profile(shapes)


def own_capability(trt: Any) -> str:
    """Generation of the GPU that `tensorrt` builds on and for, as "sm90". Raises UserError where there is none."""
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"{trt.__name__} builds on the GPU that shall run the engine, and this machine has none: build there, or "
            f"use flavour={RTX} ({INSTALL[RTX]}), which builds without a GPU."
        )
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"
