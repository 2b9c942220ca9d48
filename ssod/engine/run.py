"""The run folder: named, locked while in use, and complete enough to repeat the run."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import IO, Any

from ssod.config import validate
from ssod.errors import UserError
from ssod.modes import TrainConfig

_held: dict[Path, IO[str]] = {}  # run folders this process holds
LAUNCH = ".launch"  # in the run folder: the launch it belongs to, so that a restart by the launcher finds it


def new_run(project: str, mode: str, name: str, exist_ok: bool) -> Path:
    """Create and lock PROJECT/MODE/NAME, or NAME-2, NAME-3 ... where it exists and `exist_ok` is false."""
    base = Path(project) / mode / name
    folder, number = base, 1
    while folder.exists() and not exist_ok:
        number += 1
        folder = base.with_name(f"{base.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    lock_run(folder)
    if (launch := _launch()) is not None:
        (folder / LAUNCH).write_text(launch, encoding="utf-8")
    return folder


def lock_run(folder: Path) -> None:
    """Hold the run folder for this process; the system frees it when the process ends, however it ends.

    Of several processes of one run only the first holds it. Raises UserError when another run holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - held open on purpose
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        file.close()
        raise UserError(f"{folder} is in use by {owner}. Wait for it, or give this run another name=.") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    _held[folder.resolve()] = file


def _forget() -> None:
    """In a fork, such as a worker of the loader, which outlives a killed run by seconds and must not hold its place."""
    for file in _held.values():
        file.close()  # the lock stays with the process that took it
    _held.clear()


os.register_at_fork(after_in_child=_forget)


def unlock_run(folder: Path) -> None:
    """Let go of a run folder that this process holds."""
    if folder.resolve() in _held:
        _held.pop(folder.resolve()).close()


def resumed_run(config: TrainConfig) -> tuple[Path | None, dict[str, Any] | None, TrainConfig]:
    """(run folder or None, what to resume or None, config). A resumed run keeps its own config, but may be longer,
    and on another device. A run that the launcher has started again goes on from its checkpoint, where it has one."""
    from ssod.checkpoint import load_last_good, sweep  # brings torch, and predicting with an .onnx file needs none

    folder = _restarted_run(config)
    if folder is None and not config.resume:
        return None, None, config
    if folder is None:
        folder = _last_run(config.project, config.name) if config.resume is True else _resume_folder(str(config.resume))
    lock_run(folder)
    sweep(folder / "weights")
    content, said = load_last_good(folder / "weights")
    if said:
        print(f"{said} Resuming from previous.pt instead.", file=sys.stderr)
    values = dict(content["train"]["config"])
    given = config.model_fields_set
    for key in given & {"device", "workers", "plots", "verbose", "data_path", "patience", "restarts", "baseline"}:
        values[key] = getattr(config, key)
    if given & {"iters", "epochs"}:
        values |= {"iters": config.iters, "epochs": config.epochs}
    ignored = sorted(
        k
        for k in given - {"resume", "project", "name", "exist_ok"}
        if _plain(getattr(config, k)) != _plain(values.get(k))
    )
    if ignored:
        raise UserError(
            f"a resumed run keeps its own {', '.join(ignored)} ({folder / 'args.yaml'}). "
            "Leave these out, or start a new run with weights=."
        )
    return folder, content["train"], validate(TrainConfig, values, "")


def _plain(value: Any) -> Any:
    return value.model_dump() if hasattr(value, "model_dump") else value


def _launch() -> str | None:
    """What tells a launch by torchrun from others, over its restarts and on all its machines; None without it."""
    if (launch := os.environ.get("TORCHELASTIC_RUN_ID")) is None:
        return None
    return launch if launch != "none" else f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _restarted_run(config: TrainConfig) -> Path | None:
    """The folder, with a checkpoint, of the run that this is a restart of; None where it is none."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    marks = (Path(config.project) / "train").glob(f"{config.name}*/{LAUNCH}")
    found = [m.parent for m in marks if m.read_text(encoding="utf-8") == _launch()]
    return next((f for f in found if any((f / "weights").glob("*.pt"))), None)


def _last_run(project: str, name: str) -> Path:
    """The training run begun last, for `resume=True`: by its number, as clocks move.

    Raises UserError when there is none.
    """
    base = Path(project) / "train"
    folders = [p for p in base.glob(f"{name}*") if p.name == name or p.name.removeprefix(f"{name}-").isdigit()]
    found = [p for p in folders if any((p / "weights").glob("*.pt"))]
    if not found:
        raise UserError(f"resume=true finds no run {base / name} with a checkpoint. Give resume=PATH of its folder.")
    return max(found, key=lambda p: int(p.name.removeprefix(name).removeprefix("-") or 1))


def _resume_folder(resume: str) -> Path:
    """The run folder of a checkpoint, a weights folder or a run folder. Raises UserError when it is none of these."""
    path = Path(resume)
    for folder in (path, path.parent, path.parent.parent):
        if (folder / "weights").is_dir() and path.exists():
            return folder
    raise UserError(f"resume={resume} is neither a run folder nor a checkpoint in one.")


def environment() -> str:
    """Versions and machine, for env.txt."""
    names = ("ssod", "torch", "torchvision", "timm", "pycocotools", "faster-coco-eval", "numpy", "pillow", "pydantic")
    lines = [f"python {sys.version.split()[0]}", f"platform {platform.platform()}", f"cpus {os.cpu_count()}"]
    for name in names:
        try:
            lines.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{name} not installed")
    return "\n".join(lines) + "\n"
