"""Stock tools of mmdet, mmseg and mim in another project, with mmattn from a wheel."""

import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import mmattn
import mmattn_configs

ROOT = Path(__file__).parents[2]
MIM = Path(sys.executable).with_name('mim')
PIP = [sys.executable, '-m', 'pip', '--quiet', '--disable-pip-version-check']

LOADERS = """
classes = ('circle', 'triangle', 'square', 'star', 'ring', 'crescent')
quick = dict(batch_size=2, num_workers=0, persistent_workers=False)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=-1, save_last=False))
"""
# The smallest of the family from random weights, on small images, for one or two steps and without
# evaluation.
PROJECT = dict(
    detector="""
_base_ = 'mmattn::gcvit/cascade_mask_rcnn_gcvit_t_coco.py'
model = _base_.model
model.backbone.arch = 'xxtiny'
model.backbone.init_cfg = None
for stage in model.train_cfg.rcnn:
    stage.sampler.num = 8
del stage
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='PackDetInputs'),
]
"""
    + LOADERS
    + """
train_dataloader = dict(
    dataset=dict(indices=2, metainfo=dict(classes=classes), pipeline=train_pipeline), **quick
)
val_dataloader = dict(dataset=dict(metainfo=dict(classes=classes)), **quick)
train_cfg = dict(max_epochs=1, val_begin=2)
""",
    segmentor="""
_base_ = 'mmattn::gcvit/upernet_gcvit_t_ade20k.py'
model = dict(
    backbone=dict(arch='xxtiny', init_cfg=None),
    data_preprocessor=dict(size=(64, 64)),
    decode_head=dict(channels=32),
    auxiliary_head=dict(channels=32),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='Resize', scale=(64, 64)),
    dict(type='PackSegInputs'),
]
"""
    + LOADERS
    + """
train_dataloader = dict(dataset=dict(indices=2, pipeline=train_pipeline), **quick)
train_cfg = dict(max_iters=1, val_begin=2)
""",
    classifier="""
_base_ = 'mmattn::gcvit/gcvit_xxt_imagenet.py'
train_pipeline = _base_.train_pipeline
train_pipeline[1].scale = 64
"""
    + LOADERS
    + """
train_dataloader = dict(dataset=dict(indices=2, pipeline=train_pipeline), **quick)
train_cfg = dict(max_epochs=1, val_begin=2)
custom_hooks = []
""",
)


@pytest.fixture(scope='module')
def site(request, tmp_path_factory):
    """Folder with mmattn installed from a wheel: that of --installed, or one built here."""
    folder = tmp_path_factory.mktemp('site')
    wheel = request.config.getoption('--installed') or build_wheel(folder)
    subprocess.run(
        [*PIP, 'install', '--no-deps', '--no-index', '--target', folder / 'lib', wheel], check=True
    )
    for library in Path(mmattn.__file__).parent.glob('ops/*.so'):
        shutil.copy(library, folder / 'lib/mmattn/ops')
    return folder / 'lib'


def build_wheel(folder):
    """Build a wheel without compiled operators; return its path."""
    source = folder / 'source'  # as setuptools leaves a build folder there
    for name in ('mmattn', 'configs', 'tools'):
        ignore = shutil.ignore_patterns('__pycache__', '.mim', '*.so')
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for path in ROOT.glob('*.*'):
        if path.suffix in ('.py', '.toml', '.yml', '.md', '.in'):
            shutil.copy(path, source)
    shutil.copy(ROOT / 'LICENSE', source)
    no_compiler = os.environ | {'CXX': 'false', 'MMATTN_CUDA': '0'}
    build = [*PIP, 'wheel', '--no-deps', '--no-build-isolation', '-w', folder, source]
    subprocess.run(build, check=True, env=no_compiler)
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def project(tmp_path_factory):
    """A folder with configs and data, and nothing of mmattn."""
    folder = tmp_path_factory.mktemp('project')
    for name, text in PROJECT.items():
        (folder / f'{name}.py').write_text(text)
    for layout in ('coco', 'ade20k', 'imagenet'):
        options = ['--format', layout, '--train', '2', '--val', '1', '--size', '96']
        tool = ROOT / 'tools/misc/make_demo_dataset.py'
        subprocess.run([sys.executable, tool, folder / layout, *options], check=True)
    return folder


