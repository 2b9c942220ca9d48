"""What the files of a run folder hold, as far as the pages rely on it; anything else may stand beside it.

Files are damaged, edited by hand, or written by another version: what does not have this form is left out and said.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Count = Annotated[int, Field(ge=0, le=10**12)]
Real = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
Number = Real | None  # what is not known is null
Table = dict[str, Number]


class Form(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class Figures(Form):
    """A network's scores at a validation."""

    __pydantic_extra__: Table
    per_class: Table = {}


class Validation(Form):
    """An entry of the history; the rest are networks by name."""

    __pydantic_extra__: dict[str, Figures]
    step: Count
    by_class: dict[str, Table] = {}


class Best(Form):
    AP: Number
    step: Count
    use: str


class Summary(Form):
    """metrics.json."""

    steps: Count = 0
    labeled: Count | None = None
    unlabeled: Count | None = None
    val: Count | None = None
    burn_in: Figures | None = None
    final: dict[str, Figures] = {}
    best: Best | None = None
    history: list[Validation] = []


class Baseline(Form):
    """baseline.json."""

    gain: Table | None = None
    history: list[Validation] = []


class Alarm(Form):
    """A line of diagnosis.jsonl."""

    step: Count | None = None
    level: str = "warning"
    text: str = ""


class Bin(Form):
    low: Real
    high: Real
    n: Count
    right: Count


class Measured(Form):
    """A class, or all of them, in a line of audit.jsonl."""

    __pydantic_extra__: Table
    calibration: list[Bin] | None = None


class AuditLine(Form):
    step: Count
    network: str
    images: Count | None = None
    classes: dict[str, Measured]
    all: Measured | None = None


class Image(Form):
    file_name: str
    width: Annotated[int, Field(gt=0, le=10**6)]
    height: Annotated[int, Field(gt=0, le=10**6)]


class Shown(Image):
    """An image of the film."""

    id: int
    left_out: Count = 0


class Category(Form):
    id: int
    name: str


class Drawn(Form):
    """A pseudo box of the film, xywh pixels."""

    image_id: int
    category_id: int
    bbox: Annotated[list[Real], Field(min_length=4, max_length=4)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    kept: bool
    reason: str | None = None


class Info(Form):
    step: Count
    tau: Table | Real | None = None


class Record(Form):
    """A step of the film, pseudo/stepN.json."""

    info: Info
    images: list[Shown]
    categories: list[Category]
    annotations: list[Drawn]


Row = Annotated[list[Real], Field(min_length=7, max_length=7)]


class Seen(Form):
    """val_detections.json."""

    about: dict[str, Any]
    names: list[str]
    images: list[Image]
    truth: list[Row]
    found: list[Row]


class Args(Form):
    """args.yaml."""

    iters: Count | None = None
    burn_in: Real = 0
    batch: Count = 0
    accumulate: Count = 1
    batch_unlabeled: Count | None = None
    detector: str | dict[str, Any] = ""
    strategy: str | dict[str, Any] = ""
    name: str | None = None


def flaw(form: type[Form], content: Any) -> str | None:
    """Where content is not of a form, and how: "history.0.step: input should be a valid integer"; None if it is."""
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc'])) or 'all of it'}: {first['msg'][0].lower()}{first['msg'][1:]}"
    except RecursionError:
        return "it is nested too deeply"
    return None
