"""Tensors of more than 2**31 elements; only pages that are read take memory."""

import torch

from mmattn.ops import deform_sample, quadtree_level


def test_sampling_the_end_of_a_large_map():
    height, width = 2**16, 2**15 + 8
    x = torch.empty(1, 1, height, width, dtype=torch.float16)
    assert x.numel() > 2**31
    # Unset memory may hold NaN: cells beside the last ones may have a weight of nearly 0, and the
    # first cell is read with weight 0 in place of cells outside.
    x[..., -4:, -4:] = x[..., 0, 0] = 0
    x[..., -2:, -2:] = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    half_a_cell = torch.tensor([1 / (height - 1), 1 / (width - 1)])
    positions = torch.stack([torch.ones(2), 1 - half_a_cell]).view(1, 1, 2, 2)
    out = deform_sample(x, positions)
    assert out[0, 0, 0] == 4
    # float32 positions resolve 2**-24 of the map, 1/256 of a cell here.
    assert abs(out[0, 0, 1].item() - 2.5) < 0.02


def test_keys_at_the_end_of_a_large_pyramid():
    d, count = 64, 2**25 + 64
    keys, values = (torch.empty(1, count, 1, d, dtype=torch.float16) for _ in range(2))
    assert keys.numel() > 2**31
    generator = torch.Generator().manual_seed(0)
    last = torch.randn(2, 1, 8, 1, d, generator=generator).half()
    keys[:, -8:], values[:, -8:] = last
    queries = torch.randn(1, 1, 4, 1, d, generator=generator).half()
    parents = torch.tensor([count // 4 - 1, count // 4 - 2]).view(1, 1, 2, 1)
    messages, indices, _ = quadtree_level(queries, keys, values, parents, topk=3)
    small = quadtree_level(queries, *last, parents - (count // 4 - 2), topk=3)
    assert torch.equal(messages, small[0])
    assert torch.equal(indices, small[1] + count - 8)
