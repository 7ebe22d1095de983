"""Agreement of the metafiles with the configs and the models."""

import json
import re
from functools import cache
from pathlib import Path

import mmdet
import model_zoo
import pytest
import torch
from helpers.counting import multiply_adds, parameters, projections_of_padding
from helpers.metafiles import entries
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from modelindex.load_model_index import load

from mmattn.checkpoint.published import PUBLISHED

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
ENTRIES = entries()
pytestmark = pytest.mark.usefixtures('no_metafiles')
# Without an entry: demos, other test sets of a classifier, and the same model trained by FSDP.
NO_MODEL = r'demo_|imagenetv2|fsdp'


def test_every_config_has_one_entry():
    found = {str(p.relative_to(CONFIGS)) for p in CONFIGS.rglob('*.py') if '_base_' not in p.parts}
    assert set(ENTRIES) == {name for name in found if not re.search(NO_MODEL, name)}
    assert len(ENTRIES) == sum(len(m['Models']) for m in model_zoo.metafiles().values())


def test_entries_name_their_collection_and_config():
    for path, metafile in model_zoo.metafiles().items():
        folder = path.removesuffix('metafile.yml')
        collections = {collection['Name'] for collection in metafile['Collections']}
        assert all((ROOT / folder / c['README']).is_file() for c in metafile['Collections'])
        for model in metafile['Models']:
            assert model['Config'].startswith(folder)
            assert model['Config'].endswith(f'/{model["Name"]}.py')
            assert model['In Collection'] in collections
            assert ('Change' in model['Metadata']) == ('/ablations/' in model['Config'])


def test_openmmlabs_reader_finds_no_fault():
    index = load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    assert {model.name for model in index.models} == {e['Name'] for e in ENTRIES.values()}
    assert index.check(silent=True) == []


@pytest.mark.parametrize('name', ENTRIES)
def test_results_are_of_their_task_and_cite_their_paper(name):
    entry = ENTRIES[name]
    dataset = entry['Name'].rpartition('_')[2]
    metrics = [metric for result in entry.get('Results', []) for metric in result['Metrics']]
    assert set(metrics) <= set(model_zoo.TASKS[dataset][1])
    assert len(metrics) == len(set(metrics))
    assert ('Published In' in entry['Metadata']) == bool(metrics)
    for result in entry.get('Results', []):
        assert result['Dataset'].replace('-1k', '').lower() == dataset


def weights(entry):
    """Address -> results, of the file behind an entry's results and of its other files."""
    found = {other['URL']: other.get('Results', []) for other in entry.get('Other Weights', [])}
    return found | ({entry['Weights']: entry['Results']} if 'Weights' in entry else {})


def collections():
    return [c for metafile in model_zoo.metafiles().values() for c in metafile['Collections']]


def test_results_and_published_counts_have_sources():
    for entry in (*ENTRIES.values(), *collections()):
        results = [*entry.get('Results', []), *entry.get('Baseline', {}).get('Results', [])]
        for result in results + [r for results in weights(entry).values() for r in results]:
            assert set(result) == {'Task', 'Dataset', 'Metrics', 'Source'}
            assert all(0 < value < 100 for value in result['Metrics'].values())
        published = {key for key in entry['Metadata'] if re.search(r'Published .*\(.\)', key)}
        assert ('Published Counts From' in entry['Metadata']) == bool(published)


def test_weights_are_the_published_files():
    """All of them, each with the name and the license of mmattn.checkpoint's table."""
    addresses = set()
    for entry in (*ENTRIES.values(), *collections()):
        for other in entry.get('Other Weights', []):
            assert (other['URL'] in PUBLISHED) != ('needs a browser' in other['Note'])
            addresses.add(other['URL'])
        if 'Weights' in entry:
            address, _, name = entry['Weights'].partition('#/')
            assert PUBLISHED[address].name == (name or address.rpartition('/')[2])
            unlicensed = entry['Metadata'].get('Weights License') == 'none stated'
            assert unlicensed == ('states no license' in PUBLISHED[address].license)
            addresses.add(address)
    assert addresses >= set(PUBLISHED)


def test_mim_can_keep_all_weights_in_one_folder():
    """It names a file by what follows the last slash, and takes one that is there for the same."""
    names = [entry['Weights'].split('/')[-1] for entry in ENTRIES.values() if 'Weights' in entry]
    assert len(names) == len(set(names)) > 0
    assert all(re.fullmatch(r'\w+\.pth(\.tar)?', name) for name in names)


def test_weights_are_of_models_with_results():
    """A detector does not name its backbone's: mmengine would load them for the detector."""
    for entry in ENTRIES.values():
        assert 'Weights' not in entry or entry['Results']
    found = [entry['Weights'].partition('#')[0] for entry in ENTRIES.values() if 'Weights' in entry]
    assert len(found) == len(set(found))


def image_size(cfg):
    """Height and width of the image for which FLOPs are counted."""
    if cfg.model.type == 'EncoderDecoder':
        return 512, 512
    if cfg.model.type != 'ImageClassifier':
        return 800, 1280
    steps = [
        step for step in cfg.test_dataloader.dataset.pipeline if {'crop_size', 'scale'} & {*step}
    ]
    side = steps[-1].get('crop_size') or steps[-1].scale
    return side, side


