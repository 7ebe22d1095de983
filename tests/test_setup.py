"""`make setup` with a fake Python, which records its calls and installs nothing."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mmattn._dependencies import at_least, requirements

ROOT = Path(__file__).resolve().parent.parent
STEPS = ('venv', 'torch', 'mmcv', 'packages', 'fits', 'mmattn', 'operators', 'checked')
# Takes the place of .venv/bin/python.
FAKE = """#!/bin/sh
echo "MMCV_WITH_OPS=$MMCV_WITH_OPS CFLAGS=$CFLAGS CXX=$CXX LINKS=$PIP_FIND_LINKS -- $*" >> {calls}
case "$*" in *{failing}*) echo '{says}'; exit 1;; esac
"""


@pytest.fixture
def tree(tmp_path):
    """A copy of the files that the set-up reads."""
    for name in ('Makefile', 'pyproject.toml', 'setup.py', 'mmattn_configs.py'):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    (tmp_path / 'mmattn').mkdir()
    for name in ('__init__.py', '_dependencies.py', '_problems.py', 'doctor.py'):
        shutil.copy(ROOT / 'mmattn' / name, tmp_path / 'mmattn')
    (tmp_path / '.venv/bin').mkdir(parents=True)
    return tmp_path


def make(tree, *arguments, failing='nothing', says='', **variables):
    """Run make; return its result and the calls of the environment's Python."""
    python, calls = tree / '.venv/bin/python', tree / 'calls'
    python.write_text(FAKE.format(calls=calls, failing=failing, says=says))
    python.chmod(0o755)
    # PYTHON: as the real one, but without making an environment.
    maker = tree / 'python'
    maker.write_text(f'#!/bin/sh\n[ "$2" = venv ] || exec {sys.executable} "$@"\n')
    maker.chmod(0o755)
    calls.write_text('')
    clean = {
        key: value for key, value in os.environ.items() if not key.startswith(('PIP', 'MMATTN'))
    }
    done = subprocess.run(
        ['make', '-C', tree, '--no-print-directory', f'PYTHON={maker}', *arguments],
        env=clean | {'PYTHONPATH': ''} | variables,
        capture_output=True,
        text=True,
    )
    return done, calls.read_text().splitlines()


def test_pinned_versions_meet_the_requirements():
    for stack in ('common', 'onedl', 'openmmlab'):
        lines = (ROOT / f'requirements/{stack}.txt').read_text().splitlines()
        pins = [line.split('==') for line in lines if '==' in line]
        assert len(pins) == (3 if stack == 'common' else 5)
        for name, version in pins:
            if stack != 'common' or name == 'torch':
                assert at_least(version, requirements()[name])


def test_every_step_is_named_and_done_once(tree):
    done, calls = make(tree, 'setup')
    assert done.returncode == 0, done.stdout + done.stderr
    titles = re.findall('^set-up: (.*)$', done.stdout, re.MULTILINE)
    assert [title.split()[0] for title in titles] == [
        *('virtual', 'torch', 'mmcv', 'mmengine,', 'mmcv', 'mmattn,', 'compiled', '.venv'),
    ]
    assert {path.stem for path in (tree / '.venv/setup').iterdir()} == set(STEPS)
    start = time.monotonic()
    done, calls = make(tree, 'setup')
    assert (done.stdout, calls) == ('set-up: .venv is complete\n', [])
    assert time.monotonic() - start < 5


def test_goes_on_at_the_step_that_failed(tree):
    done, calls = make(tree, 'setup', failing='-r', says='fatal error: Python.h: No such file')
    assert done.returncode == 2
    assert len(calls) == 5  # pip and tools, torch, torchvision, mmcv, packages
    assert 'set-up stopped at: mmengine, mmdet, mmseg, mmpretrain\n' in done.stdout
    assert 'fatal error: Python.h: No such file' in done.stdout
    assert '    log: .venv/setup/packages.log\n' in done.stdout
    sentence = "what to do: install Python's headers .* it goes on from here"
    assert re.search(sentence, done.stdout)
    done, calls = make(tree, 'setup')
    assert done.returncode == 0 and ' -r ' in calls[0]


def test_what_has_changed_is_done_again(tree):
    make(tree, 'setup')
    source = tree / 'mmattn/ops/csrc/cpu/new.cpp'
    source.parent.mkdir(parents=True)
    source.touch()
    _, calls = make(tree, 'setup')
    assert [call.partition(' -- ')[2] for call in calls] == ['setup.py build_ext --inplace']
    future = time.time() + 9
    os.utime(tree / 'requirements/onedl.txt', (future, future))
    _, calls = make(tree, 'setup')
    assert 'onedl-mmcv' in calls[0] and len(calls) > 5


def test_mmcv_is_compiled_against_the_installed_torch(tree):
    _, calls = make(tree, 'setup', PIP_FIND_LINKS='a b', CFLAGS='-O2', failing='mmcv_fits')
    first, again = [call for call in calls if call.endswith('onedl-mmcv')]
    for call in (first, again):
        # Flags of the user come last, so that they win.
        assert call.startswith(
            'MMCV_WITH_OPS=1 CFLAGS=-g0 -O1 -O2 CXX= LINKS=a b -- -m pip install'
        )
        assert '--no-build-isolation --no-deps -c requirements/onedl.txt onedl-mmcv' in call
    assert '--force-reinstall --no-cache-dir --no-binary' in again


def test_opencv_without_a_desktop_is_replaced(tree):
    _, calls = make(tree, 'setup', failing='cv2')
    assert any('--force-reinstall --no-deps opencv-python-headless' in call for call in calls)


def test_torch_is_taken_from_the_index_that_is_named(tree):
    _, calls = make(tree, 'setup', MMATTN_TORCH_INDEX='http://index')
    (torch,) = [call for call in calls if call.endswith('torch torchvision')]
    assert '--index-url http://index -c requirements/common.txt torch torchvision' in torch
    assert sum('http://index' in call for call in calls) == 1


def test_the_other_stack_takes_a_wheel(tree):
    (tree / 'mmattn.whl').touch()
    done, calls = make(tree, 'setup', 'STACK=openmmlab', 'WHEEL=mmattn.whl')
    assert done.returncode == 0, done.stdout
    assert any(call.endswith('-c requirements/openmmlab.txt mmcv') for call in calls)
    assert any('mmattn.whl[openmmlab,dev,viz,export]' in call for call in calls)
    assert not any('build_ext' in call or ' -e ' in call for call in calls)


def test_refuses_an_old_python(tree):
    old = tree / 'old'
    code = 'import sys; sys.version_info = (3, 9, 18); exec(sys.argv[1])'
    old.write_text(f'#!/bin/sh\nshift; exec {sys.executable} -c "{code}" "$@"\n')
    old.chmod(0o755)
    done, calls = make(tree, 'setup', f'PYTHON={old}')
    assert done.returncode == 2 and calls == []
    assert done.stderr.startswith('mmattn needs Python >= 3.10, and ')
