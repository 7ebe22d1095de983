"""Checkpoint files of every family: found, read safely, or refused without changes."""

import io
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import published as files
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch import nn

from mmattn.backbones import DAT, GCViT, QuadTree, base
from mmattn.checkpoint import (
    CheckpointError,
    load_checkpoint,
    read_checkpoint,
    read_state_dict,
    weight_sets,
    weights_of,
)

ROOT = Path(__file__).parents[2]


def small(**options):
    return GCViT(files.SMALL['gcvit'], **options)


@pytest.fixture
def backbone():
    return small()


@pytest.fixture(scope='module')
def published():
    """State dict of a published classifier, index buffers included."""
    model = files.fill(files.build('gcvit/gcvit_t_imagenet', 'small'), seed=1)
    return files.classifier_file(model, 'gcvit')


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


# ----------------------------------------------------------------------------------------- safety


def test_loading_never_executes_a_file(tmp_path, backbone):
    marker = tmp_path / 'executed'

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    before = copy_of(backbone)
    for zipped in (True, False):
        torch.save(
            {'state_dict': backbone.state_dict(), 'extra': Attack()},
            tmp_path / 'attack.pth',
            _use_new_zipfile_serialization=zipped,
        )
        with pytest.raises(
            CheckpointError, match=r'attack\.pth holds more than tensors and plain values'
        ):
            load_checkpoint(backbone, tmp_path / 'attack.pth')
    assert not marker.exists()
    assert_unchanged(backbone, before)


def test_logs_and_options_are_read_as_plain_data(tmp_path):
    logs = HistoryBuffer(np.array([0.5, 0.25]), np.array([1, 1]))
    options = ConfigDict(model=ConfigDict(type='GCViT'))
    content = dict(logs=logs, options=options, palette=np.zeros((2, 3), np.uint8))
    torch.save(content, tmp_path / 'epoch_1.pth')
    read, _ = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert type(read['options']) is dict and read['options']['model']['type'] == 'GCViT'
    assert read['palette'].shape == (2, 3)
    assert not isinstance(read['logs'], HistoryBuffer)
    assert logs.mean() == 0.375, 'reading must not change what mmengine logs with'


@pytest.mark.parametrize('core', ['core', '_core'])
def test_numbers_of_numpy_1_and_2_are_read(tmp_path, published, core):
    """numpy 1, which wrote the files of 2022, and numpy 2 pickle numbers by other names."""
    torch.save(
        {'state_dict': published, 'metric': np.float64(83.4)},
        tmp_path / 'file.pth',
        _use_new_zipfile_serialization=False,
    )
    content = (tmp_path / 'file.pth').read_bytes()
    here = (
        b'cnumpy._core.multiarray\n' if b'cnumpy._core.' in content else b'cnumpy.core.multiarray\n'
    )
    assert here in content
    there = f'cnumpy.{core}.multiarray\n'.encode()
    (tmp_path / 'file.pth').write_bytes(content.replace(here, there))
    read, _ = read_checkpoint(tmp_path / 'file.pth')
    assert read['metric'] == 83.4


