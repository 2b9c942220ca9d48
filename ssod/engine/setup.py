"""From the config to what a run needs: data, student and strategy. Everything that can be refused is refused here,
before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ssod.config import find_yaml, validate
from ssod.data.annotations.listing import find_images
from ssod.data.annotations.shards import find_tars, read_tars
from ssod.data.annotations.sources import load_data, read_data_yaml
from ssod.data.image import ImageError, image_size
from ssod.data.samples import Dataset, Inspector, Sample, SampleTable
from ssod.data.shapes import shapes_yaml
from ssod.data.split.audited import choose_audited
from ssod.data.split.splits import choose_labeled
from ssod.detectors import build_detector, detector_class
from ssod.detectors.base import Detector
from ssod.detectors.convert import WeightsReport, load_weights, read_weights
from ssod.detectors.fetch import SCHEME
from ssod.errors import UserError
from ssod.modes import TrainConfig
from ssod.nn.backbone_weights import LoadReport
from ssod.strategies import build_strategy, strategy_class
from ssod.strategies.base import Plan, Strategy
from ssod.zoo.fetch import resolve

Report = WeightsReport | LoadReport


@dataclass
class TrainData:
    """labeled, unlabeled: what the two streams draw from; val: what validation looks at; notes: lines for the user;
    audit: images of the unlabelled ones with their true boxes, for ssod.engine.watch.audit alone."""

    labeled: Sequence[Sample]
    unlabeled: Sequence[Sample]
    val: Sequence[Sample]
    names: list[str]
    notes: list[str]
    audit: Sequence[Sample] = ()


def data_yaml(name: str | None) -> Path:
    """The data YAML a `data=` argument means: a path, one of the package's own, or `shapes`, the drawn demo set."""
    if name is None:
        raise UserError("there is no data: give data=DATA.yaml, or data=shapes for the drawn demo set.")
    return shapes_yaml() if name == "shapes" else find_yaml(name, data=True)


def load_split(data: str | None, split: str, data_path: str | None, strict: bool) -> Dataset:
    return load_data(data_yaml(data), split, data_path, strict)


def build_data(config: TrainConfig) -> TrainData:
    """Read train and val, choose the labelled part, and gather unlabelled images.

    Raises UserError for anything missing or empty: no data, no labelled image, no unlabelled image, no val.
    """
    uses_unlabeled = strategy_class(config.strategy.name).uses_unlabeled and config.unlabeled_per_step > 0
    train = load_split(config.data, "train", config.data_path, config.strict)
    val = load_split(config.data, "val", config.data_path, config.strict)
    if train.names != val.names:
        raise UserError(f"train and val name other classes: {train.names} and {val.names}. Name them in the data YAML.")
    chosen, rest = choose_labeled(train.samples, config.labeled, config.seed, len(train.names))
    audited = choose_audited(train.samples.select(chosen), config.audit, config.seed, len(train.names))
    hidden = {chosen[i] for i in audited}
    labeled = train.samples.select([i for i in chosen if i not in hidden])
    audit = train.samples.select(sorted(hidden))
    unlabeled: Sequence[Sample] = []
    notes = [train.summary(), val.summary()]
    if uses_unlabeled:
        unlabeled = _unlabeled(config, train.samples.select(sorted([*rest, *hidden])), audit, notes)
    used = max(1, round(len(val.samples) * config.val_fraction))
    boxes = len(labeled.objects()[0])
    partly = int((~labeled.complete).sum())
    said = f", {partly} of them partly," if partly else ""
    notes.append(
        f"{len(labeled)} labelled images{said} with {boxes} boxes, {len(unlabeled)} unlabelled, {used} for validation"
    )
    if hidden:
        count = len(audit.objects()[0])
        notes.append(f"audit: {len(hidden)} of the labelled images, with {count} boxes, are hidden: unlabelled now")
    if partly and not strategy_class(config.strategy.name).mines:
        notes.append(
            f"WARNING: strategy={config.strategy.name} learns as background what is not annotated in the {partly} "
            "partly labelled images; strategy=comining looks for it."
        )
    if strategy_class(config.strategy.name).mines and not partly and not unlabeled:
        notes.append(
            f"WARNING: strategy={config.strategy.name} finds no partly labelled and no unlabelled image to look for "
            "objects in; images of which only some objects are annotated belong under 'partial' in the data YAML."
        )
    return TrainData(labeled, unlabeled, val.samples[:used], train.names, notes, audit)


def _unlabeled(config: TrainConfig, rest: SampleTable, audit: SampleTable, notes: list[str]) -> SampleTable:
    """Images without their annotations: whatever lies beside them is never looked at. `audit` is among them in any
    case but unlabeled=none."""
    out = rest.without_labels()
    if config.unlabeled == "none":
        out = out[:0]
    elif config.unlabeled == "auto":
        if "unlabeled" in read_data_yaml(data_yaml(config.data), config.data_path).splits:
            more = load_split(config.data, "unlabeled", config.data_path, config.strict)
            out = SampleTable.join([out, more.samples])
            notes.append(more.summary())
    elif config.unlabeled != "rest":
        tars = find_tars(Path(config.unlabeled).expanduser())
        inspector = Inspector(config.strict)
        out = read_tars(tars, inspector) if tars else SampleTable.of(_folder(config.unlabeled))
        notes += [str(problem) for problem in inspector.problems]
        out = SampleTable.join([SampleTable.of(out), audit.without_labels()]) if audit and out else out
        if tars and not out:
            first = f" The first problem: {inspector.problems[0]}." if inspector.problems else ""
            raise UserError(f"unlabeled={config.unlabeled}: no usable image in {len(tars)} tars.{first}")
    if not out and strategy_class(config.strategy.name).needs_unlabeled:
        raise UserError(
            f"strategy={config.strategy.name} finds no unlabelled image (labeled={config.labeled}, "
            f"unlabeled={config.unlabeled}). Label fewer, such as labeled=10%, give unlabeled=FOLDER, "
            "or train with strategy=supervised."
        )
    return out


