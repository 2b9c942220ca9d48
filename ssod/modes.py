"""What each mode takes: names, types, ranges, defaults and one line of help for every argument.

As ssod.config, which reads YAMLs and words into these, this imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PrivateAttr, model_validator

from ssod.errors import did_you_mean
from ssod.sections import Augment, Component, Data, ImageSize, Inference, RunFolder, Section

FORMATS = ("onnx", "engine", "torchscript", "openvino")


def _known_format(value: str) -> str:
    if value not in FORMATS:
        raise ValueError(f"format={value} is not one of {', '.join(FORMATS)}.{did_you_mean(value, FORMATS)}")
    return value


TIMED = tuple(f"{f}{p}" for f in FORMATS for p in ("", "-fp16", "-int8") if f != "torchscript" or not p)


def _known_timed(value: list[str]) -> list[str]:
    for one in value:
        if one not in TIMED:
            raise ValueError(f"formats: {one} is not one of {', '.join(TIMED)}.{did_you_mean(one, TIMED)}")
    return value


def _input_size(value: int | list[int] | None) -> int | list[int] | None:
    sides = [value] if isinstance(value, int) else value
    if sides is None:
        return None
    if len(sides) not in (1, 2) or min(sides) < 32:
        raise ValueError(f"imgsz={value}: give one side of at least 32 pixels, or [height, width]")
    if any(side % 32 for side in sides):
        near = [max(1, round(side / 32)) * 32 for side in sides]
        shown = near[0] if isinstance(value, int) else str(near).replace(" ", "")
        raise ValueError(f"imgsz={value}: sides are multiples of 32, the largest stride; imgsz={shown} is near")
    return value


class TrainConfig(RunFolder, Inference, Data):
    """`ssod train`"""

    detector: Component = Field(
        Component(name="fcos"), description="fcos, retinanet, faster_rcnn or deformable_detr, and its options"
    )
    strategy: Component = Field(
        Component(name="mean_teacher"),
        description="supervised, mean_teacher, unbiased_teacher, soft_teacher, rpl, prc, sed, lsm or comining, "
        "and its options",
    )
    backbone: str = Field(
        "resnet50", description="any timm backbone with feature maps up to stride 32, or a plain ViT of patch 16"
    )
    caffe_stride: bool = Field(
        False, description="caffe-style ResNet: a stage's stride sits in the 1x1 convolution of its first bottleneck"
    )
    weights: str | None = Field(
        None,
        description="weights to start from: a checkpoint of ssod, torchvision or transformers, a backbone's own, "
        "or torchvision://NAME",
    )
    teacher_weights: str | list[str] | None = Field(
        None,
        description="a finished teacher for a strategy of two stages, such as rpl: its burn_in steps fall away",
    )
    frozen_norm: bool | None = Field(
        None,
        description="keep the backbone's batch norm fixed; default: as in an ssod checkpoint, true with other weights, "
        "false without",
    )
    freeze: int = Field(0, ge=0, description="freeze the backbone's stem and this many of its stages; 0 = train all")

    labeled: str | int = Field(
        "all",
        description="labelled part of train: all, 10%, a count, a file of image names, a COCO JSON, a split's folder",
    )
    unlabeled: str = Field(
        "auto",
        description="auto (rest of train, the YAML's `unlabeled`), rest, none; a folder, list, glob or tars of images",
    )
    audit: str | int = Field(
        "none", description="labelled images to hide, 5% or a count: how right are the pseudo labels on them?"
    )
    augment: Augment = Field(Augment(), description="views of the images; a paper's name sets all three")
    augment_on: Literal["worker", "device"] = Field("worker", description="where the strong view's pixel work runs")
    cache: bool | Literal["ram", "disk"] = Field(
        False, description="keep decoded, resized images: ram (true), or disk, where later runs find them"
    )
    strict: bool = Field(
        False, description="stop at the first flaw of the data, and at the first error in docs/diagnosis.md"
    )
    max_bad: float = Field(0.05, ge=0, le=1, description="stop when more than this share of images cannot be read")

    iters: int | None = Field(None, ge=1, description="training steps (one of iters, epochs)")
    epochs: int | None = Field(
        None, ge=1, description="passes over the larger set, labelled or unlabelled; 100 where iters is not given"
    )
    batch: int = Field(8, ge=1, description="labelled images of a step, over all devices")
    nominal_batch: int | None = Field(
        None,
        ge=1,
        description="batch that a recipe's numbers are for; another batch rescales lr0, iters, ema_decay, ...",
    )
    batch_unlabeled: int | None = Field(None, ge=0, description="unlabelled images of a step; default: as batch")
    accumulate: int = Field(1, ge=1, description="batches whose gradients make one step")
    burn_in: int | float = Field(0.25, ge=0, description="supervised steps before the teacher starts; < 1 is a share")
    ema_decay: float = Field(0.9996, gt=0, lt=1, description="decay of the teacher's moving average, per step")

    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="sgd or adamw")
    lr0: float = Field(0.01, gt=0, description="learning rate after warm-up")
    lr_backbone: float = Field(1.0, ge=0, description="learning rate of the backbone, as a share of lr0; DETR: 0.1")
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum or Adam's beta1")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of matrices and kernels (not norms, biases)")
    schedule: Literal["constant", "multistep", "cosine"] = Field("constant", description="learning rate over the run")
    milestones: list[float] = Field([0.67, 0.89], description="multistep: shares of the run at which lr drops tenfold")
    warmup_iters: int = Field(500, ge=0, description="steps of linear warm-up (at most a tenth of the run)")
    clip_grad: float = Field(10.0, ge=0, description="largest gradient norm; 0 = off")
    amp: bool | Literal["auto", "bf16", "fp16"] = Field(
        "auto", description="mixed precision; auto: bf16 where the device is faster with it"
    )
    compile: bool | Literal["graphs"] = Field(
        False,
        description="backbone, neck and head through torch.compile, minutes at the start; graphs: the teacher's as "
        "CUDA graphs, too",
    )

    val_interval: int = Field(0, ge=0, description="steps between validations; 0 = ten in the run")
    val_fraction: float = Field(1.0, gt=0, le=1, description="share of the val images used while training")
    baseline: Literal["none", "auto"] = Field(
        "none", description="auto: then train the matched supervised control, too, and say what was gained over it"
    )
    eval_on: Literal["both", "student", "teacher"] = Field("both", description="which network validation looks at")
    patience: int = Field(0, ge=0, description="stop after this many validations without a better AP; 0 = off")
    save_period: int = Field(0, ge=0, description="also keep a checkpoint every so many steps; 0 = off")
    save_interval: int = Field(500, ge=1, description="steps between writes of last.pt")
    plots: bool = Field(True, description="draw curves and predictions into the run folder")
    film: int = Field(
        16, ge=0, le=64, description="images whose pseudo labels are kept over the run, in `pseudo/`; 0 = none"
    )
    film_interval: int = Field(0, ge=0, description="steps between these moments; 0 = at every validation")
    seed: int = Field(0, ge=0, description="seed of the split, the weights and every draw")
    deterministic: bool = Field(True, description="prefer bit-equal results to the last bit of speed")
    restarts: int = Field(
        0, ge=0, description="device=0,1: how often a run that failed is started again, from its last checkpoint"
    )
    resume: bool | str = Field(
        False, description="true: the newest unfinished run of `name`; or a checkpoint or folder"
    )

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Lines about what another batch than the recipe's has changed."""
        return self._notes

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.iters is not None and self.epochs is not None:
            raise ValueError("'iters' and 'epochs' both set the length of the run; give one of them")
        if any(not 0 < m < 1 for m in self.milestones) or sorted(self.milestones) != self.milestones:
            raise ValueError("'milestones' are rising shares of the run between 0 and 1, such as [0.67, 0.89]")
        return self

    @property
    def unlabeled_per_step(self) -> int:
        return self.batch if self.batch_unlabeled is None else self.batch_unlabeled


