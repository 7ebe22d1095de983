"""The metafiles say what the configs, the models and the README say; sizes are in test_configs.py."""

import re

import pytest
import torch
from counting import multiply_adds
from metafiles import ROOT, entries, metafiles
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
# No models of ours: the demos, other test sets for a classifier, a baseline of mmdet's.
NO_MODEL = r'demo_|imagenetv2|pvtv2'


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


# ---- The README's two tables


def rows(first_cell_of_head, columns):
    """The cells of the table whose head begins so, with as many columns."""
    lines = iter((ROOT / 'README.md').read_text().splitlines())
    for line in lines:
        if line.startswith(f'| {first_cell_of_head} |') and line.count('|') == columns + 1:
            break
    next(lines)
    for line in lines:
        if not line.startswith('|'):
            return
        yield [cell.strip() for cell in line.strip('|').split('|')]


def configs_of(cell):
    """`dat/x_{s,t}.py` and `quadtree/x_b*.py` are several."""
    cell = cell.strip('`')
    if '*' in cell:
        return sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.glob(cell))
    if braces := re.search(r'\{(.*)\}', cell):
        return [cell.replace(braces[0], part) for part in braces[1].split(',')]
    return [cell]


def test_readme_classifiers():
    found = list(rows('model', 7))
    names = [configs_of(row[-1])[0] for row in found]
    assert sorted(names) == sorted(n for n in ENTRIES if re.match(r'\w+/\w+_imagenet\.py', n))
    for row, name in zip(found, names, strict=True):
        metadata = ENTRIES[name]['Metadata']
        _, accuracy, parameters, counted_parameters, flops, counted_flops, _ = row
        assert float(accuracy) == results(ENTRIES[name])['Top 1 Accuracy']
        assert counted_parameters == f'{metadata["Parameters"] / 1e6:.2f}'
        assert counted_flops == f'{metadata["FLOPs"] / 1e9:.2f}'
        for published, key in ((parameters, 'Parameters (M)'), (flops, 'FLOPs (G)')):
            stated = metadata.get(f'Published {key}')
            assert stated is None or published == str(stated)


def test_readme_detectors_and_segmentors():
    told = {}
    for _, result, parameters, flops, configs in rows('model', 5):
        configs = configs_of(configs)
        figures = [None] * len(configs) if result == 'not published' else result.split(', ')
        for name, figure in zip(configs, figures, strict=True):
            told[name] = [float(part) for part in figure.split(' / ')] if figure else []
            metadata = ENTRIES[name]['Metadata']
            assert parameters == str(metadata.get('Published Parameters (M)', ''))
            assert flops == str(metadata.get('Published FLOPs (G)', ''))
    single_scale = {
        name: [value for metric, value in results(entry).items() if metric != 'mIoU(ms)']
        for name, entry in ENTRIES.items()
        if not name.endswith('imagenet.py')
    }
    assert {name: single_scale[name] for name in told} == told
    assert {name for name, values in single_scale.items() if values} <= told.keys()
