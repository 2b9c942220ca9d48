import torch

from ssod.nn.fpn import FPN, ConvLevels, PoolLevels


def maps(height: int, width: int) -> dict[int, torch.Tensor]:
    return {s: torch.randn(1, s, -(-height // s), -(-width // s)) for s in (8, 16, 32)}


def test_conv_levels_add_two_strides():
    fpn = FPN({8: 8, 16: 16, 32: 32}, 12, ConvLevels(12))
    out = fpn(maps(128, 96), (8, 16, 32, 64, 128))
    assert {s: tuple(m.shape[1:]) for s, m in out.items()} == {
        8: (12, 16, 12), 16: (12, 8, 6), 32: (12, 4, 3), 64: (12, 2, 2), 128: (12, 1, 1)
    }  # fmt: skip


def test_pool_levels_take_every_second_cell():
    out = FPN({8: 8, 16: 16, 32: 32}, 12, PoolLevels())(maps(96, 96), (8, 16, 32, 64))
    assert list(out) == [8, 16, 32, 64]
    assert torch.equal(out[64], out[32][:, :, ::2, ::2])


def test_sizes_that_no_stride_divides():
    out = FPN({8: 8, 16: 16, 32: 32}, 12, ConvLevels(12))(maps(75, 50), (8, 16, 32, 64, 128))
    for stride, m in out.items():
        assert m.shape[-2:] == (-(-75 // stride), -(-50 // stride))


def test_coarse_maps_reach_fine_levels_but_not_the_other_way():
    fpn = FPN({8: 8, 16: 16, 32: 32}, 12, PoolLevels())
    base = maps(64, 64)
    out = fpn(base, (8, 16, 32))
    coarse = fpn({**base, 32: base[32] + 1}, (8, 16, 32))
    fine = fpn({**base, 8: base[8] + 1}, (8, 16, 32))
    assert not torch.allclose(out[8], coarse[8])
    assert torch.equal(out[32], fine[32])


def test_only_what_is_wanted_is_computed():
    fpn = FPN({4: 4, 8: 8, 16: 16, 32: 32}, 12, ConvLevels(12))
    base = {4: torch.randn(1, 4, 32, 32), **maps(128, 128)}
    out = fpn(base, (8, 16, 32, 64, 128))
    assert list(out) == [8, 16, 32, 64, 128]
    sum(m.sum() for m in out.values()).backward()
    assert fpn.lateral["4"].weight.grad is None
    assert fpn.smooth["4"].weight.grad is None

    finer = fpn(base, (4, 8, 16, 32, 64))  # a half-size image: one level more below, one less above
    assert list(finer) == [4, 8, 16, 32, 64]
    fpn.zero_grad()
    sum(m.sum() for m in finer.values()).backward()
    assert fpn.extra.second.weight.grad is None
    assert fpn.extra.first.weight.grad is not None
    for stride in (8, 16, 32, 64):
        assert torch.equal(out[stride], finer[stride])


def test_strides_below_every_map_are_left_out():
    fpn = FPN({8: 8, 16: 16, 32: 32}, 12, PoolLevels())
    assert list(fpn(maps(64, 64), (4, 8, 16, 32))) == [8, 16, 32]
