"""The metafiles say what the configs and the models say; sizes are in test_configs.py."""

import re

import pytest
import torch
from helpers.counting import multiply_adds
from helpers.metafiles import ROOT, entries, metafiles
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from modelindex.load_model_index import load

CONFIGS = ROOT / 'configs'
ENTRIES = entries()
# Metric -> what the first line of a config calls it.
METRICS = {
    'Top 1 Accuracy': r'top-1 (\d+(?:\.\d+)?)',
    'box AP': r'box AP (\d+(?:\.\d+)?)',
    'mask AP': r'mask AP (\d+(?:\.\d+)?)',
    'mIoU': r'\(published\): (\d+(?:\.\d+)?)(?= mIoU| single scale)',
    'mIoU(ms)': r'(\d+(?:\.\d+)?) multi-scale mIoU',
}
# No models of ours: the demos, other test sets for a classifier, another way to train the same model, a baseline
# of mmdet's.
NO_MODEL = r'demo_|imagenetv2|fsdp|pvtv2'


@pytest.fixture(autouse=True)
def clean():
    yield
    DefaultScope._instance_dict.clear()


def results(entry):
    """Metric -> value."""
    return {k: v for result in entry.get('Results', []) for k, v in result['Metrics'].items()}


def test_every_config_has_one_entry():
    found = {str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob('*.py') if '_base_' not in p.parts}
    assert set(ENTRIES) == {name for name in found if not re.search(NO_MODEL, name)}
    assert len(ENTRIES) == sum(len(metafile['Models']) for metafile in metafiles().values())


def test_entries_are_where_and_what_they_say():
    for path, metafile in metafiles().items():
        collections = {collection['Name'] for collection in metafile['Collections']}
        for model in metafile['Models']:
            assert model['Config'].startswith(path.removesuffix('metafile.yml'))
            assert model['Config'].endswith(f'/{model["Name"]}.py')
            assert model['In Collection'] in collections
            # They are `mim download`'s and the inferencers' to load, and pages are no checkpoints.
            assert 'Weights' not in model


def test_openmmlabs_reader_finds_no_fault():
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert {model.name for model in index.models} == {e['Name'] for e in ENTRIES.values()}
    assert index.check(silent=True) == []


@pytest.mark.parametrize('name', ENTRIES)
def test_results_are_those_that_the_config_names_as_published(name):
    line = (CONFIGS / name).read_text().splitlines()[0]
    expected = {}
    # UPerNet with GC ViT-T, the base of B's, names B's result.
    if line.startswith('# Expected (published)') and 'no figure for T' not in line:
        found = {metric: re.search(pattern, line) for metric, pattern in METRICS.items()}
        expected = {metric: float(match[1]) for metric, match in found.items() if match}
        assert expected
    assert results(ENTRIES[name]) == expected
    metadata = ENTRIES[name]['Metadata']
    assert ('Published In' in metadata) == bool(expected)
    for key, unit in (('Parameters (M)', 'M parameters'), ('FLOPs (G)', 'GFLOPs')):
        figure = re.search(rf'(\d+(?:\.\d+)?) {unit}', line)
        assert metadata.get(f'Published {key}') == (figure and float(figure[1]))


def test_only_dinos_work_is_not_counted():
    uncounted = {name for name, entry in ENTRIES.items() if 'FLOPs' not in entry['Metadata']}
    assert uncounted == {name for name in ENTRIES if '/dino_' in name}


@pytest.mark.parametrize(
    ('name', 'size'),
    [
        ('gcvit/gcvit_xxt_imagenet.py', (224, 224)),
        ('dat/dat_tpp_imagenet.py', (224, 224)),
        ('quadtree/quadtree_b0_imagenet.py', (224, 224)),
        ('quadtree/fpn_quadtree_b0_ade20k.py', (512, 512)),
        ('quadtree/retinanet_quadtree_b0_1x_coco.py', (800, 1280)),
        ('gcvit/cascade_mask_rcnn_gcvit_t_coco.py', (800, 1280)),
    ],
)
def test_flops(name, size):
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    stated = ENTRIES[name]['Metadata']['FLOPs']
    assert multiply_adds(model, size) == pytest.approx(stated, rel=2e-3)


def test_the_weights_licence_is_named():
    licences = {
        collection['Name']: collection['Metadata']['Weights License']
        for metafile in metafiles().values()
        for collection in metafile['Collections']
    }
    assert licences.keys() == {'GCViT', 'DAT', 'DAT++', 'QuadTree'}
    assert licences['GCViT'].startswith('CC BY-NC-SA 4.0')