@pytest.mark.parametrize(
    'kind', ['zip', 'pickle', 'safetensors', 'text', 'empty', 'image', 'a list']
)
def test_broken_files_are_named(tmp_path, backbone, published, kind):
    file = tmp_path / 'broken.pth'
    whole = io.BytesIO()
    if kind == 'safetensors':
        files.CONTAINERS['safetensors'](published, file)
        whole = io.BytesIO(file.read_bytes())
    else:
        torch.save(published, whole, _use_new_zipfile_serialization=kind != 'pickle')
    contents = {
        'text': b'version https://git-lfs.github.com/spec/v1\n',
        'empty': b'',
        'image': b'\x89PNG\r\n\x1a\n' + bytes(100),
        'a list': pickle.dumps([1, 2, 3]),
    }
    file.write_bytes(contents.get(kind, whole.getvalue()[: whole.getbuffer().nbytes // 2]))
    before = copy_of(backbone)
    with pytest.raises(CheckpointError, match=r'broken\.pth'):
        load_checkpoint(backbone, file)
    assert_unchanged(backbone, before)


def test_safetensors_without_the_package(tmp_path, monkeypatch, backbone, published):
    files.CONTAINERS['safetensors'](published, tmp_path / 'model.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(CheckpointError, match=r'model\.safetensors needs .* pip install safetens'):
        load_checkpoint(backbone, tmp_path / 'model.safetensors')


# ------------------------------------------------------------------------ several sets of weights


def test_sets_of_weights_in_one_file():
    a, b = {'x': torch.zeros(1)}, {'x': torch.ones(1)}
    timm = {'state_dict': a, 'state_dict_ema': b, 'epoch': 1}
    assert weight_sets(timm) == {'raw': 'state_dict', 'ema': 'state_dict_ema'}
    assert weight_sets({'model': a, 'model_ema': b}) == {'raw': 'model', 'ema': 'model_ema'}
    assert weight_sets({'state_dict_ema': b}) == {'ema': 'state_dict_ema'}
    assert weight_sets(a) == weight_sets([a]) == {}
    state, _ = read_state_dict(timm)
    assert torch.equal(state['x'], a['x'])
    # mmengine's hook has put the average into state_dict.
    averaged = {'module.x': a['x'], 'steps': torch.tensor(2)}
    mmengine = {'state_dict': b, 'ema_state_dict': averaged}
    assert weight_sets(mmengine) == {'ema': 'state_dict', 'raw': 'ema_state_dict'}
    assert weights_of(mmengine, 'file', 'ema_state_dict') == a
    assert read_state_dict(mmengine)[0] == b


# -------------------------------------------------------------------------------- bare backbones


BACKBONES = {
    'gcvit': small,
    'dat': partial(DAT, files.SMALL['dat']),
    'dat++': partial(DAT, files.SMALL['dat++']),
    'quadtree': partial(QuadTree, files.SMALL['quadtree']),
}


@pytest.mark.parametrize('kind', BACKBONES)
def test_own_backbone_is_read_again(kind):
    source, model = (BACKBONES[kind](out_indices=(1, 3)) for _ in range(2))
    files.fill(source, seed=1)
    report = load_checkpoint(model, source.state_dict())
    assert report.format == f'mmattn {kind.strip("+")} backbone'
    assert len(report.loaded) == len(source.state_dict())
    assert not report.fresh and not report.dropped and not report.resized
    assert_unchanged(model, source.state_dict())


@pytest.mark.parametrize('kind', BACKBONES)
def test_pretrained_init_cfg_takes_published_files(kind, tmp_path, monkeypatch):
    file, said = tmp_path / 'published.pth', []
    monkeypatch.setattr(base, 'print_log', lambda message, logger: said.append(message))
    source = files.fill(BACKBONES[kind](), seed=1)
    torch.save({'state_dict': files.NAMES[kind.strip('+')](source.state_dict())}, file)
    model = BACKBONES[kind](init_cfg=dict(type='Pretrained', checkpoint=str(file)))
    model.init_weights()
    assert_unchanged(model, source.state_dict())
    assert f'{len(source.state_dict())} loaded, 0 resized' in said[0] and '0 fresh' in said[0]


# ---------------------------------------------------------------------------------------- refusals


def test_refused_checkpoints_leave_the_model_unchanged(backbone, published):
    before = copy_of(backbone)
    with pytest.raises(
        CheckpointError,
        match=r'a state dict is no gcvit \(published or timm or mmattn\).*layer1\.weight',
    ):
        load_checkpoint(backbone, {'layer1.weight': torch.zeros(3)})
    few = {
        name: value
        for name, value in published.items()
        if not name.startswith('levels.2.blocks.1.')
    }
    with pytest.raises(
        CheckpointError,
        match=r'published gcvit classifier .*lacks, such as backbone\.stages\.2\.blocks\.1',
    ):
        load_checkpoint(backbone, few)
    many = published | {'levels.0.blocks.0.attn.rope': torch.zeros(3)}
    with pytest.raises(
        CheckpointError, match=r'cannot use, such as backbone\.stages\.0\.blocks\.0\.attn\.rope'
    ):
        load_checkpoint(backbone, many)
    larger = published | {'patch_embed.proj.weight': torch.zeros(96, 3, 3, 3)}
    with pytest.raises(
        CheckpointError, match=r'\(96, 3, 3, 3\), which is \(32, 3, 3, 3\) in the model'
    ):
        load_checkpoint(backbone, larger)
    assert_unchanged(backbone, before)

    report = load_checkpoint(backbone, many, strict=False)
    assert report.dropped['backbone.stages.0.blocks.0.attn.rope'] == 'does not fit'
    assert 'dropped backbone.stages.0.blocks.0.attn.rope: does not fit' in str(report)


@pytest.mark.parametrize('lacking', ['bbox_head.bias', 'backbone.norm2.bias'])
def test_a_detector_file_has_all_that_the_detector_needs(backbone, lacking):
    model = files.bare(backbone)
    model.bbox_head = nn.Linear(8, 80)
    state = files.model_file(model, 'gcvit')
    assert not load_checkpoint(model, state).fresh
    del state[lacking]
    if lacking.startswith('backbone.'):  # norms may start fresh
        report = load_checkpoint(model, state)
        assert report.fresh == [lacking]
    else:
        with pytest.raises(CheckpointError, match=r'it lacks, such as bbox_head\.bias'):
            load_checkpoint(model, state)


def test_wrong_arguments(backbone):
    with pytest.raises(TypeError, match='source must be a path, a URL or a state dict, got int'):
        load_checkpoint(backbone, 3)
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        load_checkpoint(backbone, 'nowhere.pth')


# -------------------------------------------------------------------------------------- conversion


def test_convert_checkpoint_writes_what_openmmlab_loads(tmp_path, published):
    torch.save({'state_dict': published}, tmp_path / 'src.pth')
    command = [
        sys.executable,
        ROOT / 'tools/model_converters/convert_checkpoint.py',
        tmp_path / 'src.pth',
        tmp_path / 'dst.pth',
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'published gcvit classifier' in done.stdout and str(tmp_path / 'dst.pth') in done.stdout
    state, _ = read_state_dict(tmp_path / 'dst.pth')
    classifier = files.build('gcvit/gcvit_t_imagenet', 'small')
    missing, unexpected = classifier.load_state_dict(state)
    assert not missing and not unexpected
    assert torch.equal(classifier.head.fc.weight, published['head.weight'])
    report = load_checkpoint(small(), tmp_path / 'dst.pth')
    assert report.dropped['backbone.norm3.weight'] == "the classifier's norm"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and 'dst.pth exists' in again.stderr