class ValConfig(RunFolder, Inference, Data):
    """`ssod val`"""

    model: str = Field(description="checkpoint, such as runs/train/exp/weights/best.pt, or an exported file")
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="which network; auto: the better one")
    split: Literal["train", "val", "test"] = Field("val", description="split of the data YAML")
    imgsz: ImageSize | None = Field(  # type: ignore[assignment]
        None, description="long side, pixels, or [short, long]; default: as trained"
    )
    batch: int = Field(8, ge=1, description="images at once")
    metric: Literal["auto", "coco", "voc"] = Field(
        "auto", description="voc: Pascal VOC's AP50 beside the COCO figures; auto: where the data are Pascal VOC"
    )
    save_json: bool = Field(False, description="write detections.json in COCO results format")


class PredictConfig(RunFolder, Inference):
    """`ssod predict`"""

    model: str = Field(description="checkpoint, such as runs/train/exp/weights/best.pt, or an exported file")
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="which network; auto: the better one")
    source: str | int | list[str | int] = Field(
        description="image, folder, list of paths (.txt), glob, video, https URL of an image, or some of these; a "
        "number: that webcam"
    )
    imgsz: ImageSize | None = Field(  # type: ignore[assignment]
        None, description="long side, pixels, or [short, long]; default: as trained"
    )
    conf: float = Field(0.25, ge=0, le=1, description="lowest score of a detection")
    classes: list[int | str] | None = Field(None, description="keep only these classes (names or numbers)")
    batch: int = Field(8, ge=1, description="images at once")
    tile: int | None = Field(
        None, ge=32, description="look at larger images in tiles of this side, pixels; default: as a whole"
    )
    overlap: float = Field(0.2, ge=0, le=0.9, description="share of a tile that its neighbour also sees")
    save: bool = Field(True, description="write drawn images and videos")
    save_txt: bool = Field(False, description="write one YOLO text file an image (class x y w h score)")
    save_json: bool = Field(False, description="write predictions.json")


