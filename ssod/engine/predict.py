"""What `predict` finds goes into a run folder, on the command line and in Python. Needs no torch."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TypedDict

from ssod.data.sizes import Size
from ssod.deploy.results import Results
from ssod.deploy.saver import Saver


class Options(TypedDict, total=False):
    """What `SSOD.predict` takes beside source and stream, for type checkers; its docstring says what it means."""

    conf: float | None
    iou: float | None
    max_det: int | None
    imgsz: Size | None
    classes: Sequence[int | str] | None
    batch: int
    workers: int
    tile: int | None
    overlap: float
    save: bool
    save_txt: bool
    save_json: bool
    project: str | Path
    name: str
    exist_ok: bool
    bgr: bool


class Saving:
    """Writes results into the run folder PROJECT/predict/NAME as they come; `Saver` says what save... write.

    folder  the run folder; None before the first result, so that nothing is written where there is nothing
    saver   what has been written there; None before
    """

    def __init__(
        self, project: str | Path, name: str, exist_ok: bool, *, save: bool, save_txt: bool, save_json: bool
    ) -> None:
        self._place = str(project), "predict", name, exist_ok
        self._what = save, save_txt, save_json
        self.folder: Path | None = None
        self.saver: Saver | None = None

    def through(self, results: Iterator[Results]) -> Generator[Results, None, None]:
        """The same results, each once it is saved. Where the user stops early, what came so far is kept and complete.

        Raises UserError where the run folder is in use, and what `results` raise.
        """
        from ssod.engine.run import new_run, unlock_run  # brings the configs, which predicting alone does without

        first = next(results)
        self.folder = new_run(*self._place)
        stopped: KeyboardInterrupt | None = None
        try:
            with Saver(self.folder, *self._what) as self.saver:
                try:
                    for result in chain([first], results):
                        self.saver.add(result)
                        yield result
                except GeneratorExit:  # nobody asks for more
                    pass
                except KeyboardInterrupt as stop:  # how a webcam is ended
                    stopped = stop
        finally:
            unlock_run(self.folder)
        if stopped is not None:
            raise stopped
