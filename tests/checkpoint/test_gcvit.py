import io
import os
import pickle
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from torch import nn

from mmattn.backbones import GCViT
from mmattn.checkpoint import CheckpointError, load_checkpoint, read_state_dict

ROOT = Path(__file__).parents[2]
XXT = 'gcvit_xxt_cls_224'


@pytest.fixture(scope='module')
def published():
    """The published xxtiny classifier's state dict, index buffers included, as float32."""
    shapes = golden.shapes(XXT)
    state = {name: value.float() for name, value in golden.state_dict(XXT).items()}
    index = {
        k: torch.zeros(shape, dtype=torch.long)
        for k, shape in shapes.items()
        if k.endswith('position_index')
    }
    return state | index


@pytest.fixture(scope='module')
def classifier():
    from mmpretrain.registry import MODELS

    return MODELS.build(Config.fromfile(ROOT / 'configs/gcvit/gcvit_xxt_imagenet.py').model).eval()


@pytest.fixture
def backbone():
    return GCViT('xxtiny')


def whole_model(backbone):
    """A detector, as far as loading is concerned."""
    model = nn.Module()
    model.backbone = backbone
    model.bbox_head = nn.Linear(8, 80)
    return model


def assert_unchanged(model, before):
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def copy_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    'dtype, output_error, gradient_error',
    [(torch.float64, 1e-9, 1e-9), (torch.float32, 1e-3, 5e-3)],
)
def test_classifier_from_our_config_is_the_published_one(
    classifier, dtype, output_error, gradient_error
):
    case, state = golden.Case(XXT), golden.state_dict(XXT)
    model = classifier.to(dtype)
    report = load_checkpoint(model, state)
    assert not report.dropped and not report.fresh and not report.resized
    x = case.image.to(dtype).requires_grad_()
    model.zero_grad()
    maps = {}
    hooks = [
        level.blocks[-1].register_forward_hook(
            lambda _, __, out, i=i: maps.update({f'stage{i}': out.permute(0, 3, 1, 2)})
        )
        for i, level in enumerate(model.backbone.levels)
    ]
    maps['logits'] = model(x)
    for hook in hooks:
        hook.remove()
    assert {
        name: case.output_error(name, maps[name]) < output_error for name in case.output_names
    } == dict.fromkeys(case.output_names, True)
    case.loss({name: out.double() for name, out in maps.items()}).backward()
    tensors = dict(model.backbone.named_parameters(), input=x)
    errors = {name: case.gradient_error(name, tensors[name].grad) for name in case.gradient_names}
    assert len(errors) == len(case.gradient_names) > 20 and max(errors.values()) < gradient_error


def test_classifier_norm_and_head_are_dropped_without_a_classification_head(backbone, published):
    before = copy_of(backbone)
    report = load_checkpoint(backbone, published)
    assert {name for name in report.dropped if not name.endswith('_index')} == {
        'backbone.norm3.weight',
        'backbone.norm3.bias',
        'head.fc.weight',
        'head.fc.bias',
    }
    assert len(report.fresh) == 8 and all(name.startswith('backbone.norm') for name in report.fresh)
    assert torch.equal(backbone.norm3.weight, before['norm3.weight'])
    assert torch.equal(
        backbone.levels[1].blocks[1].attn.qkv.weight, published['levels.1.blocks.1.attn.qkv.weight']
    )


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: {'state_dict': state, 'epoch': 3, 'arch': 'gcvit'},
        lambda state: {'model': state, 'optimizer': {'state': {}}},
        lambda state: {'state_dict_ema': state},
        lambda state: {f'module.{name}': value for name, value in state.items()},
    ],
    ids=['state_dict', 'model', 'state_dict_ema', 'module.'],
)
def test_containers(tmp_path, backbone, published, wrap):
    torch.save(wrap(published), tmp_path / 'published.pth.tar')
    report = load_checkpoint(backbone, tmp_path / 'published.pth.tar')
    assert report.format == 'published gcvit classifier' and not report.resized