class CheckConfig(RunFolder, Data):
    """`ssod check`"""

    model: str | None = Field(
        None, description="what to measure: a checkpoint, a training YAML, or a detector's name; data may be left out"
    )
    backbone: str = Field("resnet50", description="backbone of a detector given by name")
    num_classes: int = Field(80, ge=1, description="classes of a model that is not a checkpoint")
    imgsz: ImageSize | None = Field(None, description="side of the measured images, pixels; default: the model's")
    batch: int = Field(2, ge=1, description="images of the measured step")
    device: str | int = Field("auto", description="auto, cpu, cuda, cuda:0 or 0")
    decode: bool = Field(True, description="decode every image (slower) instead of reading headers only")
    strict: bool = Field(False, description="exit code 1 for warnings, too")
    as_json: bool = Field(False, alias="json", description="print JSON for programs and nothing else, draw nothing")
    samples: int = Field(16, ge=0, description="images drawn with their boxes into samples.png of the run folder")
    augment: Augment | None = Field(None, description="views to draw into views.png, weak beside strong; as in train")
    seed: int = Field(0, ge=0, description="which images are drawn")


class SplitConfig(Data):
    """`ssod split`"""

    out: str = Field(description="new folder for the splits; see docs/splits.md for what it will hold")
    percent: float | list[float] = Field([1.0, 2.0, 5.0, 10.0], description="labelled shares of train, in percent")
    folds: int = Field(1, ge=1, description="splits of each share or kind; fold k (from 0) draws with seed + k")
    seed: int = Field(0, ge=0, description="seed of fold 0")
    canonical: str | None = Field(
        None, description="take the shares from a list of positions, such as COCO_supervision.txt, instead of drawing"
    )
    canonical_images: int = Field(117_266, ge=1, description="images with a box among which that list counts")
    sparse: Literal["easy", "hard", "extreme", "50miss"] | None = Field(
        None, description="keep all images and erase some of their boxes"
    )
    verbose: bool = Field(False, description="print the traceback of an error")

    @model_validator(mode="after")
    def _one_kind(self) -> SplitConfig:
        others = sorted({"percent", "canonical", "canonical_images"} & self.model_fields_set)
        if self.sparse is not None and others:
            raise ValueError(f"'sparse' keeps all images labelled; leave out {' and '.join(others)}")
        if self.canonical is not None and "seed" in self.model_fields_set:
            raise ValueError("'canonical' takes the images from a list and draws nothing; leave out seed")
        return self


