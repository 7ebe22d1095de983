"""tools/train.py and tools/test.py end to end, with models and images small enough for a CPU.

Images are photographs of ../shared/data if that exists, or else generated.
"""

import json
import math
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.runs import TOOLS, run_tool, scalars

from mmattn.engine.resuming import read_training

ROOT = Path(__file__).parents[2]
PHOTOGRAPHS = ROOT.parent / 'shared/data'

ARCH = (
    'dict(_delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), mlp_ratio=2)'
)

LOADERS = """
quick = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(batch_size={batch}, dataset=dict(indices=4, {train}), **quick)
val_dataloader = dict(batch_size=1, dataset=dict(indices=2, {val}), **quick)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1))
"""

COCO = """
load = dict(type='LoadImageFromFile')
annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
resize = dict(type='Resize', scale=(160, 128), keep_ratio=True)
flip = dict(type='RandomFlip', prob=0.5)
train_pipeline = [load, annotations, resize, flip, dict(type='PackDetInputs')]
# Annotations of the original size, which pictures show.
meta = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
test_pipeline = [load, resize, annotations, dict(type='PackDetInputs', meta_keys=meta)]
train_cfg = dict(max_epochs=1)
"""
COCO += LOADERS.format(
    batch=1,
    train='metainfo=dict(classes={classes}), pipeline=train_pipeline',
    val='metainfo=dict(classes={classes}), pipeline=test_pipeline',
)

SMALL_CASCADE = (
    """
_base_ = '{configs}/gcvit/cascade_mask_rcnn_gcvit_t_coco.py'
model = _base_.model
model.backbone.arch = ARCH
model.backbone.init_cfg = None
model.neck.in_channels = [32, 64, 128, 256]
model.train_cfg.rpn_proposal.max_per_img = 50
for stage in model.train_cfg.rcnn:
    stage.sampler.num = 8
model.test_cfg.rpn.max_per_img = 20
model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=5)
del stage
""".replace('ARCH', ARCH.replace('_delete_=True, ', ''))
    + COCO
)

SEGMENTOR = """
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(64, 64)),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 96), keep_ratio=True),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]
train_cfg = dict(max_iters=2, val_interval=2)
"""
SEGMENTOR += LOADERS.format(batch=2, train='pipeline=train_pipeline', val='pipeline=test_pipeline')

SMALL_UPERNET = (
    """
_base_ = '{configs}/gcvit/upernet_gcvit_t_ade20k.py'
model = dict(
    backbone=dict(arch=ARCH, init_cfg=None),
    data_preprocessor=dict(size=(64, 64)),
    decode_head=dict(in_channels=[32, 64, 128, 256], channels=32),
    auxiliary_head=dict(in_channels=128, channels=32),
)
""".replace('ARCH', ARCH)
    + SEGMENTOR
)

SMALL_CLASSIFIER = (
    """
_base_ = '{configs}/gcvit/gcvit_xxt_imagenet.py'
model = dict(backbone=dict(arch=ARCH), head=dict(in_channels=256))
train_dataloader = dict(dataset=dict(pipeline=_base_.train_pipeline))
train_dataloader['dataset']['pipeline'][1].scale = 64
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=64),
    dict(type='PackInputs'),
]
train_cfg = dict(max_epochs=1)
""".replace('ARCH', ARCH)
    + LOADERS.format(batch=2, train='pipeline=_base_.train_pipeline', val='pipeline=test_pipeline')
)

# Small backbones for configs of the other families.
SMALL_BACKBONES = dict(
    dat="""dict(
        arch=dict(
            _delete_=True,
            dims=(16, 32, 64, 128),
            blocks=('L', 'LS', 'LD', 'LD'),
            num_heads=(1, 2, 4, 8),
            groups=(0, 0, 2, 4),
        ),
        img_size=128,
        init_cfg=None,
    )""",
    dat_plus_plus="""dict(
        arch=dict(
            _delete_=True,
            dims=(16, 32, 64, 128),
            blocks=('D', 'N', 'ND', 'D'),
            num_heads=(1, 2, 4, 8),
            groups=(1, 1, 2, 4),
            strides=(8, 4, 2, 1),
            plus_plus=True,
            offset_range=None,
        ),
        img_size=128,
        init_cfg=None,
    )""",
    quadtree="""dict(
        arch=dict(
            _delete_=True,
            embed_dims=(16, 32, 64, 128),
            depths=(1, 1, 1, 1),
            num_heads=(1, 2, 4, 8),
            mlp_ratios=(2, 2, 2, 2),
        ),
        topks=4,
        init_cfg=None,
    )""",
)

SMALL_RETINANET = (
    """
_base_ = '{configs}/CONFIG_1x_coco.py'
model = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=[32, 64, 128]),
    test_cfg=dict(score_thr=0.0, max_per_img=5),
)
"""
    + COCO
)

