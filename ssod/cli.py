"""`ssod MODE key=value ...`: parse, check, run, and say in one sentence what went wrong.

Exit codes: 0 done, 2 the user's mistake, 1 a fault of the program or the machine (of the data, for `ssod check`),
143 / 130 asked to stop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ssod import __version__
from ssod.errors import Fault, UserError, did_you_mean

SUMMARY = {
    "train": "train a student on labelled and unlabelled images",
    "val": "COCO (and Pascal VOC) metrics of a checkpoint on a split",
    "predict": "detect objects on images and videos",
    "export": "write a checkpoint as ONNX, TensorRT engine, TorchScript or OpenVINO, compared with it before it counts",
    "benchmark": "size, AP and speed of a model in each of its formats, on this machine",
    "label": "pseudo labels of a checkpoint for any number of images, as COCO, YOLO or VOC",
    "check": "look over a data set before training, or measure a model",
    "split": "divide a training set into labelled and unlabelled parts, or erase boxes: COCO JSON files",
    "zoo": "list the trained weights that come with the package, verify one, or pack one's own",
    "report": "a page about a run, or about several side by side: one HTML file that needs nothing else",
    "cfg": "list the configs that come with the package, or print one complete: ssod cfg cfg=demo.yaml",
    "help": "this text, or the arguments of a mode: ssod help train",
    "version": "print the version",
}
TRAINING = (
    "torch",
    "torchvision",
    "timm",
    "pycocotools",
    "matplotlib",
    "scipy",
    "tqdm",
    "jinja2",
)  # absent where one only runs models
USAGE = """ssod MODE key=value ...

Modes
{modes}

Examples
  ssod train cfg=demo.yaml
  ssod train data=my.yaml labeled=10% strategy=mean_teacher epochs=100
  ssod train model=runs/train/exp/weights/best.pt data=other.yaml
  ssod val model=runs/train/exp/weights/best.pt data=my.yaml
  ssod predict model=runs/train/exp/weights/best.pt source=photos/
  ssod export model=runs/train/exp/weights/best.pt format=onnx data=my.yaml
  ssod benchmark model=runs/train/exp/weights/best.pt formats=[onnx,onnx-int8] data=my.yaml
  ssod split data=my.yaml out=splits percent=10 folds=5
  ssod label model=runs/train/exp/weights/best.pt source=photos/ out=labels format=coco
  ssod report runs/train/exp baseline=runs/train/control
  ssod check model=faster_rcnn backbone=resnet50 imgsz=640
  ssod zoo

Arguments are key=value in any order (--key value works too); sections by dots: strategy.tau=0.6.
Defaults < cfg=FILE.yaml < command line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `ssod` and `python -m ssod`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = any(w in ("--verbose", "verbose=true", "verbose=True") for w in words)
    try:
        return _run(words)
    except UserError as error:
        if verbose:
            raise
        print(f"{_who()}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ssod: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  nothing is left to be flushed into the pipe at exit
        return 0
    except ModuleNotFoundError as error:
        if verbose or error.name not in TRAINING:
            raise
        print(
            f"ssod: this needs {error.name}, which is not installed here; install ssod with its dependencies. Without "
            "them `ssod predict model=NAME.onnx` runs, and no more.",
            file=sys.stderr,
        )
        return 2
    except (Fault, OSError) as error:
        if verbose:
            raise
        print(f"{_who()}: {error}", file=sys.stderr)
        return 1


def _who() -> str:
    """Who says a sentence: of several processes, which."""
    rank = os.environ.get("RANK", "0")
    return "ssod" if rank == "0" else f"ssod, rank {rank}"


def _run(words: list[str]) -> int:
    mode, rest = _mode(words)
    if mode == "help":
        print(help_text(rest[0] if rest else None))
        return 0
    if mode == "version":
        print(__version__)
        return 0
    from ssod.config import load_config, parse_words

    overrides = {"zoo": _zoo_words, "report": report_words}.get(mode, parse_words)(rest)
    if mode == "train" and "model" in overrides:  # trained onward: detector, backbone, image size and weights are its
        from ssod.api import SSOD

        overrides = SSOD(str(overrides.pop("model"))).train_options(overrides)
    if mode == "cfg":
        return _cfg(overrides)
    run = {
        "train": _train,
        "val": _val,
        "predict": _predict,
        "export": _export,
        "benchmark": _benchmark,
        "label": _label,
        "check": _check,
        "split": _split,
        "zoo": _zoo,
        "report": _report,
    }[mode]
    config = load_config(mode, overrides)
    if mode in ("train", "label"):
        from ssod.engine.launch import devices_of, launch, launched

        if len(devices := devices_of(config.device)) > 1 and not launched():
            return launch(mode, rest, devices, getattr(config, "restarts", 0))
    return run(config)


def _mode(words: list[str]) -> tuple[str, list[str]]:
    if not words or words[0] in ("-h", "--help"):
        return "help", []
    if words[0] in ("-V", "--version"):
        return "version", []
    for i, word in enumerate(words):
        if word in SUMMARY:
            rest = words[:i] + words[i + 1 :]
            if any(w in ("-h", "--help") for w in rest):
                return "help", [word]
            return word, rest
    first = next((w for w in words if "=" not in w and not w.startswith("-")), None)
    if first is None:
        raise UserError(f"which mode? Start with one of {', '.join(SUMMARY)}, such as `ssod train {words[0]}`.")
    raise UserError(f"'{first}' is not a mode.{did_you_mean(first, SUMMARY)} Modes: {', '.join(SUMMARY)}.")


def help_text(mode: str | None = None) -> str:
    if mode is None or mode in ("cfg", "help", "version") or mode not in SUMMARY:
        if mode is not None and mode not in SUMMARY:
            raise UserError(f"'{mode}' is not a mode.{did_you_mean(mode, SUMMARY)} Modes: {', '.join(SUMMARY)}.")
        width = max(map(len, SUMMARY)) + 2
        return USAGE.format(modes="\n".join(f"  {m:<{width}}{s}" for m, s in SUMMARY.items()))
    from ssod.config import help_lines

    return f"ssod {mode} key=value ...: {SUMMARY[mode]}\n\n" + "\n".join(help_lines(mode))


def _cfg(overrides: dict[str, Any]) -> int:
    from ssod.config import cfg_folders, load_config, to_yaml

    if overrides:
        print(to_yaml(load_config("train", overrides)), end="")
        return 0
    for folder in cfg_folders()[:1]:
        for path in sorted([*folder.glob("*.yaml"), *folder.glob("data/*.yaml")]):
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"  {path.relative_to(folder)!s:<24}{first}")
    return 0