class ExportConfig(Data):
    """`ssod export`"""

    model: str = Field(description="checkpoint, such as runs/train/exp/weights/best.pt")
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="which network; auto: the better one")
    format: Annotated[str, AfterValidator(_known_format)] = Field(
        "onnx", description="onnx, engine (TensorRT), torchscript or openvino"
    )
    out: str | None = Field(None, description="file to write; default: beside the checkpoint, named by what it is")
    imgsz: Annotated[int | list[int] | None, AfterValidator(_input_size)] = Field(
        None, description="input size, pixels: a side or [height, width], multiples of 32; default: as trained"
    )
    dynamic: bool = Field(False, description="input of any size instead of a fixed one; any batch in both cases")
    half: bool = Field(False, description="fp16 where it is safe; inputs, outputs and decoding stay fp32")
    int8: bool = Field(False, description="convolutions and hidden layers in int8, calibrated on the images of data=")
    calibration: int = Field(200, ge=1, description="int8: images, labelled and unlabelled, that set the ranges")
    target: Literal["auto", "onnx", "onnxruntime", "tensorrt"] = Field(
        "auto", description="operators of the graph: onnx for onnxruntime-gpu, tensorrt for trtexec on another machine"
    )
    opset: int = Field(18, ge=18, le=22, description="ONNX operator set")
    batch: int = Field(8, ge=1, description="engine: images at once, at most")
    workspace: float | None = Field(None, ge=2, description="engine: GiB that a layer may use; default: all there is")
    timing_cache: str | None = Field(None, description="engine: file that keeps measured times for the next build")
    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = Field("auto", description="engine: which package builds it")
    capabilities: list[str] = Field([], description="engine: GPUs that tensorrt_rtx builds for, such as [sm86, sm89]")
    conf: float = Field(0.05, ge=0, le=1, description="lowest score that the model keeps")
    iou: float = Field(0.6, ge=0, le=1, description="class-wise NMS threshold in the model")
    max_det: int = Field(100, ge=1, le=1000, description="detections of one image, at most")
    split: Literal["train", "val", "test"] = Field("val", description="split of data= for the AP")
    workers: int = Field(2, ge=0, description="loader processes; 0 loads in the main process")
    verbose: bool = Field(False, description="print the traceback of an error, and what TensorRT says")

    @model_validator(mode="after")
    def _consistent(self) -> ExportConfig:
        if self.half and self.int8:
            raise ValueError("'half' and 'int8' are two precisions; give one of them")
        if self.int8 and self.data is None:
            raise ValueError("int8=true is calibrated on images; give data=DATA.yaml, the one it was trained with")
        if self.format == "torchscript" and (self.half or self.int8 or self.dynamic):
            raise ValueError(
                "format=torchscript is float32 and of a fixed size; leave out half, int8 and dynamic, or choose "
                "format=onnx"
            )
        return self


class BenchmarkConfig(RunFolder, Inference, Data):
    """`ssod benchmark`"""

    model: str | list[str] = Field(
        description="checkpoint or exported model, or some: [best.pt,best.onnx]; the others are held against the first"
    )
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="which network; auto: the better one")
    formats: Annotated[list[str], AfterValidator(_known_timed)] = Field(
        [], description="export the checkpoint and measure these, too, such as [onnx,onnx-int8,openvino-fp16,engine]"
    )
    split: Literal["train", "val", "test"] = Field("val", description="split of data= for images and AP")
    imgsz: ImageSize | None = Field(  # type: ignore[assignment]
        None, description="long side, pixels, or [short, long]; default: as trained"
    )
    batches: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = Field(
        [1, 8], description="images at once; milliseconds are told of the first"
    )
    images: int = Field(64, ge=1, description="images that are timed, of data=, else drawn ones")
    warmup: int = Field(8, ge=0, description="images before those that are timed, at least a batch; 0 = none")
    workers: int = Field(0, ge=0, description="what reads images ahead; 0: the parts add up to the whole")

    @model_validator(mode="after")
    def _one_checkpoint(self) -> BenchmarkConfig:
        models = [self.model] if isinstance(self.model, str) else self.model
        if not models:
            raise ValueError("'model' is an empty list; give model=best.pt")
        if self.formats and sum(model.endswith(".pt") for model in models) != 1:
            raise ValueError("'formats' are exported from a checkpoint; give one .pt file in model=")
        return self


