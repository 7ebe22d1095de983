"""Every config builds, follows its recipe, and finds its data."""

import re
import subprocess
from pathlib import Path

import mmdet
import mmengine.config.utils
import pytest
import torch
from helpers.counting import parameters
from helpers.metafiles import entries
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from torch.nn.modules.batchnorm import _BatchNorm

import mmattn

CONFIGS = Path(__file__).parents[1] / 'configs'
LEAVES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts
)
RECIPES = [
    name
    for name in LEAVES
    if '/demo' not in name and (name.startswith('gcvit/') or 'ablations' not in name)
]
NORMS = (_BatchNorm, torch.nn.LayerNorm, torch.nn.GroupNorm)

ENTRIES = entries()

# Family -> head -> what is there of it, after the head's and the family's name.
PUBLISHED_HEADS = {
    'dat': {
        'mask_rcnn': 't_1x t_3x s_1x s_3x tpp_1x tpp_3x spp_1x spp_3x',
        'cascade_mask_rcnn': 't_1x t_3x s_3x b_3x tpp_1x tpp_3x spp_3x bpp_3x',
        'retinanet': 't_1x t_3x s_1x s_3x tpp_1x tpp_3x spp_1x spp_3x',
        'dino': 't_12e t_36e s_12e s_36e tpp_12e tpp_36e spp_12e spp_36e',
        'upernet': 't s b tpp spp bpp',
        'fpn': 't s b tpp spp bpp',
        '': 't s b b_384 tpp spp bpp bpp_384',
    },
    'quadtree': {
        'mask_rcnn': 'b0_1x b1_1x b2_1x b3_1x b4_1x b0_3x b1_3x b2_3x b3_3x b4_3x',
        'cascade_mask_rcnn': 'b2_3x b3_3x b4_3x',
        'retinanet': 'b0_1x b1_1x b2_1x b3_1x b4_1x',
        'dino': 'b2_12e',
        'upernet': 'b2 b3',
        'fpn': 'b0 b1 b2 b3 b4',
        '': 'b0 b1 b2 b3 b4',
    },
}
DATASETS_OF_HEADS = {'upernet': 'ade20k', 'fpn': 'ade20k', '': 'imagenet'}


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch):
    """No reading of all metafiles for each base, and no default scope left behind."""

    def no_metafile(*_):
        raise ValueError

    monkeypatch.setattr(mmengine.config.utils, '_get_cfg_metainfo', no_metafile)
    for variable in ('MMATTN_COCO', 'MMATTN_ADE20K', 'MMATTN_IMAGENET'):
        monkeypatch.delenv(variable, raising=False)
    yield
    DefaultScope._instance_dict.clear()


def read(name):
    return Config.fromfile(CONFIGS / name)


def build(cfg, device='meta'):
    init_default_scope(cfg.default_scope)
    with torch.device(device):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', LEAVES)
def test_builds_and_keeps_a_good_checkpoint(name):
    cfg = read(name)
    # mmdet's PVT v2 reads numbers while it is built.
    model = build(cfg, device='cpu' if 'pvtv2' in name else 'meta')
    if name in ENTRIES:
        metadata = ENTRIES[name]['Metadata']
        expected = metadata['Parameters']
        if cfg.model.type == 'DINO' and mmdet.__version__ == '3.3.0':
            expected -= (
                256 * 512
            )  # the forks' decoder takes 1024 channels of a query's place, not 512
        assert parameters(model) == expected
        if 'Published Parameters (M)' in metadata:
            millions = metadata['Parameters'] / 1e6
            assert millions == pytest.approx(metadata['Published Parameters (M)'], rel=0.04)
    # mmengine deletes the oldest checkpoint before it writes the next one.
    assert cfg.default_hooks.checkpoint.max_keep_ckpts >= 2
    assert cfg.custom_imports.imports == ['mmattn']
    assert cfg.default_hooks.invalid_loss.type == 'InvalidLossHook'
    assert cfg.default_hooks.iteration_seed.type == 'IterationSeedHook'


@pytest.mark.parametrize('family', PUBLISHED_HEADS)
def test_every_combination_is_there_under_its_name(family):
    expected = {
        f'{family}/{"_".join(filter(None, [head, family, size, DATASETS_OF_HEADS.get(head, "coco")]))}.py'
        for head, sizes in PUBLISHED_HEADS[family].items()
        for size in sizes.split()
    }
    found = {name for name in LEAVES if name.startswith(f'{family}/')}
    found = {name for name in found if '/demo' not in name and 'ablations' not in name}
    assert found == expected


