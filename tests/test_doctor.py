"""Each known trap of the software stack: what the doctor says, and the command that it offers."""

import json
import os
import subprocess
import sys
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_cases import GPU_TORCH, HEALTHY, NO_OPERATORS, facts, upstream

import mmattn
from mmattn.doctor import Import, examine, installed, try_import

ROOT = Path(__file__).resolve().parent.parent


def look(environment, name):
    return next(check for check in examine(environment) if check.name == name)


def failures(environment):
    return [check.name for check in examine(environment) if check.state == 'fail']


@pytest.mark.parametrize('environment', [HEALTHY, upstream()])
def test_nothing_is_wrong_with_either_stack(environment):
    assert {check.state for check in examine(environment)} == {'ok'}
    assert not any(check.mend for check in examine(environment))


def test_mmcv_without_compiled_operators():
    broken = facts({'mmcv.ops': NO_OPERATORS, 'mmdet': NO_OPERATORS})
    check = look(broken, 'mmcv operators')
    assert check.state == 'fail'
    assert 'installed without them' in check.found
    for part in (
        'MMCV_WITH_OPS=1',
        'CFLAGS="-g0 -O1"',
        '--no-build-isolation',
        '--no-cache-dir',
        '--no-binary onedl-mmcv',
        '"onedl-mmcv>=2.3.6"',
    ):
        assert part in check.mend
    # mmdet does not import for the same reason, and the remedy is the same.
    assert look(broken, 'mmdet').mend == check.mend


def test_upstream_mmcv_is_compiled_with_a_setuptools_that_has_pkg_resources():
    check = look(upstream({'mmcv.ops': NO_OPERATORS}), 'mmcv operators')
    assert '"setuptools<81"' in check.mend
    assert '"mmcv==2.1.0"' in check.mend
    assert 'onedl' not in check.mend


def test_mmcv_compiled_against_another_torch():
    error = 'ImportError: /x/site-packages/mmcv/_ext.so: undefined symbol: _ZN3c10E'
    check = look(facts({'mmcv.ops': Import(error=error)}), 'mmcv operators')
    assert (check.state, 'another torch' in check.found) == ('fail', True)
    assert '--force-reinstall' in check.mend


def test_mmcv_compiled_for_the_cpu_beside_a_gpu():
    gpu = facts({'torch': GPU_TORCH}, driver='580.65', nvcc='13.0')
    assert 'CPU alone' in look(gpu, 'mmcv operators').found
    assert look(gpu, 'mmcv operators').mend.startswith('python -m pip')
    assert 'install the CUDA toolkit 13.0' in look(replace(gpu, nvcc=''), 'mmcv operators').mend
    sound = facts({'torch': GPU_TORCH, 'mmcv.ops': Import('13.0')}, driver='580.65')
    assert failures(sound) == []


def test_mmdet_3_3_0_refuses_mmcv_2_2_0():
    refused = Import(error='AssertionError: MMCV==2.2.0 is used but incompatible.')
    check = look(upstream({'mmdet': refused}, mmcv='2.2.0'), 'mmdet')
    assert check.state == 'fail'
    assert 'MMCV==2.2.0' in check.found
    assert '"mmcv==2.1.0"' in check.mend


def test_upstream_mmdet_beside_the_fork_of_mmcv():
    refused = Import(error='AssertionError: MMCV==2.3.6 is used but incompatible.')
    mixed = upstream({'mmdet': refused}, **{'mmcv': None, 'onedl-mmcv': '2.3.6'})
    assert look(mixed, 'mmdet').mend.startswith('python -m pip uninstall -y onedl-mmcv && ')


def test_both_distributions_at_once():
    check = look(facts(distributions={'mmdet': '3.3.0'}), 'mmdet')
    assert check.state == 'fail'
    assert 'both installed' in check.found
    assert check.mend == (
        'python -m pip uninstall -y onedl-mmdetection mmdet && '
        'python -m pip install "onedl-mmdetection>=3.5.1"'
    )


@pytest.mark.parametrize(
    'module, distribution, state',
    [
        ('mmengine', 'onedl-mmengine', 'fail'),
        ('mmdet', 'onedl-mmdetection', 'fail'),
        ('mmseg', 'onedl-mmsegmentation', 'warn'),
        ('mmpretrain', 'onedl-mmpretrain', 'warn'),
    ],
)
def test_a_package_is_missing_or_too_old(module, distribution, state):
    missing = look(facts({module: Import()}, {distribution: None}), module)
    assert (missing.state, missing.found) == (state, 'not installed')
    assert missing.mend.startswith(f'python -m pip install "{distribution}>=')
    old = look(facts(distributions={distribution: '0.1'}), module)
    assert (old.state, old.mend) == (state, missing.mend)
    assert f'{distribution} 0.1, needs >=' in old.found


