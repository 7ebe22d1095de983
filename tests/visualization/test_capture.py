"""Recorded blocks, inputs and features of a forward pass, and arrays from them."""

import numpy as np
import pytest
import torch
from helpers.small_backbones import FAMILIES, small_backbone
from torch import nn

from mmattn.attention import WindowAttention
from mmattn.visualization import Block, attention_maps, capture, kept_patches
from mmattn.visualization.windows import received_attention, window_details

IMAGE = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def look(family):
    model = small_backbone(family)
    with capture(model) as seen:
        outputs = model(IMAGE)
    return model, seen, outputs


def test_blocks_are_recorded_in_order():
    model, seen, outputs = look('gcvit')
    found = [(block.stage, block.index, block.kind, block.size) for block in seen.blocks]
    assert found == [
        (0, 0, 'local', (16, 24)),
        (0, 1, 'global', (16, 24)),
        (1, 0, 'local', (8, 12)),
        (1, 1, 'global', (8, 12)),
        (2, 0, 'local', (4, 6)),
        (2, 1, 'global', (4, 6)),
        (3, 0, 'local', (2, 3)),
    ]
    assert seen.input_size == (64, 96)
    for feature, output in zip(seen.features, outputs, strict=True):
        torch.testing.assert_close(feature, output[:1])
    assert [block.stride for block in seen.blocks[::2]] == [4, 8, 16, 32]
    block = seen.blocks[2]
    assert (
        block.token(0, 0) == (0, 0)
        and block.token(63, 95) == (7, 11)
        and block.token(17, 8) == (2, 1)
    )
    before = list(seen.blocks)
    model(IMAGE)
    assert seen.blocks == before, 'hooks must be removed after the with statement'


@pytest.mark.parametrize(
    'family, kinds',
    [
        ('dat', {'local', 'shifted', 'deformable'}),
        ('dat++', {'neighborhood', 'deformable'}),
        ('quadtree', {'quadtree'}),
    ],
)
def test_kinds_of_each_family(family, kinds):
    _, seen, _ = look(family)
    assert {block.kind for block in seen.blocks} == kinds
    assert [block.stage for block in seen.blocks] == sorted(block.stage for block in seen.blocks)
    assert seen.blocks[-1].stage == 3


@pytest.mark.parametrize('family', FAMILIES)
def test_compiled_operators_give_the_arrays_of_the_reference(family, monkeypatch):
    results = {}
    for mode in ('compiled', 'reference'):
        monkeypatch.setenv('MMATTN_OPS', mode)
        _, seen, _ = look(family)
        arrays = []
        for block in seen.blocks:
            middle = tuple(side // 2 for side in block.size)
            arrays.append(attention_maps(block, [(0, 0), middle]))
            if block.kind in ('local', 'shifted', 'global'):
                arrays.append(received_attention(block))
            if block.kind == 'quadtree':
                levels = kept_patches(block.module, block.inputs[0], middle)
                arrays += [level.patches for level in levels] + [level.scores for level in levels]
        results[mode] = arrays
    assert len(results['compiled']) >= 4
    for compiled, reference in zip(results['compiled'], results['reference'], strict=True):
        np.testing.assert_allclose(compiled, reference, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_received_attention_is_the_mean_over_queries():
    _, seen, _ = look('gcvit')
    block = seen.block(1, 'global')
    everywhere = [(y, x) for y in range(8) for x in range(12)]
    given = attention_maps(block, everywhere).mean(0) * len(everywhere)
    np.testing.assert_allclose(received_attention(block), given, rtol=1e-4)
    np.testing.assert_allclose(received_attention(block).mean((1, 2)), 1, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('shift', [0, 4])
def test_uniform_attention_is_average_everywhere(shift):
    """Also next to padding, and in windows that the shift masks."""
    module = WindowAttention(8, 2, 8, shift)
    for parameter in module.parameters():
        parameter.zero_()
    x = torch.randn(1, 12, 17, 8)
    block = Block(0, 0, 'shifted', module, (x,), (12, 17))
    np.testing.assert_allclose(received_attention(block), 1, rtol=1e-5)


@torch.no_grad()
def test_attention_of_mmdets_swin():
    from mmdet.models import SwinTransformer

    torch.manual_seed(0)
    swin = SwinTransformer(
        embed_dims=16, depths=(2, 1, 1, 1), num_heads=(2, 2, 2, 2), window_size=4
    )
    swin.eval()
    with capture(swin) as seen:
        swin(IMAGE)
    assert [block.kind for block in seen.blocks] == ['local', 'shifted', 'local', 'local', 'local']
    block = seen.block(0, 'shifted')
    msa = block.module.w_msa
    x = block.inputs[0][0].unflatten(0, block.size)
    values = msa.qkv(x)[..., 32:].unflatten(-1, (2, -1))
    queries = [(0, 0), (15, 23), (7, 9)]
    maps = torch.from_numpy(attention_maps(block, queries))
    out = msa.proj(torch.einsum('nhyx,yxhd->nhd', maps, values).flatten(1))
    whole = block.module(*block.inputs)[0].unflatten(0, block.size)
    torch.testing.assert_close(out, torch.stack([whole[q] for q in queries]), atol=1e-5, rtol=1e-4)
    assert window_details(block).weights.shape == (1, 2, 16 * 24, 16)


def test_compiled_model_is_recorded():
    model = small_backbone('gcvit')
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        compiled(IMAGE)
        with capture(compiled) as seen:
            compiled(IMAGE)
    assert len(seen.blocks) == 7 and len(seen.features) == 4


def test_inputs_under_autocast_have_the_dtype_of_the_weights():
    model = small_backbone('gcvit')
    with capture(model) as seen, torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        model(IMAGE)
    assert seen.blocks[0].inputs[0].dtype == torch.float32
    assert np.isfinite(attention_maps(seen.blocks[0], [(0, 0)])).all()


def test_errors_list_the_blocks_that_exist():
    _, seen, _ = look('dat')
    with pytest.raises(
        ValueError, match=r'stage 7; there is stage 0: local \(1 head\); stage 1: local, shifted'
    ):
        seen.block(7)
    with pytest.raises(ValueError, match='no block of global attention in stage 2'):
        seen.block(2, 'global')
    with pytest.raises(TypeError, match='GCViT, DAT and QuadTree'), capture(nn.Linear(1, 1)):
        pass
