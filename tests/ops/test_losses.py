import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from ssod.ops.losses import centerness, focal_loss


def test_focal_by_hand():
    # logit 0: p = 0.5, BCE = ln 2. Background: 0.75 * 0.5^2 * ln 2; positive: 0.25 * 0.5^2 * ln 2
    logits = torch.zeros(1, 2)
    ln2 = 0.693147
    assert focal_loss(logits, torch.tensor([2])).item() == pytest.approx(2 * 0.75 * 0.25 * ln2, rel=1e-5)
    assert focal_loss(logits, torch.tensor([0])).item() == pytest.approx((0.25 + 0.75) * 0.25 * ln2, rel=1e-5)
    assert focal_loss(logits, torch.tensor([-1])).item() == 0


def test_focal_equals_torchvision_with_weights_and_gradient():
    torch.manual_seed(0)
    logits = (torch.randn(200, 5) * 4).requires_grad_()
    labels, weight = torch.randint(0, 6, (200,)), torch.rand(200)
    one_hot = F.one_hot(labels, 6)[:, :5].float()
    theirs = (sigmoid_focal_loss(logits, one_hot, 0.25, 2) * weight[:, None]).sum()
    ours = focal_loss(logits, labels, weight)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)))


@pytest.mark.parametrize(
    ("rows", "gamma", "dtype"), [(30_000, 2.0, None), (7, 1.5, None), (30_000, 2.0, torch.bfloat16)]
)
def test_focal_in_pieces_equals_the_formula(rows, gamma, dtype):
    torch.manual_seed(1)
    logits = (torch.randn(rows, 5) * 3).to(dtype or torch.float32).requires_grad_()  # 30,000 rows are three pieces
    labels, weight = torch.randint(-1, 6, (rows,)), torch.rand(rows)
    x, t = logits.float(), F.one_hot(labels.clamp(min=0), 6)[:, :5].float()
    p = x.sigmoid()
    wrong = torch.where(t == 1, 1 - p, p)
    every = torch.where(t == 1, 0.3, 0.7) * wrong**gamma * F.binary_cross_entropy_with_logits(x, t, reduction="none")
    direct = (every * (weight * (labels >= 0))[:, None]).sum() / 3
    ours = focal_loss(logits, labels, weight, alpha=0.3, gamma=gamma) / 3
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, direct)
    mine, plain = (torch.autograd.grad(loss, logits)[0].float() for loss in (ours, direct))
    torch.testing.assert_close(mine, plain, **({"rtol": 0.02, "atol": 1e-3} if dtype else {}))


def test_focal_is_finite_for_extreme_logits():
    logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
    for label in (0, 1, 2):
        loss = focal_loss(logits, torch.tensor([label]))
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, logits)[0]).all()


def test_centerness_by_hand():
    # left 1, right 3, top 2, bottom 2: sqrt(1/3 * 2/2)
    assert centerness(torch.tensor([[1.0, 2, 3, 2]])).item() == pytest.approx((1 / 3) ** 0.5)
    assert centerness(torch.zeros(0, 4)).shape == (0,)
