"""Checkpoints of models with other backbones."""

import pytest
import torch
from torch import nn

from mmattn.checkpoint import CheckpointError, load_checkpoint


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.fixture
def path(tmp_path):
    """A file of a training, with the prefix of DDP's wrapper."""
    state = {f'module.{name}': value for name, value in model().state_dict().items()}
    torch.save(dict(state_dict=state, meta=dict(epoch=3)), tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


def state_of(path):
    state = torch.load(path)['state_dict']
    return {name.removeprefix('module.'): value for name, value in state.items()}


def test_weights_are_taken_by_name(path):
    loaded, expected = model(), state_of(path)
    report = load_checkpoint(loaded, path)
    assert report.loaded == list(expected) and not report.fresh and not report.dropped
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, expected[name])


def test_a_prefix_chooses(path):
    loaded, expected = nn.Conv2d(3, 4, 1), state_of(path)
    load_checkpoint(loaded, path, prefix='0')
    assert torch.equal(loaded.weight, expected['0.weight'])


def test_what_does_not_fit_is_an_error_or_reported(path):
    larger = nn.Sequential(*model(), nn.Conv2d(4, 4, 1))
    with pytest.raises(CheckpointError, match=r'the Sequential: it lacks 2 names .* 2\.weight'):
        load_checkpoint(larger, path)
    assert load_checkpoint(larger, path, strict=False).fresh == ['2.weight', '2.bias']
    smaller = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(CheckpointError, match=r'it has 5 names that .* such as 1\.weight'):
        load_checkpoint(smaller, path)
    assert '1.bias' in load_checkpoint(smaller, path, strict=False).dropped
    with pytest.raises(CheckpointError, match=r'size mismatch for 0\.weight'):
        load_checkpoint(nn.Sequential(nn.Conv2d(3, 5, 1)), path)
