"""Attention maps reproduce the modules' outputs when they are multiplied with the values."""

import numpy as np
import pytest
import torch
from torch import nn

from mmattn.attention import (
    DeformableAttention,
    GlobalWindowAttention,
    NeighborhoodAttention,
    QuadTreeAttention,
    WindowAttention,
)
from mmattn.attention.window import window_tokens
from mmattn.visualization import attention_maps
from mmattn.visualization.capture import Block
from mmattn.visualization.deformable import sampling_points

DIM, HEADS, SIZE = 16, 2, (10, 13)
QUERIES = [(0, 0), (9, 12), (4, 7), (5, 6), (0, 12), (8, 1), (3, 3), (7, 9), (6, 2)]


@pytest.fixture(params=['compiled', 'reference'], autouse=True)
def backend(request, monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', request.param)


def drawn(module):
    """Initialize a module so that its attention is not uniform, and padding contributes nothing."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, std=0.02 if name.startswith('offsets') else 0.5)
        if 'bias' in name and parameter.ndim == 1:
            nn.init.zeros_(parameter)
    return module.eval()


def block(module, kind, *inputs, size=SIZE):
    return Block(1, 0, kind, module, inputs, size)


def shares_times_values(maps, values):
    """Weighted sums (n, C) of values (H, W, C), by attention (n, heads, H, W)."""
    values = values.unflatten(-1, (HEADS, -1))
    return torch.einsum('nhyx,yxhd->nhd', torch.from_numpy(maps), values).flatten(1)


def at(output, queries=QUERIES):
    """Values of a map (H, W, C) at the queries, (n, C)."""
    return torch.stack([output[y, x] for y, x in queries])


def agree(maps, values, project, output, queries=QUERIES):
    torch.testing.assert_close(
        project(shares_times_values(maps, values)), at(output, queries), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize('window', [4, 7, 16])
@pytest.mark.parametrize('shift', [0, 2])
@torch.no_grad()
def test_windows(window, shift):
    module = drawn(WindowAttention(DIM, HEADS, window, shift))
    x = torch.randn(1, *SIZE, DIM)
    maps = attention_maps(block(module, 'local', x), QUERIES)
    values = module.qkv(x)[0, ..., 2 * DIM :]
    agree(maps, values, module.proj, module(x)[0])
    inside = maps.sum((2, 3))
    assert inside.max() < 1 + 1e-5 and inside.min() > 0
    assert ((maps > 0).sum((2, 3)) <= window**2).all()


@torch.no_grad()
def test_global_query():
    module = drawn(GlobalWindowAttention(DIM, HEADS, 7))
    x, query = torch.randn(1, *SIZE, DIM), torch.randn(1, 7, 7, DIM)
    maps = attention_maps(block(module, 'global', x, query), QUERIES)
    agree(maps, module.qkv(x)[0, ..., DIM:], module.proj, module(x, query)[0])


@pytest.mark.parametrize('size', [SIZE, (5, 9)])
@torch.no_grad()
def test_neighborhood(size):
    module = drawn(NeighborhoodAttention(DIM, HEADS, 7))
    x = torch.randn(1, *size, DIM)
    queries = [(y, x) for y, x in QUERIES if y < size[0] and x < size[1]]
    maps = attention_maps(block(module, 'neighborhood', x, size=size), queries)
    values = module.qkv(x)[0, ..., 2 * DIM :]
    agree(maps, values, module.proj, module(x)[0], queries)


@pytest.mark.parametrize('bias', ['table', 'fixed', 'log_cpb', 'none'])
@pytest.mark.parametrize('plus_plus', [False, True])
@torch.no_grad()
def test_deformable(bias, plus_plus):
    # One group: the values of a head mix the samples of all groups, so that attention alone does
    # not determine the output.
    module = DeformableAttention(
        DIM, HEADS, 1, 7, stride=2, offset_range=None, plus_plus=plus_plus, position_bias=bias
    )
    drawn(module)
    x = torch.randn(1, *SIZE, DIM)
    maps = attention_maps(block(module, 'deformable', x), QUERIES)
    agree(maps, module.v_proj(x)[0], module.proj, module(x)[0])


@torch.no_grad()
def test_positions_without_offsets_are_the_references():
    module = drawn(DeformableAttention(DIM, HEADS, 2, 7, offset_range=None))
    with torch.no_grad():
        module.offsets.proj.weight.zero_()
    x = torch.randn(1, *SIZE, DIM)
    still = attention_maps(block(module, 'deformable', x), QUERIES)
    np.testing.assert_allclose(still.sum((2, 3)), 1, rtol=1e-5)  # all references are inside the map
    points = sampling_points(block(module, 'deformable', x))
    np.testing.assert_allclose(points.positions[0], points.references, atol=1e-4)


@torch.no_grad()
def test_deformable_details_of_some_queries_equal_those_of_all():
    module = drawn(DeformableAttention(DIM, HEADS, 2, 7))
    x = torch.randn(2, *SIZE, DIM)
    chosen = torch.tensor([5, 0, 129])
    everything = module.details(x).weights
    torch.testing.assert_close(module.details(x, chosen).weights, everything[:, :, chosen])


@pytest.mark.parametrize('attn_type', ['A', 'B'])
@pytest.mark.parametrize('levels', [1, 3])
def test_quadtree(attn_type, levels):
    weights = attn_type == 'B'
    module = drawn(QuadTreeAttention(DIM, HEADS, levels, 3, attn_type, level_weights=weights))
    x = torch.randn(1, 8, 12, DIM)
    queries = [(0, 0), (7, 11), (3, 4), (5, 5), (2, 9), (6, 1), (7, 0), (0, 11), (1, 1)]
    with torch.no_grad():
        maps = attention_maps(block(module, 'quadtree', x, size=(8, 12)), queries)
        agree(maps, module.v_proj(x)[0], module.proj, module(x)[0], queries)
    if attn_type == 'B':
        np.testing.assert_allclose(maps.sum((2, 3)), 1, rtol=1e-5)


def test_quadtree_on_a_padded_map():
    module = drawn(QuadTreeAttention(DIM, HEADS, 3, 4, level_weights=True))
    x = torch.randn(1, *SIZE, DIM)
    maps = attention_maps(block(module, 'quadtree', x), QUERIES)
    assert maps.shape == (len(QUERIES), HEADS, *SIZE)
    # A coarse patch at the border covers padding; patches of padding alone get no attention.
    assert maps.sum((2, 3)).max() < 1 + 1e-5 and maps.sum((2, 3)).min() > 0.5


@pytest.mark.parametrize('query', [(10, 0), (0, 13), (-1, 0)])
def test_query_outside_the_map_is_an_error(query):
    module = drawn(WindowAttention(DIM, HEADS, 7))
    with pytest.raises(ValueError, match='10 x 13 tokens'):
        attention_maps(block(module, 'local', torch.randn(1, *SIZE, DIM)), [query])


def test_window_tokens_contain_each_token_once():
    for shift in (0, 3):
        layout = window_tokens(10, 13, 7, shift)
        assert layout.shape == (4, 49)
        assert sorted(layout[layout >= 0].tolist()) == list(range(130))
    assert window_tokens(4, 4, 2)[1].tolist() == [2, 3, 6, 7]
    assert window_tokens(4, 4, 2, 1)[0].tolist() == [5, 6, 9, 10]
