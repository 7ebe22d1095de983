"""publish_model.py, from training with an averaged model to outputs of the published model."""

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmattn.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[3]
CONFIG = """
_base_ = '{root}/configs/quadtree/retinanet_quadtree_b0_1x_coco.py'
model = dict(
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=(16, 32, 40, 64), depths=(1, 1, 1, 1)), init_cfg=None
    ),
    neck=dict(in_channels=[32, 40, 64]),
    bbox_head=dict(num_classes=6),
)
metainfo = dict(classes=('circle', 'triangle', 'square', 'star', 'ring', 'crescent'))
train_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, dataset=dict(metainfo=metainfo)
)
val_dataloader, val_cfg, val_evaluator = None, None, None
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=2)
param_scheduler = [dict(type='LinearLR', start_factor=0.5, end=10, by_epoch=False)]
optim_wrapper = dict(optimizer=dict(lr=0.01))
custom_hooks = [dict(type='EMAHook', momentum=0.3)]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=2))
"""


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The config, and the checkpoint of two iterations with an averaged model."""
    folder = tmp_path_factory.mktemp('training')
    config = folder / 'tiny.py'
    config.write_text(CONFIG.format(root=ROOT))
    environment = dict(os.environ, MMATTN_COCO=str(folder / 'coco'), PYTHONPATH=str(ROOT))
    make = [ROOT / 'tools/misc/make_demo_dataset.py', folder / 'coco']
    for command in (
        [*make, '--train', '2', '--val', '1', '--size', '64'],
        [ROOT / 'tools/train.py', config, '--work-dir', folder / 'run'],
    ):
        done = subprocess.run(
            [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return config, folder / 'run/iter_2.pth'


@pytest.fixture
def publish(load_tool, monkeypatch, capsys):
    """Run the tool; return the file that it names, and its output."""

    def publish(*arguments):
        monkeypatch.setattr(sys, 'argv', ['publish_model.py', *map(str, arguments)])
        load_tool('model_converters/publish_model').main()
        said = capsys.readouterr().out
        return Path(re.search(r'written to (.+?): ', said)[1]), said

    return publish


def complaint(publish, *arguments):
    with pytest.raises(SystemExit) as stop:
        publish(*arguments)
    assert isinstance(stop.value.code, str)
    return stop.value.code


def build(config):
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    return MODELS.build(cfg.model).eval()


def outputs(model):
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        scores, boxes = model(image, mode='tensor')
    return [*scores, *boxes]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_training_is_published_and_loads_everywhere(run, publish, tmp_path):
    config, trained = run
    training = torch.load(trained, weights_only=False)
    assert {'optimizer', 'message_hub', 'param_schedulers', 'ema_state_dict'} < training.keys()
    # mmengine's EMAHook saves the average as state_dict, and the raw weights beside it.
    average = training['state_dict']
    raw = {name.removeprefix('module.'): v for name, v in training['ema_state_dict'].items()}
    assert raw.pop('steps') == 2
    assert any(not torch.equal(average[name], raw[name]) for name in average)

    files = {}
    for kind, state in ((None, average), ('ema', average), ('raw', raw)):
        option = ['--weights', kind] if kind else []
        files[kind], said = publish(trained, tmp_path / str(kind), '--name', 'tiny', *option)
        for word in ('optimizer', 'message_hub', 'param_schedulers', str(files[kind])):
            assert word in said
        assert f'from {"ema_state_dict" if kind == "raw" else "state_dict"}' in said
        content = torch.load(files[kind], weights_only=True)
        assert content.keys() == {'meta', 'state_dict'}
        assert content['state_dict'].keys() == state.keys()
        assert all(torch.equal(value, state[n]) for n, value in content['state_dict'].items())
    # Equal weights give equal files, named by their hash.
    assert files[None].read_bytes() == files['ema'].read_bytes() != files['raw'].read_bytes()
    digest = hashlib.sha256(files['ema'].read_bytes()).hexdigest()
    assert files['ema'].name == f'tiny-{digest[:8]}.pth'
    assert files['ema'].stat().st_size < trained.stat().st_size / 3
    meta = torch.load(files['ema'], weights_only=True)['meta']
    assert meta['dataset_meta']['classes'] == training['meta']['dataset_meta']['classes']
    assert {'cfg', 'mmengine_version', 'mmattn_version', 'iter'} <= meta.keys()

    # Read by our loader, mmengine's and mmdet's.
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    from mmengine.runner import load_checkpoint as load_by_mmengine

    expected = {}
    for kind, state in (('ema', average), ('raw', raw)):
        model = build(config)
        model.load_state_dict(state)
        expected[kind] = outputs(model)
        ours = build(config)
        report = load_checkpoint(ours, files[kind])
        assert report.format == 'mmattn quadtree model'
        assert not report.dropped and not report.resized and not report.fresh
        assert equal(outputs(ours), expected[kind])
    assert not equal(expected['ema'], expected['raw'])
    theirs = build(config)
    load_by_mmengine(theirs, str(files['ema']), map_location='cpu', strict=True)
    assert equal(outputs(theirs), expected['ema'])
    detector = init_detector(str(config), str(files['ema']), device='cpu')
    assert detector.dataset_meta['classes'][0] == 'circle'
    assert equal(outputs(detector), expected['ema'])
    # The config is in the file: an inferencer needs no other.
    inferencer = DetInferencer(weights=str(files['ema']), device='cpu', show_progress=False)
    assert equal(outputs(inferencer.model), expected['ema'])
    image = np.random.RandomState(0).randint(0, 256, (64, 96, 3), np.uint8)
    found = inference_detector(detector, image).pred_instances
    again = inferencer(image, return_datasamples=True)['predictions'][0].pred_instances
    assert torch.equal(found.scores, again.scores) and torch.equal(found.bboxes, again.bboxes)


def test_name_and_folder_default_to_the_sources(publish, tmp_path):
    src = tmp_path / 'epoch_3.pth'
    torch.save(dict(state_dict=dict(x=torch.ones(3)), meta=dict(epoch=3)), src)
    dst, _ = publish(src)
    assert dst.parent == tmp_path and re.fullmatch(r'epoch_3-[0-9a-f]{8}\.pth', dst.name)
    assert sorted(tmp_path.iterdir()) == sorted([src, dst])
    # A second run would write the same file.
    assert f'{dst} exists' in complaint(publish, src)
    assert sorted(tmp_path.iterdir()) == sorted([src, dst])


@pytest.mark.parametrize(
    'content, option, kept',
    [
        (dict(state_dict='a', state_dict_ema='b'), None, 'b'),
        (dict(state_dict='a', state_dict_ema='b'), 'raw', 'a'),
        (dict(model='a', optimizer={}), None, 'a'),
        (dict(model='a', model_ema='b'), 'ema', 'b'),
        ('a', None, 'a'),
    ],
)
def test_which_weights(publish, tmp_path, content, option, kept):
    sets = {name: {'module.x': torch.full((2,), float(ord(name)))} for name in 'ab'}
    if isinstance(content, dict):
        content = {k: sets[v] if isinstance(v, str) else v for k, v in content.items()}
    else:
        content = sets[content]
    content['epoch'] = 3
    torch.save(content, tmp_path / 'src.pth')
    dst, said = publish(tmp_path / 'src.pth', *(['--weights', option] if option else []))
    assert re.search(r'left out: .*epoch', said)
    state = torch.load(dst, weights_only=True)['state_dict']
    assert state.keys() == {'x'} and state['x'][0] == ord(kept)


def test_meta_is_plain_data(publish, tmp_path):
    meta = dict(
        best=np.float32(0.5), palette=np.array([[1, 2]]), classes=('a', 'b'), none=None,
        nested=[dict(a={1: True})], odd={1, 2},
    )  # fmt: skip
    torch.save(dict(state_dict=dict(x=torch.ones(3)), meta=meta), tmp_path / 'src.pth')
    dst, said = publish(tmp_path / 'src.pth')
    kept = torch.load(dst, weights_only=True)['meta']
    assert kept.pop('mmattn_version')
    assert kept == dict(
        best=0.5, palette=[[1, 2]], classes=('a', 'b'), none=None, nested=[dict(a={1: True})]
    )  # fmt: skip
    assert 'left out: meta.odd (a set)' in said


@pytest.mark.parametrize('meta', [None, [1, 2], 3, 'itself'])
def test_meta_of_any_kind(publish, tmp_path, meta):
    if meta == 'itself':
        meta = dict(epoch=1)
        meta['itself'] = meta
    torch.save(dict(state_dict=dict(x=torch.ones(3)), meta=meta), tmp_path / 'src.pth')
    dst, said = publish(tmp_path / 'src.pth')
    kept = torch.load(dst, weights_only=True)['meta']
    assert kept.keys() <= {'mmattn_version', 'epoch'}
    assert ('meta.itself (it contains itself)' in said) == isinstance(meta, dict)


def test_weights_that_are_not_finite_are_not_published(publish, tmp_path):
    torch.save(dict(state_dict=dict(x=torch.tensor([1.0, torch.inf]))), tmp_path / 'src.pth')
    assert 'holds NaN or infinity in 1 tensors' in complaint(publish, tmp_path / 'src.pth')


@pytest.mark.parametrize('name', ['..', 'a/b'])
def test_names_are_without_a_folder(publish, tmp_path, capsys, name):
    torch.save(dict(state_dict=dict(x=torch.ones(3))), tmp_path / 'src.pth')
    with pytest.raises(SystemExit):
        publish(tmp_path / 'src.pth', f'--name={name}')
    assert 'without a folder' in capsys.readouterr().err


@pytest.mark.parametrize('kind', ['missing', 'damaged', 'no weights', 'no average', 'a folder'])
def test_errors(publish, tmp_path, kind):
    src = tmp_path / 'src.pth'
    arguments, words = [src], 'src.pth'
    if kind == 'missing':
        words = 'there is no checkpoint file'
    elif kind == 'damaged':
        torch.save(dict(state_dict=dict(x=torch.ones(1000))), src)
        src.write_bytes(src.read_bytes()[:2000])
    elif kind == 'no weights':
        torch.save(dict(meta=dict(epoch=1)), src)
        words = 'holds no tensors'
    elif kind == 'no average':
        torch.save(dict(state_dict=dict(x=torch.ones(3))), src)
        arguments, words = [src, '--weights', 'ema'], r'no averaged \(EMA\) weights; it has raw'
    else:
        torch.save(dict(state_dict=dict(x=torch.ones(3))), src)
        (tmp_path / 'locked').touch()
        arguments, words = [src, tmp_path / 'locked' / 'below'], 'locked'
    assert re.search(words, complaint(publish, *arguments))
    assert not [*tmp_path.rglob('*-*.pth')]


def test_an_address_is_refused(publish, capsys):
    with pytest.raises(SystemExit):
        publish('http://127.0.0.1/weights.pth')
    assert 'argument src must be a file, got an address' in capsys.readouterr().err
