"""docs/reliability.md: what each fault gets, which tests inject it, and how they went when they last ran.

python tests/reliability_page.py             run all of them, the slow ones too, and write the page
python tests/reliability_page.py tests/data  run those of a folder or file; the others keep their result
python tests/reliability_page.py --dry       run none: new tests come in, gone ones go
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "reliability.md"
ROWS = {
    1: ("killed while a checkpoint is written", "the old or the new one loads; strays are swept at the next start"),
    2: ("disk full at a save", "the old checkpoint stays, a clear error"),
    3: ("checkpoint cut short or with a flipped bit", "noticed by its SHA-256; the last good one is used, and said"),
    4: ("image that cannot be decoded", "counted, reported, replaced; above `max_bad` training stops"),
    5: ("corrupt annotation file", "file, record and reason in one sentence"),
    6: ("boxes outside, NaN or without area", "clipped or dropped and counted; `strict=true` refuses"),
    7: ("unknown class, class number too large", "refused, with the names there are"),
    8: ("image or annotation id twice, annotation id 0", "refused, or renumbered so that scores are right"),
    9: ("no labelled image, no unlabelled image, no val", "said at the start"),
    10: ("no pseudo box for long", "finite loss; an alarm with cause and numbers"),
    11: ("loss not finite", "the step is skipped on all ranks; after 20 in a row the run stops, saved before them"),
    12: (
        "loss that explodes",
        "an alarm; back to the last good checkpoint at half the rate, at most twice, then a stop",
    ),
    13: ("student not finite", "the moving average never takes it in"),
    14: ("loader worker killed or hung", "an error that names it, within a time limit"),
    15: ("out of memory", "a stop that can be resumed, with what to lower"),
    16: ("a rank dies or hangs", "all processes end within 30 seconds, with a good checkpoint; `restarts` goes on"),
    17: ("SIGTERM, SIGINT", "saved after the step; exit code 143 or 130; `resume=true` goes on"),
    18: ("resumed in mid-epoch", "bit-equal on the CPU to a run that was never stopped"),
    19: ("resumed on another number of ranks", "the same images in the same order"),
    20: ("resume of a finished run", "refused, or longer with a larger `iters` or `epochs`"),
    21: ("the clock moves", "order by step, durations by a clock that does not move back"),
    22: ("data folder that cannot be written", "nothing is written there"),
    23: ("two runs on one folder", "one wins, the other is told"),
    24: ("spaces and other alphabets in paths", "the same result"),
    25: ("rotated by EXIF, gray, 16-bit, CMYK, RGBA, palette", "one decoder, right pixels"),
    26: ("gigantic image", "refused by its header, not decoded"),
    27: ("malicious pickle as a checkpoint", "refused, its code not run"),
    28: ("YAML with Python tags", "refused, nothing run"),
    29: ("file names that lead out of the data folder", "refused"),
    30: ("zoo or weights file damaged, cut, or not over https", "refused, nothing left behind"),
    31: ("predictions not finite at validation", "refused (pycocotools would score AP 1.0)"),
    32: ("classes of data and checkpoint differ", "said, with both lists"),
    33: ("labels beside the unlabelled images", "never read: corrupting them changes no weight"),
    34: ("validation images among the training ones", "found by their content, said"),
}
TOP = """# Reliability
What is promised when something goes wrong, and the tests that make it go wrong for real. Exit codes: 2 the user's
mistake, 1 a fault, 143 or 130 asked to stop.

Written by `make reliability`, which runs every one of these tests, the slow ones included.

| # | fault | promise | tests, and how they last went |
|---|---|---|---|"""

END = """
## Exact resume
`tests/engine/test_resume_matrix.py`: every strategy, RPL in either stage, with 0 and 2 workers, on 1 and 2 processes
(gloo), stopped by SIGTERM after a step and by SIGKILL in the middle of one: checkpoint and curves are those of a run
that was never stopped, to the last bit. Eleven controls leave out one thing each (student, teacher, the strategy's
own state, optimizer, scaler, step, schedule, sampler position, best, history, the seeding of each step), and the same
comparison notices each. What a step draws follows from seed, step and rank, so no generator is saved. On a GPU none
of this has run.

## Fuzzing
`tests/test_fuzz.py` (hypothesis): annotations, data and config YAMLs, lists, images of six kinds, checkpoints, packed
networks, descriptions of exports and engines, and every file of a run folder that is read back, damaged by bytes and
by odd values in their places; only `ssod.errors` may come out. `tests/test_config.py` does so with arguments. Eight
examples of each in `make test`, 500 in `make test-slow`, last run whole on 2026-11-21. It found a checkpoint that
names 10^30 layers, which were built until memory was full: what a network grows with now has upper bounds. atheris
(3.0, coverage-guided) was tried by hand for a minute on four readers (packed networks, COCO, VOC, results.csv) and
found nothing that these had not; it is no dependency.

## Memory
`tests/engine/test_memory.py` (slow) trains 3,000 steps with all that watches by default, ten validations and saves:
from step 780 on the process grew by 0.3 MB in 1,000 steps (2026-11-21, one CPU, torch 2.15.0). The limit is 1.
Every log line has the memory, and the run's page says how fast it grows.
"""


def marked() -> dict[int, list[str]]:
    """Of each row the tests that carry its number, "folder/file.py::test", in order."""
    found = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            for mark in node.decorator_list if isinstance(node, ast.FunctionDef) else []:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.fault":
                    for row in mark.args:
                        found[ast.literal_eval(row)].append(f"{path.relative_to(TESTS)}::{node.name}")
    return dict(found)


def known() -> dict[str, str]:
    """What the page says of each test: "3 passed", "not run"."""
    if not PAGE.exists():
        return {}
    return dict(re.findall(r"`([^`]+::[^`]+)`: ([^<|]+?)(?:<br>| \|)", PAGE.read_text(encoding="utf-8")))


def page(results: dict[str, str]) -> str:
    """The page's text, with the result of each test."""
    tests = marked()
    lines = [TOP]
    for row, (fault, promise) in ROWS.items():
        cell = "<br>".join(f"`{t}`: {results.get(t, 'not run')}" for t in tests[row])
        lines.append(f"| {row} | {fault} | {promise} | {cell} |")
    return "\n".join(lines) + "\n" + END


def run(places: list[str]) -> dict[str, str]:
    """Run those that lie in `places`; "3 passed" by test."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        only = ["-m", "fault and not gpu", f"--junitxml={report}", "-o", "junit_family=xunit1"]
        subprocess.run([sys.executable, "-m", "pytest", *only, *places], cwd=TESTS.parent)
        found: dict[str, Counter[str]] = defaultdict(Counter)
        for case in ElementTree.parse(report).iter("testcase"):
            test = f"{Path(case.attrib['file']).relative_to('tests')}::{case.attrib['name'].split('[')[0]}"
            outcome = {"failure": "failed", "error": "failed", "skipped": "skipped"}
            kinds = [outcome[c.tag] for c in case if c.tag in outcome]
            found[test][kinds[0] if kinds else "passed"] += 1
    return {t: ", ".join(f"{n} {what}" for what, n in sorted(c.items())) for t, c in found.items()}


if __name__ == "__main__":
    words = sys.argv[1:]
    new = {} if words == ["--dry"] else run(words or ["tests"])
    PAGE.write_text(page(known() | new), encoding="utf-8")
    sys.exit(any("failed" in result for result in new.values()))
