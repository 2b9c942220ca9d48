"""Cold starts: `ssod help`, `import ssod`, `ssod predict` of one image, each in a process of its own.

    python tests/bench/bench_start.py [--rounds 7] [--peer PYTHON]

The peer is ultralytics, where the Python given has it: `yolo help`, `import ultralytics`, `yolo predict` of a yolov8n
with random weights. It is AGPL-3.0 and no dependency of this project; without --peer there are figures and no ratios.
`ssod predict` runs `shapes_fcos` of the zoo on the same image. CPU time of the process and its children, and time by
the clock; medians, taking turns.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from common import Row, arguments, finish, head
from PIL import Image

GOALS = {"help": 0.1, "import": None, "predict": None}
IMAGE = "image.jpg"
YOLO = "import sys; from ultralytics.cfg import entrypoint; sys.argv = ['yolo', {}]; entrypoint()"
THEIR_MODEL = "from ultralytics import YOLO; YOLO('yolov8n.yaml').save('yolov8n.pt')"
OURS = {
    "help": ("-m", "ssod", "help"),
    "import": ("-c", "import ssod"),
    "predict": ("-m", "ssod", "predict", "model=shapes_fcos", f"source={IMAGE}", "device=cpu"),
}
THEIRS = {
    "help": ("-c", YOLO.format("'help'")),
    "import": ("-c", "import ultralytics"),
    "predict": ("-c", YOLO.format(f"'predict', 'model=yolov8n.pt', 'source={IMAGE}', 'device=cpu'")),
}


def taken(command: Sequence[str], folder: Path) -> tuple[float, float]:
    """CPU milliseconds, and by the clock."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": str(folder)}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    clock, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-500:]}")
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime), 1000 * clock


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--peer", help="a Python that has ultralytics")
    args = parser.parse_args()
    head(args, "pillow", what="each in a fresh process")
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = np.random.default_rng(0).integers(0, 255, (480, 640, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / IMAGE)
        if args.peer:
            subprocess.run([args.peer, "-c", THEIR_MODEL], cwd=folder, check=True, capture_output=True)
        for i in range(args.rounds + 1):  # the first round fills the caches of the system
            for what in OURS:
                sides = {"ours": (sys.executable, *OURS[what])}
                if args.peer:
                    sides["theirs"] = (args.peer, *THEIRS[what])
                for who, command in sides.items():
                    result = taken(command, folder)
                    if i:
                        times.setdefault((what, who), []).append(result)
    rows = []
    for what, goal in GOALS.items():
        for k, clock in enumerate(("CPU", "by the clock")):
            mine, theirs = ([t[k] for t in times.get((what, who), [])] for who in ("ours", "theirs"))
            rows.append(Row(f"{what}, {clock} / ultralytics", median(mine), median(theirs) if theirs else None, goal))
    finish(rows, args)


if __name__ == "__main__":
    main()
