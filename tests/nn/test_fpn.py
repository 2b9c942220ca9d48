import torch

from ssod.nn.fpn import FPN, ConvLevels, PoolLevel


def maps(height: int, width: int) -> dict[int, torch.Tensor]:
    return {s: torch.randn(1, s, -(-height // s), -(-width // s)) for s in (8, 16, 32)}


def test_conv_levels_add_two_strides():
    fpn = FPN({8: 8, 16: 16, 32: 32}, 12, ConvLevels(12))
    out = fpn(maps(128, 96))
    assert {s: tuple(m.shape[1:]) for s, m in out.items()} == {
        8: (12, 16, 12), 16: (12, 8, 6), 32: (12, 4, 3), 64: (12, 2, 2), 128: (12, 1, 1)
    }  # fmt: skip


def test_pool_level_takes_every_second_cell():
    out = FPN({8: 8, 16: 16, 32: 32}, 12, PoolLevel())(maps(96, 96))
    assert list(out) == [8, 16, 32, 64]
    assert torch.equal(out[64], out[32][:, :, ::2, ::2])


def test_sizes_that_no_stride_divides():
    out = FPN({8: 8, 16: 16, 32: 32}, 12, ConvLevels(12))(maps(75, 50))
    for stride, m in out.items():
        assert m.shape[-2:] == (-(-75 // stride), -(-50 // stride))


def test_coarse_maps_reach_fine_levels_but_not_the_other_way():
    fpn = FPN({8: 8, 16: 16, 32: 32}, 12, PoolLevel())
    base = maps(64, 64)
    out = fpn(base)
    coarse = fpn({**base, 32: base[32] + 1})
    fine = fpn({**base, 8: base[8] + 1})
    assert not torch.allclose(out[8], coarse[8])
    assert torch.equal(out[32], fine[32])