def ends(models):
    """The smallest and the largest model of each kind, and all ablations: FLOPs take seconds."""
    kinds = {}
    for name, entry in models.items():
        if 'Change' in entry['Metadata']:
            kinds[name] = [name]
            continue
        part = model_zoo.parse(entry)
        kind = (part['head'], part['family'], part['size'].endswith('pp'), part['dataset'])
        kinds.setdefault(kind, []).append(name)
    by_size = (
        sorted(names, key=lambda n: models[n]['Metadata']['Parameters']) for names in kinds.values()
    )
    return {name for names in by_size for name in (names[0], names[-1])}


@cache
def count(model_json, size):
    """Parameters and multiply-adds of the model whose config is given as JSON.

    ``size`` None, and DINO: no multiply-adds.
    """
    model_cfg = ConfigDict(json.loads(model_json))
    # The constructor of mmdet's PVT v2 reads values of tensors.
    baseline = model_cfg['backbone']['type'] == 'PyramidVisionTransformerV2'
    with torch.device('cpu' if baseline else 'meta'):
        model = MODELS.build(model_cfg).to('meta')
    if size is None:
        return parameters(model), None
    if model_cfg['type'] != 'DINO':
        return parameters(model), multiply_adds(model, size)
    with torch.no_grad():
        maps = model.extract_feat(torch.empty(1, 3, 64, 64, device='meta'))
    assert [tuple(x.shape[1:]) for x in maps] == [(256, n, n) for n in (8, 4, 2, 1)]
    return parameters(model), None


COUNTED = ends(ENTRIES)


@pytest.mark.parametrize('name', ENTRIES)
def test_parameters_and_flops(name):
    """Count through the whole model, which also proves that its channels fit."""
    cfg = Config.fromfile(CONFIGS / name)
    init_default_scope(cfg.default_scope)
    model = cfg.model.to_dict()
    # drop_path_rate changes no count, and is all that some schedules of one model differ in.
    model['backbone'].pop('drop_path_rate', None)
    size = image_size(cfg) if name in COUNTED else None
    found, work = count(json.dumps(model, sort_keys=True), size)
    metadata = ENTRIES[name]['Metadata']
    expected = metadata['Parameters']
    if cfg.model.type == 'DINO' and mmdet.__version__ == '3.3.0':
        expected -= 256 * 512  # ref_point_head takes 512 channels there, 1024 in the fork
    assert found == expected
    if published := metadata.get('Published Parameters (M)'):
        assert metadata['Parameters'] / 1e6 == pytest.approx(published, rel=0.04)
    if name in COUNTED:
        stated = metadata.get('FLOPs')
        assert work == (stated and pytest.approx(stated, rel=2e-3))


@pytest.mark.parametrize('name', [n for n, e in ENTRIES.items() if 'FLOPs' in e['Metadata']])
def test_published_flops_that_are_not_ours_are_marked(name):
    metadata = ENTRIES[name]['Metadata']
    if published := metadata.get('Published FLOPs (G)'):
        rounding = 0.5 * 10.0 ** -len(f'{published:g}'.partition('.')[2])
        ours = metadata['FLOPs'] / 1e9
        agree = ours == pytest.approx(published, rel=0.025, abs=rounding)
        assert agree != bool(model_zoo.otherwise(ENTRIES[name]))
    else:
        assert not model_zoo.otherwise(ENTRIES[name])


def counted_otherwise(pattern):
    """Names, and the match of the pattern in how the published FLOPs were counted."""
    return [
        pytest.param(name, match, id=entry['Name'])
        for name, entry in ENTRIES.items()
        if (match := re.fullmatch(pattern, entry['Metadata'].get('Published FLOPs Count', '')))
    ]


def build(cfg):
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize(
    ('name', 'match'), counted_otherwise(r'as with windows of (\d+) on padded maps')
)
def test_published_flops_are_those_of_other_windows(name, match):
    """With attention's products: without them, even our larger windows have fewer."""
    cfg, metadata = Config.fromfile(CONFIGS / name), ENTRIES[name]['Metadata']
    published = metadata['Published FLOPs (G)']
    size = image_size(cfg)
    if stated := metadata.get('Published FLOPs Input'):
        size = tuple(map(int, stated.split(' x ')))
    assert multiply_adds(build(cfg), size, layers_only=True) / 1e9 < 0.96 * published
    cfg.model.backbone.window_size = (int(match[1]),) * 4
    model = build(cfg)
    work = multiply_adds(model, size) + projections_of_padding(model.backbone, size)
    assert work / 1e9 == pytest.approx(published, rel=2e-3)


@pytest.mark.parametrize(('name', 'match'), counted_otherwise("without attention's products"))
def test_published_flops_leave_out_the_products_of_attention(name, match):
    cfg = Config.fromfile(CONFIGS / name)
    work = multiply_adds(build(cfg), image_size(cfg), layers_only=True)
    published = ENTRIES[name]['Metadata']['Published FLOPs (G)']
    assert work / 1e9 == pytest.approx(published, rel=2e-3)


def test_the_licenses_of_the_weights_are_named():
    licenses = {
        collection['Name']: collection['Metadata']['Weights License']
        for collection in collections()
    }
    assert licenses.keys() == {'GCViT', 'DAT', 'DAT++', 'QuadTree', 'PVT v2'}
    assert licenses['GCViT'].startswith('CC BY-NC-SA 4.0')