@pytest.mark.parametrize(
    'name',
    [name for name in LEAVES if name.startswith(('dat/dino', 'quadtree/dino', 'quadtree/upernet'))],
)
def test_what_nobody_published_says_so(name):
    assert (CONFIGS / name).read_text().startswith('# Not published')


@pytest.mark.parametrize('name', RECIPES)
def test_says_what_to_expect_and_nothing_twice(name):
    text = (CONFIGS / name).read_text()
    assert re.match(r'# (Expected|Table|Tests|No result|Not published)', text)
    assert len([line for line in text.splitlines() if not line.startswith('#')]) <= 20


@pytest.mark.parametrize(
    'name',
    [
        'gcvit/cascade_mask_rcnn_gcvit_t_coco.py',
        'gcvit/upernet_gcvit_t_ade20k.py',
        'gcvit/gcvit_s_imagenet.py',
        'dat/retinanet_dat_t_1x_coco.py',
        'dat/mask_rcnn_dat_tpp_3x_coco.py',
        'dat/upernet_dat_t_ade20k.py',
        'dat/dat_t_imagenet.py',
    ],
)
def test_no_weight_decay_on_norms_and_bias_tables(name):
    cfg = read(name)
    model = build(cfg)
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters()}
    decay = cfg.optim_wrapper.optimizer.weight_decay
    groups = build_optim_wrapper(model, cfg.optim_wrapper).optimizer.param_groups
    decays = {id(p): group['weight_decay'] for group in groups for p in group['params']}
    assert decays.keys() == names.keys()
    for key, found in decays.items():
        free = key in norms or names[key].endswith(('relative_position_bias_table', 'rpe_table'))
        if 'imagenet' in name:
            # Nor on biases and layer scales.
            free = free or dict(model.named_parameters())[names[key]].ndim == 1
        assert found == (0 if free else decay), names[key]


def test_dino_trains_the_bias_tables_at_the_backbones_rate():
    cfg = read('gcvit/dino_gcvit_l_coco.py')
    groups = build_optim_wrapper(build(cfg), cfg.optim_wrapper).optimizer.param_groups
    assert {(g['lr'], g['weight_decay']) for g in groups} == {(1e-4, 1e-4), (1e-5, 1e-4), (1e-5, 0)}
    assert cfg.model.neck.num_outs == 4


@pytest.mark.parametrize('size', 'tsb')
def test_cascade_heads(size):
    heads = build(read(f'gcvit/cascade_mask_rcnn_gcvit_{size}_coco.py')).roi_head.bbox_head
    assert len(heads) == 3
    for head in heads:
        assert (len(head.shared_convs), len(head.shared_fcs)) == (4, 1)
        assert all(isinstance(conv.norm, torch.nn.SyncBatchNorm) for conv in head.shared_convs)
        assert head.fc_reg.out_features == 4 * 80
        assert head.reg_decoded_bbox
        assert head.loss_bbox.loss_weight == 10


def value(cfg, path):
    for key in path.split('.'):
        cfg = cfg[int(key)] if key.isdigit() else cfg[key]
    return cfg


