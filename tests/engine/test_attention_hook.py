"""AttentionHook in a Runner, with mmengine's Visualizer."""

import mmcv
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.visualization import Visualizer
from mmpretrain.structures import DataSample
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mmattn.engine.attention_hook import AttentionHook


@pytest.fixture(autouse=True)
def fresh_globals():
    """Restore mmengine's global scopes and visualizers after each test."""
    before = {cls: dict(cls._instance_dict) for cls in (DefaultScope, Visualizer)}
    yield
    for cls, instances in before.items():
        cls._instance_dict.clear()
        cls._instance_dict.update(instances)


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 3

    def __getitem__(self, i):
        image = torch.from_numpy(np.random.default_rng(i).integers(0, 255, (3, 64, 64), np.uint8))
        return dict(inputs=image, data_samples=DataSample().set_gt_label(i % 2))


def runner(tmp_path, backends=('LocalVisBackend',), **hook):
    arch = dict(embed_dims=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2)
    backbone = dict(type='GCViT', arch=arch, window_size=(4, 4, 4, 4), out_indices=(3,))
    loader = dict(
        dataset=Images(),
        batch_size=1,
        collate_fn=dict(type='default_collate'),
        sampler=dict(type='DefaultSampler', shuffle=False),
    )
    return Runner(
        model=dict(
            type='ImageClassifier',
            backbone=backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(type='LinearClsHead', num_classes=2, in_channels=128),
            data_preprocessor=dict(num_classes=2, mean=[127] * 3, std=[60] * 3, to_rgb=True),
        ),
        work_dir=str(tmp_path),
        train_dataloader=loader,
        val_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=2, val_interval=1),
        val_cfg=dict(),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        val_evaluator=dict(type='Accuracy', topk=(1,)),
        custom_hooks=[dict(type='AttentionHook', **hook)],
        visualizer=dict(
            type='Visualizer',
            vis_backends=[dict(type=backend) for backend in backends],
            name=f'{tmp_path}',
        ),
        default_hooks=dict(checkpoint=None),
        default_scope='mmpretrain',
        experiment_name=f'{tmp_path}',
        log_level='ERROR',
    )


def test_pictures_are_written_at_every_evaluation(tmp_path):
    runner(tmp_path, num_images=2, stage=1).train()
    kinds = ('attention_local', 'attention_global', 'window_0', 'features')
    names = {path.name for path in tmp_path.glob('*/vis_data/vis_image/*.png')}
    assert names == {
        f'{kind}_{image}_{step}.png' for kind in kinds for image in (0, 1) for step in (3, 6)
    }
    folder = next(tmp_path.glob('*/vis_data/vis_image'))
    first, later = (mmcv.imread(folder / f'features_0_{step}.png') for step in (3, 6))
    other = mmcv.imread(folder / 'features_1_3.png')
    assert first.std() > 10 and (first != later).any() and (first != other).any()


def test_pictures_in_tensorboard(tmp_path):
    training = runner(tmp_path, ('TensorboardVisBackend',), stage=1)
    training.train()
    training.visualizer.close()
    events = EventAccumulator(str(next(tmp_path.glob('*/vis_data'))))
    events.Reload()
    assert set(events.Tags()['images']) == {
        'attention_local_0', 'attention_global_0', 'window_0_0', 'features_0',
    }  # fmt: skip
    for step, image in zip((3, 6), events.Images('attention_global_0'), strict=True):
        assert image.step == step and mmcv.imfrombytes(image.encoded_image_string).std() > 10


def test_interval_stage_and_head(tmp_path):
    runner(tmp_path, interval=2, stage=3, head=1).train()
    names = sorted(path.name for path in tmp_path.glob('*/vis_data/vis_image/*.png'))
    assert names and all(name.endswith('_0_3.png') for name in names)


def test_unknown_stage_stops_the_evaluation(tmp_path):
    with pytest.raises(ValueError, match='stage 5; there is stage 0'):
        runner(tmp_path, stage=5).val()


@pytest.mark.parametrize('wrong', [dict(num_images=0), dict(interval='1')])
def test_arguments_are_checked(wrong):
    with pytest.raises(ValueError, match=f'{next(iter(wrong))} must be a positive integer'):
        AttentionHook(**wrong)
