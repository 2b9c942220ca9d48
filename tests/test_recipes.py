"""Every YAML of the package builds; a paper's recipe has the paper's numbers, typed here once more from the papers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssod.config import cfg_folders, load_config
from ssod.data.transforms import pipeline
from ssod.detectors import build_detector
from ssod.engine.optim import lr_at
from ssod.engine.setup import check_options
from ssod.errors import UserError

RECIPES = sorted(cfg_folders()[0].glob("*.yaml"))

# Unbiased Teacher, ICLR 2021: batch, unlabelled batch, steps, burn-in, weight of the unlabelled loss, EMA decay
UNBIASED_TEACHER = {
    "coco1.yaml": (32, 32, 180_000, 2_000, 4.0, 0.9996),
    "coco2.yaml": (32, 32, 180_000, 2_000, 4.0, 0.9996),
    "coco5.yaml": (32, 32, 180_000, 2_000, 4.0, 0.9996),
    "coco10.yaml": (32, 32, 180_000, 2_000, 4.0, 0.9996),
    "coco_full.yaml": (32, 32, 180_000, 90_000, 2.0, 0.9996),
    "voc.yaml": (16, 16, 180_000, 30_000, 2.0, 0.999),
}
SPARSE = ("easy", "hard", "extreme", "50miss")


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.name)
def test_every_recipe_builds_its_model_views_and_schedule(path: Path) -> None:
    config = load_config("train", {"cfg": str(path)})
    assert config.notes == []
    check_options(config)
    detector = build_detector(config.detector.name, 3, config.backbone, config.detector.options)
    assert sum(p.numel() for p in detector.parameters()) > 1e6
    assert pipeline(config.augment.labeled, config.imgsz, "labeled").chains
    assert pipeline(config.augment.weak, config.imgsz, "weak").as_weak().longest
    assert pipeline(config.augment.strong, config.imgsz).chains
    iters = config.iters or 1000
    assert lr_at(0, iters, config) < lr_at(iters // 2, iters, config) == pytest.approx(config.lr0, rel=0.5)
    if config.nominal_batch is not None:
        assert config.batch == config.nominal_batch
        other = load_config("train", {"cfg": str(path), "batch": config.batch // 2})
        assert (other.iters, other.lr0) == (2 * config.iters, pytest.approx(config.lr0 / 2))
        assert len(other.notes) == 1


@pytest.mark.parametrize("name", UNBIASED_TEACHER)
def test_semi_supervised_recipes_have_unbiased_teachers_numbers(name: str) -> None:
    c = load_config("train", {"cfg": name})
    found = (c.batch, c.batch_unlabeled, c.iters, c.burn_in, c.strategy.options["weight"], c.ema_decay)
    assert found == UNBIASED_TEACHER[name]
    assert (c.optimizer, c.lr0, c.momentum, c.weight_decay, c.schedule) == ("sgd", 0.01, 0.9, 1e-4, "constant")
    assert (c.strategy.options["tau"], c.strategy.options["box_loss"], c.eval_on) == (0.7, False, "both")
    assert (c.detector.name, c.backbone) == ("faster_rcnn", "resnet50")
    assert c.augment.strong == "unbiased_teacher"
    assert c.labeled == {"coco1.yaml": "1%", "coco2.yaml": "2%", "coco5.yaml": "5%", "coco10.yaml": "10%"}.get(
        name, "all"
    )


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_recipes_have_co_minings_numbers(kind: str) -> None:
    c = load_config("train", {"cfg": f"sparse_{kind}.yaml"})
    assert (c.batch, c.lr0, c.iters, c.warmup_iters) == (16, 0.01, 90_000, 1_000)
    assert [round(m * c.iters, -3) for m in c.milestones] == [60_000, 80_000]
    assert (c.detector.name, c.backbone, c.strategy.name) == ("retinanet", "resnet50", "supervised")
    assert f"/{kind}/" in c.data


def test_without_the_data_a_recipe_says_what_to_put_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssod.engine.trainer import SemiTrainer

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("coco10.yaml", "voc.yaml"):
        with pytest.raises(UserError, match=r"put .* into .*cfg=demo.yaml"):
            SemiTrainer(load_config("train", {"cfg": name}))
    with pytest.raises(UserError, match="ssod split"):
        SemiTrainer(load_config("train", {"cfg": "sparse_hard.yaml"}))
    assert list(tmp_path.iterdir()) == []