@pytest.mark.parametrize(
    ('name', 'path', 'expected'),
    [
        ('cascade_mask_rcnn_gcvit_t_coco', 'train_cfg.max_epochs', 36),
        ('cascade_mask_rcnn_gcvit_t_coco', 'param_scheduler.1.milestones', [27, 33]),
        ('cascade_mask_rcnn_gcvit_t_coco', 'optim_wrapper.optimizer.lr', 1e-4),
        ('cascade_mask_rcnn_gcvit_t_coco', 'optim_wrapper.optimizer.weight_decay', 0.05),
        ('cascade_mask_rcnn_gcvit_t_coco', 'model.rpn_head.loss_bbox.beta', 1 / 9),
        ('cascade_mask_rcnn_gcvit_t_coco', 'model.backbone.window_size', (24,) * 4),
        ('cascade_mask_rcnn_gcvit_t_coco', 'auto_scale_lr.base_batch_size', 16),
        ('mask_rcnn_gcvit_t_coco', 'train_cfg.max_epochs', 36),
        ('dino_gcvit_l_coco', 'train_cfg.max_epochs', 36),
        ('upernet_gcvit_b_ade20k', 'train_cfg.max_iters', 160000),
        ('upernet_gcvit_b_ade20k', 'optim_wrapper.optimizer.lr', 6e-5),
        ('upernet_gcvit_b_ade20k', 'param_scheduler.0.end', 1500),
        ('upernet_gcvit_b_ade20k', 'auto_scale_lr.base_batch_size', 16),
        ('gcvit_b_imagenet', 'train_cfg.max_epochs', 310),
        ('gcvit_b_imagenet', 'optim_wrapper.optimizer.lr', 1e-3),
        ('gcvit_b_imagenet', 'optim_wrapper.clip_grad.max_norm', 5.0),
        ('gcvit_b_imagenet', 'custom_hooks.0.momentum', 1 - 0.9998),
        ('gcvit_b_imagenet', 'param_scheduler.1.end', 300),
        ('gcvit_l_384_imagenet', 'model.backbone.drop_path_rate', 0.1),
        ('gcvit_l_512_imagenet', 'test_dataloader.dataset.pipeline.1.scale', 512),
        ('gcvit_l_512_imagenet', 'train_dataloader.dataset.pipeline.1.scale', 512),
        ('retinanet_dat_t_1x_coco', 'train_cfg.max_epochs', 12),
        ('retinanet_dat_t_1x_coco', 'optim_wrapper.optimizer.lr', 1e-4),
        ('retinanet_dat_spp_3x_coco', 'model.backbone.drop_path_rate', 0.5),
        ('retinanet_dat_spp_3x_coco', 'optim_wrapper.optimizer.lr', 2e-4),
        ('retinanet_dat_spp_3x_coco', 'auto_scale_lr.base_batch_size', 32),
        ('mask_rcnn_dat_tpp_3x_coco', 'model.backbone.drop_path_rate', 0.3),
        ('mask_rcnn_dat_tpp_3x_coco', 'auto_scale_lr.base_batch_size', 64),
        ('cascade_mask_rcnn_dat_bpp_3x_coco', 'model.backbone.drop_path_rate', 0.8),
        ('cascade_mask_rcnn_dat_bpp_3x_coco', 'optim_wrapper.optimizer.lr', 4e-4),
        ('upernet_dat_spp_ade20k', 'model.backbone.drop_path_rate', 0.5),
        ('fpn_dat_t_ade20k', 'train_cfg.max_iters', 80000),
        ('fpn_dat_t_ade20k', 'optim_wrapper.optimizer.weight_decay', 1e-4),
        ('dat_t_imagenet', 'param_scheduler.1.eta_min', 5e-6),
        ('dat_b_384_imagenet', 'model.backbone.window_size', 12),
        ('retinanet_quadtree_b0_1x_coco', 'optim_wrapper.optimizer.lr', 1e-4),
        ('retinanet_quadtree_b0_1x_coco', 'optim_wrapper.optimizer.weight_decay', 1e-4),
        ('mask_rcnn_quadtree_b1_1x_coco', 'optim_wrapper.optimizer.lr', 2e-4),
        ('mask_rcnn_quadtree_b1_3x_coco', 'optim_wrapper.optimizer.lr', 1e-4),
        ('mask_rcnn_quadtree_b1_3x_coco', 'optim_wrapper.optimizer.weight_decay', 0.05),
        ('fpn_quadtree_b0_ade20k', 'train_cfg.max_iters', 160000),
        ('fpn_quadtree_b0_ade20k', 'optim_wrapper.paramwise_cfg.custom_keys.head.lr_mult', 10),
        ('quadtree_b0_imagenet', 'model.backbone.topks', 8),
        ('quadtree_b0_imagenet', 'param_scheduler.0.end', 5),
    ],
)
def test_recipe(name, path, expected):
    family = next(family for family in ('gcvit', 'dat', 'quadtree') if family in name.split('_'))
    assert value(read(f'{family}/{name}.py'), path) == pytest.approx(expected)


def test_published_quadtree_detectors_and_classifiers_differ():
    detector, classifier = (
        build(read(f'quadtree/{name}.py')).backbone
        for name in ('retinanet_quadtree_b0_1x_coco', 'quadtree_b0_imagenet')
    )
    for backbone, topk, act in ((detector, 32, torch.nn.ReLU), (classifier, 8, torch.nn.GELU)):
        attention = backbone.block1[0].attn
        assert attention.topks == topk and isinstance(attention.value_branchs[0][1], act)


