"""``import mmattn``: what it says when something is missing, and what it asks for."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mmattn._dependencies import IMPORTED, OPENMMLAB, at_least, release

ROOT = Path(__file__).resolve().parent.parent


def run(code, *path):
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
    command = [sys.executable, '-c', code]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def last_line(done):
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    'code, sentence',
    [
        ('__version__ = "2.0.1"', 'mmattn needs mmcv >= 2.1.0, and found 2.0.1'),
        (
            'raise ImportError("libGL.so.1: cannot open")',
            'mmattn needs mmcv >= 2.1.0, and it does not import (libGL.so.1: cannot open)',
        ),
        (
            'raise ModuleNotFoundError("No module named \'mmcv\'", name="mmcv")',
            'mmattn needs mmcv >= 2.1.0, and it is not installed',
        ),
    ],
    ids=['too old', 'broken', 'missing'],
)
def test_one_sentence_names_the_package_and_the_doctor(tmp_path, code, sentence):
    (tmp_path / 'mmcv.py').write_text(code)
    done = run('import mmattn', tmp_path)
    assert done.returncode == 1
    remedy = '`python -m mmattn.doctor` prints the command that mends this'
    assert last_line(done) == f'ImportError: {sentence}; {remedy}'


def test_registers_without_the_task_packages(tmp_path):
    for name in ('mmdet', 'mmseg', 'mmpretrain'):
        (tmp_path / f'{name}.py').write_text('raise ImportError')
    code = 'import mmattn; from mmengine.registry import MODELS; print("GCViT" in MODELS)'
    done = run(code, tmp_path)
    assert done.stdout == 'True\n', done.stderr


def test_torchvision_and_the_environment_report_work_after_the_import():
    code = (
        'import mmattn\n'
        'from torchvision.transforms.functional import to_tensor\n'
        'from mmengine.utils.dl_utils import collect_env\n'
        'import mmpretrain.datasets\n'
        'print(collect_env()["TorchVision"])'
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert re.match(r'0\.\d+', done.stdout.splitlines()[-1])


def test_versions_are_compared_by_number():
    assert release('2.13.0+cpu') == (2, 13, 0)
    assert release('2.14.0a0+git1') == (2, 14, 0)
    assert at_least('2.13.0', '2.10')
    assert not at_least('2.9.1', '2.10')


def test_the_extras_are_the_table_that_the_doctor_reads():
    requirements = [Requirement(line) for line in importlib.metadata.requires('mmattn')]

    def stated(extra):
        chosen = [r for r in requirements if r.marker and r.marker.evaluate({'extra': extra})]
        return {r.name: str(r.specifier) for r in chosen}

    assert stated('onedl') == {p.onedl: p.onedl_requirement for p in OPENMMLAB}
    upstream = {p.upstream: p.upstream_requirement for p in OPENMMLAB}
    assert upstream.items() <= stated('openmmlab').items()
    minimum = {d.module: f'>={d.minimum}' for d in IMPORTED}
    for requirement in requirements:
        if not requirement.marker:
            assert str(requirement.specifier) == minimum[requirement.name]
