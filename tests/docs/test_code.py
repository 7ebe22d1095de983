"""Every Python block of the pages does what it says: configs are read and built, the others run."""

import ast
import importlib.util
import re
import sys

import pytest
import torch
from helpers import published
from helpers.pages import PAGES, ROOT, Block, blocks
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope, init_default_scope
from mmengine.runner import set_random_seed

SHAPE = re.compile(r'#.*?(\((?:\d+, )+\d+\))')


def python_blocks(page):
    return [block for block in blocks(page) if block.language == 'python']


def is_config(text):
    return re.search(r'^_base_ = ', text, re.MULTILINE) is not None


@pytest.fixture(scope='session')
def published_tiny(tmp_path_factory):
    """gcvit_tiny.pth.tar, as its authors publish it but for the numbers in it."""
    path = tmp_path_factory.mktemp('published') / 'gcvit_tiny.pth.tar'
    model = published.build('gcvit/gcvit_t_imagenet')
    torch.save({'state_dict': published.classifier_file(model, 'gcvit')}, path)
    return path


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """An empty folder in which somebody types the pages' blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['python'])
    yield tmp_path
    DefaultScope._instance_dict.clear()


def read_config(block, folder):
    """The config under the name in its first line; its model is built as well."""
    name = re.match(r'# (\w+\.py)', block.text)
    path = folder / (name[1] if name else 'inherited.py')
    path.write_text(block.text)
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        MODELS.build(cfg.model)
    return cfg


def run(block, namespace, capsys):
    """Execute a block, statement by statement, and hold shapes to what the comments say.

    A comment with a shape belongs to the statement that ends in its line: to the tensor that it
    assigns, or to its output.
    """
    lines = block.text.splitlines()
    for statement in ast.parse(block.text).body:
        code = ast.Module([statement], type_ignores=[])
        exec(compile(code, f'block at line {block.line}', 'exec'), namespace)
        printed = capsys.readouterr().out.replace('[', '(').replace(']', ')')
        comment = SHAPE.search(lines[statement.end_lineno - 1])
        if comment is None or isinstance(statement, (ast.For, ast.With, ast.ClassDef)):
            continue
        if isinstance(statement, ast.Assign):
            found = str(tuple(namespace[statement.targets[0].id].shape))
            assert found == comment[1], f'line {block.line + statement.end_lineno - 1}'
        elif isinstance(statement, ast.Expr):
            assert comment[1] in printed, f'line {block.line + statement.end_lineno - 1}'


def check_names(block):
    """Of a block that is not run: it compiles, and what it imports is there."""
    compile(block.text, f'block at line {block.line}', 'exec')
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            assert all(importlib.util.find_spec(alias.name) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize('page', [page for page in PAGES if python_blocks(page)])
def test_blocks(page, reader, request, capsys):
    found = python_blocks(page)
    if any("'gcvit_tiny.pth.tar'" in block.text for block in found):
        (reader / 'gcvit_tiny.pth.tar').symlink_to(request.getfixturevalue('published_tiny'))
    namespace = {'__file__': str(reader / 'typed.py'), '__name__': '__main__'}
    for block in found:
        if is_config(block.text):
            read_config(block, reader)
        elif block.is_run:
            run(block, namespace, capsys)
        else:
            check_names(block)


def test_few_blocks_are_not_run():
    left_out = [
        (page, block.line) for page in PAGES for block in python_blocks(page) if not block.is_run
    ]
    assert [page for page, _ in left_out] == ['docs/export.md', 'docs/your_project.md']


def test_wrong_shapes_are_found(capsys):
    namespace = {'torch': torch}
    run(
        Block(1, 'x = torch.zeros(2, 3)  # (2, 3)\nprint(x.shape)  # (2, 3)', '', True),
        namespace,
        capsys,
    )
    for text in ('x = torch.zeros(2, 3)  # (2, 4)', 'print(torch.zeros(2).shape)  # as (2, 4)'):
        with pytest.raises(AssertionError):
            run(Block(1, text, '', True), namespace, capsys)


# ---- The configs for one's own data read data, in the layouts that the page names


@pytest.fixture
def make(reader):
    spec = importlib.util.spec_from_file_location('maker', ROOT / 'tools/misc/make_demo_dataset.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda layout: module.make_dataset('data/mine', layout, train=6, val=6)


@pytest.mark.parametrize(
    ('name', 'layout', 'check'),
    [
        (
            'my_detector.py',
            'coco',
            lambda sample: set(sample.gt_instances.labels.tolist()) <= {0, 1, 2},
        ),
        # What is not labeled is ignored.
        ('my_segmentor.py', 'ade20k', lambda sample: 255 in sample.gt_sem_seg.data),
        ('my_classifier.py', 'imagenet', lambda sample: 0 <= sample.gt_label.item() < 6),
    ],
)
def test_own_data(name, layout, check, reader, make):
    set_random_seed(0)
    make(layout)
    (block,) = [
        b for b in python_blocks('docs/getting_started.md') if b.text.startswith(f'# {name}')
    ]
    cfg = read_config(block, reader)
    train = DATASETS.build(cfg.train_dataloader.dataset)
    sample = train[0]
    assert sample['inputs'].shape[0] == 3 and check(sample['data_samples'])
    for loader in (cfg.val_dataloader, cfg.test_dataloader):
        assert len(DATASETS.build(loader.dataset)) == 6