def test_the_pvt_v2_baseline_differs_in_the_backbone_alone():
    baseline, ours = (
        read(f'quadtree/{name}.py')
        for name in ('ablations/mask_rcnn_pvtv2_b2_1x_coco', 'mask_rcnn_quadtree_b2_1x_coco')
    )
    assert baseline.model.backbone.type == 'PyramidVisionTransformerV2'
    # Of the same body: dimensions, depths, heads and MLPs by stage.
    models = build(baseline, 'cpu'), build(ours)
    theirs = [layers[1] for layers in models[0].backbone.layers]
    blocks = [getattr(models[1].backbone, f'block{i}') for i in (1, 2, 3, 4)]
    assert [len(stage) for stage in theirs] == [len(stage) for stage in blocks]
    for stage, block in zip(theirs, blocks, strict=True):
        assert stage[0].norm1.normalized_shape == block[0].norm1.normalized_shape
        assert stage[0].attn.attn.num_heads == block[0].attn.num_heads
        assert stage[0].ffn.feedforward_channels == block[0].mlp.fc1.out_features
    for cfg in (baseline, ours):
        del cfg.model.backbone
    assert baseline.to_dict() == ours.to_dict()


@pytest.mark.parametrize('slash', ['', '/'])
def test_environment_variables_say_where_data_are(slash, monkeypatch, tmp_path):
    """Also when a config of another folder inherits."""
    roots = {name: str(tmp_path / name) for name in ('coco', 'ade20k', 'imagenet')}
    for name, root in roots.items():
        monkeypatch.setenv(f'MMATTN_{name.upper()}', root + slash)
    for leaf in LEAVES:
        own = tmp_path / 'own.py'
        own.write_text(f'_base_ = {str(CONFIGS / leaf)!r}')
        cfg = Config.fromfile(own)
        task = next((name for name in roots if leaf.endswith(f'{name}.py')), None)
        task = task or ('imagenet' if 'imagenetv2' in leaf else 'coco')
        for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
            assert loader.dataset.data_root.rstrip('/') == roots[task], leaf
        if task == 'coco':
            ann_file = roots[task] + '/annotations/instances_val2017.json'
            assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == ann_file


@pytest.mark.parametrize(
    ('name', 'root'),
    [
        ('cascade_mask_rcnn_gcvit_t_coco', 'data/coco/'),
        ('dino_gcvit_l_coco', 'data/coco/'),
        ('upernet_gcvit_t_ade20k', 'data/ade/ADEChallengeData2016'),
        ('gcvit_t_imagenet', 'data/imagenet'),
    ],
)
def test_default_data_roots_are_openmmlabs(name, root):
    assert read(f'gcvit/{name}.py').test_dataloader.dataset.data_root == root


def test_weights_by_two_options(tmp_path):
    """What the configs' first comment says loads published weights."""
    backbone = mmattn.backbones.GCViT('xxtiny')
    torch.save(backbone.state_dict(), tmp_path / 'weights.pth')
    cfg = read('gcvit/gcvit_xxt_imagenet.py')
    cfg.merge_from_dict(
        {
            'model.backbone.init_cfg.type': 'Pretrained',
            'model.backbone.init_cfg.checkpoint': str(tmp_path / 'weights.pth'),
        }
    )
    model = build(cfg, 'cpu')
    model.init_weights()
    loaded = model.backbone.state_dict()
    assert all(torch.equal(backbone.state_dict()[name], loaded[name]) for name in loaded)


@pytest.mark.parametrize(
    ('name', 'folder'),
    [
        ('matched', 'imagenetv2-matched-frequency-format-val'),
        ('threshold', 'imagenetv2-threshold0.7-format-val'),
    ],
)
def test_imagenetv2_labels_are_folder_names(name, folder, monkeypatch, tmp_path):
    """With the list that the command in the config's comment makes."""
    import cv2
    import numpy as np

    for label in (0, 1, 2, 10, 100, 999):
        (tmp_path / folder / str(label)).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / folder / str(label) / 'a.jpeg'), np.zeros((40, 40, 3), 'uint8'))
    leaf = CONFIGS / f'gcvit/gcvit_t_imagenetv2_{name}.py'
    command = re.search(r'^#   (find .*)$', leaf.read_text(), re.MULTILINE)[1]
    subprocess.run(command, shell=True, cwd=tmp_path / folder, check=True)

    monkeypatch.setenv('MMATTN_IMAGENET', str(tmp_path))
    cfg = Config.fromfile(leaf)
    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    labels = {dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))}
    assert labels == {0, 1, 2, 10, 100, 999}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        assert Path(info['img_path']).parent.name == str(info['gt_label'])
    assert dataset[0]['inputs'].shape == (3, 224, 224)
