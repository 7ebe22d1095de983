"""Training that is killed, repeated, or fed broken data, as docs/reliability.md describes."""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import cv2
import pytest
import torch
from helpers.runs import TOOLS, run_tool, scalars
from mmengine.dataset import InfiniteSampler
from mmengine.optim import OptimWrapper
from mmengine.runner import set_random_seed

from mmattn.backbones import DAT, GCViT, QuadTree

DEMO = TOOLS.parent / 'configs/gcvit/demo_cascade_mask_rcnn_gcvit.py'

# The demo's detector with stochastic depth, random flips and sampled boxes, made smaller.
SMALL = """
_base_ = '{demo}'
model = _base_.model
model.backbone.arch.update(embed_dims=16, depths=(1, 1, 1, 1), drop_path_rate=0.5)
model.neck.in_channels = [16, 32, 64, 128]
train_pipeline = _base_.train_pipeline
train_pipeline[2].scale = (64, 64)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size=2, dataset=dict(pipeline=train_pipeline), **loader)
val_dataloader = dict(batch_size=1, **loader)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0, deterministic=True)
train_cfg = dict(max_epochs=3)
"""
BY_ITERATION = """
train_dataloader.update(sampler=dict(type='InfiniteSampler'), batch_sampler=None)
train_cfg = dict(_delete_=True, type='IterBasedTrainLoop', max_iters=4, val_interval=2)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=4)]
default_hooks['checkpoint'] = dict(by_epoch=False, interval=2)
log_processor = dict(by_epoch=False)
randomness = dict(seed=None, deterministic=True)
"""
WITHOUT_VALIDATION = """
val_cfg = val_dataloader = val_evaluator = None
"""


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp('data') / 'coco'
    run_tool('misc/make_demo_dataset', root, '--train', 4, '--val', 1, '--size', 96)
    return root


@pytest.fixture
def data(images, monkeypatch, tmp_path):
    """A copy of the data set, which the test may break."""
    monkeypatch.setenv('MMATTN_COCO', str(tmp_path / 'coco'))
    return shutil.copytree(images, tmp_path / 'coco')


@pytest.fixture(autouse=True)
def determinism_as_before():
    """Restore the setting of deterministic algorithms, which the configs change."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def write_config(folder, *parts):
    path = folder / 'small.py'
    path.write_text('\n'.join(parts).replace('{demo}', str(DEMO)))
    return path


def first_epoch(tmp_path, *options):
    config = write_config(tmp_path, SMALL, WITHOUT_VALIDATION)
    options = ['train_cfg.max_epochs=1', *options]
    run_tool('train', config, '--work-dir', tmp_path / 'run', '--cfg-options', *options)
    return scalars(tmp_path / 'run')[0]


# ---- Killed, and resumed


@pytest.fixture(scope='module')
def uninterrupted(images, tmp_path_factory):
    """Config and folder of a run of three epochs with two iterations each."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    config = write_config(folder, SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMATTN_COCO', str(images))
        run_tool('train', config, '--work-dir', folder)
    return config, folder


def assert_alike(work_dir, reference, checkpoint):
    """Assert equal losses since the resume, and equal final weights and optimizer state."""
    steps, expected = scalars(work_dir)[0], scalars(reference)[0][-len(scalars(work_dir)[0]) :]
    assert [step['loss'] for step in steps] == [step['loss'] for step in expected]
    states = [torch.load(f / checkpoint, weights_only=False) for f in (work_dir, reference)]
    for part in ('state_dict', 'optimizer'):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


@pytest.mark.parametrize('moment', ['while writing', 'while training'])
def test_a_killed_run_resumes_exactly(moment, uninterrupted, images, monkeypatch, tmp_path):
    config, reference = uninterrupted
    work_dir = tmp_path / 'run'
    options = [config, '--work-dir', work_dir]
    monkeypatch.setenv('MMATTN_COCO', str(images))

    def reached():
        if moment == 'while writing':  # the file of the second epoch has just been opened
            return (work_dir / 'epoch_2.pth').exists()
        return any('"step": 5' in log.read_text() for log in work_dir.glob('*/vis_data/*.json'))

    with open(tmp_path / 'log', 'w') as log:
        process = subprocess.Popen(
            [sys.executable, TOOLS / 'train.py', *options], stdout=log, stderr=log
        )
    while not reached():
        assert process.poll() is None, (tmp_path / 'log').read_text()
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL

    run_tool('train', *options, '--resume')
    resumed_at = scalars(work_dir)[0][0]['step']
    assert resumed_at in ((3, 5) if moment == 'while writing' else (5,))
    assert_alike(work_dir, reference, 'epoch_3.pth')


@pytest.mark.skipif(
    not hasattr(InfiniteSampler, 'skip'),
    reason="mmengine 0.10.7 loads the batches that it skips, which changes the next ones' flips",
)
def test_resuming_by_iteration_with_a_drawn_seed(data, tmp_path):
    """The seed decides the order of images, and mmengine restores it too late for that."""
    config = write_config(tmp_path, SMALL, BY_ITERATION)
    whole, resumed = tmp_path / 'a', tmp_path / 'b'
    run_tool('train', config, '--work-dir', whole)
    resumed.mkdir()
    shutil.copy(whole / 'iter_2.pth', resumed)
    run_tool('train', config, '--work-dir', resumed, '--resume', resumed / 'iter_2.pth')
    assert [step['step'] for step in scalars(resumed)[0]] == [3, 4]
    assert_alike(resumed, whole, 'iter_4.pth')


# ---- A loss that is not finite


