"""Start-up and memory of a COCO file of the size of train2017, against pycocotools.

    python tests/bench/bench_index.py

Makes a file of 118,287 images and 860,001 boxes with outlines (450 MB; links to a few small images stand for the
photographs) in a temporary folder. Every figure is taken in a process of its own: seconds of `load_data` the first time
and from the cache, memory above what the imports need, and what a worker that looks at every sample needs for itself,
forked and spawned, beside a worker that is given the same samples as a Python list.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.queues import Queue
from pathlib import Path

import numpy as np
from common import Row, common_options, save
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
LINKS = 50_000  # of one file; file systems allow some 65,000


def write_set(folder: Path, images: int, boxes: int, points: int = 44) -> Path:
    """A COCO set of 80 classes whose ids have gaps; returns its data YAML."""
    rng = np.random.default_rng(0)
    pictures = folder / "images" / "train"
    pictures.mkdir(parents=True)
    (folder / "annotations").mkdir()
    ids = (rng.permutation(5 * images)[:images] + 1).tolist()
    categories = (np.flatnonzero(rng.permutation(90) < 80) + 1).tolist()
    counts = rng.multinomial(boxes, rng.dirichlet(np.full(images, 0.9))).tolist()
    with open(folder / "annotations" / "instances_train.json", "w") as file:
        file.write('{"info": {"description": "synthetic"}, "licenses": [], "images": [')
        for k, i in enumerate(ids):
            if k % LINKS == 0:
                photograph = folder / f"{k}.jpg"
                Image.new("RGB", (640, 480)).save(photograph)
            os.link(photograph, pictures / f"{i:012d}.jpg")
            record = {"license": 3, "file_name": f"{i:012d}.jpg", "height": 480, "width": 640, "id": i}
            record["coco_url"] = f"http://images.example.org/train2017/{i:012d}.jpg"
            record["flickr_url"] = "http://farm9.example.org/8186/8119368305_4e622c8349_z.jpg"
            file.write(("," if k else "") + json.dumps(record))
        file.write('], "annotations": [')
        n = 0
        for i, count in zip(ids, counts, strict=True):
            for x, y, w, h in (rng.random((count, 4)) * [500, 380, 130, 95] + [0, 0, 2, 2]).round(2).tolist():
                outline = (rng.random(points) * 400).round(2).tolist()
                record = {"segmentation": [outline], "area": round(0.6 * w * h, 5), "iscrowd": 0, "image_id": i}
                record |= {"bbox": [x, y, w, h], "category_id": categories[n % 80], "id": n + 1}
                file.write(("," if n else "") + json.dumps(record))
                n += 1
        names = [{"supercategory": "thing", "id": c, "name": f"thing {c}"} for c in categories]
        file.write(f'], "categories": {json.dumps(names)}}}')
    (folder / "data.yaml").write_text("train: annotations/instances_train.json\n")
    return folder / "data.yaml"


def memory(*kinds: str) -> float:
    """MB of this process, the sum of some lines of /proc/self/smaps_rollup."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    table = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return sum(table[kind] for kind in kinds) / 1000


def peak() -> float:
    """MB, the most that this process ever held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1000


def load_ours(yaml: str) -> dict[str, float]:
    from ssod.data.annotations.sources import load_data

    before, start, used = memory("Rss"), time.perf_counter(), time.process_time()
    data = load_data(yaml, "train")
    took = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - used}
    assert not data.problems
    return took | {"MB": memory("Rss") - before, "peak MB": peak() - before, "boxes": len(data.samples.objects()[0])}


def load_peer(yaml: str) -> dict[str, float]:
    from pycocotools.coco import COCO

    before, start, used = memory("Rss"), time.perf_counter(), time.process_time()
    data = COCO(str(Path(yaml).parent / "annotations" / "instances_train.json"))
    took = {"seconds": time.perf_counter() - start, "CPU seconds": time.process_time() - used}
    return took | {"MB": memory("Rss") - before, "peak MB": peak() - before, "boxes": len(data.anns)}


def look(samples: Sequence[object], out: Queue[tuple[float, float]]) -> None:
    """A worker that looks at every sample: MB of its own, before and after."""
    import torch  # noqa: F401  # as every loader worker has it

    private = ("Private_Clean", "Private_Dirty")
    before = memory(*private)
    for i in range(len(samples)):
        samples[i]
    out.put((before, memory(*private)))


def workers(yaml: str) -> dict[str, float]:
    import torch.multiprocessing as mp

    from ssod.data.annotations.sources import load_data

    table = load_data(yaml, "train").samples
    figures: dict[str, float] = {}
    as_list = list(table)
    for what, samples, way in (
        ("nothing, forked", [], "fork"),
        ("table, forked", table, "fork"),
        ("list, forked", as_list, "fork"),
        ("table, spawned", table, "spawn"),
        ("nothing, spawned", [], "spawn"),
        ("list, spawned", as_list, "spawn"),
    ):
        context = mp.get_context(way)
        out = context.Queue()
        process = context.Process(target=look, args=(samples, out))
        process.start()
        before, after = out.get()
        process.join()
        figures[f"{what}: MB before looking"], figures[f"{what}: MB after"] = before, after
    return figures


PARTS = {"ours": load_ours, "pycocotools": load_peer, "workers": workers}


def in_process(part: str, yaml: Path, cache: Path) -> dict[str, float]:
    """One of PARTS in a fresh process."""
    environment = {**os.environ, "SSOD_CACHE": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, "--part", part, "--yaml", str(yaml)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--images", type=int, default=118_287)
    options.add_argument("--boxes", type=int, default=860_001)
    options.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options.add_argument("--yaml", help=argparse.SUPPRESS)
    common_options(options)
    given = options.parse_args()
    if given.quick:
        given.images, given.boxes = 60, 400
    if given.part:
        print(json.dumps(PARTS[given.part](given.yaml)))
        return
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        yaml = write_set(Path(folder) / "set", given.images, given.boxes)
        size = (yaml.parent / "annotations" / "instances_train.json").stat().st_size
        print(f"{given.images} images, {given.boxes} boxes, {size / 1e6:.0f} MB of JSON (memory: above the imports)")
        cache = Path(folder) / "cache"
        found = {}
        for what, part in (("first", "ours"), ("cached", "ours"), ("pycocotools", "pycocotools")):
            found[what] = in_process(part, yaml, cache)
            print(f"{what:<12}" + ", ".join(f"{v:.2f} {k}" for k, v in found[what].items()))
        kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
        print(f"cache file  {kept / 1e6:.0f} MB")
        print("a worker's own memory")
        for what, value in in_process("workers", yaml, cache).items():
            print(f"  {what:<40}{value:8.1f}")
    save([row(what, kind, found) for what in ("first", "cached") for kind in ("CPU seconds", "MB")], given.json)


def row(what: str, kind: str, found: dict[str, dict[str, float]]) -> Row:
    return Row(f"index, {what} / pycocotools", found[what][kind], found["pycocotools"][kind], unit=kind)


if __name__ == "__main__":
    main()
