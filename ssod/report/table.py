"""results.csv: what the trainer writes and the plots read."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from ssod.files import replacing

_STEP = re.compile("[0-9]{1,12}")


def read_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """The lines of a results.csv that are whole: a step, and numbers or nothing; and how many are not."""
    good: list[dict[str, str]] = []
    bad = 0
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        try:
            for row in csv.DictReader(file):
                if _is_whole(row):
                    good.append(row)
                else:
                    bad += 1
        except csv.Error:  # such as a NUL: what stands behind it cannot be told apart
            bad += 1
    return good, bad


def _is_whole(row: dict[str, str]) -> bool:
    if None in row or not _STEP.fullmatch(row.get("step") or ""):  # more cells than columns
        return False
    try:
        return [float(v or 0) for v in row.values()] != []
    except ValueError:
        return False


class Table:
    """results.csv: one row a log line or validation, columns as they appear. Readable at any moment.

    Appends; only a new column makes it write the file anew (atomically).
    """

    def __init__(self, path: Path, until_step: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():  # resumed: what came after the checkpoint happens again
            self.rows = [r for r in read_rows(path)[0] if int(r["step"]) <= until_step]
        self.columns = list(dict.fromkeys(k for r in self.rows for k in r))
        self._rewrite()

    def add(self, row: dict[str, Any]) -> None:
        text = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        self.rows.append(text)
        new = [k for k in text if k not in self.columns]
        if new:
            self.columns += new
            self._rewrite()
        else:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerow(text)

    def _rewrite(self) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self.columns, restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        with replacing(self.path) as file:
            file.write(buffer.getvalue().encode())

    def series(self, column: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one column."""
        pairs = [(int(r["step"]), float(r[column])) for r in self.rows if r.get(column)]
        return [s for s, _ in pairs], [v for _, v in pairs]
