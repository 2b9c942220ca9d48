"""LSM: its loss by hand, who learns from which term, and what is saved of the auxiliary classifier."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small import SIZE, batch, on_labeled, strategy, unsupervised, view
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ssod import dist
from ssod.checkpoint import load_checkpoint
from ssod.config import load_config
from ssod.data.shapes import SIZE as PICTURE
from ssod.data.shapes import draw_image
from ssod.deploy.predictor import load_detector
from ssod.detectors import DETECTORS
from ssod.engine.signals import Stopped
from ssod.engine.trainer import SemiTrainer
from ssod.errors import UserError
from ssod.ops.distill import foreground_weight
from ssod.ops.half import half_size
from ssod.ops.pseudo import above
from ssod.strategies.lsm import LSM, as_targets, self_distillation, unsure
from ssod.strategies.pairing import Paired, pair
from ssod.structures import Instances, SemiBatch, View

# alpha and tau between which untrained teachers have boxes, and untrained auxiliary classifiers scores
RANGE = {
    "fcos": (0.005, 0.0715),
    "retinanet": (0.005, 0.01015),
    "faster_rcnn": (0.2, 0.253),
    "deformable_detr": (0.005, 0.011),
}
HALF: dict[str, object] = {"half_scale": True}


def lsm(name: str = "fcos", detector_options: dict[str, object] | None = None, **options: object) -> LSM:
    alpha, tau = RANGE[name]
    built = strategy("lsm", name, HALF | (detector_options or {}), **({"alpha": alpha, "tau": tau} | options))
    assert isinstance(built, LSM)
    return built


@pytest.fixture(params=list(DETECTORS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def step(s: LSM, b: SemiBatch | None = None) -> Any:
    torch.manual_seed(0)  # Faster R-CNN samples, Deformable DETR drops
    return s(b or batch(), step=0)


# ---- the self-distillation by hand


def paired(aux: list[list[float]], main: list[list[float]], exclusive: bool, stage: str = "dense") -> Paired:
    """Candidates with these probabilities."""
    target, given = torch.tensor(aux), torch.tensor(main)
    logits = (given.log() if exclusive else given.logit()).requires_grad_()
    return candidates(stage, logits, target.log() if exclusive else target.logit(), exclusive)


def candidates(stage: str, logits: Tensor, target: Tensor, exclusive: bool) -> Paired:
    boxes, image = torch.zeros(len(logits), 4), torch.zeros(len(logits), dtype=torch.int64)
    return Paired(stage, image, logits, target, exclusive, lambda rows: (boxes[rows], boxes[rows]))


def test_sigmoids_sum_a_binary_kl_of_each_class_and_candidates_are_averaged() -> None:
    # 0.6 ln(0.6/0.5) + 0.4 ln(0.4/0.5) + 0.1 ln(0.1/0.2) + 0.9 ln(0.9/0.8) = 0.020136 + 0.036690 = 0.056826; the
    # second candidate is in the range and predicted alike: 0; 0.49 and 0.71 are outside. Mean of two: 0.028413
    aux = [[0.6, 0.1], [0.5001, 0.3], [0.49, 0.1], [0.71, 0.6]]
    main = [[0.5, 0.2], [0.5001, 0.3], [0.1, 0.9], [0.1, 0.9]]
    found = paired(aux, main, exclusive=False)
    loss, count = self_distillation([found], 0.5, 0.7)
    assert count == 2
    assert loss.item() == pytest.approx(0.028413, abs=1e-6)
    loss.backward()
    # d/dx of a binary KL is sigmoid(x) - p: (0.5 - 0.6, 0.2 - 0.1), of two candidates half
    assert found.logits.grad is not None
    assert found.logits.grad[0].tolist() == pytest.approx([-0.05, 0.05], abs=1e-6)
    assert found.logits.grad[1:].abs().max() < 1e-6


def test_regions_have_one_kl_over_classes_and_background() -> None:
    # 0.6 ln(0.6/0.5) + 0.1 ln(0.1/0.25) + 0.3 ln(0.3/0.25) = 0.109393 - 0.091629 + 0.054696 = 0.072460;
    # the second is background with 0.6 and an object with 0.3 only: not between 0.5 and 0.7
    found = paired([[0.6, 0.1, 0.3], [0.3, 0.1, 0.6]], [[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]], True, "roi")
    rpn = paired([[0.6]], [[0.1]], exclusive=False, stage="rpn")
    loss, count = self_distillation([rpn, found], 0.5, 0.7)
    assert count == 1
    assert loss.item() == pytest.approx(0.072460, abs=1e-6)
    loss.backward()
    assert rpn.logits.grad is None  # it knows no classes, and both share it
    assert found.logits.grad is not None
    assert found.logits.grad[0].tolist() == pytest.approx([0.5 - 0.6, 0.25 - 0.1, 0.25 - 0.3], abs=1e-6)


@pytest.mark.parametrize("exclusive", [False, True])
def test_no_candidate_in_the_range_is_zero_in_the_graph(exclusive: bool) -> None:
    aux = [[0.1, 0.1, 0.8]] * 3
    found = paired(aux, [[0.4, 0.3, 0.3]] * 3, exclusive, "roi" if exclusive else "dense")
    loss, count = self_distillation([found], 0.5, 0.7)
    assert (loss.item(), count) == (0, 0)
    loss.backward()
    assert found.logits.grad is not None
    assert not found.logits.grad.any()


@pytest.mark.parametrize("exclusive", [False, True])
def test_certain_logits_stay_finite(exclusive: bool) -> None:
    far = torch.tensor([[90.0, -90, -90], [-90, 90, 90]])
    logits = (-far).requires_grad_()
    found = candidates("roi" if exclusive else "dense", logits, far, exclusive)
    loss, count = self_distillation([found], 0.0, 1.0)
    assert count == 2
    assert torch.isfinite(loss)
    loss.backward()
    assert torch.isfinite(logits.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("name", RANGE)
def test_candidates_outside_the_range_need_not_be_paired(name: str) -> None:
    s = lsm(name)
    stage = 1 if name == "faster_rcnn" else 0
    half, full = s.half_output(view(1)), s.student_output(view(1))
    every = pair(s.student, full, s.twin(), half, None)
    seen = foreground_weight(every[stage].target, every[stage].exclusive)
    alpha, tau = seen.quantile(0.25).item(), seen.quantile(0.75).item()
    few = pair(s.student, full, s.twin(), half, None, lambda t, exclusive: unsure(t, exclusive, alpha, tau))
    assert 0 < len(few[stage].logits) < len(every[stage].logits)
    (loss, count), (wanted, all_of_them) = (self_distillation(p, alpha, tau) for p in (few, every))
    assert count == all_of_them == len(few[stage].logits)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-4)
    rows = torch.arange(int(count))
    assert few[stage].image.shape == (count,)
    assert all(len(boxes) == count for boxes in few[stage].boxes(rows))


# ---- L = L_s + w_u L_main(tau) + w_p L_PIM(alpha) + w_d L_SD


def test_each_term_learns_from_its_own_boxes_with_its_own_weight(name: str) -> None:
    s = lsm(name, {"dropout": 0.0} if name == "deformable_detr" else None, weight=3.0, pim_weight=0.25).eval()
    out = step(s)
    b = batch()
    assert b.weak is not None
    assert b.strong is not None
    alpha, tau = RANGE[name]
    with torch.no_grad():
        found = s.teacher.decode(s.teacher.head(s.teacher.features(b.weak.images, b.weak.sizes)), alpha, 0.6, 100)
        low = s.to_strong(b, found)
        high = [as_targets(m) for m in above(low, torch.full((3,), tau))]
        assert sum(map(len, low)) > sum(map(len, high)) > 0
        assert float(out.stats["pseudo/per_image"]) == sum(map(len, high)) / 2
        assert float(out.stats["pseudo/pim_per_image"]) == sum(map(len, low)) / 2
        assert all(t.box_weight is None and t.cls_weight is None for t in high)  # hard: class and box, weight 1

        torch.manual_seed(0)  # the same draws in the same order: labelled, its half, main, PIM
        on_labeled(s, b)
        main = s.student.loss(s.student_output(b.strong), high)
        images, sizes = half_size(b.strong)
        twin = s.twin()
        mined = twin.loss(twin.head(twin.features(images, sizes, shift=1)), [as_targets(m) for m in low])
    for key, value in main.items():
        assert out.losses[f"unsup/{key}"].item() == pytest.approx(3.0 * value.item(), rel=1e-4), key
    for key, value in mined.items():
        assert out.losses[f"unsup/pim/{key}"].item() == pytest.approx(0.25 * value.item(), rel=1e-4), key


def test_the_weights_and_the_ramp_multiply_their_terms() -> None:
    plain = step(lsm()).losses
    heavy = step(lsm(weight=2.0, pim_weight=1.0, distill_weight=3.0)).losses
    early = step(lsm(ramp=4)).losses
    for key, value in plain.items():
        factor = 2.0 if key.startswith("unsup/pim/") or key == "sup/pim" else 3.0 if key == "unsup/distill" else 2.0
        factor = 1.0 if key.startswith("sup/") and key != "sup/pim" else factor
        assert heavy[key].item() == pytest.approx(factor * value.item(), rel=1e-5), key
        ramp = 0.25 if key.startswith("unsup/") else 1.0  # the first of 4 steps
        assert early[key].item() == pytest.approx(ramp * value.item(), rel=1e-5), key
    assert plain["unsup/distill"] > 0


def test_without_both_parts_it_is_a_mean_teacher_with_hard_boxes(name: str) -> None:
    options = {"tau": RANGE[name][1], "weight": 2.0}
    s = strategy("lsm", name, pim=False, distill=False, **options)  # half_scale is not needed
    assert not any("aux" in k.split(".")[0] for k in s.state_dict())
    other = strategy("unbiased_teacher", name, box_loss=True, nms=0.6, **options)
    found, wanted = step(s).losses, step(other).losses
    assert {k: v.item() for k, v in found.items()} == {k: v.item() for k, v in wanted.items()}


def test_labelled_images_teach_as_without_lsm(name: str) -> None:
    # Deformable DETR has an "aux" loss of its own: no name of ours may take its place
    b = SemiBatch(batch().labeled)
    plain = step(strategy("unbiased_teacher", name, HALF), b).losses  # type: ignore[arg-type]
    losses = step(lsm(name), b).losses
    assert set(losses) - set(plain) == {"sup/pim"}
    assert {k: losses[k].item() for k in plain} == {k: v.item() for k, v in plain.items()}


def test_pim_without_distillation(name: str) -> None:
    losses = step(lsm(name, distill=False)).losses
    assert "unsup/distill" not in losses
    both = step(lsm(name)).losses
    assert set(both) - set(losses) == {"unsup/distill"}
    assert all(losses[k].item() == both[k].item() for k in losses)


# ---- who learns from what


def gradients(s: LSM, loss: Tensor) -> dict[str, bool]:
    """Which part of the strategy gets a gradient that is not 0 from a loss."""
    names = [k for k, p in s.named_parameters() if p.requires_grad]
    params = [p for _, p in s.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    reached = {"teacher": False, "main": False, "aux": False, "boxes": False, "body": False, "else": False}
    for key, grad in zip(names, grads, strict=True):
        top, _, rest = key.partition(".")
        module = rest.partition(".")[0]
        part = "else"
        if top in ("teacher", "aux"):
            part = top
        elif module in s.student.classifier:
            part = "main"
        elif module in ("box_tower", "box_codes", "roi_codes", "box_heads", "centerness"):
            part = "boxes"
        elif module == "backbone":
            part = "body"
        reached[part] |= grad is not None and bool(grad.any())
    return reached


def test_who_gets_a_gradient_from_which_term(name: str) -> None:
    s = lsm(name)
    with torch.no_grad():  # at first both classifiers agree nearly everywhere, and there is nothing to distill
        for p in s.aux.parameters():  # type: ignore[union-attr]
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(3)) * 0.01)
    out = step(s)
    assert out.stats["distill/per_image"] > 0

    def total(*starts: str) -> Tensor:
        return torch.stack([v for k, v in out.losses.items() if k.startswith(starts)]).sum()

    nobody = dict.fromkeys(("teacher", "main", "aux", "boxes", "body", "else"), False)
    assert gradients(s, total("sup/pim")) == nobody | {"aux": True}
    mined = gradients(s, total("unsup/pim/"))
    assert (mined["teacher"], mined["main"], mined["aux"], mined["boxes"], mined["body"]) == (
        *(False, False, True),
        *(True, True),
    )
    distilled = gradients(s, total("unsup/distill"))
    assert (distilled["teacher"], distilled["main"], distilled["aux"]) == (False, True, False)
    assert distilled["body"]
    labelled = [k for k in out.losses if k.startswith("sup/") and k != "sup/pim"]
    pseudo = [k for k in out.losses if k.startswith("unsup/") and "pim/" not in k and "distill" not in k]
    for keys in (labelled, pseudo):
        found = gradients(s, torch.stack([out.losses[k] for k in keys]).sum())
        assert (found["teacher"], found["main"], found["aux"], found["boxes"]) == (False, True, False, True)


@pytest.mark.parametrize("unlabeled", [False, True])
def test_every_parameter_that_learns_is_used_in_every_step(name: str, unlabeled: bool) -> None:
    # one without a gradient would stop several processes; in burn-in there are labelled images only
    s = lsm(name)
    out = step(s, batch() if unlabeled else SemiBatch(batch().labeled))
    torch.stack(list(out.losses.values())).sum().backward()
    missing = [k for k, p in s.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(p.grad is None for p in s.teacher.parameters())
    assert all(p.grad.any() for p in s.aux.parameters())  # type: ignore[union-attr]


def test_several_processes_find_every_gradient(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        s = lsm()
        wrapped = dist.wrap(s, torch.device("cpu"))
        assert isinstance(wrapped, DistributedDataParallel)
        alone = copy.deepcopy(s)
        for i, b in enumerate((SemiBatch(batch().labeled), batch(), batch())):
            for module in (wrapped, alone):
                out = module(b, i)  # raises where the step before left a parameter without its gradient
                torch.stack(list(out.losses.values())).sum().backward()
        for (key, p), q in zip(s.named_parameters(), alone.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6), key
    finally:
        torch.distributed.destroy_process_group()


def test_running_statistics_are_those_of_full_size_images() -> None:
    s, plain = lsm(), strategy("unbiased_teacher", "fcos", HALF, box_loss=True, tau=RANGE["fcos"][1], nms=0.6)
    step(s)
    step(plain)  # type: ignore[arg-type]
    for key, value in plain.student.state_dict().items():
        assert torch.equal(s.student.state_dict()[key], value), key
    assert s.student.state_dict()["backbone.net.bn1.num_batches_tracked"] == 2


def test_the_teacher_follows_the_student_and_has_no_second_classifier() -> None:
    s = lsm()
    assert set(s.networks()) == {"student", "teacher"}
    for network in s.networks().values():
        assert set(network.state_dict()) == set(s.student.state_dict())
        assert not any("aux" in k for k in network.state_dict())
    with torch.no_grad():
        s.student.cls_logits.bias += 1
    s.after_step(0)
    assert torch.equal(s.teacher.cls_logits.bias, s.student.cls_logits.bias)


# ---- edges


@pytest.mark.parametrize("case", ["no box", "empty range", "no label"])
def test_nothing_to_learn_from(name: str, case: str) -> None:
    if case == "no box":
        s = lsm(name, alpha=1.0, tau=1.0)
    elif case == "empty range":
        s = lsm(name, alpha=RANGE[name][1] * 0.999, tau=RANGE[name][1] * 0.999 + 1e-9)
    else:
        s = lsm(name)
    b = batch()
    if case == "no label":
        b.labeled.targets = [Instances.empty(), Instances.empty()]
    out = step(s, b)
    if case == "no box":
        assert (float(out.stats["pseudo/pim_per_image"]), float(out.stats["distill/per_image"])) == (0, 0)
        assert out.losses["unsup/distill"].item() == 0
    assert all(torch.isfinite(v) for v in out.losses.values())
    unsupervised(out.losses).backward()
    assert all(torch.isfinite(p.grad).all() for p in s.parameters() if p.grad is not None)


@pytest.mark.parametrize(("height", "width"), [(61, 75), (64, 33), (97, 64)])
def test_odd_sizes(name: str, height: int, width: int) -> None:
    s = lsm(name)
    generator = torch.Generator().manual_seed(0)

    def odd(flip: bool) -> View:
        images = torch.randint(0, 255, (2, 3, height, width), dtype=torch.uint8, generator=generator)
        sizes = torch.tensor([[height, width], [height - 4, width - 7]])
        matrix = torch.eye(3, dtype=torch.float64).repeat(2, 1, 1)
        if flip:
            matrix[:, 0, 0], matrix[:, 0, 2] = -1, sizes[:, 1].double()
        return View(images, sizes, matrix, [Instances.empty()] * 2, [0, 1])

    labeled = odd(False)
    labeled.targets = [Instances(torch.tensor([[4.0, 4, 30, 40]]), torch.tensor([1])), Instances.empty()]
    out = step(s, SemiBatch(labeled, odd(False), odd(True)))
    assert all(torch.isfinite(v) for v in out.losses.values())
    assert out.stats["pseudo/pim_per_image"] > 0
    torch.stack(list(out.losses.values())).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in s.parameters() if p.grad is not None)


def test_half_size_outputs_are_in_the_full_frame() -> None:
    s = lsm().eval()
    v = view(1)
    with torch.no_grad():
        half, full = s.half_output(v), s.student_output(v)
    assert half.pyramid.frame == full.pyramid.frame == (SIZE, SIZE)
    assert torch.equal(half.anchors, full.anchors)
    assert half.spans == full.spans


# ---- refusals


@pytest.mark.parametrize(
    ("detector_options", "options", "message"),
    [
        ({}, {"pim": False}, r"set strategy.pim=true, or strategy.distill=false, too\.$"),
        ({"half_scale": False}, {}, r"set detector.half_scale=true, or strategy.pim=false strategy.distill=false\.$"),
        ({}, {"alpha": 0.8, "tau": 0.7}, r"strategy.alpha=0.8 is above strategy.tau=0.7.*lower strategy.alpha\.$"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(name, detector_options, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=message) as error:
        lsm(name, detector_options, **options)
    assert "\n" not in str(error.value)


# ---- checkpoints


@pytest.fixture
def run(tiny: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A run of seconds whose unlabelled images are a plain folder: pictures without any boxes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(draw_image(np.random.default_rng(i))[0]).resize((PICTURE - 7 * i, 65)).save(folder / f"{i}.png")
    return tiny | {
        "labeled": "all",
        "unlabeled": str(folder),
        "detector": {"name": "fcos", "fpn_channels": 32, "head_convs": 1, "half_scale": True},
        "strategy": {"name": "lsm", "alpha": 0.002, "tau": 0.02},
    }


@pytest.mark.fault(18)
def test_a_resumed_run_equals_one_that_was_never_stopped(run: dict[str, Any]) -> None:
    whole = SemiTrainer(load_config("train", run | {"name": "whole"}))
    assert len(whole.data.unlabeled) == 6
    whole.train()
    halves = SemiTrainer(load_config("train", run | {"name": "halves"}))
    inner = halves._step

    def asked(*args: Any) -> bool:
        done = inner(*args)
        if halves.step + 1 == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    halves._step = asked  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        halves.train()
    resumed = SemiTrainer(load_config("train", {"resume": str(halves.folder)}))
    assert resumed.step == 4
    resumed.train()

    a, b = (load_checkpoint(t.folder / "weights" / "last.pt") for t in (whole, resumed))
    state = a["train"]["strategy"]
    aux = [k for k in state if k.startswith("aux.")]
    assert len(aux) == len(list(whole.strategy.aux.state_dict()))  # type: ignore[union-attr,arg-type]
    assert all(not torch.equal(state[k], state[f"student.{k[4:]}"]) for k in aux if k.endswith("weight"))
    assert all(torch.equal(v, b["train"]["strategy"][k]) for k, v in state.items())
    moments = (c["train"]["optimizer"]["state"] for c in (a, b))
    for one, other in zip(*(m.values() for m in moments), strict=True):
        assert torch.equal(one["momentum_buffer"], other["momentum_buffer"])

    best = load_checkpoint(whole.folder / "weights" / "best.pt")
    assert set(best["networks"]) == {"student", "teacher"}
    assert "train" not in best
    plain = {k.partition(".")[2] for k in state if k.startswith("student.")}
    assert all(set(weights) == plain for weights in best["networks"].values())
    load_detector(whole.folder / "weights" / "best.pt")
