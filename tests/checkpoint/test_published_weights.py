"""Every published file, made here by its recipe, from its address into the models for it.

The addresses are the real ones; connections arrive at a server here, which redirects as theirs do.
"""

import hashlib
import re
from functools import cache
from urllib.parse import urlsplit

import mmengine.config.utils
import mmengine.model
import pytest
import torch
from helpers import published
from helpers.server import Answer, Server, instead_of_https, redirect

from mmattn.backbones import base
from mmattn.checkpoint import (
    CheckpointError,
    download,
    find_file,
    load_checkpoint,
    read_checkpoint,
    weights_of,
)
from mmattn.checkpoint.published import PUBLISHED

SIZES = dict(
    xxtiny='xxt', xtiny='xt', tiny='t', tiny2='t2', small='s', small2='s2', base='b', large='l'
)
# Name of the file -> config, rule of its names, container.
RECIPES = (
    (r'gcvit_21k_large_512\.pth\.tar', 'gcvit/gcvit_l_512_imagenet', published.classifier_file,
     "timm's training with an average"),
    (r'gcvit_21k_large_384\.pth\.tar', 'gcvit/gcvit_l_384_imagenet', published.classifier_file,
     "timm's training"),
    (r'gcvit_(?:1k|21k)_([a-z]+2?)(?:_224)?\.pth\.tar', 'gcvit/gcvit_{}_imagenet',
     published.classifier_file, "timm's training"),
    (r'gcvit_([a-z]+)_224_nvidia-\w{8}\.pth', 'gcvit/gcvit_{}_imagenet', published.timm_file,
     'bare'),
    (r'dat_([a-z]+)_in1k_224\.pth', 'dat/dat_{}_imagenet', published.classifier_file,
     "Swin's training"),
    (r'dat_([a-z]+)_in1k_384\.pth', 'dat/dat_{}_384_imagenet', published.classifier_file,
     "Swin's training"),
    (r'dat_pp_([a-z]+)_in1k_224\.pth', 'dat/dat_{}pp_imagenet', published.classifier_file,
     "Swin's training"),
    (r'dat_pp_([a-z]+)_in1k_384\.pth', 'dat/dat_{}pp_384_imagenet', published.classifier_file,
     "Swin's training"),
    (r'(quadtree_b\d_imagenet)\.pth', 'quadtree/{}', published.classifier_file,
     "DeiT's training"),
    (r'(\w+_quadtree_b\d_\w+)\.pth', 'quadtree/{}', published.model_file, 'mmdet 2'),
    (r'(\w+_dat_\wpp_\w+)\.pth', 'dat/{}', published.model_file, 'mmdet 2'),
)  # fmt: skip
# Models that start from a classifier, by family.
STARTS = {
    'gcvit': ('gcvit/mask_rcnn_gcvit_t_coco', 'gcvit/upernet_gcvit_t_ade20k'),
    'dat': ('dat/retinanet_dat_t_1x_coco', 'dat/upernet_dat_t_ade20k'),
    'dat++': ('dat/retinanet_dat_tpp_1x_coco', 'dat/fpn_dat_tpp_ade20k'),
    'quadtree': ('quadtree/retinanet_quadtree_b0_1x_coco', 'quadtree/fpn_quadtree_b0_ade20k'),
}
MATCHING = [url for url in PUBLISHED if url.endswith('.ckpt')]
# The smallest classifiers, and a detector, in their real size.
REAL = (
    'gcvit_1k_xxtiny.pth.tar',
    'gcvit_xxtiny_224_nvidia-d1d86009.pth',
    'dat_tiny_in1k_224.pth',
    'dat_pp_tiny_in1k_224.pth',
    'quadtree_b0_imagenet.pth',
    'retinanet_quadtree_b0_1x_coco.pth',
)


def recipe(name):
    """Config, rule of the names and container of a published file."""
    for pattern, config, make, container in RECIPES:
        if match := re.fullmatch(pattern, name):
            size = match.group(1) if match.groups() else ''
            return config.format(SIZES.get(size, size)), make, container
    raise LookupError(name)


@cache
def model_of(config, size):
    """The model of a config, without time for its random weights."""
    with torch.device('meta'):
        model = published.build(config, size)
    return model.to_empty(device='cpu')


def fill(model, seed):
    """Fill all parameters and saved buffers, each with another value."""
    for i, value in enumerate(model.state_dict().values()):
        value.fill_(i + seed)
    return model


