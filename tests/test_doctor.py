"""The doctor's findings and remedies for every known problem of the software stack."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mmattn
from mmattn._dependencies import OPENMMLAB, requirements
from mmattn._problems import TABLE, Facts, Found
from mmattn.doctor import PARTS, examine, look, try_import

ROOT = Path(__file__).resolve().parent.parent
FORKS = {fork: '9.0' for fork, _ in OPENMMLAB.values()}
OWN = {own: '9.0' for _, own in OPENMMLAB.values()}
HEALTHY = {
    'Python': '3.11.7',
    'torch': '2.13.0+cpu, CPU build',
    'GPU': '',
    'nvcc': '',
    'C++ compiler': '/usr/bin/c++',
    'Python headers': '/usr/include/python3.11/Python.h',
    'transformers': '',
    'numpy': '2.2.6',
    'OpenCV': '4.12.0',
    'torchvision': '0.28.0',
    'triton': '',
    'mmengine': '0.10.12',
    'mmcv': '2.3.6',
    'mmcv operators': 'compiled, CUDA: not available',
    'mmdet': '3.5.1',
    'mmseg': '1.4.2',
    'mmpretrain': '1.3.6',
    'mmattn': '0.1.0 in /somewhere/mmattn',
    'mmattn operators': 'cpu: compiled; cuda: this torch is a CPU build',
}
H200 = {'torch': '2.13.0, CUDA 13.0, NVIDIA H200', 'triton': '3.7.0'}
RECOMPILE = '--no-cache-dir --no-binary onedl-mmcv "onedl-mmcv>='
REBUILD = 'python -m pip install --force-reinstall --no-deps --no-build-isolation -e .'


def environment(changes=None, distributions=FORKS):
    """A healthy environment with `changes`: part -> output, or Exception of its import."""
    parts = {
        part: Found(error=str(value)) if isinstance(value, Exception) else Found(value)
        for part, value in (HEALTHY | (changes or {})).items()
    }
    return Facts(parts, distributions, editable=True)


def no_module(name):
    return Exception(f"ModuleNotFoundError: No module named '{name}'")


NMS = Exception('RuntimeError: operator torchvision::nms does not exist')
NO_GL = Exception('ImportError: libGL.so.1: cannot open shared object file')
NO_BASE = Exception('TypeError: NoneType takes no arguments')
REFUSED = Exception('AssertionError: MMCV==2.2.0 is used but incompatible.')
OTHER_TORCH = Exception('ImportError: .../mmcv/_ext.so: undefined symbol: _ZN3c10E')
MIXED = OWN | {'onedl-mmcv': '9.0'}

# Part, environment, text of the finding, text of the remedy: one for each row of the table.
CASES = [
    ('Python', environment({'Python': '3.9.18'}), '3.9.18, needs >= 3.10', 'Python >= 3.10'),
    ('torch', environment({'torch': ''}), 'not installed', 'install --upgrade "torch>=2.10"'),
    ('numpy', environment({'numpy': Exception('OSError: x')}), 'OSError: x', '--force-reinstall'),
    ('numpy', environment({'numpy': '1.24.4'}), '1.24.4, needs >=1.26', '--upgrade "numpy>=1.26"'),
    ('GPU', environment({'GPU': 'Driver 580'}), 'torch is a CPU build', 'index of CUDA builds'),
    ('GPU', environment({'GPU': 'Driver 470', 'torch': '2.13.0, CUDA 13.0'}), 'no GPU', 'driver'),
    ('nvcc', environment(H200 | {'nvcc': '12.4'}), 'for CUDA 13.0', 'CUDA toolkit 13.0'),
    (
        'C++ compiler',
        environment({'C++ compiler': '', 'mmcv operators': no_module('mmcv._ext')}),
        'none, and mmcv has to be compiled',
        'apt-get install g++',
    ),
    (
        'C++ compiler',
        environment(H200 | {'C++ compiler': ''}),
        'GPU kernels need one',
        'apt-get install gcc',
    ),
    ('Python headers', environment(H200 | {'Python headers': ''}), 'Python.h', 'python3-dev'),
    (
        'mmattn',
        environment({'mmattn': '0.1.0 in /here/mmattn copies in /here/mmattn/.mim'}),
        'links could not be made',
        'pip install --no-deps --no-build-isolation -e .',
    ),
    ('transformers', environment({'transformers': '5.2'}), '5.2', '"transformers<5"'),
    ('OpenCV', environment({'OpenCV': ''}), 'not installed', 'install opencv-python-headless'),
    ('OpenCV', environment({'OpenCV': NO_GL}), 'libGL', '--no-deps opencv-python-headless'),
    (
        'torchvision',
        environment({'torchvision': ''}),
        'mmpretrain',
        '--no-deps "torchvision==0.28.*"',
    ),
    (
        'torchvision',
        environment({'torchvision': NMS}),
        'another torch',
        '"torchvision==0.28.*" from',
    ),
    ('torchvision', environment({'torchvision': NO_GL}), 'stops every', 'uninstall -y torchvision'),
    ('triton', environment(H200 | {'triton': ''}), 'GPU kernels need it', 'pip install triton'),
    ('triton', environment({'triton': NO_GL}), 'libGL', '--force-reinstall triton'),
    (
        'mmdet',
        environment(distributions=FORKS | {'mmdet': '3.3.0'}),
        'onedl-mmdetection mmdet are both installed',
        'pip uninstall -y onedl-mmdetection mmdet && python -m pip install "onedl-mmdetection>=',
    ),
    ('mmengine', environment({'mmengine': ''}), 'not installed', 'install "onedl-mmengine>='),
    ('mmseg', environment({'mmseg': '0.1'}), '0.1, needs >=', 'install "onedl-mmsegmentation>='),
    ('mmcv', environment({'mmcv': ''}, OWN), 'not installed', 'MMCV_WITH_OPS=1 CFLAGS="-g0 -O1"'),
    ('mmseg', environment({'mmseg': NO_BASE}), 'transformers 5', '"transformers<5"'),
    ('mmdet', environment({'mmdet': REFUSED}, OWN), 'MMCV==2.2.0', 'ninja && MMCV_WITH_OPS=1'),
    ('mmdet', environment({'mmdet': REFUSED}, MIXED), 'MMCV==2.2.0', 'uninstall -y onedl-mmcv &&'),
    ('mmpretrain', environment({'mmpretrain': no_module('torchvision')}), 'torchvision', '==0.28'),
    ('mmengine', environment({'mmengine': no_module('pkg_resources')}), '', '"setuptools<81"'),
    ('mmseg', environment({'mmseg': no_module('ftfy')}), "'ftfy'", 'pip install ftfy'),
    ('mmcv', environment({'mmcv': Exception('OSError: x')}), 'OSError: x', RECOMPILE),
    ('mmdet', environment({'mmdet': Exception('KeyError: x')}), 'x', '--force-reinstall "onedl-mm'),
    (
        'mmcv operators',
        environment({'mmcv operators': ''}),
        'mmcv is not installed',
        '"onedl-mmcv>=',
    ),
    (
        'mmcv operators',
        environment({'mmcv operators': no_module('mmcv._ext')}),
        'without',
        RECOMPILE,
    ),
    ('mmcv operators', environment({'mmcv operators': OTHER_TORCH}), 'another torch', RECOMPILE),
    ('mmcv operators', environment({'mmcv operators': Exception('signal 11')}), '11', RECOMPILE),
    (
        'mmcv operators',
        environment(H200),
        'for the CPU alone',
        'install the CUDA toolkit 13.0, then',
    ),
    ('mmattn', environment({'mmattn': Exception('SyntaxError: x')}), 'SyntaxError', 'mmattn again'),
    (
        'mmattn operators',
        environment({'mmattn operators': 'cpu: not built; cuda: not built', 'C++ compiler': ''}),
        'slower reference serves: cpu: not built',
        f'install a C++ compiler (g++), then {REBUILD}',
    ),
    (
        'mmattn operators',
        environment(H200 | {'mmattn operators': 'cpu: compiled; cuda: triton is not installed'}),
        'without triton',
        'pip install triton',
    ),
    (
        'mmattn operators',
        environment(H200 | {'mmattn operators': 'cpu: compiled; cuda: not built', 'nvcc': '13.0'}),
        'for the CPU alone',
        REBUILD,
    ),
]
LOGS = {
    'The virtual environment was not created: ensurepip is not available.': 'python3-venv',
    "OSError: [Errno 28] No space left on device: '/x'": 'free some disk space',
    'python_headers.h:12:10: fatal error: Python.h: No such file or directory': 'python3-dev',
    'OSError: CUDA_HOME environment variable is not set.': "CUDA_VISIBLE_DEVICES=''",
    'g++: fatal error: Killed signal terminated program cc1plus': 'MAX_JOBS=1',
    "error: command 'x86_64-linux-gnu-g++' failed: No such file": 'apt-get install g++',
    "error: [Errno 2] No such file or directory: 'g++'": 'apt-get install g++',
    'ERROR: Could not find a version that satisfies the requirement torch==2': 'PIP_INDEX_URL',
    'Temporary failure in name resolution': 'check the network',
}


@pytest.mark.parametrize('distributions', [FORKS, OWN], ids=['forks', 'own'])
def test_nothing_is_wrong_with_either_stack(distributions):
    assert set(PARTS) == set(HEALTHY)
    for check in examine(environment(distributions=distributions)):
        assert (check.state, check.mend) == ('ok', ''), check
        assert check.found


def test_nothing_is_wrong_with_apples_gpu():
    facts = environment({'torch': '2.13.0, CPU build, mps', 'GPU': "Apple's mps: the references"})
    assert {check.state for check in examine(facts)} == {'ok'}


def test_nothing_is_wrong_beside_a_gpu():
    compiled = {
        'mmcv operators': 'compiled, CUDA: 13.0',
        'mmattn operators': 'cpu: compiled; cuda: compiled',
    }
    facts = environment(H200 | compiled | {'GPU': 'Driver Version: 580.65', 'nvcc': '13.0'})
    assert {check.state for check in examine(facts)} == {'ok'}


@pytest.mark.parametrize('part, facts, found, mend', CASES)
def test_problem(part, facts, found, mend):
    check = look(part, facts)
    assert check.state == ('warn' if part in ('mmseg', 'mmpretrain') else check.state) != 'ok'
    assert found in check.found
    assert mend in check.mend
    assert '{' not in check.mend + check.found


@pytest.mark.parametrize('log', LOGS)
def test_log_of_a_failed_step(log, tmp_path):
    path = tmp_path / 'step.log'
    path.write_text(f'before\n{log}\nafter')
    done = doctor('--log', path)
    assert done.returncode == 0 and LOGS[log] in done.stdout


def test_every_row_is_the_first_that_fits_somewhere():
    logs = [('make setup', Facts({'make setup': Found(error=log)})) for log in LOGS]
    cases = [(part, facts) for part, facts, *_ in CASES] + logs
    reached = {
        next(
            i
            for i, row in enumerate(TABLE)
            if part in row.parts.split(', ') and row.test(facts, part)
        )
        for part, facts in cases
    }
    # Cases of torch and numpy share rows.
    assert [TABLE[i] for i in range(len(TABLE)) if i not in reached] == []


def test_a_later_failure_gets_the_remedy_of_the_first():
    facts = environment(
        dict.fromkeys(('OpenCV', 'mmcv', 'mmcv operators', 'mmdet', 'mmseg'), NO_GL)
    )
    mends = {check.mend for check in examine(facts) if check.mend}
    assert mends == {'python -m pip install --force-reinstall --no-deps opencv-python-headless'}


def test_upstream_mmcv_is_compiled_with_pkg_resources():
    mend = look('mmcv operators', environment({'mmcv operators': OTHER_TORCH}, OWN)).mend
    assert '"setuptools<81"' in mend and '"mmcv==' in mend and 'onedl' not in mend


def test_versions_are_those_of_the_metadata():
    for part, (fork, own) in OPENMMLAB.items():
        for name, distributions in ((fork, FORKS), (own, OWN)):
            mend = look(part, environment({part: '0.0.1'}, distributions)).mend
            assert f'"{name}{requirements()[name]}"' in mend


def doctor(*arguments, python=sys.executable, path=()):
    """Run the doctor as a user does, with folders ahead of everything installed."""
    variables = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
    command = [python, '-m', 'mmattn.doctor', *map(str, arguments)]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def test_here_the_main_job_can_run():
    run = doctor('--json')
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)['ok'] is True
    for check in json.loads(run.stdout)['checks']:
        assert set(check) == {'name', 'state', 'found', 'mend'}


def test_runs_without_any_package_at_all(tmp_path):
    venv.create(tmp_path / 'bare', with_pip=False)
    alone = tmp_path / 'alone'
    alone.mkdir()
    (alone / 'mmattn').symlink_to(Path(mmattn.__file__).parent)
    variables = {'PYTHONPATH': str(alone)}
    command = [tmp_path / 'bare/bin/python', '-m', 'mmattn.doctor', '--json']
    run = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (1, '')
    checks = {check['name']: check for check in json.loads(run.stdout)['checks']}
    assert 'mmattn needs torch, and it is not installed' in checks['mmattn']['found']
    missing = {name for name, check in checks.items() if check['found'] == 'not installed'}
    assert missing == {'torch', 'numpy', 'OpenCV', *OPENMMLAB}


def test_broken_package_really(tmp_path, monkeypatch):
    (tmp_path / 'torchvision.py').write_text('raise RuntimeError("its library is broken")')
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    broken = try_import('torchvision')
    assert broken == Found(error='RuntimeError: its library is broken')
    (tmp_path / 'torchvision.py').write_text('import os; os.abort()')
    assert try_import('torchvision').error == 'the process was ended by signal 6'


def test_report_offers_commands_that_can_be_copied(tmp_path):
    (tmp_path / 'torch.py').write_text('raise OSError("libcudart.so.13: cannot open")')
    run = doctor(path=[tmp_path])
    assert run.returncode == 1
    assert 'fail  torch             does not import: OSError: libcudart.so.13' in run.stdout
    command = 'python -m pip install --upgrade --force-reinstall "torch>=2.10"'
    assert run.stdout.endswith(f'in this order:\n  {command}\n\nThe main job cannot run.\n')