def test_an_invalid_loss_ends_training_and_names_the_batch(data, tmp_path):
    config = write_config(
        tmp_path, SMALL, WITHOUT_VALIDATION, 'optim_wrapper = dict(optimizer=dict(lr=1e30))'
    )
    with pytest.raises(FloatingPointError) as error:
        run_tool('train', config, '--work-dir', tmp_path / 'run')
    message = str(error.value)
    assert 'loss is nan, loss_rpn_cls is nan' in message
    assert 'at iteration 2 (epoch 1, batch 2)' in message
    assert len(re.findall(r'train2017/\d+\.jpg', message)) == 2
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_a_gradient_that_overflows_does_not_end_training(data, tmp_path, monkeypatch):
    """A loss scaler skips such a step."""
    scaler = torch.amp.GradScaler('cpu', init_scale=2.0**126)

    def update_params(self, loss, **kwargs):
        scaler.scale(loss).backward()
        scaler.step(self.optimizer)
        scaler.update()
        self.zero_grad()

    monkeypatch.setattr(OptimWrapper, 'update_params', update_params)
    first_epoch(tmp_path)
    assert scaler.get_scale() < 2.0**126


# ---- Broken data


def break_image(data, i, kind):
    path = data / f'train2017/{i:012d}.jpg'
    whole = path.read_bytes()
    path.write_bytes(dict(empty=b'', text=b'not an image', cut=whole[: len(whole) // 2])[kind])
    return path


@pytest.mark.parametrize('kind', ['text', 'cut'])
def test_an_image_that_cannot_be_read_is_named(kind, data, tmp_path):
    path = break_image(data, 1, kind)
    with pytest.raises(AssertionError, match=f'failed to load image: {path}'):
        first_epoch(tmp_path)


def test_an_empty_image_file_ends_training(data, tmp_path):
    break_image(data, 1, 'empty')
    with pytest.raises(cv2.error, match='empty'):
        first_epoch(tmp_path)


def test_broken_images_can_be_left_out(data, tmp_path):
    for i, kind in enumerate(['empty', 'text', 'cut']):
        break_image(data, i, kind)
    load = 'train_dataloader.dataset.pipeline.0'
    steps = first_epoch(tmp_path, f'{load}.ignore_empty=True', f'{load}.imdecode_backend=pillow')
    assert len(steps) == 2  # of two images each, all of them the fourth


@pytest.fixture
def unannotated(data):
    """The first two of the four images have no annotations."""
    path = data / 'annotations/instances_train2017.json'
    content = json.loads(path.read_text())
    content['annotations'] = [a for a in content['annotations'] if a['image_id'] > 1]
    path.write_text(json.dumps(content))


def test_images_without_objects_are_left_out(unannotated, tmp_path):
    assert len(first_epoch(tmp_path)) == 1


def test_images_without_objects_can_be_kept(unannotated, tmp_path):
    keep = 'train_dataloader.dataset.filter_cfg.filter_empty_gt=False'
    # One image per batch.
    steps = first_epoch(tmp_path, keep, 'train_dataloader.batch_size=1')
    assert len(steps) == 4
    # Without objects there are no masks to learn.
    assert sorted(step['s0.loss_mask'] > 0 for step in steps) == [False, False, True, True]


# ---- Repeated


FAMILIES = dict(
    gcvit=lambda: GCViT(
        dict(embed_dims=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2),
        window_size=(7, 7, 14, 7),
        drop_path_rate=0.2,
    ),
    dat=lambda: DAT(
        dict(
            dims=(16, 32, 64, 128),
            blocks=('L', 'LS', 'LD', 'LD'),
            num_heads=(1, 2, 4, 8),
            groups=(0, 0, 2, 4),
        ),
        drop_path_rate=0.2,
    ),
    datpp=lambda: DAT(
        dict(
            dims=(16, 32, 64, 128),
            blocks=('D', 'N', 'ND', 'D'),
            num_heads=(1, 2, 4, 8),
            groups=(1, 1, 2, 4),
            strides=(8, 4, 2, 1),
            plus_plus=True,
            offset_range=None,
        ),
        drop_path_rate=0.2,
    ),
    quadtree=lambda: QuadTree(
        dict(
            embed_dims=(16, 32, 64, 128),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            mlp_ratios=(2, 2, 2, 2),
        ),
        topks=4,
        drop_path_rate=0.2,
    ),
)


@pytest.fixture
def compiled(monkeypatch):
    monkeypatch.setenv('MMATTN_OPS', 'compiled')


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def step(model, optimizer, images):
    optimizer.zero_grad()
    sum(y.square().mean() for y in model(images)).backward()
    optimizer.step()


@pytest.mark.parametrize('threads', [1, 2], indirect=True)
@pytest.mark.parametrize('family', FAMILIES)
def test_two_runs_with_one_seed_give_the_same_weights(family, threads, compiled):
    def train():
        set_random_seed(0, deterministic=True)
        model = FAMILIES[family]().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for size in ((90, 128), (128, 70), (64, 100)):
            step(model, optimizer, torch.randn(2, 3, *size))
        return model.state_dict()

    torch.testing.assert_close(train(), train(), rtol=0, atol=0)


# ---- New sizes


@pytest.mark.parametrize('family', FAMILIES)
def test_an_image_size_leaves_nothing_behind(family, compiled):
    """No grid, mask or index is cached per size; `benchmark.py soak` measures all memory."""

    def held():
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
        return sum(t.untyped_storage().nbytes() for t in tensors if t.device.type == 'cpu')

    model = FAMILIES[family]().train()
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer, torch.randn(1, 3, 64, 64))
    optimizer.zero_grad()
    before = held()
    for i in range(20):
        step(model, optimizer, torch.randn(1, 3, 65 + 3 * i, 160 - 5 * i))
    optimizer.zero_grad()
    assert held() == before
