"""TensorRT's two Python packages: which one is there, and what it can do. Neither torch nor a GPU is needed here.

`tensorrt` (8.6, 10, 11) builds and tunes an engine for the GPU of the machine that it is built on. `tensorrt_rtx`
builds without a GPU and compiles the kernels on the machine that runs the engine. Their interfaces differ by version,
so what a package can do is asked of it (`hasattr`) and no version number is read.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Sequence
from typing import Any

from ssod.errors import UserError, did_you_mean

TENSORRT = "tensorrt"
RTX = "tensorrt_rtx"
INSTALL = {TENSORRT: "pip install 'ssod[trt]'", RTX: "pip install 'ssod[rtx]'"}
WHICH = (
    f"`{INSTALL[TENSORRT]}` is for any NVIDIA GPU, data centre ones (H100, H200) among them, and builds on the GPU "
    f"that shall run the engine; `{INSTALL[RTX]}` is for RTX GPUs (Turing or later) and builds without a GPU"
)
FLAVOURS = ("auto", TENSORRT, RTX)
_TURING = "sm75"  # the one capability that an engine of tensorrt_rtx has only when it is named


def load_trt(flavour: str = "auto", capabilities: Sequence[str] = ()) -> Any:
    """The package `tensorrt` or `tensorrt_rtx`, imported.

    auto  `tensorrt` where it is installed, unless `capabilities`, which only `tensorrt_rtx` has, are asked for
    Raises UserError for a flavour that does not exist, or that is not installed or cannot be imported.
    """
    if flavour not in FLAVOURS:
        raise UserError(
            f"flavour={flavour} does not exist.{did_you_mean(flavour, FLAVOURS)} Use {', '.join(FLAVOURS)}."
        )
    installed = [name for name in INSTALL if importlib.util.find_spec(name) is not None]
    if flavour == "auto":
        if not installed:
            raise UserError(f"TensorRT is not installed: {WHICH}.")
        flavour = RTX if capabilities and RTX in installed else installed[0]
    if flavour not in installed:
        raise UserError(f"{flavour} is not installed: {WHICH}.")
    try:
        return importlib.import_module(flavour)
    except (ImportError, OSError) as error:
        raise UserError(
            f"{flavour} is installed, but cannot be imported ({_one_line(error)}). Install it anew: {INSTALL[flavour]}."
        ) from None


def network_flags(trt: Any) -> int:
    """Bits of `Builder.create_network`: explicit batch where it is a choice (8.6), strong typing where it exists.

    In a strongly typed network every tensor has the type that the ONNX file gives it. From 11 on there is nothing else.
    """
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def precision_flags(trt: Any, precision: str) -> list[Any]:
    """Builder flags that allow what the ONNX file is written in; none where types are strong.

    8.6 takes types as hints only. For fp16 it must also be held to the float32 of the decoding (see `engine.py`): box
    offsets in half precision are pixels off.
    """
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED") or not hasattr(trt.BuilderFlag, "FP16"):
        return []
    wanted = {"fp32": [], "fp16": ["FP16", "OBEY_PRECISION_CONSTRAINTS"], "int8": ["INT8"]}[precision]
    return [getattr(trt.BuilderFlag, name) for name in wanted]


def has_timing_cache(trt: Any) -> bool:
    """Whether a timing cache is of use: `tensorrt_rtx` has the functions, but measures nothing when it builds.

    There they do nothing, and ask for a GPU that a build does not need otherwise.
    """
    return not has_capabilities(trt)


def has_capabilities(trt: Any) -> bool:
    """Whether an engine is built for named GPU generations (`tensorrt_rtx`) or for the GPU at hand (`tensorrt`)."""
    return hasattr(trt.IBuilderConfig, "set_compute_capability")


def known_capabilities(trt: Any) -> list[str]:
    """GPU generations that `tensorrt_rtx` builds for, as "sm86"."""
    return [name.lower() for name in trt.ComputeCapability.__members__ if re.fullmatch(r"SM\d+", name)]


def check_capabilities(trt: Any, wanted: Sequence[str]) -> list[str]:
    """`wanted` in small letters, each once. Raises UserError for those that this package does not build for."""
    names = list(dict.fromkeys(name.lower() for name in wanted))
    if not has_capabilities(trt):
        if names:
            raise UserError(
                f"capabilities={','.join(names)}: {trt.__name__} builds for the GPU of this machine alone; leave "
                f"capabilities out, or use flavour={RTX}."
            )
        return []
    known = known_capabilities(trt)
    for name in names:
        if name not in known:
            raise UserError(
                f"capabilities: {trt.__name__} does not build for {name}; it knows {', '.join(known)}. Other GPUs, "
                f"such as H100 and H200 (sm90), need flavour={TENSORRT}: {INSTALL[TENSORRT]}."
            )
    return names


def runs_on(trt: Any, capabilities: Sequence[str], device: str) -> bool:
    """Whether an engine built for `capabilities` runs on a GPU of the generation `device` ("sm86").

    Built by `tensorrt_rtx` for none by name, it runs on all that the package knows but Turing.
    """
    if has_capabilities(trt) and not capabilities:
        return device in known_capabilities(trt) and device != _TURING
    return device in capabilities


@functools.cache
def log_of(trt: Any) -> Any:
    """The one logger of a package: TensorRT sends all messages of a process to the first that it was given.

    `errors` are the messages since `start(verbose)`; a verbose one prints everything but TensorRT's own debugging.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            super().__init__()
            self.start(verbose=False)

        def start(self, verbose: bool) -> None:
            self.errors: list[str] = []
            self.verbose = verbose

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            if self.verbose and severity <= trt.ILogger.INFO:
                print(f"{trt.__name__}: {message}", file=sys.stderr, flush=True)

    return Log()


def readable(message: str) -> str:
    """A message of TensorRT without source files, line numbers and error codes."""
    text = re.sub(r"^\[?[\w.]+\.(?:cpp|h)[\w:.]*\]?:?\s*", "", " ".join(message.split()))
    text = re.sub(r"^(?:\w+::\w+: )?Error Code \d+: ([\w ]+?) ?\((.*)\)$", r"\1: \2", text)
    text = re.sub(r"^(?:Internal|API Usage) Error: ", "", text)
    text = re.sub(r"\s*\(?In \w+ at \S+", "", text)
    text = re.sub(r"^Assertion \S+ failed\. (?=\S)", "", text)
    text = re.sub(r"^Assertion failed: (?:[^:]|::)+: (?=\S)", "", text)
    text = re.sub(r'^[^"]*&& "(.*)"$', r"\1", text).strip(" .!")
    return "it is not supported" if text == "false" else text


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