def test_a_requirement_that_a_package_does_not_state():
    error = Import(error="ModuleNotFoundError: No module named 'ftfy'")
    check = look(upstream({'mmseg': error}), 'mmseg')
    assert (check.state, check.mend) == ('warn', 'python -m pip install ftfy')
    error = Import(error="ModuleNotFoundError: No module named 'torchvision'")
    check = look(facts({'mmpretrain': error, 'torchvision': Import()}), 'mmpretrain')
    assert check.mend == 'python -m pip install --no-deps "torchvision==0.28.*"'


def test_upstream_mmengine_without_pkg_resources():
    error = Import(error="ModuleNotFoundError: No module named 'pkg_resources'")
    check = look(upstream({'mmengine': error}), 'mmengine')
    assert (check.state, check.mend) == ('fail', 'python -m pip install "setuptools<81"')


def test_a_fault_of_mmattn_is_not_blamed_on_the_task_packages():
    error = Import(error='SyntaxError: invalid syntax')
    checks = examine(facts(dict.fromkeys(('mmattn', 'mmdet', 'mmseg', 'mmpretrain'), error)))
    mends = {check.mend for check in checks if check.mend}
    assert len(mends) == 1
    assert 'install mmattn again' in mends.pop()


def test_transformers_5_beside_mmdet():
    error = Import(error='TypeError: NoneType takes no arguments')
    broken = facts({'mmdet': error}, {'transformers': '5.23.0'})
    assert look(broken, 'transformers').state == 'fail'
    for name in ('transformers', 'mmdet'):
        assert look(broken, name).mend == 'python -m pip install "transformers<5"'
    partly = facts({'mmdet': Import('3.5.1'), 'mmseg': error}, {'transformers': '5.23.0'})
    assert look(partly, 'transformers').state == 'warn'
    assert look(partly, 'mmseg').mend == 'python -m pip install "transformers<5"'
    assert look(facts(distributions={'transformers': '4.57.1'}), 'transformers').state == 'ok'


@pytest.mark.parametrize(
    'changes, cuda, found, mend',
    [
        (dict(), 'this torch is a CPU build', 'compiled for the CPU', ''),
        (dict(imports={'torch': GPU_TORCH}, nvcc='13.0'), '', 'for the CPU and CUDA', ''),
        (
            dict(imports={'torch': GPU_TORCH}),
            '_cuda.so was not built with the package',
            'for the CPU alone, beside a GPU: _cuda.so was not built',
            'install the CUDA toolkit 13.0, then python -m pip install --force-reinstall',
        ),
    ],
)
def test_compiled_operators(changes, cuda, found, mend):
    operators = Import(json.dumps({'cpu': '', 'cuda': cuda}))
    imports = changes.pop('imports', {}) | {'mmattn.ops': operators}
    check = look(facts(imports, **changes), 'mmattn operators')
    assert found in check.found
    assert check.mend.startswith(mend) if mend else not check.mend


def test_operators_that_were_not_compiled():
    problem = json.dumps({'cpu': '_cpu.so was not built with the package', 'cuda': ''})
    check = look(facts({'mmattn.ops': Import(problem)}, compiler=''), 'mmattn operators')
    assert check.state == 'warn' and '_cpu.so was not built' in check.found
    assert check.mend.startswith('install a C++ compiler') and '--no-build-isolation' in check.mend


def test_torchvision_for_cuda_beside_a_cpu_torch_is_what_mmattn_mends():
    error = Import(error='RuntimeError: operator torchvision::nms does not exist')
    assert look(facts({'torchvision': error}), 'torchvision').state == 'ok'
    assert 'import mmattn' in look(facts({'torchvision': error}), 'torchvision').found
    check = look(facts({'torchvision': error, 'torch': GPU_TORCH}), 'torchvision')
    assert (check.state, '"torchvision==0.28.*" --force-reinstall' in check.mend) == ('warn', True)


def test_torchvision_missing_or_beyond_repair():
    absent = look(facts({'torchvision': Import()}), 'torchvision')
    assert absent.state == 'warn'
    assert absent.mend == 'python -m pip install --no-deps "torchvision==0.28.*"'
    broken = look(facts({'torchvision': Import(error='ImportError: gone')}), 'torchvision')
    assert broken.state == 'fail'
    assert broken.mend == 'python -m pip uninstall -y torchvision'


def test_opencv_without_a_desktop_is_named_as_the_cause():
    error = Import(error='ImportError: libGL.so.1: cannot open shared object file')
    broken = facts({'cv2': error, 'mmcv': error, 'mmcv.ops': error, 'mmdet': error})
    mend = 'python -m pip install --force-reinstall --no-deps opencv-python-headless'
    for name in ('OpenCV', 'mmcv', 'mmcv operators', 'mmdet'):
        assert look(broken, name).mend == mend


def test_torch_is_missing_too_old_or_broken():
    for output in (Import(), Import(json.dumps({'version': '2.4.1', 'cuda': None, 'gpus': []}))):
        check = look(facts({'torch': output}), 'torch')
        assert check.state == 'fail'
        assert check.mend == 'python -m pip install --upgrade "torch>=2.10"'
    check = look(facts({'torch': Import(error='OSError: libcudart.so.13')}), 'torch')
    assert check.mend.endswith('--force-reinstall')


