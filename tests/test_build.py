"""The build of the operators with fake compilers, on machines that are not quite right."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FAKE = f"""#!{sys.executable}
import os, sys
from pathlib import Path
if '--list-gpu-arch' in sys.argv:
    print('compute_75', 'compute_80', 'compute_90', sep='\\n')
    sys.exit()
with open(os.environ['CALLS'], 'a') as calls:
    print(*sys.argv, file=calls)
if message := os.environ.get('FAIL_' + Path(sys.argv[0]).name.upper()):
    sys.exit('note: here\\n' + message)
Path(sys.argv[sys.argv.index('-o') + 1]).write_text('library')
"""


class Tree:
    """A working tree without operators, with fake compilers `nvcc` and `cxx`."""

    def __init__(self, folder):
        self.folder, self.calls = folder / 'tree', folder / 'calls'
        for name in ('setup.py', 'pyproject.toml', 'mmattn_configs.py', 'README.md', 'LICENSE'):
            self.folder.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, self.folder)
        csrc = Path('mmattn/ops/csrc')
        shutil.copytree(ROOT / csrc, self.folder / csrc)
        shutil.copy(ROOT / 'mmattn/__init__.py', self.folder / 'mmattn')
        self.bin = folder / 'cuda' / 'bin'
        self.bin.mkdir(parents=True)
        for name in ('nvcc', 'cxx'):
            (self.bin / name).write_text(FAKE)
            (self.bin / name).chmod(stat.S_IRWXU)

    def build(self, **variables):
        """Build in place; return its output, and the commands of the compilers."""
        self.calls.write_text('')
        inherited = {k: v for k, v in os.environ.items() if 'CUDA' not in k and 'CXX' not in k}
        environment = inherited | dict(
            CUDA_HOME=str(self.bin.parent), CXX=str(self.bin / 'cxx'), CALLS=str(self.calls)
        )
        done = subprocess.run(
            [sys.executable, 'setup.py', 'build_ext', '--inplace'],
            cwd=self.folder, env=environment | variables, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stderr, self.calls.read_text().splitlines()

    def built(self):
        return sorted(path.name for path in (self.folder / 'mmattn/ops').glob('_*'))


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def libraries(device):
    names = ['_cpu_avx2.so', '_cpu_avx512.so', '_cpu_default.so', '_cuda.so']
    return [name for name in names if name.startswith(device)]


def test_targets_are_those_that_nvcc_knows(tree):
    _, calls = tree.build()
    [command] = {' '.join(x for x in call.split() if 'gencode' in x) for call in calls} - {''}
    assert 'code=sm_80' in command and 'code=sm_90' in command and 'sm_100' not in command
    assert 'code=compute_90' in command  # PTX of the newest
    assert tree.built() == libraries('')


def test_a_target_that_nvcc_does_not_know_is_left_out_and_named(tree):
    errors, calls = tree.build(TORCH_CUDA_ARCH_LIST='8.0;12.0+PTX')
    assert 'does not know 12.0+PTX: left out' in errors
    assert not any('120' in call for call in calls) and any('sm_80' in call for call in calls)


def test_the_package_keeps_why_it_has_no_operators(tree):
    errors, _ = tree.build(TORCH_CUDA_ARCH_LIST='12.0')
    reason = (tree.folder / 'mmattn/ops/_cuda.txt').read_text()
    assert 'knows none of 12.0, but compute_75' in reason and reason.strip() in errors
    assert tree.built() == [*libraries('_cpu'), '_cuda.txt']

    tree.build(FAIL_NVCC="nvcc fatal   : Unsupported gpu architecture 'compute_90'")
    reason = (tree.folder / 'mmattn/ops/_cuda.txt').read_text()
    assert "nvcc failed: nvcc fatal   : Unsupported gpu architecture 'compute_90'" in reason

    tree.build()
    assert tree.built() == libraries('')


def test_a_missing_compiler_is_kept(tree):
    tree.build(CXX='/nowhere/g++', MMATTN_CUDA='0')
    assert tree.built() == ['_cpu.txt']
    assert '/nowhere/g++' in (tree.folder / 'mmattn/ops/_cpu.txt').read_text()


def test_flags_of_conda_do_not_lower_the_standard(tree):
    _, calls = tree.build(CXXFLAGS='-std=c++17 -march=nocona', MMATTN_CUDA='0')
    for call in calls:
        words = call.split()
        assert [word for word in words if word.startswith('-std')][-1] == '-std=c++20'
        assert '-march=nocona' in words


def test_copies_where_links_cannot_be_made(tree, tmp_path):
    """An editable install on Windows, without the right to make links."""
    for name in ('configs', 'tools'):
        (tree.folder / name).mkdir()
        (tree.folder / name / 'file.py').write_text('x = 1')
    code = (
        'import pathlib\n'
        'def refuse(*_, **__): raise OSError("[WinError 1314] A required privilege is not held")\n'
        'pathlib.Path.symlink_to = refuse\n'
    )
    (tmp_path / 'site').mkdir()
    (tmp_path / 'site/sitecustomize.py').write_text(code)
    command = [
        *(sys.executable, '-m', 'pip', 'install', '--no-deps', '--no-build-isolation', '-v'),
        *('--no-index', '--target', tmp_path / 'target', '-e', tree.folder),
    ]
    environment = os.environ | dict(PYTHONPATH=str(tmp_path / 'site'), MMATTN_CUDA='0')
    environment |= dict(CXX=str(tree.bin / 'cxx'), CALLS=str(tree.calls))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'has copies, as links fail: [WinError 1314]' in done.stdout + done.stderr
    copy = tree.folder / 'mmattn/.mim/configs'
    assert (copy / 'file.py').read_text() == 'x = 1' and not copy.is_symlink()
