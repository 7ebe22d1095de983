"""``import mmattn``: errors when something is missing, and its requirements."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mmattn
from mmattn._dependencies import OPENMMLAB, at_least, release, requirements

ROOT = Path(__file__).resolve().parent.parent
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def run(code, *path):
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, '-c', code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    'code, sentence',
    [
        ('__version__ = "1.2"', ', and found 1.2'),
        ('raise ImportError("libGL.so.1: gone")', ', and it does not import (libGL.so.1: gone)'),
        ('raise AssertionError("no")', ', and it does not import (no)'),
        ('raise ModuleNotFoundError("", name="torch")', ', and it is not installed'),
    ],
    ids=['too old', 'broken', 'refused', 'missing'],
)
def test_one_sentence_names_the_package_and_the_doctor(tmp_path, code, sentence):
    (tmp_path / 'torch.py').write_text(code)
    done = run('import mmattn', tmp_path)
    assert done.returncode == 1
    remedy = '`python -m mmattn.doctor` prints the command that mends this'
    said = f'ImportError: mmattn needs torch{requirements()["torch"]}{sentence}; {remedy}'
    assert done.stderr.strip().splitlines()[-1] == said


def test_registers_without_the_task_packages(tmp_path):
    for name in ('mmdet', 'mmseg', 'mmpretrain'):
        (tmp_path / f'{name}.py').write_text('raise ImportError')
    code = 'import mmattn; from mmengine.registry import MODELS; print("GCViT" in MODELS)'
    done = run(code, tmp_path)
    assert done.stdout == 'True\n', done.stderr


def test_exports_what_it_lists():
    assert all(hasattr(mmattn, name) for name in mmattn.__all__)


def test_the_environment_report_of_a_training_works():
    code = (
        'from mmengine.utils.dl_utils import collect_env\n'
        'from torchvision.transforms.functional import to_tensor\n'
        'import mmpretrain.datasets\n'
        'print(collect_env()["TorchVision"])'
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert re.match(r'0\.\d+', done.stdout.splitlines()[-1])


def test_versions_are_compared_by_number():
    assert release('2.13.0+cpu') == (2, 13, 0)
    assert release('2.14.0a0+git1') == (2, 14, 0)
    assert release('>=2.10') == (2, 10)
    assert at_least('2.13.0', '2.10') and at_least('2.13.0', '>=2.10') and at_least('2.1', '')
    assert not at_least('2.9.1', '>=2.10')


def test_every_openmmlab_package_is_in_both_extras():
    project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
    for index, extra in enumerate(('onedl', 'openmmlab')):
        names = [re.split('[<>=]', line)[0] for line in project['optional-dependencies'][extra]]
        assert {pair[index] for pair in OPENMMLAB.values()} <= set(names)
        assert all(requirements()[pair[index]] for pair in OPENMMLAB.values())
