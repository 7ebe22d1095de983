"""Make the virtual environment that `make demo` and `make test` share, or that of `make test-upstream`.

    python tools/setup_env.py [--venv DIR] [--stack openmmlab] [--wheel FILE]

Needs nothing but Python (its standard library), a C++ compiler and pip's package index. The first
run installs everything, a second one finds its stamp in the environment and returns at once, and an
interrupted one is resumed: every step leaves alone what is there already.

pip's own settings are honoured (PIP_FIND_LINKS, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, ...), as are
MAX_JOBS and CFLAGS for the compilation of mmcv, and
    MMATTN_TORCH_INDEX    package index for torch and torchvision alone, for instance PyTorch's index
                          of CPU builds, where the ordinary index offers only the CUDA build.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# One tested set. The ranges that the package accepts are in pyproject.toml.
BUILD_TOOLS = ['pip>=24', 'wheel', 'ninja']
TORCH = 'torch==2.13.0'
TORCHVISION = 'torchvision==0.28.0'
MIM = 'openmim==0.3.9'


@dataclass(frozen=True)
class Stack:
    """One distribution of OpenMMLab's packages."""

    mmcv: str
    others: tuple[str, ...]
    setuptools: str = 'setuptools>=77'


# By the extra of pyproject.toml that asks for it.
STACKS = {
    'onedl': Stack(
        'onedl-mmcv==2.3.6',
        (
            'onedl-mmengine==0.10.12',
            'onedl-mmdetection==3.5.1',
            'onedl-mmsegmentation==1.4.2',
            'onedl-mmpretrain==1.3.6',
        ),
    ),
    'openmmlab': Stack(
        'mmcv==2.1.0',
        ('mmengine==0.10.7', 'mmdet==3.3.0', 'mmsegmentation==1.2.2', 'mmpretrain==1.2.0'),
        # mmengine and the setup.py of mmcv import pkg_resources, which later ones no longer have.
        'setuptools>=77,<81',
    ),
}

# Written into a finished environment: the fingerprint of what it was made from.
STAMP = 'mmattn-setup'

# Exits with 1 where mmcv's operators are missing, belong to another torch, or lack CUDA beside a GPU.
MMCV_FITS = """
import torch
from mmcv.ops import get_compiling_cuda_version
raise SystemExit(torch.cuda.is_available() and get_compiling_cuda_version() == "not available")
"""

# What a failed step says, by the first pattern that its log matches.
HINTS = (
    (
        r"ensurepip is not available|No module named '?(venv|ensurepip)",
        'this Python lacks the venv module: install it (Debian, Ubuntu: apt-get install python3-venv)',
    ),
    (r'No space left on device', 'the disk is full: free some space'),
    (
        r'Python\.h: No such file',
        "Python's headers are missing: install them (Debian, Ubuntu: apt-get install python3-dev; "
        'Fedora: dnf install python3-devel)',
    ),
    (
        r"CUDA_HOME environment variable is not set|No such file or directory: '\S*nvcc'",
        "this machine has an NVIDIA driver but no CUDA compiler: install the CUDA toolkit of torch's "
        "CUDA version, or set CUDA_VISIBLE_DEVICES='' to set up for the CPU alone",
    ),
    (
        r'Killed signal|[Cc]annot allocate memory|out of memory',
        'the compiler ran out of memory: set MAX_JOBS=1',
    ),
    (
        r"command '?\S*(gcc|g\+\+|c\+\+|clang\S*|cc)'? failed: No such file|"
        r"No such file or directory: '\S*(gcc|g\+\+|c\+\+|clang\S*)'|\b(g\+\+|c\+\+): not found",
        'no C++ compiler was found: install one (Debian, Ubuntu: apt-get install g++; '
        'Fedora: dnf install gcc-c++)',
    ),
    (
        r'NewConnectionError|Temporary failure in name resolution|Read timed out|ProxyError|SSLError|'
        r'Connection(Error|ResetError| refused)|Could not find a version that satisfies',
        'the package index was not reached, or does not hold this version for this Python: check the '
        'network, and PIP_INDEX_URL, PIP_FIND_LINKS and MMATTN_TORCH_INDEX where they are set',
    ),
)


class SetupError(Exception):
    """A step failed; the message says which, shows the end of the log, and what to do."""


def hint(log):
    """One sentence on what to do about a failed step, from what its commands printed."""
    for pattern, advice in HINTS:
        if re.search(pattern, log):
            return advice
    return 'the whole log is in the file named above'


