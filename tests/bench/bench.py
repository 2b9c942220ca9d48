"""Every benchmark, one after the other, and one table: `make bench`.

    python tests/bench/bench.py [--quick] [--only step loader ...] [--peer PYTHON] [--out runs/bench]

Each script is a process of its own that writes its rows as JSON; all are kept in OUT/DATE.json, with versions, load and
what has failed. A row: what is compared, ours, the peer's, the ratio, the goal, and whether it is reached. --peer: a
Python that has ultralytics. A quick run says only whether the scripts run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import HEADER, Row, where

HERE = Path(__file__).parent
DETECTORS = ("fcos", "retinanet", "faster_rcnn", "deformable_detr")
# Arms of the grid that say nothing of which detector they are for; the grid's own is Faster R-CNN.
ARMS = dict.fromkeys(DETECTORS, ("mean_teacher", "unbiased_teacher"))
ARMS["faster_rcnn"] = (*ARMS["faster_rcnn"], "soft_teacher", "rpl", "prc", "sed", "lsm")
SCRIPTS: dict[str, tuple[str, ...]] = {
    "step": ("bench_step.py",),
    "semi": ("bench_step.py", "--semi", "--rounds", "3"),
    **{f"strategies_{n}": ("bench_strategies.py", "--detector", n, "--arms", *arms) for n, arms in ARMS.items()},
    "loader": ("bench_loader.py",),
    "export": ("bench_export.py",),
    "conv3x3": ("bench_conv3x3.py",),
    "products": ("bench_products.py",),
    "eval": ("bench_eval.py",),
    "ema": ("bench_ema.py",),
    "start": ("bench_start.py",),
    "growth": ("bench_growth.py",),
    "index": ("bench_index.py",),
    "attention": ("bench_deform_attn.py",),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes and one round: do the scripts run?")
    parser.add_argument("--only", nargs="+", choices=SCRIPTS, help="some of the scripts")
    parser.add_argument("--peer", help="a Python that has ultralytics, for the cold starts")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    began, load = where("torchvision", "transformers", "onnxruntime", "timm"), os.getloadavg()
    found: dict[str, list[Row]] = {}
    failed: dict[str, int] = {}
    for name in args.only or SCRIPTS:
        print(f"\n== {name}", flush=True)
        code, found[name] = run(name, args)
        if code:
            failed[name] = code
    print(f"\n{began}\n\n{HEADER}")
    for row in (r for rows in found.values() for r in rows):
        print(row.text())
    for name, code in failed.items():
        print(f"{name} failed with exit code {code}")
    print(f"kept in {keep(found, failed, load, began, args)}")
    return 1 if failed else 0


def run(name: str, args: argparse.Namespace) -> tuple[int, list[Row]]:
    """Exit code and rows of one script."""
    script, *options = SCRIPTS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        words = [sys.executable, str(HERE / script), *options, "--json", str(file)]
        words += ["--quick"] if args.quick else []
        words += ["--peer", args.peer] if args.peer and name == "start" else []
        done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"})
        rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    return done.returncode, [Row(**r) for r in rows]


def keep(
    found: dict[str, list[Row]], failed: dict[str, int], load: tuple[float, ...], began: str, args: argparse.Namespace
) -> Path:
    """Write OUT/DATE.json; a second one of the same day has a number."""
    args.out.mkdir(parents=True, exist_ok=True)
    stem = time.strftime("%Y-%m-%d") + ("-quick" if args.quick else "")
    names = (f"{stem}{f'-{i}' if i else ''}.json" for i in range(10_000))
    path = next(args.out / n for n in names if not (args.out / n).exists())
    rows = [
        {"script": s, **vars(r), "ratio": r.ratio, "reached": r.reached} for s, group in found.items() for r in group
    ]
    about = {"where": began, "load": [load, os.getloadavg()], "quick": args.quick, "failed": failed}
    path.write_text(json.dumps(about | {"rows": rows}, indent=1), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
