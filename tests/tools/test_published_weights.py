"""train.py and test.py with weights from addresses, which a server here stands for."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers import published
from helpers.runs import TOOLS, run_tool, scalars
from helpers.server import Answer, Server
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from mmattn.checkpoint import download

CONFIGS = TOOLS.parent / 'configs'
SMALL = f"""
_base_ = '{CONFIGS}/gcvit/demo_cascade_mask_rcnn_gcvit.py'
model = _base_.model
model.backbone.arch.update(embed_dims=16, depths=(1, 1, 1, 1))
model.neck.in_channels = [16, 32, 64, 128]
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (64, 64)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline), **loader)
val_dataloader = dict(batch_size=1, **loader)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1))
optim_wrapper = dict(optimizer=dict(lr=0.0))
train_cfg = dict(max_epochs=1)
"""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'coco'
    run_tool('misc/make_demo_dataset', root, '--train', 2, '--val', 1, '--size', 96)
    return root


@pytest.fixture
def config(images, monkeypatch, tmp_path):
    """A config in a folder of its own."""
    monkeypatch.setenv('MMATTN_COCO', str(images))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.delenv('MMATTN_WEIGHTS', raising=False)
    download._say_once.cache_clear()
    path = tmp_path / 'family/small.py'
    path.parent.mkdir()
    path.write_text(SMALL)
    return path


def build(config):
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    return published.fill(MODELS.build(cfg.model), seed=1)


def content(state, folder):
    torch.save({'state_dict': state}, folder / 'content')
    return (folder / 'content').read_bytes()


def start_from(address):
    init = 'model.backbone.init_cfg.'
    return ['--cfg-options', f'{init}type=Pretrained', f'{init}checkpoint={address}']


def log(work_dir):
    newest = max(Path(work_dir).glob('*/*.log'), key=lambda path: path.stat().st_mtime)
    return newest.read_text()


def test_training_starts_from_an_address_and_resumes_without(config, tmp_path):
    backbone = {k: 0.02 * v for k, v in build(config).backbone.state_dict().items()}
    classifier = content(published.gcvit_names(backbone), tmp_path)
    train = ['train', config, '--work-dir', tmp_path / 'run']
    with Server({'/gcvit.pth.tar': Answer(classifier)}) as server:
        address = f'{server.address}/gcvit.pth.tar'
        run_tool(*train, *start_from(address))
        assert len(server.requests) == 1
    assert f'downloading {address} to' in log(tmp_path / 'run')
    assert f'{address} (published gcvit backbone): ' in log(tmp_path / 'run')
    state = torch.load(tmp_path / 'run/epoch_1.pth', weights_only=False)['state_dict']
    # The learning rate is zero.
    assert all(torch.equal(state[f'backbone.{name}'], value) for name, value in backbone.items())

    shutil.rmtree(tmp_path / 'hub')
    run_tool(*train, '--resume', *start_from(address), 'train_cfg.max_epochs=2')
    steps, _ = scalars(tmp_path / 'run')
    assert [step['iter'] for step in steps] == [2]


def test_training_without_its_weights_ends_with_one_sentence(config, tmp_path, capfd):
    with Server({}) as server:
        address = f'{server.address}/gcvit.pth.tar'
        with pytest.raises(SystemExit) as stop:
            run_tool('train', config, '--work-dir', tmp_path / 'run', *start_from(address))
    assert stop.value.code == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f'train.py: {address} cannot be downloaded (')
    assert 'put it as gcvit.pth.tar into the folder' in error
    assert error.endswith('--cfg-options model.backbone.init_cfg=None')
    run_tool(  # the option does what the sentence says
        'train', config, '--work-dir', tmp_path / 'run', '--cfg-options',
        'model.backbone.init_cfg=None',
    )  # fmt: skip


def test_testing_takes_the_published_weights(config, tmp_path, capfd):
    """Of the metafile, unless the config names a checkpoint."""
    weights = content(published.model_file(build(config), 'gcvit'), tmp_path)
    test = ['test', config, '--work-dir', tmp_path / 'run']
    with pytest.raises(SystemExit) as stop:
        run_tool(*test)
    assert stop.value.code == 2
    assert f'no weights of {config} are published: name a checkpoint' in capfd.readouterr().err

    with Server({'/small.pth': Answer(weights), '/other.pth': Answer(weights)}) as server:
        address = f'{server.address}/small.pth'
        entry = dict(Name='small', Config='configs/family/small.py', Weights=address)
        (config.parent / 'metafile.yml').write_text(yaml.safe_dump(dict(Models=[entry])))
        run_tool(*test)
        assert f'no checkpoint was given: testing the published {address}' in capfd.readouterr().out
        assert f'{address} (published gcvit model): ' in log(tmp_path / 'run')

        other = f'{server.address}/other.pth'
        run_tool(*test, '--cfg-options', f'load_from={other}')
        assert f'{other} (published gcvit model): ' in log(tmp_path / 'run')
        assert [path for _, path in server.requests] == ['/small.pth', '/other.pth']


def test_a_download_that_fails_ends_testing_with_one_sentence(config, tmp_path, capfd):
    with Server({}) as server, pytest.raises(SystemExit) as stop:
        run_tool('test', config, f'{server.address}/small.pth?token=SECRET')
    assert stop.value.code == 2
    printed = capfd.readouterr()
    error = printed.err.strip().splitlines()[-1]
    assert error.startswith(f'test.py: {server.address}/small.pth cannot be downloaded (')
    assert 'init_cfg' not in error and 'SECRET' not in error


def test_what_is_pretrained_is_dropped_wherever_it_is(load_tool):
    pretrained, normal = (
        dict(type='Pretrained', checkpoint='x'),
        dict(type='Normal', layer='Linear'),
    )
    model = Config(
        dict(
            backbone=dict(type='A', init_cfg=pretrained),
            heads=[dict(init_cfg=[normal, pretrained]), dict(init_cfg=normal), 3],
            other=dict(init_cfg=[pretrained]),
        )
    )
    load_tool('train').drop_pretrained(model._cfg_dict)
    assert model.backbone == dict(type='A', init_cfg=None)
    assert model.heads == [dict(init_cfg=[normal]), dict(init_cfg=[normal]), 3]
    assert model.other.init_cfg is None


@pytest.mark.parametrize('family', ['gcvit', 'dat', 'quadtree'])
def test_demos_download_nothing(family):
    cfg = Config.fromfile(CONFIGS / f'{family}/demo_cascade_mask_rcnn_{family}.py')
    assert cfg.model.backbone.get('init_cfg') is None and cfg.load_from is None