def copied(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Content of a published file, and the values of the model that it was made from."""
    folder = tmp_path_factory.mktemp('made')

    @cache
    def make(config, rule, container, size):
        model = fill(model_of(config, size), seed=1)
        state = {k: v.clone() for k, v in rule(model, config.split('/')[0]).items()}
        published.CONTAINERS[container](state, folder / 'file')
        return (folder / 'file').read_bytes(), copied(model)

    return make


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.delenv('MMATTN_WEIGHTS', raising=False)
    # mmengine reads all metafiles for each base, and prints a page for each backbone.
    monkeypatch.setattr(mmengine.config.utils, '_get_cfg_metainfo', no_metafile)
    monkeypatch.setattr(mmengine.model.BaseModule, '_dump_init_info', lambda self: None)
    download._say_once.cache_clear()


def no_metafile(*_):
    raise ValueError


@pytest.fixture
def said(monkeypatch):
    said = []
    for module in (download, base):
        monkeypatch.setattr(module, 'print_log', lambda message, logger: said.append(message))
    return said


@pytest.fixture
def serve(monkeypatch):
    """Serve content at a published address, behind a redirect; its hash becomes the known one."""
    running = []

    def serve(url, content):
        parts = urlsplit(url)
        server = Server({'/storage/1?signature=abc': Answer(content)})
        running.append(server.__enter__())
        path = f'{parts.path}?{parts.query}' if parts.query else parts.path
        server.answers[path] = redirect(f'https://{parts.netloc}/storage/1?signature=abc')
        digest = hashlib.sha256(content).hexdigest()
        monkeypatch.setitem(PUBLISHED, url, PUBLISHED[url]._replace(sha256=digest))
        running.append(instead_of_https(monkeypatch, server))
        running[-1].__enter__()
        return server

    yield serve
    for context in reversed(running):
        context.__exit__(None, None, None)


def assert_starts_from(url, config, size, values):
    """``init_cfg`` gives the backbone of a config's model the values of the file."""
    backbone = fill(model_of(config, size).backbone, seed=0.5)
    backbone.init_cfg, backbone._is_init = dict(type='Pretrained', checkpoint=url), False
    backbone.init_weights()
    after = {f'backbone.{name}': value for name, value in backbone.state_dict().items()}
    # A classifier has no output norms; tables of other windows are resized.
    body = [name for name in after if not re.match(r'backbone\.norm\d\.', name)]
    resized = [name for name in body if after[name].shape != values[name].shape]
    assert all('bias_table' in name or 'position_bias' in name for name in resized)
    same = [name for name in body if name not in resized]
    assert len(same) > 20
    assert [name for name in same if not torch.equal(after[name], values[name])] == []


@pytest.mark.parametrize('url', [url for url in PUBLISHED if url not in MATCHING])
def test_a_published_file_from_its_address(url, made, serve, said):
    file = PUBLISHED[url]
    config, rule, container = recipe(file.name)
    size = 'real' if file.name in REAL else 'small'
    content, values = made(config, rule, container, size)
    server = serve(url, content)

    model = fill(model_of(config, size), seed=0.5)
    report = load_checkpoint(model, url)
    assert not report.fresh and not report.resized and report.source == url
    after = model.state_dict()
    assert [name for name in after if not torch.equal(after[name], values[name])] == []

    starts = [config]
    if config.endswith('_imagenet') and size == 'small':
        starts += STARTS['dat++' if 'pp_' in config else config.split('/')[0]]
    for start in starts:
        assert_starts_from(url, start, size, values)
    # One download for all of them.
    assert server.requests == [
        (urlsplit(url).netloc, url.split(urlsplit(url).netloc)[1]),
        (urlsplit(url).netloc, '/storage/1?signature=abc'),
    ]
    assert sum(file.license in message for message in said) == 1
    assert sum(f'{url} (' in message and ' loaded' in message for message in said) == len(starts)


def test_the_rows_are_known():
    """Each has a name of its own; rows of one kind share a rule."""
    names = [file.name for file in PUBLISHED.values()]
    assert len(set(names)) == len(names) and set(REAL) <= set(names)
    for url, file in PUBLISHED.items():
        assert file.license and len(file.sha256) in (0, 64) and url.startswith('https://')


def test_the_default_is_what_was_trained_and_the_average_is_named(made, serve, said):
    """The file of GC ViT-L at 512 has, by its size, two sets of weights."""
    url = next(url for url in PUBLISHED if url.endswith('gcvit_21k_large_512.pth.tar'))
    config, rule, container = recipe(PUBLISHED[url].name)
    content, values = made(config, rule, container, 'small')
    serve(url, content)
    model = model_of(config, 'small')
    report = load_checkpoint(model, url)
    assert torch.equal(model.head.fc.weight, values['head.fc.weight'])
    assert "the file's ema weights (state_dict_ema) were not taken" in report.summary
    assert 'publish_model.py FILE --weights ema' in report.summary
    content, label = read_checkpoint(url)
    load_checkpoint(model, weights_of(content, label, 'state_dict_ema'))
    assert not model.head.fc.weight.any()


def test_a_hash_in_a_name_of_timms_counts(made, monkeypatch, serve):
    url = next(url for url in PUBLISHED if 'gcvit_tiny_224_nvidia' in url)
    as_published = PUBLISHED[url]
    serve(url, made(*recipe(as_published.name), 'small')[0])
    monkeypatch.setitem(PUBLISHED, url, as_published)
    with pytest.raises(CheckpointError, match=r'than the published file \(ac783954'):
        find_file(url)


@pytest.mark.parametrize('url', MATCHING)
def test_files_of_the_matcher(url, serve, tmp_path):
    """Their names begin with ``matcher.``, as PyTorch Lightning saves them."""
    content = {'state_dict': {'matcher.backbone.conv1.weight': torch.ones(2)}, 'epoch': 3}
    torch.save(content | {'pytorch-lightning_version': '1.3.5'}, tmp_path / 'file')
    serve(url, (tmp_path / 'file').read_bytes())
    content, label = read_checkpoint(url)
    assert label == url and content['state_dict']['matcher.backbone.conv1.weight'].sum() == 2
