"""Configs: agreement with their names, differences between siblings, data folders, weights.

test_metafiles.py builds those with an entry, and counts their parameters and FLOPs; test_recipes.py
has optimizers, schedules and pipelines.
"""

import re
from functools import cache
from pathlib import Path

import model_zoo
import pytest
import torch
import yaml
from helpers.metafiles import entries
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, init_default_scope

import mmattn
from mmattn.attention import QuadTreeAttention

CONFIGS = Path(__file__).parents[2] / 'configs'
LEAVES = sorted(
    str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob('*.py') if '_base_' not in path.parts
)
ENTRIES = entries()
pytestmark = pytest.mark.usefixtures('no_metafiles')
ROWS = {
    f'{name}.py': row
    for row in yaml.safe_load(Path(__file__).with_name('recipes.yml').read_text())['rows']
    for name in row['configs']
}
ABLATIONS = [name for name in LEAVES if '/ablations/' in name]
REGULAR = [name for name in ENTRIES if name not in ABLATIONS]


@pytest.fixture(autouse=True)
def default_data_folders(monkeypatch):
    for variable in ('MMATTN_COCO', 'MMATTN_ADE20K', 'MMATTN_IMAGENET'):
        monkeypatch.delenv(variable, raising=False)


def read(name):
    return Config.fromfile(CONFIGS / name)


def build(cfg, device='meta'):
    init_default_scope(cfg.default_scope)
    with torch.device(device):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize('name', [name for name in LEAVES if name not in ENTRIES])
def test_builds(name):
    # The constructor of mmdet's PVT v2 reads values of tensors.
    build(read(name), device='cpu' if 'pvtv2' in name else 'meta')


@pytest.mark.parametrize('name', LEAVES)
def test_default_hooks_guard_checkpoints_and_loss(name):
    cfg = read(name)
    # mmengine deletes the oldest checkpoint before it writes the next one.
    assert cfg.default_hooks.checkpoint.max_keep_ckpts >= 2
    assert cfg.custom_imports.imports == ['mmattn']
    assert cfg.default_hooks.invalid_loss.type == 'InvalidLossHook'
    assert cfg.default_hooks.iteration_seed.type == 'IterationSeedHook'


# ---- Names

FAMILIES = dict(gcvit='GCViT', dat='DAT', quadtree='QuadTree')
LETTERS = dict(t='tiny', s='small', b='base', l='large', p='+')
MODELS_OF_HEADS = {
    'mask_rcnn': 'MaskRCNN',
    'cascade_mask_rcnn': 'CascadeRCNN',
    'retinanet': 'RetinaNet',
    'dino': 'DINO',
    'upernet': 'EncoderDecoder',
    'fpn': 'EncoderDecoder',
    None: 'ImageClassifier',
}
DECODERS = dict(upernet='UPerHead', fpn='FPNHead')
EPOCHS = {'1x': 12, '3x': 36, '12e': 12, '36e': 36}
DATA = dict(coco='CocoDataset', ade20k='ADE20KDataset', imagenet='ImageNet')


def arch_of(part):
    """Name of the arch: small++ for ``spp``, xxtiny for ``xxt``; QuadTree's b2 for ``b2``."""
    if part['family'] == 'quadtree':
        return part['size']
    return ''.join(LETTERS.get(letter, letter) for letter in part['size'])


@pytest.mark.parametrize('name', REGULAR)
def test_is_what_its_name_says(name):
    cfg, part = read(name), model_zoo.parse(ENTRIES[name])
    assert name.startswith(f'{part["family"]}/')
    backbone = cfg.model.backbone
    assert (backbone.type, backbone.arch) == (FAMILIES[part['family']], arch_of(part))
    assert cfg.model.type == MODELS_OF_HEADS[part['head']]
    if part['head'] in DECODERS:
        assert cfg.model.decode_head.type == DECODERS[part['head']]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert loader.dataset.type == DATA[part['dataset']]
    if part['extra'] in EPOCHS:
        assert cfg.train_cfg.max_epochs == EPOCHS[part['extra']]
    elif part['extra'] and part['extra'].isdigit():
        assert cfg.train_dataloader.dataset.pipeline[1].scale == int(part['extra'])


# ---- Siblings


@cache
def settings(name):
    """The resolved config as path -> value; lists of dicts are flattened, too."""

    def flatten(value, path):
        if isinstance(value, dict):
            pairs = value.items()
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            pairs = enumerate(value)
        else:
            yield path, value
            return
        for key, item in pairs:
            yield from flatten(item, (*path, str(key)))

    return {'.'.join(path): value for path, value in flatten(read(name).to_dict(), ())}