def _folder(folder: str) -> list[Sample]:
    out: list[Sample] = []
    for path in find_images(folder):
        try:
            width, height = image_size(path)
        except ImageError:  # said again, with its reason, by the loader when it is drawn
            width = height = 0
        out.append(Sample.unlabeled(path, len(out) + 1, width, height))
    return out


def plan_run(config: TrainConfig, data: TrainData) -> Plan:
    """Length of the run and of its supervised start, in steps."""
    iters = config.iters
    if iters is None:
        per_step = config.batch * config.accumulate
        passes = -(-len(data.labeled) // per_step)
        if data.unlabeled:
            passes = max(passes, -(-len(data.unlabeled) // (config.unlabeled_per_step * config.accumulate)))
        iters = passes * (config.epochs or 100)
    burn_in = round(config.burn_in * iters) if config.burn_in < 1 else int(config.burn_in)
    if data.unlabeled and burn_in >= iters:
        raise UserError(
            f"burn_in={config.burn_in} leaves none of the {iters} steps for the unlabelled images. "
            "Lower burn_in or raise iters."
        )
    two_stages = strategy_class(config.strategy.name).two_stages
    if config.teacher_weights is not None:
        return Plan(iters - burn_in, 0, config.ema_decay, two_stages)
    if two_stages and burn_in == 0:
        raise UserError(
            f"strategy={config.strategy.name} needs a teacher: give burn_in=STEPS of its training on the labelled "
            "images, or teacher_weights=FILE."
        )
    return Plan(iters, min(burn_in, iters), config.ema_decay, two_stages)


def check_options(config: TrainConfig) -> None:
    """Refuse unknown strategies, detectors and options before any data is read."""
    strategy = strategy_class(config.strategy.name)
    validate(strategy.Options, config.strategy.options, "strategy.")
    if config.baseline == "auto" and not strategy.uses_unlabeled:
        raise UserError(
            f"strategy={config.strategy.name} is itself the control that baseline=auto would train; leave out baseline."
        )
    if config.teacher_weights is not None and not strategy.two_stages:
        raise UserError(
            f"strategy={config.strategy.name} trains no teacher beforehand, so teacher_weights has no place; "
            "start the student from that file with weights=FILE."
        )
    validate(detector_class(config.detector.name).Options, config.detector.options, "detector.")


def build_student(config: TrainConfig, names: list[str]) -> tuple[Detector, Report | str]:
    """The detector with its starting weights, and what is to be said of them."""
    source = _teacher_files(config)[0] if config.teacher_weights else config.weights
    found = None if source is None else read_weights(_file(source))
    frozen = config.frozen_norm
    if frozen is None:
        frozen = found is not None and found.frozen_norm
    student = build_detector(
        config.detector.name,
        len(names),
        config.backbone,
        config.detector.options,
        frozen_norm=frozen,
        freeze=config.freeze,
        caffe_stride=config.caffe_stride,
    )
    if found is None:
        return student, f"{config.detector.name} on {config.backbone}, random weights"
    return student, load_weights(student, found, names)


def build(config: TrainConfig, data: TrainData) -> tuple[Strategy, Report | str]:
    student, note = build_student(config, data.names)
    strategy = build_strategy(config.strategy.name, student, config.strategy.options, plan_run(config, data))
    if config.teacher_weights is not None:
        note = load_teachers(strategy, _teacher_files(config), data.names)
    return strategy, note


def load_teachers(strategy: Strategy, files: Sequence[str], names: list[str]) -> str:
    """Make each student and its teacher equal to the detector of a file; a sentence about them.

    Raises UserError unless there is a file for each pair, of whole detectors that know all classes.
    """
    pairs, notes = strategy.pairs(), []
    if len(files) != len(pairs):
        raise UserError(f"teacher_weights names {len(files)} files for {len(pairs)} teachers; give one for each.")
    for file, (student, teacher) in zip(files, pairs, strict=True):
        report = load_weights(student, read_weights(_file(file)), names)
        if not isinstance(report, WeightsReport) or len(report.classes.pairs) < len(names):
            raise UserError(
                f"teacher_weights={file} is no finished teacher ({report}): give a detector trained on these classes, "
                "or leave it out to train the teacher first."
            )
        teacher.load_state_dict(student.state_dict())
        notes.append(str(report))
    return "teacher: " + "; ".join(notes)


def _file(source: str) -> str:
    """What `read_weights` takes: of a zoo name its file, of torchvision://NAME itself."""
    return source if source.startswith(SCHEME) else str(resolve(source))


def _teacher_files(config: TrainConfig) -> list[str]:
    files = config.teacher_weights or []
    return [files] if isinstance(files, str) else files
