"""Run a TensorRT engine on torch tensors: images in, detections out, nothing passes through the host.

Tensors are bound by name and the work is queued on torch's current stream, as `tensorrt` 8.6, 10, 11 and `tensorrt_rtx`
all do it. What is checked before a GPU is needed has been run; the rest has not, for want of one: the test that runs it
is marked `gpu`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssod.deploy.contract import OUTPUTS, ForeignModel
from ssod.deploy.engine_sidecar import Shape, Sidecar, check_shape, read_engine
from ssod.deploy.trt import INSTALL, TENSORRT, load_trt, log_of, readable, runs_on
from ssod.errors import Fault, UserError

_DTYPES = {
    "images": torch.float32,
    "sizes": torch.int32,
    "num_dets": torch.int32,
    "boxes": torch.float32,
    "scores": torch.float32,
    "labels": torch.int32,
}


class EngineModel:
    """An engine on one GPU. Not for several threads at once: all calls share one context and its memory.

    card     what the exported model is (see `contract.py`)
    sidecar  how it was built; sidecar.profile says which shapes it takes

    An engine of `tensorrt_rtx` compiles its kernels in the first call, which takes seconds.
    """

    def __init__(self, path: str | Path, device: torch.device | str = "cuda") -> None:
        """Raises UserError where files are missing or damaged, or this TensorRT or this GPU does not run the engine."""
        plan, self.sidecar = read_engine(Path(path))
        self.card = self.sidecar.card
        self._trt = installed_for(self.sidecar, path)
        self.device = cuda_device(device, path)
        self._refuse_other_gpu(path)
        log = log_of(self._trt)
        log.start(verbose=False)
        with torch.cuda.device(self.device):
            self._runtime = self._trt.Runtime(log)  # must outlive the engine
            self._engine = self._runtime.deserialize_cuda_engine(plan)
            self._context: Any = self._engine and self._engine.create_execution_context()
        if self._context is None:
            said = readable(log.errors[0]) if log.errors else "it gave no reason"
            raise UserError(f"{path}: {self._trt.__name__} cannot load the engine ({said}). Build it on this machine.")
        self._refuse_foreign(path)
        self._shape: Shape = ()
        self._output_shapes: dict[str, Shape] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, images: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """num_dets int32 [B, 1], boxes float32 [B, D, 4] xyxy pixels, scores float32 [B, D], labels int32 [B, D].

        images  float32 [B, 3, H, W] on the engine's device, RGB 0 .. 1
        sizes   int32 [B, 2], valid (h, w) in pixels; for a detector whose card.inputs has it, else None
        Returns at once: results are there when work queued on torch's current stream is done, as with any torch
        operation. Raises UserError for tensors that the engine does not take.
        """
        inputs = self._inputs(images, sizes)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)  # the call before may still be using the context's memory
            self._stream = stream
            self._take_shapes(inputs)
            outputs = {
                name: torch.empty(self._output_shapes[name], dtype=_DTYPES[name], device=self.device)
                for name in OUTPUTS
            }
            for name, tensor in {**inputs, **outputs}.items():
                self._context.set_tensor_address(name, tensor.data_ptr())
            # Inputs made contiguous above may be freed when this returns: torch hands their memory out again to work
            # on the same stream only, which comes after.
            if not self._context.execute_async_v3(stream.cuda_stream):
                raise Fault(f"{self._trt.__name__} could not run the engine{self._reason()}.")
        return outputs["num_dets"], outputs["boxes"], outputs["scores"], outputs["labels"]

    def _inputs(self, images: Tensor, sizes: Tensor | None) -> dict[str, Tensor]:
        given = {"images": images} | ({} if sizes is None else {"sizes": sizes})
        if set(given) != set(self.card.inputs):
            raise UserError(
                f"The engine takes {' and '.join(self.card.inputs)}, and was given {' and '.join(given)}: `sizes`, "
                "the valid (h, w) of padded images, go to those detectors that ask for them, and to no other."
            )
        for name, tensor in given.items():
            if tensor.device != self.device or tensor.dtype != _DTYPES[name]:
                raise UserError(
                    f"{name} is {tensor.dtype} on {tensor.device}; the engine takes {_DTYPES[name]} on {self.device}."
                )
        check_shape(self.sidecar, tuple(images.shape))
        if sizes is not None and sizes.shape != (len(images), 2):
            raise UserError(f"sizes have the shape {list(sizes.shape)}; with these images it is [{len(images)}, 2].")
        return {name: tensor.contiguous() for name, tensor in given.items()}

    def _take_shapes(self, inputs: dict[str, Tensor]) -> None:
        """Tell the context of a new input shape, and ask for those of the outputs. Costs nothing for the same shape."""
        shape = tuple(inputs["images"].shape)
        if shape == self._shape:
            return
        self._shape = ()
        for name, tensor in inputs.items():
            if not self._context.set_input_shape(name, tuple(tensor.shape)):
                raise Fault(f"{self._trt.__name__} does not take {name} {list(tensor.shape)}{self._reason()}.")
        self._output_shapes = {name: tuple(self._context.get_tensor_shape(name)) for name in OUTPUTS}
        self._shape = shape

    def _reason(self) -> str:
        errors = log_of(self._trt).errors
        return f": {readable(errors[-1])}" if errors else ""

    def _refuse_other_gpu(self, path: str | Path) -> None:
        major, minor = torch.cuda.get_device_capability(self.device)
        own, built = f"sm{major}{minor}", self.sidecar.capabilities
        if not runs_on(self._trt, built, own):
            other = f", or with flavour={TENSORRT}: {INSTALL[TENSORRT]}" if self._trt.__name__ != TENSORRT else ""
            raise UserError(
                f"{path} was built for {', '.join(built) or 'RTX GPUs'}, and {torch.cuda.get_device_name(self.device)} "
                f"is {own}. Build the engine for this GPU{other}."
            )

    def _refuse_foreign(self, path: str | Path) -> None:
        """A plan whose tensors are not those of the contract would be given memory of the wrong size."""
        trt, engine = self._trt, self._engine
        types = {torch.float32: trt.float32, torch.int32: trt.int32}
        found = {n: engine.get_tensor_dtype(n) for n in map(engine.get_tensor_name, range(engine.num_io_tensors))}
        if found != {name: types[_DTYPES[name]] for name in (*self.card.inputs, *OUTPUTS)}:
            raise ForeignModel(f"{path} has the tensors {', '.join(found)}, which are not those of an export by ssod.")


def installed_for(sidecar: Sidecar, path: str | Path) -> Any:
    """The package that built an engine. Raises UserError where it is not installed, or in another version."""
    try:
        trt = load_trt(sidecar.flavour)
    except UserError as error:
        raise UserError(f"{path} was built by {sidecar.flavour} {sidecar.version}. {error}") from None
    if trt.__version__ != sidecar.version:
        raise UserError(
            f"{path} was built by {sidecar.flavour} {sidecar.version}, and {trt.__version__} is installed: an engine "
            f"runs in the version that built it. Build it again, or `pip install {package(sidecar)}`."
        )
    return trt


def package(sidecar: Sidecar) -> str:
    """What pip calls the package that built an engine: "tensorrt-rtx==1.7.1.116"."""
    return f"{sidecar.flavour.replace('_', '-')}=={sidecar.version}"


def cuda_device(device: torch.device | str, path: str | Path) -> torch.device:
    """A CUDA device with its number. Raises UserError on a machine without one, and for any other device."""
    device = torch.device(device)
    if not torch.cuda.is_available():
        raise UserError(f"{path}: an engine needs a CUDA device, and this machine has none. format=onnx runs on a CPU.")
    if device.type != "cuda":
        raise UserError(f"{path}: an engine runs on a CUDA device, not on {device.type}. Use device=0.")
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    if device.index >= torch.cuda.device_count():
        raise UserError(f"{path}: device={device}, and this machine has {torch.cuda.device_count()} CUDA devices.")
    return device