def differences(one, other):
    """Paths of the settings in which two configs differ."""
    a, b = settings(one), settings(other)
    return {
        path for path in a.keys() | b.keys() if path not in a or path not in b or a[path] != b[path]
    }


def kinds():
    """Groups of configs with one paper, head, schedule, data set and image size."""
    found = {}
    for name in REGULAR:
        part = model_zoo.parse(ENTRIES[name])
        collection = ENTRIES[name]['In Collection']
        found.setdefault((collection, part['head'], part['extra'], part['dataset']), []).append(
            name
        )
    return [names for names in found.values() if len(names) > 1]


# Where sizes differ: in the model, in the weights it starts from, and in what their rows of
# recipes.yml say.
OF_SIZE = (
    r'model\.backbone\.(arch|drop_path_rate)|.*\.in_channels',
    r'checkpoint|model\.backbone\.init_cfg\.checkpoint',
)
OF_RECIPE = dict(
    images=r'train_dataloader\.batch_size',
    rate=r'optim_wrapper\.optimizer\.lr',
    warmup=r'param_scheduler\.\d\.(start_factor|begin|end)',
    precision=r'optim_wrapper\.type',
    clip=r'optim_wrapper\.clip_grad(\.max_norm)?',
    test=r'(test_pipeline|(val|test)_dataloader\.dataset\.pipeline)\..*',
)


@pytest.mark.parametrize('names', kinds(), ids=lambda names: names[0])
def test_sizes_of_a_kind_differ_in_size_and_recipe_alone(names):
    first = ROWS[names[0]]
    for name in names[1:]:
        found = differences(names[0], name)
        assert 'model.backbone.arch' in found
        allowed = [*OF_SIZE, *(p for key, p in OF_RECIPE.items() if ROWS[name][key] != first[key])]
        assert not {path for path in found if not re.fullmatch('|'.join(allowed), path)}, name


@pytest.mark.parametrize('name', ABLATIONS)
def test_ablations_differ_in_the_backbone_alone(name):
    base = 'gcvit/gcvit_t_imagenet.py' if name.startswith('gcvit/') else 'dat/dat_t_imagenet.py'
    if 'pvtv2' in name:
        base = 'quadtree/mask_rcnn_quadtree_b2_1x_coco.py'
    found = differences(name, base) - {'checkpoint'}
    assert found and all(path.startswith('model.backbone.') for path in found)


@pytest.mark.parametrize(
    ('name', 'base', 'where'),
    [
        ('gcvit_l_512_imagenet', 'gcvit_l_384_imagenet', r'.*(window_size|resolution|scale)'),
        ('dino_gcvit_l_fsdp_coco', 'dino_gcvit_l_coco', 'runner_type|strategy.*'),
        ('gcvit_t_imagenetv2_matched', 'gcvit_t_imagenet', 'test_dataloader.dataset.*'),
        ('gcvit_t_imagenetv2_threshold', 'gcvit_t_imagenet', 'test_dataloader.dataset.*'),
    ],
)
def test_variants_differ_where_they_should(name, base, where):
    found = differences(f'gcvit/{name}.py', f'gcvit/{base}.py')
    assert found and all(re.fullmatch(where, path) for path in found), found


@pytest.mark.parametrize('family', ['dat', 'quadtree'])
def test_the_demos_differ_in_the_backbone_alone(family):
    demo = f'{family}/demo_cascade_mask_rcnn_{family}.py'
    found = differences(demo, 'gcvit/demo_cascade_mask_rcnn_gcvit.py')
    assert found and all(path.startswith('model.backbone.') for path in found)


def test_the_pvt_v2_baseline_has_quadtrees_body():
    baseline = build(read('quadtree/ablations/mask_rcnn_pvtv2_b2_1x_coco.py'), 'cpu')
    ours = build(read('quadtree/mask_rcnn_quadtree_b2_1x_coco.py'))
    theirs = [block for layers in baseline.backbone.layers for block in layers[1]]
    blocks = [m for m in ours.backbone.modules() if hasattr(m, 'attn') and hasattr(m, 'mlp')]
    for block, other in zip(blocks, theirs, strict=True):
        assert block.norm1.normalized_shape == other.norm1.normalized_shape
        assert block.attn.num_heads == other.attn.attn.num_heads
        assert block.mlp.fc1.out_features == other.ffn.feedforward_channels


# ---- Models