SMALL_MASK_RCNN = (
    """
_base_ = '{configs}/CONFIG_1x_coco.py'
model = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=[16, 32, 64, 128]),
    train_cfg=dict(rpn_proposal=dict(max_per_img=50), rcnn=dict(sampler=dict(num=8))),
    test_cfg=dict(rpn=dict(max_per_img=20), rcnn=dict(score_thr=0.0, max_per_img=5)),
)
"""
    + COCO
)

SMALL_FPN = (
    """
_base_ = '{configs}/CONFIG_ade20k.py'
model = dict(
    backbone=BACKBONE,
    data_preprocessor=dict(size=(64, 64)),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    decode_head=dict(in_channels=[32] * 4, channels=32),
)
"""
    + SEGMENTOR
)


def fill_up_categories(path):
    """Add categories up to the 80 that the models predict; generated images have six."""
    annotations = json.loads(path.read_text())
    categories = annotations['categories']
    taken = {category['id'] for category in categories}
    free = (number for number in range(1, 81) if number not in taken)
    categories += [dict(id=number, name=f'unseen {number}') for number in free]
    path.write_text(json.dumps(annotations))


# Without randomness and batch statistics, so that updates depend on the batch alone.
UPDATES = """
_base_ = ['{configs}/gcvit/gcvit_xxt_imagenet.py', *SHARDED]
pipeline = [
    dict(type='LoadImageFromFile'), dict(type='Resize', scale=(64, 64)), dict(type='PackInputs')
]
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True, embed_dims=32, depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 8), mlp_ratio=2
        ),
        with_cp=True,
    ),
    head=dict(in_channels=256),
    train_cfg=None,
)
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(shuffle=False),
    dataset=dict(indices=4, pipeline=pipeline),
)
val_dataloader = val_cfg = val_evaluator = None
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.2, momentum=0.9, weight_decay=1)
)
param_scheduler = None
custom_hooks = []  # no moving average
train_cfg = dict(max_epochs=2)
auto_scale_lr = dict(base_batch_size=4)
default_hooks = dict(logger=dict(interval=1))
randomness = dict(seed=0)
"""
ONE_IMAGE = 'train_dataloader.batch_size=1'


@pytest.fixture(scope='session')
def data(tmp_path_factory):
    """Folders of the data sets by layout."""
    root = tmp_path_factory.mktemp('data')
    folders = dict(coco=PHOTOGRAPHS / 'coco_tiny', ade20k=PHOTOGRAPHS / 'ade_tiny')
    for layout in ('coco', 'ade20k', 'imagenet'):
        if layout not in folders or not folders[layout].is_dir():
            folders[layout] = root / layout
            command = [TOOLS / 'misc/make_demo_dataset.py', folders[layout], '--format', layout]
            subprocess.run(
                [sys.executable, *command, '--train', '8', '--val', '4', '--size', '96'], check=True
            )
    if folders['coco'].is_relative_to(root):
        for path in folders['coco'].glob('annotations/*.json'):
            fill_up_categories(path)
    return folders


@pytest.fixture(autouse=True)
def environment(data, monkeypatch):
    for layout, folder in data.items():
        monkeypatch.setenv(f'MMATTN_{layout.upper()}', str(folder))


@pytest.fixture
def config(data, tmp_path):
    """Write a config; return its path."""

    def write(text):
        annotations = json.loads((data['coco'] / 'annotations/instances_val2017.json').read_text())
        classes = tuple(category['name'] for category in annotations['categories'])
        text = text.replace('{configs}', str(ROOT / 'configs'))
        path = tmp_path / 'small.py'
        path.write_text(text.replace('{classes}', repr(classes)))
        return str(path)

    return write


def log(work_dir):
    newest = max(Path(work_dir).glob('*/*.log'), key=lambda p: p.stat().st_mtime)
    return newest.read_text()


