"""results.csv: what the trainer writes and the plots read."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ssod.files import replacing


class Table:
    """results.csv: one row a log line or validation, columns as they appear. Readable at any moment.

    Appends; only a new column makes it write the file anew (atomically).
    """

    def __init__(self, path: Path, until_step: int = 0) -> None:
        self.path = path
        self.rows: list[dict[str, str]] = []
        if path.is_file():  # resumed: what came after the checkpoint happens again
            with open(path, newline="") as file:
                self.rows = [r for r in csv.DictReader(file) if r.get("step") and int(r["step"]) <= until_step]
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