class LabelConfig(Inference):
    """`ssod label`"""

    model: str = Field(description="checkpoint, such as runs/train/exp/weights/best.pt, or an exported file")
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="which network; auto: the better one")
    source: str | list[str] = Field(
        description="folder, image, list (.txt), glob, DATA.yaml:unlabeled, or some of these"
    )
    out: str = Field(description="folder to write; started again with the same arguments, a run goes on")
    format: Literal["coco", "yolo", "voc"] = Field("coco", description="coco, yolo or voc; see docs/label.md")
    imgsz: ImageSize | None = Field(  # type: ignore[assignment]
        None, description="long side, pixels, or [short, long]; default: as trained"
    )
    conf: float | dict[str, float] = Field(  # type: ignore[assignment]
        0.5, description="lowest score of a label; by class: conf.NAME=0.6, and conf.default for the others"
    )
    scores: bool = Field(False, description="yolo: write the score behind each box (some programs refuse it)")
    batch: int = Field(8, ge=1, description="images at once")
    save_interval: int = Field(512, ge=1, description="images between saves: a killed run repeats at most these")
    verbose: bool = Field(False, description="print the traceback of an error")


class ZooConfig(RunFolder, Data):
    """`ssod zoo`; its first words are `action` and `entry`"""

    action: Literal["list", "verify", "pack"] = Field(
        "list", description="list; verify ENTRY: score it again; pack ENTRY: make one from model="
    )
    entry: str | None = Field(None, description="name in the zoo, such as bccd_fcos")
    device: str | int = Field("auto", description="auto, cpu, cuda, cuda:0 or 0")
    workers: int = Field(2, ge=0, description="loader processes; 0 loads in the main process")
    batch: int = Field(8, ge=1, description="images at once")
    model: str | None = Field(None, description="pack: checkpoint, such as runs/train/exp/weights/best.pt")
    weights: Literal["auto", "student", "teacher"] = Field("auto", description="pack: which network; auto: the better")
    out: str = Field("zoo", description="pack: folder of entries.json and weights/; made where it is missing")
    trained_by: str | None = Field(None, description="pack: how it was trained, such as mean_teacher")
    labels: str | None = Field(None, description='pack: labels it was trained with, such as "77 of 765 images (10%)"')
    supervised_ap: float | None = Field(
        None, ge=0, le=1, description="pack: AP 0..1 of the same network trained on those labels alone"
    )
    weights_licence: str = Field("Apache-2.0", description="pack: licence of the weights")
    data_licence: str | None = Field(None, description="pack: licence of the data")
    command: str | None = Field(None, description="pack: the command that trained it, whole")
    commit: str | None = Field(None, description="pack: the commit of ssod that trained it")

    @model_validator(mode="after")
    def _all_there(self) -> ZooConfig:
        packed = ("model", "trained_by", "labels", "data_licence", "command", "commit", "data")
        needed = {"list": (), "verify": ("entry",), "pack": ("entry", *packed)}[self.action]
        for key in needed:
            if getattr(self, key) is None:
                shown = "a name behind it" if key == "entry" else f"{key}="
                raise ValueError(f"`ssod zoo {self.action}` needs {shown}: {type(self).model_fields[key].description}")
        return self


class ReportConfig(Section):
    """`ssod report`; words without a key are `run`"""

    run: str | list[str] = Field(
        description="folder of a training run, such as runs/train/exp; several, or a folder of runs: a comparison"
    )
    baseline: str | None = Field(None, description="folder of the run that one run is held against")
    data_path: str | None = Field(None, description="folder of the data, where it is no longer where it was")
    out: str | None = Field(None, description="file to write; default: report.html in the run, comparison.html above")
    device: str | int = Field("auto", description="auto, cpu, cuda, cuda:0 or 0: where best.pt looks at the val images")
    workers: int = Field(2, ge=0, description="loader processes; 0 loads in the main process")
    batch: int = Field(8, ge=1, description="images at once")
    verbose: bool = Field(False, description="print the traceback of an error")


MODES: dict[str, type[Section]] = {
    "train": TrainConfig,
    "val": ValConfig,
    "predict": PredictConfig,
    "check": CheckConfig,
    "label": LabelConfig,
    "split": SplitConfig,
    "export": ExportConfig,
    "benchmark": BenchmarkConfig,
    "zoo": ZooConfig,
    "report": ReportConfig,
}