def test_detector_trains_resumes_and_draws(config, tmp_path, capsys):
    path, work_dir = config(SMALL_CASCADE), tmp_path / 'run'
    run_tool('train', path, '--work-dir', work_dir)
    steps, evaluations = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2, 3, 4]
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= evaluations[0].keys()

    run_tool(
        'train', path, '--work-dir', work_dir, '--resume', '--cfg-options', 'train_cfg.max_epochs=2'
    )
    steps, _ = scalars(work_dir)
    assert [step['iter'] for step in steps] == [5, 6, 7, 8]
    state = read_training(work_dir / 'epoch_2.pth')
    assert state['meta']['iter'] == 8

    pictures, predictions = tmp_path / 'pictures', tmp_path / 'predictions.pkl'
    checkpoint = work_dir / 'epoch_2.pth'
    options = ['--work-dir', tmp_path / 'test', '--show-dir', pictures, '--out', predictions]
    run_tool('test', path, checkpoint, *options)
    assert len(list(pictures.glob('*.jpg'))) == 2
    assert len(pickle.loads(predictions.read_bytes())) == 2
    assert 'coco/bbox_mAP' in log(tmp_path / 'test')

    run_tool('test', path, checkpoint, '--work-dir', tmp_path / 'tta', '--tta')
    assert 'coco/bbox_mAP' in log(tmp_path / 'tta')

    # Testing needs all weights, and a bare backbone has none for the heads.
    backbone = {k: v for k, v in state['state_dict'].items() if k.startswith('backbone.')}
    torch.save(backbone, tmp_path / 'backbone.pth')
    capsys.readouterr()
    with pytest.raises(SystemExit):
        run_tool('test', path, tmp_path / 'backbone.pth', '--work-dir', tmp_path / 'test')
    assert 'neck.' in capsys.readouterr().err


@pytest.mark.parametrize(
    'text, name, backbone, num_steps, metric',
    [
        (SMALL_RETINANET, 'dat/retinanet_dat_t', 'dat', 4, 'coco/bbox_mAP'),
        (SMALL_MASK_RCNN, 'dat/mask_rcnn_dat_tpp', 'dat_plus_plus', 4, 'coco/segm_mAP'),
        (SMALL_RETINANET, 'quadtree/retinanet_quadtree_b0', 'quadtree', 4, 'coco/bbox_mAP'),
        (SMALL_MASK_RCNN, 'quadtree/mask_rcnn_quadtree_b1', 'quadtree', 4, 'coco/segm_mAP'),
        (SMALL_FPN, 'dat/fpn_dat_t', 'dat', 2, 'mIoU'),
        (SMALL_FPN, 'quadtree/fpn_quadtree_b0', 'quadtree', 2, 'mIoU'),
    ],
)
def test_other_families_train_and_are_evaluated(
    text, name, backbone, num_steps, metric, config, tmp_path
):
    path = config(text.replace('CONFIG', name).replace('BACKBONE', SMALL_BACKBONES[backbone]))
    run_tool('train', path, '--work-dir', tmp_path / 'run')
    steps, evaluations = scalars(tmp_path / 'run')
    assert [step['iter'] for step in steps] == list(range(1, num_steps + 1))
    assert math.isfinite(evaluations[0][metric])
    (checkpoint,) = (tmp_path / 'run').glob('*.pth')
    state = torch.load(checkpoint, weights_only=False)
    moments = state['optimizer']['state']
    # Every parameter, also of the backbone, has had a gradient and taken a step.
    assert len(moments) == sum(len(group['params']) for group in state['optimizer']['param_groups'])
    assert all(moment['exp_avg'].isfinite().all() for moment in moments.values())


def test_segmentor_trains_and_is_tested(config, tmp_path):
    path, work_dir = config(SMALL_UPERNET), tmp_path / 'run'
    run_tool('train', path, '--work-dir', work_dir)
    steps, evaluations = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]
    assert 'mIoU' in evaluations[0]

    options = ['--work-dir', tmp_path / 'test', '--show-dir', tmp_path / 'pictures']
    run_tool('test', path, work_dir / 'iter_2.pth', *options)
    assert 'mIoU' in log(tmp_path / 'test')
    assert len(list((tmp_path / 'pictures').rglob('*.png'))) == 2

    fast = ['--cfg-options', 'test_dataloader.dataset.indices=1']
    run_tool('test', path, work_dir / 'iter_2.pth', '--work-dir', tmp_path / 'tta', '--tta', *fast)
    assert 'mIoU' in log(tmp_path / 'tta')


def test_classifier_trains_resumes_and_is_tested(config, tmp_path):
    """The saved and tested weights are the moving average."""
    path, work_dir = config(SMALL_CLASSIFIER), tmp_path / 'run'
    run_tool('train', path, '--work-dir', work_dir)
    steps, evaluations = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]
    assert 'accuracy/top1' in evaluations[0]
    assert 'ema_state_dict' in torch.load(work_dir / 'epoch_1.pth', weights_only=False)

    run_tool(
        'train', path, '--work-dir', work_dir, '--resume', '--cfg-options', 'train_cfg.max_epochs=2'
    )
    steps, evaluations = scalars(work_dir)
    assert [step['iter'] for step in steps] == [3, 4]

    checkpoint, pictures = work_dir / 'epoch_2.pth', tmp_path / 'pictures'
    run_tool('test', path, checkpoint, '--work-dir', tmp_path / 'test', '--show-dir', pictures)
    tested = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    assert tested['accuracy/top5'] == evaluations[0]['accuracy/top5']
    assert len(list(pictures.iterdir())) == 2
    run_tool('test', path, checkpoint, '--work-dir', tmp_path / 'tta', '--tta')


