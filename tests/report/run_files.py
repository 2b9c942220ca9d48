"""Files of a run folder, written by hand as docs/report.md describes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from ssod.config import load_config

NAMES = ["cat", "dog"]
STEPS = [20, 40, 60]  # of the validations


def made_by_hand(folder: Path, names: Sequence[str] = NAMES, **args: Any) -> Path:
    """A finished run: args.yaml, env.txt, metrics.json, results.csv. args: options of it."""
    folder.mkdir(parents=True)
    config = load_config("train", {"data": "my.yaml", "iters": 60, "burn_in": 20, "labeled": "10%"} | args)
    (folder / "args.yaml").write_text(yaml.safe_dump(config.model_dump(), allow_unicode=True))
    (folder / "env.txt").write_text("python 3.11\n")
    write_history(folder, names, STEPS, burn_in=20)
    return folder


def write_history(folder: Path, names: Sequence[str], steps: Sequence[int], burn_in: int = 0) -> None:
    """metrics.json and results.csv of a finished run that grew better at every validation."""
    history = []
    for i, step in enumerate(steps):
        figures: dict[str, Any] = {k: round(0.1 + 0.02 * i + 0.05 * (k == "AP50"), 4) for k in ("AP", "AP50", "AP75")}
        entry: dict[str, Any] = {"step": step, "student": figures | {"per_class": dict.fromkeys(names, figures["AP"])}}
        if step >= burn_in:
            entry["teacher"] = figures | {"AP": figures["AP"] + 0.01, "per_class": dict.fromkeys(names, None)}
            entry["by_class"] = {"tau": dict.fromkeys(names, 0.5 + 0.01 * i)}
        history.append(entry)
    last, start = history[-1], next((h["student"] for h in history if h["step"] == burn_in), None)
    best = {"AP": last["teacher"]["AP"], "step": steps[-1], "use": "teacher"}
    summary = {"folder": str(folder), "burn_in": start, "final": {k: last[k] for k in ("student", "teacher")}}
    counts = {"steps": steps[-1], "labeled": 20, "unlabeled": 80, "val": 8, "unreadable": {}}
    (folder / "metrics.json").write_text(json.dumps(summary | {"best": best, "history": history} | counts))
    rows = ["step,sup/cls,sup/box,unsup/cls,pseudo/per_image,pseudo/labeled_per_image,pseudo/kept,pseudo/tau,seconds"]
    for k in range(1, 41):
        step = max(1, round(steps[-1] * k / 40))
        semi = f"{0.3 / k:.4f},{6 - 3 / k:.3f},6.2,{0.4 + 0.01 * k:.3f},0.7" if step > burn_in else ",,,,"
        rows.append(f"{step},{1 / k:.4f},{0.5 / k:.4f},{semi},{1.5 * k:.2f}")
    (folder / "results.csv").write_text("\n".join(rows) + "\n")


def write_film(
    folder: Path, names: Sequence[str], steps: Sequence[int], images: int = 4, boxes: int = 6, seed: int = 0
) -> None:
    """pseudo/ of a run: COCO files, thumbnails, pairs of views. Thumbnails are noise, the worst case for their size."""
    rng = np.random.default_rng(seed)
    pseudo = folder / "pseudo"
    for sub in ("images", "views"):
        (pseudo / sub).mkdir(parents=True, exist_ok=True)
    listed = [{"id": i + 1, "width": 640, "height": 480, "file_name": f"{i}.jpg"} for i in range(images)]
    for image in listed:
        Image.fromarray(rng.integers(0, 255, (240, 320, 3), np.uint8)).save(pseudo / "images" / f"{image['id']}.jpg")
    categories = [{"id": i + 1, "name": n} for i, n in enumerate(names)]
    for number, step in enumerate(steps):
        annotations: list[dict[str, Any]] = []
        for image in listed:
            for k in range(boxes):
                score = float(rng.uniform(0.05, 1))
                kept = score > 0.7
                box = [float(rng.uniform(0, 500)), float(rng.uniform(0, 380)), 90.0, 60.0]
                row = {"id": len(annotations) + 1, "image_id": image["id"], "category_id": k % len(names) + 1}
                row |= {"bbox": box, "area": 5400.0, "iscrowd": 0, "score": score, "quality": None, "kept": kept}
                row |= {"cls_weight": 1.0, "box_weight": 1.0, "reason": "above tau" if kept else "below tau 0.70"}
                annotations.append(row)
        info = {"step": step, "tau": dict.fromkeys(names, 0.7)}
        content = {"info": info, "images": listed, "categories": categories, "annotations": annotations}
        (pseudo / f"step{step:06d}.json").write_text(json.dumps(content))
        pair = rng.integers(0, 255, (200, 400, 3), np.uint8)
        Image.fromarray(pair).save(pseudo / "views" / f"step{step:06d}-{number}.jpg")


def write_audit(folder: Path, names: Sequence[str], steps: Sequence[int]) -> None:
    lines = []
    for i, step in enumerate(steps):
        one = {"true": 40, "found": 60, "kept": 20 + i, "tau": 0.7, "precision": 0.8 + 0.01 * i, "recall": 0.5}
        bins = [{"low": k / 10, "high": (k + 1) / 10, "n": 10 - k, "right": k * (10 - k) // 10} for k in range(10)]
        one |= {"iou": 0.8, "suggested_tau": 0.6, "calibration": bins}
        total = {k: v for k, v in one.items() if k not in ("tau", "suggested_tau")}
        entry = {"step": step, "network": "teacher", "images": 9, "classes": dict.fromkeys(names, one), "all": total}
        lines.append(json.dumps(entry))
    (folder / "audit.jsonl").write_text("\n".join(lines) + "\n")


def write_alarm(folder: Path, text: str, level: str = "warning") -> None:
    line = {"step": 40, "code": "starving", "level": level, "text": text, "numbers": {"pseudo/per_image": 0.01}}
    with open(folder / "diagnosis.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def write_baseline(folder: Path, names: Sequence[str], steps: Sequence[int]) -> None:
    history = [
        {"step": s, "student": {"AP": 0.09, "AP50": 0.14, "per_class": dict.fromkeys(names, 0.1)}} for s in steps
    ]
    content = {"folder": "gone", "steps": steps[-1], "AP": {"student": 0.09}, "gain": {"AP": 0.04, "AP50": 0.05}}
    (folder / "baseline.json").write_text(json.dumps(content | {"history": history}))