def _train(config: Any) -> int:
    from ssod.engine.signals import Stopped
    from ssod.engine.trainer import SemiTrainer

    trainer = SemiTrainer(config)
    try:
        summary = trainer.train()
    except Stopped as stop:
        print(
            f"ssod: stopped by {stop} after step {trainer.step}; saved. `ssod train resume={trainer.folder}` goes on."
        )
        return stop.code
    print(summary_text(summary))
    return 0


def summary_text(summary: dict[str, Any]) -> str:
    """What the last lines of a training run say: AP at the end of burn-in and at the end, and where everything is."""
    lines = [""]
    if summary["burn_in"]:
        lines.append(f"end of burn-in (supervised)  AP {summary['burn_in']['AP']:.4f}")
    for name, figures in summary["final"].items():
        lines.append(
            f"{'end, ' + name:<29}AP {figures['AP']:.4f}  AP50 {figures['AP50']:.4f}  AP75 {figures['AP75']:.4f}"
        )
    best = summary["best"]
    lines.append(f"{'best':<29}AP {best['AP']:.4f}  the {best['use']} at step {best['step']}: best.pt")
    control = summary.get("baseline")
    if control and control["gain"]["AP"] is not None:
        ap, gain = control["AP"]["AP"], control["gain"]["AP"]
        lines.append(f"{'supervised control, end':<29}AP {ap:.4f}  the {control['network']}; the gain is {gain:+.4f}")
    if summary["unreadable"]:
        lines.append(f"{len(summary['unreadable'])} images could not be read (metrics.json lists them)")
    folder = Path(summary["folder"])
    if (folder / "report.html").is_file():
        lines.append(f"report {folder / 'report.html'}: open it in a browser")
    lines.append(f"run folder {folder}: results.png (curves), predictions.png, results.csv, weights/best.pt")
    lines.append(f"next: ssod predict model={folder / 'weights' / 'best.pt'} source=FOLDER")
    return "\n".join(lines)


def _val(config: Any) -> int:
    from ssod.engine.validate import validate

    print(validate(config).text())
    return 0


def _predict(config: Any) -> int:
    from ssod.deploy.predictor import Predictor
    from ssod.engine.predict import Saving

    predictor = Predictor(
        config.model,
        weights=config.weights,
        device=config.device,
        imgsz=config.imgsz,
        classes=config.classes,
        batch=config.batch,
        workers=config.workers,
        tile=config.tile,
        overlap=config.overlap,
        **config.given_limits(),
    )
    what = {key: getattr(config, key) for key in ("save", "save_txt", "save_json")}
    saving = Saving(config.project, config.name, config.exist_ok, **what)
    code = 0
    with closing(saving.through(predictor.stream(config.source))) as results:
        try:
            for number, result in enumerate(results):
                if number < 20:
                    print(f"{result.path}: {result.verbose()}")
        except KeyboardInterrupt:  # how a webcam is ended
            if saving.folder is None:
                raise
            print("ssod: interrupted; what was found so far is kept.", file=sys.stderr)
            code = 130
    assert saving.saver is not None
    if saving.saver.images > 20:
        print(f"... and {saving.saver.images - 20} more images")
    for path, reason in predictor.unreadable:
        print(f"ssod: skipped {path}: {reason}", file=sys.stderr)
    print(saving.saver.summary())
    print(f"run folder {saving.folder}")
    return code


