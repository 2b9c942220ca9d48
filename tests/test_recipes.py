"""Every YAML of the package builds; a paper's recipe has the paper's numbers, typed here once more from the papers."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssod.config import cfg_folders, load_config
from ssod.data.views.transforms import pipeline
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
# Rethinking Pseudo Labels, section 3.1: steps of the teacher, steps of the student, short side
RPL = {
    "coco1_rpl.yaml": (6_000, 180_000, 800),
    "coco2_rpl.yaml": (12_000, 180_000, 800),
    "coco5_rpl.yaml": (30_000, 180_000, 800),
    "coco10_rpl.yaml": (60_000, 180_000, 800),
    "coco_full_rpl.yaml": (180_000, 180_000, 800),
    "voc_rpl.yaml": (10_000, 90_000, 600),
}
# As published: its own focal loss, and the rest as above
PUBLISHED = {"coco10": "coco10.yaml", "coco_full": "coco_full.yaml", "voc": "voc.yaml"}
# batch, unlabelled batch, steps, weight, learning rate, steps at which it drops. Soft Teacher, ICCV 2021, and its code;
# LER/PRC, 4.2, whose learning rate is ours
DROPPING = {
    "coco10_soft_teacher": (8, 32, 180_000, 4.0, 0.01, [120_000, 160_000]),
    "coco_full_soft_teacher": (32, 32, 720_000, 2.0, 0.01, [480_000, 640_000]),
    "coco10_prc": (4, 16, 180_000, 4.0, 0.005, [120_000, 160_000]),
    "coco_full_prc": (4, 16, 180_000, 4.0, 0.005, [120_000, 160_000]),
    "voc_prc": (8, 8, 72_000, 2.0, 0.004, [48_000, 64_000]),
}
# detector, t, alpha, optimizer, learning rate, share of it for the backbone. Ours, but for Deformable DETR's optimizer
LSM = {
    "coco10_lsm": ("faster_rcnn", 0.7, 0.5, "sgd", 0.01, 1.0),
    "coco10_lsm_detr": ("deformable_detr", 0.6, 0.4, "adamw", 2e-4, 0.1),
}
SPARSE = ("easy", "hard", "extreme", "50miss")
# Co-mining, AAAI 2021, and its code: detector, backbone, tau, theta1, NMS of the evaluation; theta2 is 0.4 in all
CO_MINING = {
    "easy_comining": ("retinanet", "resnet50", 0.6, 0.5, 0.5),
    "hard_comining": ("retinanet", "resnet50", 0.6, 0.5, 0.5),
    "extreme_comining": ("retinanet", "resnet50", 0.5, 0.5, 0.5),
    "50miss_comining": ("retinanet", "resnet101", 0.6, 0.5, 0.5),
    "hard_comining_fcos": ("fcos", "resnet50", 0.5, 0.6, 0.6),
}


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
        slower = 2 if config.optimizer == "sgd" else 2**0.5
        assert (other.iters, other.lr0) == (2 * config.iters, pytest.approx(config.lr0 / slower, rel=1e-5))
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


@pytest.mark.parametrize("name", RPL)
def test_rpl_recipes_have_its_numbers(name: str) -> None:
    c = load_config("train", {"cfg": name})
    teacher, student, short = RPL[name]
    assert (c.burn_in, c.iters, c.imgsz) == (teacher, teacher + student, [short, 1333])
    assert (c.batch, c.optimizer, c.lr0, c.momentum, c.weight_decay) == (8, "sgd", 0.01, 0.9, 1e-4)
    assert c.schedule == "multistep"
    rates = [lr_at(round(share * 180_000) + off, 180_000, c) for share in (2 / 3, 8 / 9) for off in (-1, 0)]
    assert rates == pytest.approx([0.01, 0.001, 0.001, 0.0001])  # at 120k and 160k of 180k
    found = {k: c.strategy.options[k] for k in ("tau", "weight", "gamma1", "gamma2")}
    assert found == {"tau": 0.7, "weight": 1.0, "gamma1": 0.05, "gamma2": 0.6}
    assert {"certainty", "teacher", "ensemble"}.isdisjoint(c.strategy.options)  # the defaults: on, frozen, one
    assert (c.detector.name, c.backbone, c.detector.options["codec"]) == ("faster_rcnn", "resnet50", "bucket")
    assert (c.detector.options["buckets"], c.augment.strong) == (30, "rpl")
    shares = {"coco1_rpl.yaml": "1%", "coco2_rpl.yaml": "2%", "coco5_rpl.yaml": "5%", "coco10_rpl.yaml": "10%"}
    assert c.labeled == shares.get(name, "all")


@pytest.mark.parametrize("name", PUBLISHED)
def test_unbiased_teacher_as_published(name: str) -> None:
    c, base = load_config("train", {"cfg": f"{name}_unbiased_teacher.yaml"}), PUBLISHED[name]
    found = (c.batch, c.batch_unlabeled, c.iters, c.burn_in, c.strategy.options["weight"], c.ema_decay)
    assert found == UNBIASED_TEACHER[base]
    assert (c.strategy.name, c.strategy.options["tau"]) == ("unbiased_teacher", 0.7)
    assert c.detector.options == {"roi_focal_gamma": 1.5}
    same = load_config("train", {"cfg": base})
    assert (c.data, c.labeled, c.unlabeled, c.imgsz, c.augment) == (
        *(same.data, same.labeled, same.unlabeled, same.imgsz, same.augment),
    )


@pytest.mark.parametrize("name", DROPPING)
def test_soft_teacher_and_prc_have_their_papers_numbers(name: str) -> None:
    c = load_config("train", {"cfg": f"{name}.yaml"})
    drops = [round(m * (c.iters or 0), -3) for m in c.milestones]
    found = (c.batch, c.batch_unlabeled, c.iters, c.strategy.options["weight"], c.lr0, drops)
    assert found == DROPPING[name]
    assert (c.burn_in, c.ema_decay, c.schedule, c.augment.strong) == (0, 0.999, "multistep", "soft_teacher")
    assert (c.detector.name, c.backbone, c.optimizer) == ("faster_rcnn", "resnet50", "sgd")
    own = {k: v for k, v in c.strategy.options.items() if k != "weight"}
    if c.strategy.name == "prc":
        assert own == {"tau": 0.8, "ler": True, "prc": True}
        assert c.detector.options == {"codec": "gaussian"}
    else:
        assert own == {"candidates": 0.5, "tau": 0.9, "jitters": 10, "jitter": 0.06, "spread": 0.02}
        assert c.eval_on == "student"


@pytest.mark.parametrize("name", LSM)
def test_lsm_recipes_have_the_numbers_we_chose(name: str) -> None:
    c, base = load_config("train", {"cfg": f"{name}.yaml"}), load_config("train", {"cfg": "coco10.yaml"})
    detector, tau, alpha, optimizer, lr, body = LSM[name]
    assert (c.detector.name, c.detector.options) == (detector, {"half_scale": True})
    own = {"tau": tau, "alpha": alpha, "weight": 4.0, "pim_weight": 0.5, "distill_weight": 1.0, "nms": 0.5}
    assert (c.strategy.name, c.strategy.options) == ("lsm", own)
    assert (c.optimizer, c.lr0, c.lr_backbone) == (optimizer, lr, body)
    for key in ("labeled", "unlabeled", "batch", "batch_unlabeled", "iters", "burn_in", "ema_decay", "augment"):
        assert getattr(c, key) == getattr(base, key), key


def test_the_sed_recipe_has_the_numbers_we_chose() -> None:
    c, base = load_config("train", {"cfg": "coco10_sed.yaml"}), load_config("train", {"cfg": "coco10.yaml"})
    assert (c.detector.name, c.detector.options) == ("faster_rcnn", {"half_scale": True})
    own = {"weight": 1.0, "scale_weight": 1.0, "box_weight": 1.0, "reweight": True}
    assert (c.strategy.name, c.strategy.options) == ("sed", own)
    for key in ("labeled", "unlabeled", "batch", "batch_unlabeled", "iters", "burn_in", "ema_decay", "augment", "lr0"):
        assert getattr(c, key) == getattr(base, key), key


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_recipes_have_co_minings_numbers(kind: str) -> None:
    c = load_config("train", {"cfg": f"sparse_{kind}.yaml"})
    assert (c.batch, c.lr0, c.iters, c.warmup_iters) == (16, 0.01, 90_000, 1_000)
    assert [round(m * c.iters, -3) for m in c.milestones] == [60_000, 80_000]
    assert (c.detector.name, c.backbone, c.strategy.name) == ("retinanet", "resnet50", "supervised")
    assert f"/{kind}/" in c.data


@pytest.mark.parametrize("name", CO_MINING)
def test_co_mining_recipes_differ_from_their_baseline_by_the_strategy(name: str) -> None:
    c, original = (load_config("train", {"cfg": f"sparse_{n}.yaml"}) for n in (name, name.split("_")[0]))
    detector, backbone, tau, theta1, iou = CO_MINING[name]
    assert (c.detector.name, c.backbone, c.iou) == (detector, backbone, iou)
    assert (c.strategy.name, c.strategy.options) == ("comining", {"tau": tau, "theta1": theta1, "theta2": 0.4})
    assert len(pipeline(c.augment.labeled, c.imgsz, "labeled").chains) == 2
    # RetinaNet's losses are the authors' by default; FCOS's box loss is weighted by the centerness
    assert c.detector.options == ({"center_weighted_box": True} if detector == "fcos" else {})
    for key in ("data", "labeled", "imgsz", "batch", "lr0", "iters", "milestones", "warmup_iters", "freeze"):
        assert getattr(c, key) == getattr(original, key), key


def test_the_detectors_have_co_minings_losses_by_default() -> None:
    found = build_detector("retinanet", 3, "test_resnet").options
    assert (found.focal_alpha, found.focal_gamma, found.smooth_l1_beta) == (0.25, 2.0, 0.1)
    assert (found.codec, found.mean_of_images, found.box_loss_weight) == ("l1", False, 1.0)
    fcos = build_detector("fcos", 3, "test_resnet").options
    assert (fcos.focal_alpha, fcos.focal_gamma, fcos.codec, fcos.center_radius) == (0.25, 2.0, "giou", 1.5)


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