def test_gpu_that_torch_does_not_use():
    check = look(facts(driver='580.65'), 'GPU')
    assert (check.state, 'CPU build' in check.found) == ('warn', True)
    unseen = Import(json.dumps({'version': '2.13.0', 'cuda': '13.0', 'gpus': []}))
    assert 'sees no GPU' in look(facts({'torch': unseen}, driver='470.1'), 'GPU').found


def test_nvcc_of_another_cuda():
    check = look(facts({'torch': GPU_TORCH}, nvcc='12.4'), 'nvcc')
    assert (check.state, 'CUDA toolkit 13.0' in check.mend) == ('warn', True)


def test_compiler_matters_only_while_mmcv_is_to_be_compiled():
    assert look(facts(compiler=''), 'C++ compiler').state == 'ok'
    check = look(facts({'mmcv.ops': NO_OPERATORS}, compiler=''), 'C++ compiler')
    assert (check.state, 'apt-get install g++' in check.mend) == ('warn', True)


def doctor(*arguments, python=sys.executable, path=()):
    """Run it as a user does, with folders ahead of everything installed."""
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run(
        [python, '-m', 'mmattn.doctor', *arguments], env=environment, capture_output=True, text=True
    )


def report(run):
    checks = json.loads(run.stdout)['checks']
    return {check['name']: check for check in checks}


def write_module(folder, name, code):
    (folder / name).mkdir()
    (folder / name / '__init__.py').write_text(code)


def write_distribution(folder, name, version):
    info = folder / f'{name}-{version}.dist-info'
    info.mkdir()
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


def test_here_the_main_job_can_run():
    run = doctor('--json')
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout)['ok'] is True
    assert all(set(check) == {'name', 'state', 'found', 'mend'} for check in report(run).values())


def test_runs_without_any_package_at_all(tmp_path):
    venv.create(tmp_path / 'bare', with_pip=False)
    python = tmp_path / 'bare' / 'bin' / 'python'
    # Where mmattn is installed, everything else is beside it.
    alone = tmp_path / 'alone'
    alone.mkdir()
    (alone / 'mmattn').symlink_to(Path(mmattn.__file__).parent)
    run = doctor(python=python, path=[alone])
    assert run.returncode == 1
    assert run.stderr == ''
    assert 'mmattn needs torch >= 2.10, and it is not installed\n' in run.stdout
    assert run.stdout.endswith('The main job cannot run.\n')
    checks = report(doctor('--json', python=python, path=[alone]))
    missing = {name for name, check in checks.items() if check['found'] == 'not installed'}
    packages = {'torch', 'numpy', 'OpenCV', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
    assert missing == packages


@pytest.fixture
def imports_beside(tmp_path, monkeypatch):
    """Really import modules, in processes that find `tmp_path` before everything installed."""
    monkeypatch.setenv('PYTHONPATH', f'{tmp_path}{os.pathsep}{ROOT}')
    monkeypatch.syspath_prepend(tmp_path)
    return lambda *modules: {module: try_import(module) for module in modules}


def test_transformers_5_really(tmp_path, imports_beside):
    # Some of what OpenMMLab asks it for is gone, and it then derives from None.
    code = 'BertPreTrainedModel = None\ndef __getattr__(name): return type(name, (), {})'
    names = ('modeling_utils', 'models', 'models/bert', 'models/bert/modeling_bert')
    for name in ('transformers', *(f'transformers/{name}' for name in names)):
        write_module(tmp_path, name, code)
    write_distribution(tmp_path, 'transformers', '5.23.0')
    assert installed(['transformers']) == {'transformers': '5.23.0'}
    broken = facts(imports_beside('mmdet'), {'transformers': '5.23.0'})
    assert look(broken, 'transformers').found == '5.23.0: mmdet does not import beside it'
    assert look(broken, 'mmdet').mend == 'python -m pip install "transformers<5"'


def test_broken_torchvision_really(tmp_path, imports_beside):
    write_module(tmp_path, 'torchvision', 'raise RuntimeError("its library is broken")')
    broken = facts(imports_beside('torchvision', 'mmdet'))
    assert failures(broken) == ['torchvision', 'mmdet']
    for name in failures(broken):
        assert 'its library is broken' in look(broken, name).found
        assert look(broken, name).mend == 'python -m pip uninstall -y torchvision'


def test_table_offers_commands_that_can_be_copied(tmp_path):
    write_module(tmp_path, 'torch', 'raise OSError("libcudart.so.13: cannot open")')
    run = doctor(path=[tmp_path])
    assert run.returncode == 1
    assert 'does not import: OSError: libcudart.so.13' in ' '.join(run.stdout.split())
    command = 'python -m pip install --upgrade "torch>=2.10" --force-reinstall'
    assert command in map(str.strip, run.stdout.splitlines())