def test_cascade_heads():
    heads = build(read('gcvit/cascade_mask_rcnn_gcvit_t_coco.py')).roi_head.bbox_head
    assert len(heads) == 3
    for head in heads:
        assert (len(head.shared_convs), len(head.shared_fcs)) == (4, 1)
        assert all(isinstance(conv.norm, torch.nn.SyncBatchNorm) for conv in head.shared_convs)
        assert head.fc_reg.out_features == 4 * 80
        assert head.reg_decoded_bbox


@pytest.mark.parametrize(
    ('name', 'topk', 'act', 'other'),
    [
        ('retinanet_quadtree_b0_1x_coco', 32, torch.nn.ReLU, torch.nn.GELU),
        ('quadtree_b0_imagenet', 8, torch.nn.GELU, torch.nn.ReLU),
    ],
)
def test_quadtree_attends_as_its_published_weights_need_it(name, topk, act, other):
    backbone = build(read(f'quadtree/{name}.py')).backbone
    attention = next(m for m in backbone.modules() if isinstance(m, QuadTreeAttention))
    assert attention.topks == topk
    kinds = {type(module) for module in attention.modules()}
    assert act in kinds and other not in kinds


# ---- Data and weights


def test_environment_variables_set_the_data_folders(monkeypatch, tmp_path):
    """For a config in another folder that inherits, with and without a trailing slash."""
    roots = {name: str(tmp_path / name) for name in ('coco', 'ade20k', 'imagenet')}
    for i, leaf in enumerate(LEAVES):
        for name, root in roots.items():
            monkeypatch.setenv(f'MMATTN_{name.upper()}', root + '/' * (i % 2))
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


# Models that start from other weights than those of their size's classifier at 224.
STARTS = {
    'gcvit/gcvit_l_384_imagenet.py': 'gcvit_l_21k',
    'gcvit/gcvit_l_512_imagenet.py': 'gcvit_l_21k',
    'gcvit/dino_gcvit_l_coco.py': 'gcvit_l_384',
}


@pytest.mark.parametrize('name', REGULAR)
def test_starts_from_the_published_weights_of_a_classifier(name):
    cfg, part = read(name), model_zoo.parse(ENTRIES[name])
    init_cfg = cfg.model.backbone.get('init_cfg')
    if part['dataset'] == 'imagenet' and part['extra'] not in ('384', '512'):
        assert init_cfg is None
        return
    classifier = STARTS.get(name, f'{part["family"]}_{part["size"]}')
    weights = ENTRIES[f'{part["family"]}/{classifier}_imagenet.py']['Weights']
    assert init_cfg.type == 'Pretrained'
    assert init_cfg.checkpoint == cfg.checkpoint == weights.partition('#')[0]


@pytest.mark.parametrize('name', [name for name in LEAVES if '/demo_' in name])
def test_demos_download_nothing(name):
    assert read(name).model.backbone.get('init_cfg') is None


def test_weights_by_two_options(tmp_path):
    """The two options of the READMEs load a file into the backbone."""
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


@pytest.mark.parametrize('name', ['matched', 'threshold'])
def test_imagenetv2_labels_are_folder_names(name, monkeypatch, tmp_path):
    """With the list of labels that configs/gcvit/README.md asks for."""
    import cv2
    import numpy as np

    monkeypatch.setenv('MMATTN_IMAGENET', str(tmp_path))
    cfg = read(f'gcvit/gcvit_t_imagenetv2_{name}.py')
    labels = (0, 1, 2, 10, 100, 999)
    folder = tmp_path / cfg.test_dataloader.dataset.data_prefix
    for label in labels:
        (folder / str(label)).mkdir(parents=True)
        cv2.imwrite(str(folder / str(label) / 'a.jpeg'), np.zeros((40, 40, 3), 'uint8'))
    list_of_labels = tmp_path / cfg.test_dataloader.dataset.ann_file
    list_of_labels.write_text(''.join(f'./{label}/a.jpeg {label}\n' for label in labels))

    init_default_scope(cfg.default_scope)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    assert {dataset.get_data_info(i)['gt_label'] for i in range(len(dataset))} == set(labels)
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        assert Path(info['img_path']).parent.name == str(info['gt_label'])
    assert dataset[0]['inputs'].shape == (3, 224, 224)


@pytest.mark.parametrize('name', [name for name in LEAVES if name.endswith('_imagenet.py')])
def test_mmpretrains_browse_dataset_takes_the_visualizer(name):
    """It passes all keys but the type to the class."""
    cfg = read(name)
    options = {key: value for key, value in cfg.visualizer.items() if key != 'type'}
    assert options == dict(vis_backends=[dict(type='LocalVisBackend')])
