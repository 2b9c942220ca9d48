"""`SSOD`: one object for a model of any format, with a method for each mode of the command line.

Needs torch only where the model does, so whatever brings torch or the configs is imported by the method that needs it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from ssod.data.sizes import Size
from ssod.deploy.array_model import ArrayModel
from ssod.deploy.contract import Card
from ssod.deploy.predictor import Predictor, left_out, listed, open_model
from ssod.deploy.results import Results
from ssod.deploy.sources import Source
from ssod.engine.given import from_scratch, options_of, plain
from ssod.engine.info import Info, info_of_card, info_of_detector
from ssod.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ssod.deploy.exported import Loaded
    from ssod.engine.benchmark import Report
    from ssod.engine.callbacks import State
    from ssod.engine.predict import Options, Saving
    from ssod.engine.validate import Validation

Functions = Mapping[str, "Callable[[State], object] | Sequence[Callable[[State], object]]"]


@dataclass(frozen=True)
class Trained:
    """What a training run left.

    folder   the run folder; its weights/best.pt is what the SSOD object holds now
    ap       COCO AP, 0 .. 1, of the best validation; use  "student" or "teacher": which network had it; step  when
    summary  all that metrics.json holds: AP at the end of burn-in, at the end, of each validation
    """

    folder: Path
    ap: float
    use: str
    step: int
    summary: dict[str, Any]


class SSOD:
    """A model: trained, exported, or still to be trained.

    model    a checkpoint (.pt) written by `ssod train`; what `ssod export` made of it: .onnx (runs without torch),
             .torchscript, .engine, or an OpenVINO folder; a name of the zoo (`ssod zoo` lists them); a training YAML
             ("coco10.yaml", your own) or the name of a detector ("fcos"), to train it from scratch
    weights  which network of a checkpoint: "auto" (the one that scored better), "student" or "teacher"
    device   "auto", "cpu", "cuda", "cuda:0" or 0; for .onnx also "tensorrt"

    path   the file of the model, None before it is trained
    names  {class number: class name}, empty before it is trained
    card   the description of an exported model, else None
    unreadable, saved  what the last `predict` could not read, and the run folder that it wrote

    Options of the methods are those of the command line (`ssod help train` lists them), with the same defaults and
    checks: `ssod train batch=4 strategy.tau=0.6` is `train(batch=4, strategy={"tau": 0.6})`. None means: not given.
    Raises UserError for a model that cannot be used and a device that cannot be had.
    """

    def __init__(self, model: str | Path, *, weights: str = "auto", device: str | int = "auto") -> None:
        self.path: Path | None = None
        self.names: dict[int, str] = {}
        self.card: Card | None = None
        self.weights, self.device = weights, device
        self._model: ArrayModel | Loaded | None = None
        self._callbacks: dict[str, list[Callable[[State], object]]] = {}
        self._predicted: tuple[Predictor, Saving] | None = None
        self._data: dict[str, Any] = {}  # what it was trained on here, which `val` takes where nothing else is said
        self._scratch = from_scratch(model)  # options of `ssod train`, of what has no weights yet
        if self._scratch is None:
            self._open(Path(model))

    def __repr__(self) -> str:
        if self._model is None:
            return f"SSOD({next(iter(self._scratch.values())) if self._scratch else None}: not trained)"
        return f"SSOD({self.path}: {len(self.names)} classes, on {self._model.device})"

    # -- training

    def train(
        self,
        data: str | Path | None = None,
        *,
        cfg: str | Path | None = None,
        strategy: str | Mapping[str, Any] | None = None,
        labeled: str | int | None = None,
        unlabeled: str | Path | None = None,
        epochs: int | None = None,
        iters: int | None = None,
        batch: int | None = None,
        imgsz: Size | None = None,
        device: str | int | None = None,
        workers: int | None = None,
        seed: int | None = None,
        project: str | Path | None = None,
        name: str | None = None,
        resume: bool | str | Path | None = None,
        callbacks: Functions | None = None,
        **overrides: Any,
    ) -> Trained:
        """Train on labelled and unlabelled images; afterwards this object is the best network of the run.

        data       data YAML, or "shapes", the drawn demo set
        cfg        training YAML beneath the options given here
        strategy   name, or {"name": ..., option: value}
        resume     True: the run that this checkpoint lies in, else the newest one of `name`; or a folder or checkpoint
        callbacks  {event: function or list of functions}, for this run; see `add_callback`
        overrides  any other option of `ssod train`: burn_in, lr0, ema_decay, detector={"fpn_channels": 128}, ...

        A checkpoint is trained onward: its detector with all options, its backbone, image size and weights are where
        the run starts, as far as they are not given here. All else is as `ssod train` does it.
        Raises UserError for anything that can be mended, before the first step where possible; Fault where the run or
        a callback fails; ssod.engine.signals.Stopped when asked to stop by a signal, with everything saved.
        """
        given = options_of(locals())
        from ssod.config import load_config
        from ssod.engine.callbacks import Callbacks
        from ssod.engine.trainer import SemiTrainer

        called = Callbacks(self._callbacks, callbacks or {})
        trainer = SemiTrainer(load_config("train", self.train_options(given)), called)
        summary = trainer.train()
        self._data = {"data": trainer.config.data, "data_path": trainer.config.data_path}
        self.weights, self._scratch = "auto", None
        self._open(trainer.folder / "weights" / "best.pt")
        best = summary["best"]
        return Trained(trainer.folder, best["AP"], best["use"], best["step"], summary)

    def add_callback(self, event: str, function: Callable[[State], object]) -> None:
        """Call `function(state)` at a place of every later training run, behind those added before.

        event  on_train_start, on_pseudo_labels, on_step_end, on_log, on_burn_in_end, on_val_end, on_save or
               on_train_end: ssod.engine.callbacks.EVENTS says when; State in the same file is what the function is told
        An exception in it ends the run with a Fault that names it. Raises UserError for another event.
        """
        from ssod.engine.callbacks import Callbacks

        Callbacks({event: function})
        self._callbacks.setdefault(event, []).append(function)

    def train_options(self, given: dict[str, Any]) -> dict[str, Any]:
        """Options of `ssod train` that start from this model: what it is, beneath what was given.

        Raises UserError for a model that cannot be trained.
        """
        from ssod.config import merge

        here: dict[str, Any] = {} if self.device == "auto" else {"device": self.device}
        if given.get("resume"):  # such a run knows its model
            mine = given["resume"] is True and self.path is not None and self.card is None
            return here | given | ({"resume": str(self.path)} if mine else {})
        if self._scratch is not None:
            if "cfg" in self._scratch and "cfg" in given:
                raise UserError(
                    f"the model is the YAML {self._scratch['cfg']} already, so cfg={given['cfg']} has no place. Leave "
                    "it out, or start from the name of a detector."
                )
            return merge(here | self._scratch, given)
        if self.card is not None:
            raise UserError(
                f"{self.path} is an exported model, which cannot be trained. Take the checkpoint it was made from."
            )
        content = self._content()
        if self.weights not in ("auto", content["use"]):
            raise UserError(
                f"training starts from the {content['use']} of {self.path}, which scored better, not from the "
                f"{self.weights}. Leave out weights={self.weights}, or save() that one to a file of its own first."
            )
        spec = content["spec"]
        here |= {"weights": str(self.path), "backbone": spec["backbone"], "imgsz": plain(content["imgsz"])}
        here |= {"detector": {"name": spec["name"], **plain(spec["options"])}}
        here |= {"caffe_stride": spec.get("caffe_stride", False)}
        return merge(here, given)

    # -- what a trained model does

    def val(
        self,
        data: str | Path | None = None,
        *,
        split: str | None = None,
        imgsz: Size | None = None,
        batch: int | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        metric: str | None = None,
        workers: int | None = None,
        project: str | Path | None = None,
        name: str | None = None,
        **overrides: Any,
    ) -> Validation:
        """Score the model on a split of the data; COCO's AP is `.ap`, all figures `.figures`, by class `.per_class`.

        data       data YAML; None after `train`: the data it was trained on
        overrides  any other option of `ssod val`: save_json, data_path, exist_ok, ...
        Raises UserError for data that cannot be used or of other classes.
        """
        given = options_of(locals())
        from ssod.config import load_config
        from ssod.engine.validate import validate

        known = {} if data is not None else self._data
        return validate(load_config("val", self._how() | known | given))

    @overload
    def predict(
        self, source: Source, *, stream: Literal[False] = False, **options: Unpack[Options]
    ) -> list[Results]: ...

    @overload
    def predict(self, source: Source, *, stream: Literal[True], **options: Unpack[Options]) -> Iterator[Results]: ...

    def predict(
        self,
        source: Source,
        *,
        stream: bool = False,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        imgsz: Size | None = None,
        classes: Sequence[int | str] | None = None,
        batch: int = 8,
        workers: int = 2,
        tile: int | None = None,
        overlap: float = 0.2,
        save: bool = False,
        save_txt: bool = False,
        save_json: bool = False,
        project: str | Path = "runs",
        name: str = "exp",
        exist_ok: bool = False,
        bgr: bool = False,
    ) -> list[Results] | Iterator[Results]:
        """Detect on files, folders, globs, URLs, videos, webcams, arrays, tensors, Pillow images, or a list of these;
        results in the order of the sources, without the images that cannot be read: see `unreadable`.

        stream  True: results one by one, however long the source is, instead of a list
        save    drawn images and videos into a run folder, see `saved`: the command line does so where it is not told
                otherwise, Python where it is told to; save_txt, save_json, project, name, exist_ok  as there
        bgr     arrays are BGR, as OpenCV reads them
        The other options are those of `Predictor`. Raises UserError as it does.
        """
        from ssod.engine.predict import Saving

        predictor = Predictor(
            self._ready(),
            conf=conf,
            iou=iou,
            max_det=max_det,
            imgsz=imgsz,
            classes=classes,
            batch=batch,
            workers=workers,
            tile=tile,
            overlap=overlap,
            bgr=bgr,
        )
        saving = Saving(project, name, exist_ok, save=save, save_txt=save_txt, save_json=save_json)
        self._predicted = predictor, saving
        results = predictor.stream(source)
        if save or save_txt or save_json:
            results = saving.through(results)
        return _told(predictor, results) if stream else listed(predictor, source, results)

    @property
    def unreadable(self) -> list[tuple[str, str]]:
        """(path, reason) of the images that the last `predict` left out; of a stream, as far as it has come."""
        return [] if self._predicted is None else self._predicted[0].unreadable

    @property
    def saved(self) -> Path | None:
        """The run folder that the last `predict` wrote, or None; of a stream, from its first result."""
        return None if self._predicted is None else self._predicted[1].folder

    def export(
        self,
        *,
        format: str | None = None,
        out: str | Path | None = None,
        imgsz: Size | None = None,
        dynamic: bool | None = None,
        half: bool | None = None,
        int8: bool | None = None,
        data: str | Path | None = None,
        batch: int | None = None,
        conf: float | None = None,
        iou: float | None = None,
        max_det: int | None = None,
        **overrides: Any,
    ) -> Path:
        """Write a checkpoint as ONNX, TensorRT engine, TorchScript or OpenVINO model, prove that it finds the same, and
        return its path, which `SSOD` opens.

        format     "onnx" (default), "engine", "torchscript" or "openvino"
        data       data YAML to calibrate int8 on and to compare AP on; without it boxes alone are compared
        overrides  any other option of `ssod export`: opset, workspace, target, calibration, ...
        Raises UserError for what cannot be exported, Fault for an export that finds other things.
        """
        given = options_of(locals())
        from ssod.config import load_config
        from ssod.engine.export import export

        how = self._how()
        return export(load_config("export", {"model": how["model"], "weights": how["weights"]} | given)).path

    def benchmark(
        self, *, formats: Sequence[str] | None = None, data: str | Path | None = None, **overrides: Any
    ) -> Report:
        """Size, AP and speed of the model on this machine, and of the formats it is exported to for that.

        formats    such as ["onnx", "onnx-int8", "engine"]
        data       data YAML for images and AP; without it drawn images are timed
        overrides  any other option of `ssod benchmark`: batches, images, warmup, imgsz, ...
        Raises UserError as `ssod benchmark` does.
        """
        given = options_of(locals())
        from ssod.config import load_config
        from ssod.engine.benchmark import benchmark

        return benchmark(load_config("benchmark", self._how() | given))

    def report(self, *, baseline: str | Path | None = None, out: str | Path | None = None, **overrides: Any) -> Path:
        """Write the page about the training run that this checkpoint lies in, and return its path (docs/report.md).

        baseline   folder of the run to hold it against; out  file to write; default: report.html in the run's folder
        overrides  any other option of `ssod report`: data_path, device, ...
        Raises UserError for a model that lies in no run folder.
        """
        given = options_of(locals())
        from ssod.config import load_config
        from ssod.engine.report import report, run_of

        self._ready()
        assert self.path is not None
        return report(load_config("report", {"run": str(run_of(self.path))} | given))

    def info(self, verbose: bool = True) -> Info:
        """What the model is: detector, classes, image size, layers, parameters, GFLOPs; printed unless verbose=False.

        Raises UserError before it is trained (`ssod check model=NAME` measures a detector by its name).
        """
        model = self._ready()
        if model.card is not None:
            told = info_of_card(model.card)
        else:
            from ssod.detectors.base import Detector

            assert not isinstance(model, ArrayModel)  # these and `Exported` have cards
            assert isinstance(model.detector, Detector)
            told = info_of_detector(model.detector, model.names, model.imgsz)
        if verbose:
            print(told.text())
        return told

    def save(self, path: str | Path) -> Path:
        """Write the network that this object runs, the student or the teacher, as a checkpoint of its own, without
        what only a resumed run needs. Returns the path.

        Raises UserError for a name without .pt, a folder that is not there, and an exported model.
        """
        from ssod.checkpoint import save_checkpoint

        path = Path(path)
        if path.suffix != ".pt":
            raise UserError(
                f"save({str(path)!r}): a checkpoint is named NAME.pt; other formats are written by export()."
            )
        if not path.parent.is_dir():
            raise UserError(f"save({str(path)!r}): the folder {path.parent} does not exist.")
        content = self._content()
        use = content["use"] if self.weights == "auto" else self.weights
        networks = {use: content["networks"][use]}
        kept = {k: v for k, v in content.items() if k != "train"}
        save_checkpoint(kept | {"use": use, "networks": networks}, path)
        return path

    # -- what it is made of

    def _open(self, path: Path) -> None:
        self._model = open_model(path, self.weights, self.device)
        self.path = self._model.path  # of a zoo name, the file that it stands for
        self.names = dict(enumerate(self._model.names))
        self.card = self._model.card

    def _ready(self) -> ArrayModel | Loaded:
        """Raises UserError where there are no weights yet."""
        if self._model is None:
            raise UserError(f"{self} yet: call train() first, or give a checkpoint (.pt) or an exported model.")
        return self._model

    def _how(self) -> dict[str, Any]:
        """The model as options of the command line."""
        self._ready()
        return {"model": str(self.path), "weights": self.weights, "device": self.device}

    def _content(self) -> dict[str, Any]:
        """The checkpoint. Raises UserError where it is none."""
        from ssod.checkpoint import load_checkpoint

        self._ready()
        assert self.path is not None
        if self.card is not None:
            raise UserError(f"{self.path} is an exported model and no checkpoint (.pt), which alone can be saved anew.")
        return load_checkpoint(self.path)


def _told(predictor: Predictor, results: Iterator[Results]) -> Iterator[Results]:
    yield from results
    if predictor.unreadable:
        warnings.warn(left_out(predictor.unreadable), UserWarning, stacklevel=2)