SWIN = (
    "dict(_delete_=True, type='SwinTransformer', "
    'embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))'
)
RESNET = "dict(_delete_=True, type='ResNet', depth=18, stem_channels=16, base_channels=16)"


@pytest.mark.parametrize(
    'text, backbone, checkpoint, metric',
    [
        (SMALL_MASK_RCNN.replace('CONFIG', 'dat/mask_rcnn_dat_tpp'), SWIN, 'epoch_1', 'bbox_mAP'),
        (SMALL_FPN.replace('CONFIG', 'dat/fpn_dat_t'), RESNET, 'iter_2', 'mIoU'),
        (SMALL_CLASSIFIER.replace('=256', '=128'), RESNET, 'epoch_1', 'accuracy/top5'),
    ],
    ids=['detector', 'segmentor', 'classifier'],
)
def test_models_with_other_backbones_are_tested(
    text, backbone, checkpoint, metric, config, tmp_path
):
    text = text.replace('BACKBONE', backbone).replace(f'dict(arch={ARCH})', backbone)
    path, work_dir = config(text), tmp_path / 'run'
    run_tool('train', path, '--work-dir', work_dir)
    _, (evaluation,) = scalars(work_dir)
    run_tool('test', path, work_dir / f'{checkpoint}.pth', '--work-dir', tmp_path / 'test')
    tested = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    name = next(name for name in tested if metric in name)
    assert tested[name] == evaluation[name]


@pytest.fixture
def two_processes(tmp_path):
    """Train by torchrun and gloo; return the output."""

    def run(*arguments):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        environment = dict(
            os.environ, PYTHON=sys.executable, PORT=str(port), CUDA_VISIBLE_DEVICES=''
        )
        command = [TOOLS / 'dist_train.sh', arguments[0], '2', *arguments[1:]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    return run


def test_two_processes(two_processes, config, tmp_path):
    """Both ranks step, and one of them saves."""
    work_dir = tmp_path / 'run'
    printed = two_processes(config(SMALL_CASCADE), '--work-dir', work_dir)
    steps, evaluations = scalars(work_dir)
    assert [step['iter'] for step in steps] == [1, 2]  # of four images
    assert 'coco/bbox_mAP' in evaluations[0]
    assert [path.name for path in work_dir.glob('*.pth')] == ['epoch_1.pth']
    assert 'gloo instead of nccl' in printed


def weights(work_dir):
    checkpoint = torch.load(work_dir / 'epoch_2.pth', weights_only=False)
    assert len(checkpoint['optimizer']['state']) > 0
    return checkpoint['state_dict']


def assert_same_updates(work_dir, expected):
    steps, _ = scalars(work_dir)
    # The total batch is half of the base batch size in every case.
    assert {step['lr'] for step in steps} == {0.1}
    torch.testing.assert_close(weights(work_dir), expected, rtol=1e-4, atol=1e-5)


def test_a_batch_gives_the_same_updates_however_split(two_processes, config, tmp_path):
    """One process, accumulation, two processes, and two that shard and resume."""
    common = ['--auto-scale-lr', '--work-dir']
    path = config(UPDATES.replace('*SHARDED', ''))
    run_tool('train', path, *common, tmp_path / 'whole')
    expected = weights(tmp_path / 'whole')

    accumulate = ['--cfg-options', ONE_IMAGE, 'optim_wrapper.accumulative_counts=2']
    run_tool('train', path, *common, tmp_path / 'accumulated', *accumulate)
    assert_same_updates(tmp_path / 'accumulated', expected)

    options = ['--cfg-options', ONE_IMAGE]
    two_processes(path, *common, tmp_path / 'replicated', *options)
    assert_same_updates(tmp_path / 'replicated', expected)

    path = config(UPDATES.replace('*SHARDED', "'{configs}/_base_/fsdp.py'"))
    options = [*common, tmp_path / 'sharded', *options]
    two_processes(path, *options, 'train_cfg.max_epochs=1')
    two_processes(path, '--resume', *options)
    assert_same_updates(tmp_path / 'sharded', expected)

    # The result is an ordinary checkpoint, which one process can test.
    loader = dict(num_workers=0, persistent_workers=False, **{'dataset.indices': 2})
    quick = [f'test_dataloader.{key}={value}' for key, value in loader.items()]
    checkpoint = tmp_path / 'sharded/epoch_2.pth'
    run_tool('test', path, checkpoint, '--work-dir', tmp_path / 'test', '--cfg-options', *quick)
    assert 'accuracy/top1' in log(tmp_path / 'test')
