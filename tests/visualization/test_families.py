"""Arrays of each family: chosen windows, sampling points, top keys, kept patches."""

import itertools

import numpy as np
import pytest
import torch
from helpers.small_backbones import small_backbone

from mmattn.attention import QuadTreeAttention
from mmattn.visualization import (
    attention_across,
    attention_maps,
    capture,
    chosen_window,
    kept_patches,
    sampling_points,
    top_keys,
)


@torch.no_grad()
def look(family):
    model = small_backbone(family)
    with capture(model) as seen:
        model(torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    return seen


@pytest.mark.parametrize('kind', ['local', 'shifted'])
def test_chosen_window_contains_all_attention_of_the_query(kind):
    block = look('dat').block(1, kind)
    query = (5, 6)
    window = chosen_window(block, query)
    whole = attention_maps(block, [query])[0]
    np.testing.assert_allclose(
        whole[:, window.rows][:, :, window.columns], window.weights, rtol=1e-5
    )
    np.testing.assert_allclose(whole.sum((1, 2)), window.weights.sum((1, 2)), rtol=1e-5)
    assert query[0] in window.rows and query[1] in window.columns
    assert window.mean_weights.shape == window.weights.shape


def test_sampling_points_are_in_pixels():
    block = look('dat').block(2, 'deformable')
    points = sampling_points(block)
    assert points.references.shape == (4, 6, 2) and points.positions.shape == (2, 4, 6, 2)
    # DAT's grid starts half a step from the border, between the centers of the outer tokens.
    first, last = points.references[0, 0], points.references[-1, -1]
    np.testing.assert_allclose(first, [8 + (1 / 6) * 5 * 8, 8 + (1 / 4) * 3 * 8], rtol=1e-5)
    np.testing.assert_allclose(first + last, [96, 64], rtol=1e-5)
    # Offsets are limited to two steps of the grid.
    moves = np.abs(points.positions - points.references)
    assert moves.max() > 0.1
    assert (moves <= [2 / 6 * 5 * 8 + 1e-3, 2 / 4 * 3 * 8 + 1e-3]).all()


def test_top_keys_have_the_highest_attention_of_each_head():
    block = look('dat').block(2, 'deformable')
    keys = top_keys(block, (1, 2), num=5)
    assert keys.points.shape == (4, 5, 2) and keys.weights.shape == (4, 5)
    assert (np.diff(keys.weights, axis=1) <= 0).all()
    everything = top_keys(block, (1, 2), num=100)
    assert everything.weights.shape == (4, 24)
    np.testing.assert_allclose(everything.weights.sum(1), 1, rtol=1e-5)
    positions = sampling_points(block).positions
    for head in range(4):  # heads 0 and 1 are group 0
        sampled = positions[head // 2].reshape(-1, 2)
        distance = np.linalg.norm(sampled - keys.points[head, 0], axis=1)
        assert distance.min() < 1e-3


def test_kept_patches_are_children_of_kept_patches():
    block = look('quadtree').block(0)
    levels = kept_patches(block.module, block.inputs[0], (9, 13))
    assert [(level.level, level.cell, level.query) for level in levels] == [
        (3, 8, (1, 1)),
        (2, 4, (2, 3)),
        (1, 2, (4, 6)),
    ]
    for coarse, fine in itertools.pairwise(levels):
        parents = {tuple(patch) for patch in coarse.patches[0]}
        assert {tuple(patch // 2) for patch in fine.patches[0]} <= parents
    # The finest level attends only to tokens in the patches kept at level 1.
    details = block.module.details(block.inputs[0], queries=torch.tensor([9 * 24 + 13]))
    finest = details.weights[-1][0, 0, 0]
    kept = torch.zeros(16, 24, dtype=bool)
    for row, column in levels[-1].patches[0] * 2:
        kept[row : row + 2, column : column + 2] = True
    assert finest[kept].min() > 0 and not finest[~kept].any()


def test_attention_between_two_images():
    torch.manual_seed(0)
    attention = QuadTreeAttention(16, 2, num_levels=3, topks=3).eval()
    for parameter in (attention.q_proj.weight, attention.k_proj.weight):
        parameter.data *= 30
    first, second = torch.randn(1, 8, 8, 16), torch.randn(1, 12, 16, 16)
    share = attention_across(attention, first, (2, 5), second)
    assert share.shape == (2, 12, 16)
    with torch.no_grad():
        values = attention.v_proj(second)[0].unflatten(2, (2, 8))
        out = torch.einsum('hyx,yxhd->hd', torch.from_numpy(share), values).flatten()
        whole = attention(first, second)[0, 2, 5]
        torch.testing.assert_close(attention.proj(out), whole, atol=1e-5, rtol=1e-4)
    levels = kept_patches(attention, first, (2, 5), second)
    assert levels[0].patches.max(axis=(0, 1)).tolist() <= [2, 3]
