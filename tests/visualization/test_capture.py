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


def test_blocks_are_those_that_ran():
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
    assert seen.blocks == before, 'the hooks are gone after the with statement'


@pytest.mark.parametrize(
    'family, kinds',
    [
        ('dat', {'local', 'shifted', 'deformable'}),
        ('dat++', {'neighborhood', 'deformable'}),
        ('quadtree', {'quadtree'}),
    ],
)
def test_families_have_their_kinds(family, kinds):
    _, seen, _ = look(family)
    assert {block.kind for block in seen.blocks} == kinds
    assert [block.stage for block in seen.blocks] == sorted(block.stage for block in seen.blocks)
    assert seen.blocks[-1].stage == 3


@pytest.mark.parametrize('family', FAMILIES)
def test_compiled_operators_show_what_literal_ones_do(family, monkeypatch):
    shown = {}
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
        shown[mode] = arrays
    assert len(shown['compiled']) >= 4
    for compiled, literal in zip(shown['compiled'], shown['reference'], strict=True):
        np.testing.assert_allclose(compiled, literal, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_received_attention_is_what_the_queries_give():
    _, seen, _ = look('gcvit')
    block = seen.block(1, 'global')
    everywhere = [(y, x) for y in range(8) for x in range(12)]
    given = attention_maps(block, everywhere).mean(0) * len(everywhere)
    np.testing.assert_allclose(received_attention(block), given, rtol=1e-4)
    np.testing.assert_allclose(received_attention(block).mean((1, 2)), 1, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize('shift', [0, 4])
def test_even_attention_is_average_everywhere(shift):
    """Also beside padding, and where the shift masks half of a window."""
    module = WindowAttention(8, 2, 8, shift)
    for parameter in module.parameters():
        parameter.zero_()
    x = torch.randn(1, 12, 17, 8)
    block = Block(0, 0, 'shifted', module, (x,), (12, 17))
    np.testing.assert_allclose(received_attention(block), 1, rtol=1e-5)


@torch.no_grad()
def test_swin_of_mmdet_is_shown_as_it_attends():
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


def test_what_is_compiled_is_seen():
    model = small_backbone('gcvit')
    compiled = torch.compile(model, backend='eager')
    with torch.no_grad():
        compiled(IMAGE)
        with capture(compiled) as seen:
            compiled(IMAGE)
    assert len(seen.blocks) == 7 and len(seen.features) == 4


def test_under_autocast_the_inputs_come_back_in_the_dtype_of_the_weights():
    model = small_backbone('gcvit')
    with capture(model) as seen, torch.autocast('cpu', torch.bfloat16), torch.no_grad():
        model(IMAGE)
    assert seen.blocks[0].inputs[0].dtype == torch.float32
    assert np.isfinite(attention_maps(seen.blocks[0], [(0, 0)])).all()


def test_what_is_not_there_is_named_with_what_is():
    _, seen, _ = look('dat')
    with pytest.raises(
        ValueError, match=r'stage 7; there is stage 0: local \(1 head\); stage 1: local, shifted'
    ):
        seen.block(7)
    with pytest.raises(ValueError, match='no block of global attention in stage 2'):
        seen.block(2, 'global')
    with pytest.raises(TypeError, match='GCViT, DAT and QuadTree'), capture(nn.Linear(1, 1)):
        pass