def has_nvidia_gpu(environment=os.environ, driver=Path('/proc/driver/nvidia/version')):
    """Whether there is an NVIDIA driver, and CUDA_VISIBLE_DEVICES does not hide its GPUs."""
    if environment.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return False
    return driver.exists() or shutil.which('nvidia-smi', path=environment.get('PATH')) is not None


def compile_jobs():
    """Parallel compiler processes: one per CPU, as long as each has 2 GiB of memory."""
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    return max(1, min(len(os.sched_getaffinity(0)), memory // 2**31))


def compile_environment(venv, environment=os.environ):
    """The environment in which mmcv is compiled.

    Without debug information and with -O1 it takes half the time; flags that somebody has set come last,
    so that they win. Without the environment's ninja on the path only one file is compiled at a time.
    """
    return {
        'MAX_JOBS': str(compile_jobs()),
        **environment,
        'PATH': f'{venv / "bin"}{os.pathsep}{environment.get("PATH", os.defpath)}',
        'MMCV_WITH_OPS': '1',
        'CFLAGS': f'-g0 -O1 {environment.get("CFLAGS", "")}'.strip(),
    }


def fingerprint(venv, stack, wheel=None, root=ROOT):
    """Changes when the environment has to be looked at again: other requirements, or another place."""
    if wheel:
        installed = [wheel]
    else:
        installed = [root / 'pyproject.toml', root / 'setup.py']
        installed += sorted((root / 'mmattn/ops/csrc').rglob('*.*'))
    digest = hashlib.sha256()
    for part in (BUILD_TOOLS, TORCH, TORCHVISION, MIM, stack, STACKS[stack], root, venv):
        digest.update(f'{part}\0'.encode())
    for path in installed:
        digest.update(path.read_bytes() + b'\0')
    return digest.hexdigest()


class Environment:
    """The environment that is being made: runs the steps, times them and keeps the log."""

    def __init__(self, venv):
        self.venv = venv
        self.python = venv / 'bin' / 'python'
        self.log = venv / 'setup.log'

    def step(self, title, command, env=None):
        """Say what comes, do it, and say how long it took."""
        print(f'  {title} ...', end=' ', flush=True)
        start = time.monotonic()
        status, output = self.call(command, env)
        if status != 0:
            print('failed', flush=True)
            tail = '\n'.join(f'    {line}' for line in output.splitlines()[-15:])
            raise SetupError(
                f'set-up stopped at: {title}\n{tail}\n'
                f'  log: {self.log}\n'
                f'  what to do: {hint(output)}; then run the same command again, it goes on from here.'
            )
        print(f'{time.monotonic() - start:.0f} s', flush=True)

    def call(self, command, env=None):
        """Run a command, append its output to the log, and return its exit status and output.

        In a folder away from the sources, which Python would otherwise import in the place of a wheel.
        """
        with self.log.open('a+', errors='replace') as log:
            log.write(f'\n$ {" ".join(map(str, command))}\n')
            log.flush()
            start = log.tell()
            status = subprocess.run(
                command, cwd=self.venv, env=env, stdout=log, stderr=subprocess.STDOUT
            ).returncode
            log.seek(start)
            return status, log.read()

    def pip(self, *arguments):
        return [self.python, '-m', 'pip', 'install', '--progress-bar', 'off', *arguments]

    def works(self, code):
        return self.call([self.python, '-c', code])[0] == 0

    def torch_version(self):
        status, output = self.call([self.python, '-c', 'import torch; print(torch.__version__)'])
        if status != 0:
            raise SetupError(f'torch was installed but does not import:\n{output}')
        return output.split()[-1]


def require_space(folder, gigabytes):
    free = shutil.disk_usage(folder).free / 2**30
    if free < gigabytes:
        raise SetupError(
            f'{folder} has {free:.1f} GiB free and the environment takes about {gigabytes} GiB: '
            'free some space and run the same command again.'
        )


def torch_sentence(version, gpu):
    """What was installed as torch, and what it means here. `version` is torch's, with its suffix."""
    if version.endswith('+cpu'):
        return f'torch {version} is a CPU build' + (', though there is a GPU' if gpu else '')
    if gpu:
        return f'torch {version} is a CUDA build'
    return (
        f'torch {version} is a CUDA build, though this machine has no NVIDIA driver: it works, on the '
        "CPU, and takes several GiB. For the CPU build set MMATTN_TORCH_INDEX to PyTorch's index of "
        "CPU builds (its address is in PyTorch's installation guide), remove the environment and "
        'start again'
    )


def install(venv, extra, wheel=None):
    """All steps, in order.

    Args:
        venv: the environment's folder.
        extra: which of STACKS.
        wheel: of mmattn; without one the working tree is installed, editable.
    """
    stack = STACKS[extra]
    gpu = has_nvidia_gpu()
    environment = Environment(venv)
    index = os.environ.get('MMATTN_TORCH_INDEX')
    index = ['--index-url', index] if index else []
    pip, step = environment.pip, environment.step

    venv.mkdir(parents=True, exist_ok=True)
    if not (environment.python.exists() and environment.works('import pip')):
        require_space(venv, 12 if gpu else 4)
        if (venv / 'pyvenv.cfg').exists():  # half made, or its Python is gone
            shutil.rmtree(venv / 'bin', ignore_errors=True)
        step('virtual environment', [sys.executable, '-m', 'venv', venv])

    step('pip, setuptools, wheel, ninja', pip(*BUILD_TOOLS, stack.setuptools))
    step(
        'torch (a download of several GB for a GPU, of 0.2 GB as a CPU build)',
        pip(*index, TORCH),
    )
    print(f'    {torch_sentence(environment.torch_version(), gpu)}', flush=True)

    step('mmengine, mmdet, mmseg, mmpretrain', pip(*stack.others))
    # opencv-python needs the libraries of a desktop; the headless build has the same functions.
    if not environment.works('import cv2'):
        headless = 'opencv-python-headless'
        step(
            f'{headless}, as opencv-python does not load here',
            pip('--force-reinstall', '--no-deps', headless),
        )

    mmcv = ('--no-build-isolation', '--no-deps', stack.mmcv)
    step(
        'mmcv with compiled operators (about 10 minutes on 2 cores where pip finds no wheel)',
        pip(*mmcv),
        env=compile_environment(venv),
    )
    if not environment.works(MMCV_FITS):
        # A wheel's name does not tell which torch it belongs to, nor that of a build pip has cached.
        step(
            'mmcv from source, as the wheel does not fit this torch (about 10 minutes on 2 cores)',
            pip(
                '--force-reinstall',
                '--no-cache-dir',
                '--no-binary',
                stack.mmcv.split('=')[0],
                *mmcv,
            ),
            env=compile_environment(venv),
        )
    # Its metadata ask for torch's CUDA build, so that its dependencies would replace a CPU build.
    step('torchvision', pip(*index, '--no-deps', TORCHVISION))
    if wheel:
        # pip would leave alone another wheel of the same version.
        step(f'mmattn from {wheel.name}', pip('--force-reinstall', '--no-deps', wheel))
        step('what mmattn needs, and what tests it', pip(f'{wheel}[{extra},dev,viz,export]', TORCH))
    else:
        step(
            'mmattn with compiled operators (some minutes), and what develops it',
            pip('--no-build-isolation', '-e', f'{ROOT}[{extra},dev,viz,export]', TORCH),
        )
    # It asks for openxlab, which asks for a setuptools that torch is too new for.
    step('mim', pip('--no-deps', MIM))
    step('python -m mmattn.doctor', [environment.python, '-m', 'mmattn.doctor'])


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--venv', type=Path, default=ROOT / '.venv', help='where to make it (default: %(default)s)'
    )
    parser.add_argument(
        '--stack',
        choices=STACKS,
        default='onedl',
        help="the maintained forks, or OpenMMLab's own releases (default: %(default)s)",
    )
    parser.add_argument(
        '--wheel',
        type=lambda name: Path(name).resolve(),
        help='a wheel of mmattn to install, instead of the working tree',
    )
    args = parser.parse_args(arguments)
    venv = args.venv.resolve()
    if args.wheel and not args.wheel.is_file():
        return f'there is no wheel {args.wheel}: `make wheel` builds one'
    if sys.version_info < (3, 10):
        return f'mmattn needs Python >= 3.10, and {sys.executable} is {sys.version.split()[0]}'

    stamp = venv / STAMP
    wanted = fingerprint(venv, args.stack, args.wheel)
    if stamp.exists() and stamp.read_text() == wanted:
        print(f'set-up: {venv} is complete, nothing to install')
        return 0
    print(f'set-up: making {venv}', flush=True)
    start = time.monotonic()
    try:
        install(venv, args.stack, args.wheel)
    except SetupError as error:
        return str(error)
    except KeyboardInterrupt:
        return '\nset-up interrupted; the same command goes on from here'
    stamp.write_text(wanted)
    print(f'set-up: done in {time.monotonic() - start:.0f} s, log in {venv / "setup.log"}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
