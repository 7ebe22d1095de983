"""DAT checkpoints: buffers of the published files, two kinds of tables, DAT against DAT++."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import published
from helpers.published import SMALL
from torch import nn

from mmattn.backbones import DAT
from mmattn.checkpoint import CheckpointError, load_checkpoint


def small(kind='dat', seed=0, **options):
    torch.manual_seed(seed)
    model = DAT(SMALL[kind], **dict(img_size=96, window_size=3) | options)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def assert_same_values(model, expected):
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


def test_masks_and_indices_of_a_file_are_ignored():
    """Buffers of the file fit one image size; the model computes them for each map."""
    source, x = small(), torch.randn(1, 3, 97, 130)
    state = published.dat_names(source.state_dict())
    ours = ('relative_position_index', 'attn_mask')
    buffers = {name for name in state if name.endswith(ours)}
    assert {name.rpartition('.')[2] for name in buffers} == set(ours)
    model = small(seed=1)
    report = load_checkpoint(model, state)
    expected = {re.sub(r'attns\.(\d+)', r'blocks.\1.attn', name) for name in buffers}
    assert report.dropped == {f'backbone.{name}': 'built by the model' for name in expected}
    assert not report.fresh and not report.resized
    for a, b in zip(model(x), source(x), strict=True):
        assert torch.equal(a, b)


def test_bias_tables_are_resized_bicubically_for_other_windows():
    """Windows of 7 and 12, as in fine-tuning at 384."""
    state = published.dat_names(small(window_size=7).state_dict())
    model = small(seed=1, window_size=12)
    report = load_checkpoint(model, state)
    assert len(report.resized) == 7 and not report.fresh
    name = 'stages.2.blocks.0.attn.relative_position_bias_table'
    assert report.resized[f'backbone.{name}'] == ((169, 4), (529, 4))
    image = state['stages.2.attns.0.relative_position_bias_table'].t().reshape(1, 4, 13, 13)
    expected = F.interpolate(image, size=(23, 23), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.state_dict()[name], expected.view(4, -1).t())


@pytest.mark.parametrize('kind', ['dat', 'dat++'])
def test_deformable_tables_serve_images_of_any_size(kind):
    """Tables are loaded unchanged: they are sampled in normalized coordinates."""
    source, model = small(kind), small(kind, seed=1)
    report = load_checkpoint(model, published.dat_names(source.state_dict()))
    assert not report.resized
    tables = [name for name in source.state_dict() if name.endswith('position_bias.table')]
    assert tables and all(
        torch.equal(model.state_dict()[name], source.state_dict()[name]) for name in tables
    )
    for size in ((96, 96), (192, 192), (65, 130)):
        x = torch.randn(1, 3, *size)
        assert all(torch.equal(a, b) for a, b in zip(model(x), source(x), strict=True))


@pytest.mark.parametrize('kind', ['dat', 'dat++'])
def test_deformable_tables_are_resampled_for_other_images(kind):
    """A larger img_size has finer tables, interpolated as the authors fine-tune at 384."""
    source, model = small(kind), small(kind, seed=1, img_size=192)
    report = load_checkpoint(model, published.dat_names(source.state_dict()))
    name = 'stages.2.blocks.1.attn.position_bias.table'
    assert report.resized[f'backbone.{name}'] == ((4, 11, 11), (4, 23, 23))
    assert set(report.resized) == {
        f'backbone.{name}' for name in source.state_dict() if name.endswith('position_bias.table')
    }
    before, after = source.state_dict()[name], model.state_dict()[name]
    expected = F.interpolate(before[None], size=(23, 23), mode='bicubic', align_corners=False)
    torch.testing.assert_close(after, expected[0])


def test_a_file_of_the_other_generation_does_not_fit():
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'published dat backbone .* does not fit'):
        load_checkpoint(model, published.dat_names(small('dat++').state_dict()))
    with pytest.raises(CheckpointError, match='is no dat'):
        load_checkpoint(model, {'stages.0.blocks.0.attn.qkv.weight': torch.zeros(3)})
    assert_same_values(model, before)


@pytest.mark.parametrize(
    'position_bias, names',
    [
        ('fixed', {'pairs': '.bias'}),
        ('depthwise', {'conv.weight': '.weight', 'conv.bias': '.bias'}),
        ('log_cpb', {f'mlp.{part}': f'.mlp.{part}' for part in ('0.weight', '0.bias', '2.weight')}),
    ],
)
def test_ablations_of_0_1_0(position_bias, names):
    """Its position biases were all named rpe_table, whatever they were."""
    arch = dict(SMALL['dat'], position_bias=position_bias)
    source, model = (DAT(arch, img_size=96, window_size=3) for _ in range(2))
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    state = published.dat_names(source.state_dict())
    for ours, theirs in names.items():
        for name in [name for name in state if name.endswith(f'.position_bias.{ours}')]:
            state[name.removesuffix(f'.position_bias.{ours}') + f'.rpe_table{theirs}'] = state.pop(
                name
            )
    assert sum('.rpe_table' in name for name in state) == 3 * len(names)
    report = load_checkpoint(model, state)
    assert not report.fresh and not report.resized
    assert_same_values(model, source.state_dict())