def test_files_of_old_torch_are_read(tmp_path, backbone, published):
    torch.save(published, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    assert load_checkpoint(backbone, str(tmp_path / 'old.pth')).loaded


def test_url_is_downloaded_once(tmp_path, monkeypatch, backbone, published, capsys):
    served = tmp_path / 'served'
    served.mkdir()
    torch.save(published, served / 'gcvit.pth')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    handler = partial(SimpleHTTPRequestHandler, directory=served)
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/gcvit.pth'
        load_checkpoint(backbone, url)
        assert 'downloading' in capsys.readouterr().out
        server.shutdown()
    load_checkpoint(backbone, url)
    assert 'downloading' not in capsys.readouterr().out


def as_timm(state):
    """The published names turned into timm's, by its own rules in the other direction."""
    out = {}
    for name, value in state.items():
        if name.endswith('_index'):
            continue
        if '.conv.2.fc.' in name:
            value = value[:, :, None, None]
        for ours, theirs in (
            ('conv.0', 'conv_dw'),
            ('conv.2.fc.0', 'se.fc1'),
            ('conv.2.fc.2', 'se.fc2'),
            ('conv.3', 'conv_pw'),
        ):
            name = name.replace(f'.{ours}.', f'.conv_block.{theirs}.')
        name = re.sub(
            r'levels\.(\d)\.downsample', lambda m: f'stages.{int(m[1]) + 1}.downsample', name
        )
        name = re.sub(
            r'levels\.(\d)\.q_global_gen\.to_q_global\.(\d)\.conv_block',
            lambda m: f'stages.{m[1]}.global_block.blocks.conv{int(m[2]) + 1}',
            name,
        )
        name = re.sub(r'^levels\.', 'stages.', name)
        name = name.replace('patch_embed.proj', 'stem.conv1').replace(
            'patch_embed.conv_down', 'stem.down'
        )
        name = name.replace('relative_position_bias_table', 'rel_pos.relative_position_bias_table')
        name = re.sub(r'\.gamma([12])$', r'.ls\1.gamma', name)
        name = re.sub(r'^norm\.', 'stages.3.norm.', name)
        out[re.sub(r'^head\.', 'head.fc.', name)] = value
    return out


@pytest.mark.parametrize('case', [XXT, 'gcvit_s_cls'])
def test_timm_files(case):
    published = {k: v.float() for k, v in golden.state_dict(case).items()}
    state = as_timm(published)
    assert {name: list(value.shape) for name, value in state.items()} == golden.shapes(
        f'timm_{case}'
    )
    model = GCViT('xxtiny' if case == XXT else 'small')
    report = load_checkpoint(model, state)
    assert report.format == 'timm gcvit classifier'
    twin = GCViT('xxtiny' if case == XXT else 'small')
    twin.load_state_dict(model.state_dict())
    load_checkpoint(twin, published)
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_tables_are_resized_bicubically_for_other_windows(published):
    model = GCViT('xxtiny', window_size=(24, 24, 24, 24))
    report = load_checkpoint(model, published)
    assert len(report.resized) == 12
    name = 'levels.2.blocks.0.attn.relative_position_bias_table'
    assert report.resized[f'backbone.{name}'] == ((729, 8), (2209, 8))
    image = published[name].t().reshape(1, 8, 27, 27)
    expected = F.interpolate(image, size=(47, 47), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.state_dict()[name], expected.view(8, -1).t())


def test_detector_file_in_a_whole_model_and_in_its_backbone(published):
    body = {
        name: value
        for name, value in published.items()
        if name.split('.')[0] not in ('norm', 'head')
    }
    norms = {
        f'norm{i}.{part}': torch.randn(64 * 2**i) for i in range(4) for part in ('weight', 'bias')
    }
    detector = {f'backbone.{name}': value for name, value in (body | norms).items()}
    detector |= {'bbox_head.weight': torch.randn(80, 8), 'bbox_head.bias': torch.randn(80)}

    model = whole_model(GCViT('xxtiny'))
    report = load_checkpoint(model, {'meta': {'CLASSES': ('a', 'b')}, 'state_dict': detector})
    assert report.format == 'published gcvit model' and not report.fresh
    assert torch.equal(model.bbox_head.weight, detector['bbox_head.weight'])
    assert torch.equal(model.backbone.norm2.weight, norms['norm2.weight'])

    report = load_checkpoint(model.backbone, detector)
    assert report.dropped['bbox_head.weight'] == 'not of the backbone' and not report.fresh

    model.bbox_head = nn.Linear(8, 5)
    report = load_checkpoint(model, detector)
    assert set(report.fresh) == {'bbox_head.weight', 'bbox_head.bias'}
    assert 'other classes: (80, 8), the model (5, 8)' in report.dropped['bbox_head.weight']

    del detector['bbox_head.bias']
    with pytest.raises(CheckpointError, match=r'it lacks, such as bbox_head\.bias'):
        load_checkpoint(model, detector)


def test_other_number_of_classes_leaves_the_head_fresh(classifier, published):
    from mmpretrain.registry import MODELS

    config = Config.fromfile(ROOT / 'configs/gcvit/gcvit_xxt_imagenet.py').model
    config.head.num_classes = 10
    model = MODELS.build(config)
    report = load_checkpoint(model, published)
    assert set(report.fresh) == {'head.fc.weight', 'head.fc.bias'}
    assert torch.equal(model.backbone.norm3.weight, published['norm.weight'])


def test_stages_that_are_not_built_are_dropped(published):
    report = load_checkpoint(GCViT('xxtiny', out_indices=(0, 1)), published)
    assert (
        report.dropped['backbone.levels.1.downsample.norm1.weight']
        == 'of a stage that is not built'
    )
    assert report.fresh == [
        f'backbone.norm{i}.{part}' for i in (0, 1) for part in ('weight', 'bias')
    ]


def test_pretrained_init_cfg_takes_the_same_files(tmp_path, published):
    from mmdet.registry import MODELS

    torch.save({'state_dict': published}, tmp_path / 'published.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'published.pth'))
    model = MODELS.build(
        dict(type='GCViT', arch='xxtiny', window_size=(24,) * 4, init_cfg=init_cfg)
    )
    model.init_weights()
    assert torch.equal(
        model.levels[0].blocks[0].attn.qkv.weight, published['levels.0.blocks.0.attn.qkv.weight']
    )


def test_our_own_training_checkpoint_is_read(tmp_path, backbone):
    logs = HistoryBuffer(np.array([0.5, 0.25]), np.array([1, 1]))
    checkpoint = dict(
        meta=dict(epoch=1, dataset_meta=dict(CLASSES=('a',))),
        state_dict={f'backbone.{name}': value for name, value in backbone.state_dict().items()},
        message_hub=dict(log_scalars={'train/loss': logs}, runtime_info=dict(iter=2)),
        optimizer=dict(state={0: dict(step=torch.tensor(2.0))}, param_groups=[dict(lr=1e-4)]),
    )
    torch.save(checkpoint, tmp_path / 'epoch_1.pth')
    report = load_checkpoint(GCViT('xxtiny'), tmp_path / 'epoch_1.pth')
    assert not report.dropped and not report.fresh
    assert logs.mean() == 0.375, 'reading must not change what mmengine logs with'


def test_loading_never_executes_a_file(tmp_path, backbone):
    marker = tmp_path / 'executed'

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    torch.save({'state_dict': backbone.state_dict(), 'extra': Attack()}, tmp_path / 'attack.pth')
    before = copy_of(backbone)
    with pytest.raises(
        CheckpointError, match=r'attack\.pth holds more than tensors and plain values'
    ):
        load_checkpoint(backbone, tmp_path / 'attack.pth')
    assert not marker.exists()
    assert_unchanged(backbone, before)


@pytest.mark.parametrize(
    'kind', ['truncated zip', 'truncated pickle', 'text', 'empty', 'image', 'a list']
)
def test_broken_files_are_named(tmp_path, backbone, published, kind):
    whole = io.BytesIO()
    torch.save(published, whole, _use_new_zipfile_serialization=kind != 'truncated pickle')
    contents = {
        'text': b'version https://git-lfs.github.com/spec/v1\n',
        'empty': b'',
        'image': b'\x89PNG\r\n\x1a\n' + bytes(100),
        'a list': pickle.dumps([1, 2, 3]),
    }
    file = tmp_path / 'broken.pth'
    file.write_bytes(contents.get(kind, whole.getvalue()[: whole.tell() // 2]))
    before = copy_of(backbone)
    with pytest.raises(CheckpointError, match=r'broken\.pth'):
        load_checkpoint(backbone, file)
    assert_unchanged(backbone, before)


def test_foreign_and_incomplete_checkpoints_leave_the_model_unchanged(backbone, published):
    before = copy_of(backbone)
    with pytest.raises(
        CheckpointError, match=r'a state dict is no gcvit \(published or timm\).*layer1\.weight'
    ):
        load_checkpoint(backbone, {'layer1.weight': torch.zeros(3)})
    few = {
        name: value
        for name, value in published.items()
        if not name.startswith('levels.2.blocks.4.')
    }
    with pytest.raises(
        CheckpointError,
        match=r'published gcvit classifier .*lacks, such as backbone\.levels\.2\.blocks\.4',
    ):
        load_checkpoint(backbone, few)
    many = published | {'levels.0.blocks.0.attn.rope': torch.zeros(3)}
    with pytest.raises(
        CheckpointError, match=r'cannot use, such as backbone\.levels\.0\.blocks\.0\.attn\.rope'
    ):
        load_checkpoint(backbone, many)
    larger = {k: v.float() for k, v in golden.state_dict('gcvit_s_cls').items()}
    with pytest.raises(
        CheckpointError, match=r'\(96, 3, 3, 3\), which is \(64, 3, 3, 3\) in the model'
    ):
        load_checkpoint(backbone, larger)
    assert_unchanged(backbone, before)

    report = load_checkpoint(backbone, many, strict=False)
    assert report.dropped['backbone.levels.0.blocks.0.attn.rope'] == 'does not fit'
    assert 'dropped backbone.levels.0.blocks.0.attn.rope: does not fit' in str(report)


def test_wrong_arguments(backbone):
    with pytest.raises(TypeError, match='one of GCViT, DAT, QuadTree, got Linear'):
        load_checkpoint(nn.Linear(2, 2), {})
    with pytest.raises(TypeError, match='source must be a path, a URL or a state dict, got int'):
        load_checkpoint(backbone, 3)
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        load_checkpoint(backbone, 'nowhere.pth')


def test_convert_checkpoint_writes_what_openmmlab_loads(tmp_path, published, classifier):
    torch.save({'state_dict': published}, tmp_path / 'src.pth')
    command = [
        sys.executable,
        ROOT / 'tools/convert_checkpoint.py',
        tmp_path / 'src.pth',
        tmp_path / 'dst.pth',
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'published gcvit classifier' in done.stdout and str(tmp_path / 'dst.pth') in done.stdout
    state, _ = read_state_dict(tmp_path / 'dst.pth')
    missing, unexpected = classifier.load_state_dict(state)
    assert not missing and not unexpected
    report = load_checkpoint(GCViT('xxtiny'), tmp_path / 'dst.pth')
    assert report.dropped['backbone.norm3.weight'] == "the classifier's norm"
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 1 and 'dst.pth exists' in again.stderr