def _export(config: Any) -> int:
    from ssod.engine.export import export

    made = export(config)
    print(f"next: ssod predict model={made.path} source=FOLDER")
    return 0


def _benchmark(config: Any) -> int:
    from ssod.engine.benchmark import benchmark

    benchmark(config)
    return 0


def _check(config: Any) -> int:
    from ssod.data.check.doctor import check_data
    from ssod.data.check.doctor_text import as_json, page, passed
    from ssod.data.check.sheet import draw_samples, draw_views, read_views
    from ssod.engine.run import new_run
    from ssod.engine.setup import data_yaml

    if config.model is not None and config.as_json:
        raise UserError("json=true tells about data only; leave out model=, or json=true.")
    if config.model is not None:
        from ssod.engine.profile import profile_model

        print(profile_model(config).text())
        if config.data is None:
            return 0
    views = read_views(config.augment, config.imgsz) if config.augment else None
    report = check_data(data_yaml(config.data), config.data_path, decode=config.decode)
    print(as_json(report, config.strict) if config.as_json else page(report))
    if config.samples and report.splits and not config.as_json:
        folder = new_run(config.project, "check", config.name, config.exist_ok)
        first = next(iter(report.splits.values())).dataset  # train, unless it cannot be used
        draw_samples(first, config.samples, folder / "samples.png", config.seed)
        if views is not None:
            draw_views(first, views, config.samples, folder / "views.png", config.seed)
        print(f"run folder {folder}: samples.png{', views.png' if views else ''}")
    return 0 if passed(report, config.strict) else 1


def _split(config: Any) -> int:
    from ssod.data.split.division import by_erasing, by_list, by_percent, read_source
    from ssod.data.split.split_files import check_out, write_splits
    from ssod.engine.setup import data_yaml

    check_out(Path(config.out))
    source = read_source(data_yaml(config.data), config.data_path, config.strict)
    percents = config.percent if isinstance(config.percent, list) else [config.percent]
    about = {"kind": "percent", "seed": config.seed}
    if config.sparse is not None:
        about["kind"] = "sparse"
        splits = by_erasing(source, config.sparse, config.folds, config.seed)
    elif config.canonical is not None:
        about = {"kind": "canonical", "list": Path(config.canonical).name}
        splits = by_list(source, Path(config.canonical), config.canonical_images, percents, config.folds)
    else:
        splits = by_percent(source, percents, config.folds, config.seed)
    print(source.train.summary())
    lines = write_splits(source, splits, Path(config.out), about)
    print("\n".join(lines))
    print(f"next: ssod train data={Path(config.out) / lines[0].split(':')[0] / 'data.yaml'}")
    return 0


def _label(config: Any) -> int:
    from ssod.deploy.label import label
    from ssod.engine.run import lock_run, unlock_run

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    lock_run(out)
    try:
        done = label(config)
    finally:
        unlock_run(out)
    if done is not None:
        print(done.text())
        print(f"next: ssod check data={done.data_yaml}")
    return 0


def _zoo_words(words: list[str]) -> dict[str, Any]:
    """`verify NAME` in front of the arguments is action=verify entry=NAME."""
    from ssod.config import parse_words

    bare = 0
    while bare < min(2, len(words)) and "=" not in words[bare] and not words[bare].startswith("-"):
        bare += 1
    return dict(zip(("action", "entry"), words[:bare], strict=False)) | parse_words(words[bare:])


def _zoo(config: Any) -> int:
    if config.action == "list":
        from ssod import zoo

        print(zoo.text(zoo.entries()))
        return 0
    from ssod.engine.zoo import pack, verify

    if config.action == "verify":
        verified = verify(config)
        print(verified.text())
        return 0 if verified.same else 1
    entry = pack(config)
    print(f"next: ssod predict model={Path(config.out) / 'weights' / (entry.file or '')} source=FOLDER")
    return 0


def report_words(words: list[str]) -> dict[str, Any]:
    """Words without a key are run folders, as a shell makes them of runs/train/*."""
    from ssod.config import parse_words

    bare = [w for w in words if "=" not in w and not w.startswith("-")]
    given = parse_words([w for w in words if w not in bare])
    return ({"run": bare[0] if len(bare) == 1 else bare} if bare else {}) | given


def _report(config: Any) -> int:
    from ssod.engine.report import report

    print(f"page {report(config)}: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
