"""The set-up of the environments that make's targets use, without installing anything."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mmattn._dependencies import OPENMMLAB
from tools import setup_env

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('extra', setup_env.STACKS)
def test_the_pinned_set_is_within_what_the_package_asks_for(extra):
    stack = setup_env.STACKS[extra]
    pinned = {r.name: r for r in map(Requirement, [stack.mmcv, *stack.others])}
    assert len(pinned) == len(OPENMMLAB)
    stated = [Requirement(line) for line in importlib.metadata.requires('mmattn')]
    asked = {r.name: r for r in stated if r.marker and r.marker.evaluate({'extra': extra})}
    for name, requirement in pinned.items():
        (version,) = requirement.specifier
        assert asked[name].specifier.contains(version.version)


def test_a_second_run_installs_nothing(tmp_path):
    stamp = tmp_path / setup_env.STAMP
    stamp.write_text(setup_env.fingerprint(tmp_path, 'onedl'))
    command = [sys.executable, ROOT / 'tools' / 'setup_env.py', '--venv', tmp_path]
    # Without pip or a network, anything but a quick return would fail.
    done = subprocess.run(command, env={'PATH': ''}, capture_output=True, text=True, timeout=10)
    assert done.returncode == 0
    assert done.stdout == f'set-up: {tmp_path} is complete, nothing to install\n'
    assert list(tmp_path.iterdir()) == [stamp]


def test_fingerprint_follows_place_stack_and_requirements(tmp_path):
    for name in ('pyproject.toml', 'setup.py'):
        (tmp_path / name).write_text((ROOT / name).read_text())

    def fingerprint(venv='.venv', stack='onedl'):
        return setup_env.fingerprint(tmp_path / venv, stack, root=tmp_path)

    before = fingerprint()
    assert fingerprint() == before
    assert fingerprint(venv='elsewhere') != before
    assert fingerprint(stack='openmmlab') != before
    (tmp_path / 'pyproject.toml').write_text('')
    assert fingerprint() != before


def test_fingerprint_follows_the_wheel_and_not_the_sources_beside_it(tmp_path):
    wheel = tmp_path / 'mmattn.whl'
    wheel.write_bytes(b'one')
    before = setup_env.fingerprint(tmp_path, 'openmmlab', wheel, root=tmp_path)
    wheel.write_bytes(b'two')
    assert setup_env.fingerprint(tmp_path, 'openmmlab', wheel, root=tmp_path) != before


def test_a_wheel_that_is_not_there_is_named(tmp_path):
    message = setup_env.main(['--venv', str(tmp_path), '--wheel', str(tmp_path / 'none.whl')])
    assert str(tmp_path / 'none.whl') in message and '`make wheel`' in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    'log, advice',
    [
        ("error: [Errno 2] No such file or directory: 'g++'", 'apt-get install g++'),
        ("error: command 'x86_64-linux-gnu-g++' failed: No such file or directory", 'install g++'),
        ('torch/csrc/python_headers.h:12:10: fatal error: Python.h: No such file', 'python3-dev'),
        ("OSError: [Errno 28] No space left on device: '/x'", 'disk is full'),
        ('ensurepip is not available.', 'python3-venv'),
        ('g++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('OSError: CUDA_HOME environment variable is not set.', "CUDA_VISIBLE_DEVICES=''"),
        ('ERROR: Could not find a version that satisfies the requirement torch', 'PIP_INDEX_URL'),
        ('Temporary failure in name resolution', 'check the network'),
        ('something else', 'whole log'),
    ],
)
def test_a_failed_step_says_what_to_do(log, advice):
    assert advice in setup_env.hint(log)


def test_a_failed_step_shows_the_end_of_its_log(tmp_path, capsys):
    environment = setup_env.Environment(tmp_path)
    environment.step('first', [sys.executable, '-c', 'print("earlier")'])
    with pytest.raises(setup_env.SetupError) as failed:
        environment.step('second', [sys.executable, '-c', 'raise SystemExit("no space")'])
    message = str(failed.value)
    assert message.startswith('set-up stopped at: second\n    no space\n')
    assert 'earlier' not in message
    assert str(tmp_path / 'setup.log') in message
    assert 'earlier' in (tmp_path / 'setup.log').read_text()
    assert capsys.readouterr().out == '  first ... 0 s\n  second ... failed\n'


def test_mmcv_is_compiled_with_light_flags_unless_somebody_sets_others(tmp_path):
    made = setup_env.compile_environment(tmp_path, {'PATH': '/bin', 'PIP_FIND_LINKS': 'a b'})
    assert made['CFLAGS'] == '-g0 -O1'
    assert made['MMCV_WITH_OPS'] == '1'
    assert made['PATH'] == f'{tmp_path}/bin:/bin'
    assert made['PIP_FIND_LINKS'] == 'a b'
    assert 1 <= int(made['MAX_JOBS']) <= os.cpu_count()
    made = setup_env.compile_environment(tmp_path, {'CFLAGS': '-O2', 'MAX_JOBS': '7'})
    assert (made['CFLAGS'], made['MAX_JOBS']) == ('-g0 -O1 -O2', '7')


def test_gpu_is_what_the_driver_says_and_can_be_hidden(tmp_path):
    driver = tmp_path / 'version'
    assert not setup_env.has_nvidia_gpu({'PATH': ''}, driver)
    driver.touch()
    assert setup_env.has_nvidia_gpu({'PATH': ''}, driver)
    assert not setup_env.has_nvidia_gpu({'CUDA_VISIBLE_DEVICES': ''}, driver)


@pytest.mark.parametrize(
    'version, gpu, sentence',
    [
        ('2.13.0+cpu', False, 'torch 2.13.0+cpu is a CPU build'),
        ('2.13.0+cpu', True, 'though there is a GPU'),
        ('2.13.0+cu130', True, 'torch 2.13.0+cu130 is a CUDA build'),
        ('2.13.0+cu130', False, 'set MMATTN_TORCH_INDEX'),
    ],
)
def test_says_which_torch_came(version, gpu, sentence):
    assert sentence in setup_env.torch_sentence(version, gpu)


def test_refuses_a_full_disk_and_an_old_python(tmp_path, monkeypatch):
    with pytest.raises(setup_env.SetupError, match='GiB free'):
        setup_env.require_space(tmp_path, 10**9)
    monkeypatch.setattr(sys, 'version_info', (3, 9, 18))
    assert 'needs Python >= 3.10' in setup_env.main(['--venv', str(tmp_path)])
    assert list(tmp_path.iterdir()) == []