@pytest.fixture
def run(site, project):
    """Run a command in the project's folder; return what it printed."""

    def run(*command, **environment):
        data = {f'MMATTN_{name.upper()}': name for name in ('coco', 'ade20k', 'imagenet')}
        done = subprocess.run(
            list(map(str, command)),
            cwd=project,
            env=os.environ | data | {'PYTHONPATH': str(site)} | environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def tool(package):
    """Path of the train.py in a package's wheel."""
    return Path(importlib.util.find_spec(package).origin).parent / '.mim/tools/train.py'


def assert_trained(work_dir):
    (log,) = work_dir.glob('*/vis_data/scalars.json')
    steps = map(json.loads, log.read_text().splitlines())
    losses = [step['loss'] for step in steps if 'loss' in step]
    assert losses and all(map(math.isfinite, losses))


def test_mim_trains_a_detector_with_mmdets_own_tool(run, tmp_path):
    """mim takes the name of a distribution, of which mmdet has two."""
    installed = {name.lower() for name in importlib.metadata.packages_distributions()['mmdet']}
    printed = run(MIM, 'train', installed.pop(), 'detector.py', '--work-dir', tmp_path)
    assert f'Training command is {sys.executable} {tool("mmdet")} detector.py' in printed
    assert_trained(tmp_path)


def test_mmsegs_own_tool_trains(run, tmp_path):
    run(sys.executable, tool('mmseg'), 'segmentor.py', '--work-dir', tmp_path)
    assert_trained(tmp_path)


def test_our_tool_trains(run, site, tmp_path):
    """Run train.py from the wheel, where `mim train mmattn` finds it."""
    ours = site / 'mmattn/.mim/tools/train.py'
    run(sys.executable, ours, 'classifier.py', '--work-dir', tmp_path)
    assert_trained(tmp_path)


def test_mim_searches(run, tmp_path):
    run(MIM, 'search', 'mmattn', '--model', 'gcvit', '--json', tmp_path / 'found.json')
    found = json.loads((tmp_path / 'found.json').read_text())
    assert found['coco/box_ap']['cascade_mask_rcnn_gcvit_t_coco'] == 51.6
    assert found['published_in']['gcvit_t_imagenet'] == 'arxiv 2206.09959'
    assert set(found['model'].values()) == {'gcvit'}


def test_mim_downloads_published_weights(run, site, tmp_path):
    """From a server here, which sends each path and query back; mim sends no `#/NAME`."""
    names = [
        'dat_t_imagenet',  # a share link, which ends in a query
        'mask_rcnn_dat_tpp_1x_coco',
        'quadtree_b0_imagenet',  # two files of one name
        'retinanet_quadtree_b0_1x_coco',
        'gcvit_xxt_imagenet',
    ]
    copy, out = tmp_path / 'lib', tmp_path / 'out'
    shutil.copytree(site, copy, ignore=shutil.ignore_patterns('*.so'))
    entries = {}
    with serving_paths() as address:
        for path in copy.glob('mmattn/.mim/configs/*/metafile.yml'):
            text = re.sub(r'(Weights: )https://[^/]+', rf'\1{address}', path.read_text())
            path.write_text(text)
            entries |= {model['Name']: model for model in yaml.safe_load(text)['Models']}
        run(MIM, 'download', 'mmattn', '--config', *names, '--dest', out, PYTHONPATH=str(copy))
    files = {path.name: path.read_text() for path in out.glob('*.pth*')}
    assert len(files) == len(names)
    for name in names:
        asked = entries[name]['Weights'].removeprefix(address).partition('#')[0]
        assert files.pop(entries[name]['Weights'].split('/')[-1]) == asked
        assert (out / f'{name}.py').is_file()


@contextmanager
def serving_paths():
    """Serve, for each path and query, a file that holds them; yield the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header('Content-Length', str(len(self.path)))
            self.end_headers()
            self.wfile.write(self.path.encode())

        def log_message(self, *_):
            """Print no line for each request."""

    with ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


# A file without bases: for each base, mmengine reads all metafiles, which takes seconds.
INHERITED = 'mmattn::_base_/datasets/multiscale.py'
READ = """
from mmengine.config import Config
{between}
cfg = Config.fromfile('read.py')
print(cfg.multiscale[0].type, '_scope_' in cfg.multiscale[0], 'mmattn' in sys.modules)
"""


@pytest.mark.parametrize(
    ('before', 'between', 'base', 'imports_mmattn'),
    [
        ('', 'import torch', repr(INHERITED), False),
        ('import torch', 'from mmengine.hub import get_config', repr(INHERITED), False),
        (
            '',
            '',
            "__import__('mmattn').__name__ + '" + INHERITED.removeprefix('mmattn') + "'",
            True,
        ),
    ],
    ids=['mmengine first', 'torch first', 'expression'],
)
def test_configs_are_found(before, between, base, imports_mmattn, run, project):
    """By torch's entry point, or, with that off, by importing mmattn in ``_base_``."""
    (project / 'read.py').write_text(f'_base_ = {base}')
    code = f'import sys; {before}\n' + READ.format(between=between)
    code += f"if 'get_config' in dir(): print(get_config('{INHERITED}').multiscale[0].type)"
    autoload = dict(TORCH_DEVICE_BACKEND_AUTOLOAD=str(int(not imports_mmattn)))
    printed = run(sys.executable, '-c', code, **autoload).splitlines()
    assert printed == [f'RandomFlip False {imports_mmattn}'] + ['RandomFlip'] * bool(before)


def test_an_unknown_config_is_named_with_similar_ones(site, monkeypatch):
    origin = SimpleNamespace(origin=site / 'mmattn/__init__.py')
    monkeypatch.setattr(mmattn_configs, 'find_spec', lambda name: origin)
    name = 'gcvit/mask_rcnn_gcvit_t_coco.py'
    assert mmattn_configs.config_path(name) == site / 'mmattn/.mim/configs' / name
    wrong = name.replace('_t_', '_tiny_')
    with pytest.raises(FileNotFoundError, match=f'no config {wrong} .* similar: {name}'):
        mmattn_configs.config_path(wrong)
