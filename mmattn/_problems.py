"""Problems that `mmattn.doctor` knows: a table of symptoms and remedies, and its facts.

Only the standard library is imported, as everything else may be missing or broken.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ._dependencies import OPENMMLAB, REMEDY, at_least, release, requirements

PIP = 'python -m pip'


@dataclass(frozen=True)
class Found:
    """Output of a part, or the last line of its error; an absent part has neither."""

    output: str = ''
    error: str = ''


@dataclass(frozen=True)
class Facts:
    """Findings on the environment, which the table judges."""

    parts: dict[str, Found] = field(default_factory=dict)
    distributions: dict[str, str] = field(default_factory=dict)  # name: version, of those installed
    editable: bool = False  # mmattn is installed from a working tree

    def __getitem__(self, part: str) -> str:
        return self.parts.get(part, Found()).output

    def error(self, part: str) -> str:
        return self.parts.get(part, Found()).error

    @property
    def upstream(self) -> bool:
        """True if more of OpenMMLab's own releases are installed than of the forks."""
        here = [name in self.distributions for pair in OPENMMLAB.values() for name in pair]
        return sum(here[1::2]) > sum(here[::2])

    def distribution(self, part: str) -> str:
        """The installed distribution of a part, or else the one to install."""
        fork, own = OPENMMLAB.get(part, (part, part))
        wanted, other = (own, fork) if self.upstream else (fork, own)
        return next((name for name in (wanted, other) if name in self.distributions), wanted)


Test = Callable[[Facts, str], Any]


class Problem(NamedTuple):
    """A row of the table: it applies to these parts if `test` is true; texts may use `values`."""

    parts: str
    state: str
    symptom: str
    test: Test
    mend: str


def absent(facts: Facts, part: str) -> bool:
    return not facts[part] and not facts.error(part)


def too_old(facts: Facts, part: str) -> bool:
    return bool(facts[part]) and not at_least(facts[part], need(facts.distribution(part)))


def both(facts: Facts, part: str) -> bool:
    return set(OPENMMLAB[part]) <= set(facts.distributions)


def says(pattern: str) -> Test:
    return lambda facts, part: re.search(pattern, facts[part])


def error(pattern: str) -> Test:
    return lambda facts, part: re.search(pattern, facts.error(part))


def beside_gpu(test: Test) -> Test:
    return lambda facts, part: re.search(r'CUDA \S+, ', facts['torch']) and test(facts, part)


def with_driver(pattern: str) -> Test:
    return lambda facts, part: facts['GPU'] and re.search(pattern, facts['torch'])


def other_cuda(facts: Facts, part: str) -> bool:
    return bool(facts[part] and cuda(facts)) and release(facts[part])[0] != release(cuda(facts))[0]


def linkless(facts: Facts, part: str) -> bool:
    return facts.editable and ' copies in ' in facts[part]


def nothing_compiled(facts: Facts, part: str) -> bool:
    return not facts[part] and not facts['mmcv operators']


# Patterns in logs of failed steps of `make setup`.
NO_COMPILER = (
    r"command '?\S*(gcc|g\+\+|c\+\+|clang\S*|cc)'? failed: No such file|"
    r"No such file or directory: '\S*(gcc|g\+\+|c\+\+|clang\S*)'|\b(g\+\+|c\+\+): not found"
)
NO_INDEX = (
    'NewConnectionError|Temporary failure in name resolution|Read timed out|ProxyError|SSLError|'
    'Connection(Error|ResetError| refused)|Could not find a version that satisfies'
)
NO_VENV = r"ensurepip is not available|No module named '?(venv|ensurepip)"
NO_NVCC = r"CUDA_HOME environment variable is not set|No such file or directory: '\S*nvcc'"
NO_MEMORY = 'Killed signal|[Cc]annot allocate memory|out of memory'

FIRST = 'torch, numpy'
TASKS = 'mmdet, mmseg, mmpretrain'
MM = f'mmengine, mmcv, {TASKS}'
DEBIAN = '(Debian, Ubuntu: apt-get install'
BROKEN = 'does not import: {error}'

# For each part, the first row that fits applies.
# fmt: off
TABLE = (
    Problem('Python', 'fail', '{found}, needs >= 3.10', lambda f, p: not at_least(f[p], '3.10'),
            'make an environment with Python >= 3.10'),
    Problem(FIRST, 'fail', 'not installed', absent, '{pip} install --upgrade {wanted}'),
    Problem(FIRST, 'fail', BROKEN, error('.'),
            '{pip} install --upgrade --force-reinstall {wanted}'),
    Problem(FIRST, 'fail', '{found}, needs {need}', too_old, '{pip} install --upgrade {wanted}'),
    Problem('GPU', 'warn', '{found}, but torch is a CPU build: the GPU is not used',
            with_driver('CPU build$'), '{pip} uninstall -y torch, then {pip} install {torch} from '
            'an index of CUDA builds, then compile mmcv again'),
    Problem('GPU', 'warn', '{found}, but torch for CUDA {cuda} sees no GPU',
            with_driver(r'CUDA \S+$'), 'unset CUDA_VISIBLE_DEVICES if it is set; otherwise update '
            'the driver, or install a torch that was built for an older CUDA'),
    Problem('nvcc', 'warn', '{found}, but torch was built for CUDA {cuda}: operators do not '
            'compile', other_cuda, 'install the CUDA toolkit {cuda} and set CUDA_HOME to it'),
    Problem('C++ compiler', 'warn', 'none, and mmcv has to be compiled', nothing_compiled,
            'apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)'),
    # Triton compiles the code that starts a kernel when the kernel first runs.
    Problem('C++ compiler', 'warn', 'none, and GPU kernels need one when they first run',
            beside_gpu(absent), 'apt-get install gcc (Debian, Ubuntu) or dnf install gcc (Fedora)'),
    Problem('Python headers', 'warn', 'none, and GPU kernels need Python.h when they first run',
            beside_gpu(absent), f"install Python's headers {DEBIAN} python3-dev; Fedora: dnf "
            'install python3-devel)'),
    Problem('transformers', 'warn', '{found}: mmpretrain and multimodal models need 4',
            says('^([5-9]|[1-4][0-9])'), '{pip} install "transformers<5"'),
    Problem('OpenCV', 'fail', 'not installed', absent, '{pip} install opencv-python-headless'),
    # opencv-python needs the libraries of a desktop (libGL.so.1), which servers lack.
    Problem('OpenCV', 'fail', BROKEN, error('.'),
            '{pip} install --force-reinstall --no-deps opencv-python-headless'),
    Problem('torchvision', 'warn', 'not installed: mmpretrain needs it, mmdet and mmseg do not',
            absent, '{pip} install --no-deps {torchvision}'),
    Problem('torchvision', 'fail', 'built for another torch, and stops every training: {error}',
            error('operator torchvision::nms does not exist'),
            '{pip} install --force-reinstall --no-deps {torchvision} from the index that torch '
            'came from; or, without mmpretrain: {pip} uninstall -y torchvision'),
    Problem('torchvision', 'fail', 'does not import, and stops every training: {error}', error('.'),
            '{pip} uninstall -y torchvision'),
    Problem('triton', 'warn', 'not installed: GPU kernels need it', beside_gpu(absent),
            '{pip} install triton'),
    Problem('triton', 'warn', BROKEN, error('.'), '{pip} install --force-reinstall triton'),
    Problem(MM, 'fail', '{both} are both installed and overwrite each other', both,
            '{pip} uninstall -y {both} && {install}'),
    Problem(MM, 'fail', 'not installed', absent, '{install}'),
    Problem(MM, 'fail', '{found}, needs {need}', too_old, '{install}'),
    # OpenMMLab sets a class of transformers that it does not find to None, and derives from it.
    Problem(TASKS, 'fail', 'does not import beside transformers 5: {error}',
            error('NoneType takes no arguments'), '{pip} install "transformers<5"'),
    # OpenMMLab's mmdet 3.3.0 and mmseg 1.2.2 assert mmcv < 2.2.0, though 2.2.0 is its last release.
    Problem('mmdet, mmseg', 'fail', 'refuses this mmcv: {error}',
            error('MMCV==.* is used but incompatible'), '{remove_fork}{compile_upstream}'),
    Problem(MM, 'fail', 'needs torchvision: {error}', error("No module named 'torchvision'"),
            '{pip} install --no-deps {torchvision}'),
    # Imported by mmengine 0.10.7 and the setup.py of mmcv 2.1.0; later setuptools lack it.
    Problem(MM, 'fail', 'needs an older setuptools: {error}',
            error("No module named 'pkg_resources'"), '{pip} install "setuptools<81"'),
    # mmsegmentation 1.2.2, for one, imports ftfy and regex and does not require them.
    Problem(MM, 'fail', 'needs a package that it does not require: {error}',
            error(r"No module named '(?!mmcv)\w+'"), '{pip} install {missing}'),
    Problem('mmcv', 'fail', BROKEN, error('.'), '{recompile}'),
    Problem(MM, 'fail', BROKEN, error('.'), '{pip} install --force-reinstall {wanted}'),
    Problem('mmcv operators', 'fail', 'mmcv is not installed', absent, '{compile}'),
    Problem('mmcv operators', 'fail', 'mmcv was installed without them: {error}',
            error(r"No module named 'mmcv\._ext'"), '{recompile}'),
    Problem('mmcv operators', 'fail', 'compiled against another torch: {error}',
            error('mmcv/_ext'), '{recompile}'),
    Problem('mmcv operators', 'fail', 'do not import: {error}', error('.'), '{recompile}'),
    Problem('mmcv operators', 'fail', 'compiled for the CPU alone, beside a GPU',
            beside_gpu(says('not available')), '{toolkit}{recompile}'),
    Problem('mmattn', 'fail', BROKEN, error('.'), 'mend what is wrong above; if nothing is, '
            'install mmattn again, or report this error'),
    Problem('mmattn', 'warn', '{found}: links could not be made, so changes in configs/ and tools/ '
            'do not reach it', linkless, 'after such changes: {pip} install '
            '--no-deps --no-build-isolation -e .'),
    Problem('mmattn operators', 'warn', 'not compiled, and the slower reference serves: {found}',
            says('cpu: (?!compiled)'), '{compiler}{rebuild}'),
    Problem('mmattn operators', 'warn', 'no GPU kernels without triton: {found}',
            beside_gpu(says('cuda: triton')), '{pip} install triton'),
    Problem('mmattn operators', 'warn', 'compiled for the CPU alone, beside a GPU: {found}',
            beside_gpu(says('cuda: (?!compiled)')), '{toolkit}{rebuild}'),
    Problem('make setup', 'fail', 'ensurepip is not available', error(NO_VENV),
            f'install the venv module of this Python {DEBIAN} python3-venv)'),
    Problem('make setup', 'fail', 'No space left on device', error('No space left on device'),
            'free some disk space: the environment takes 4 GB, beside a GPU 12 GB'),
    Problem('make setup', 'fail', 'Python.h: No such file', error(r'Python\.h: No such file'),
            f"install Python's headers {DEBIAN} python3-dev; Fedora: dnf install python3-devel)"),
    Problem('make setup', 'fail', 'CUDA_HOME environment variable is not set', error(NO_NVCC),
            "install the CUDA toolkit of torch's CUDA version, or set CUDA_VISIBLE_DEVICES='' to "
            'set up for the CPU alone'),
    Problem('make setup', 'fail', 'Killed signal terminated program cc1plus', error(NO_MEMORY),
            'set MAX_JOBS=1, as the compiler ran out of memory'),
    Problem('make setup', 'fail', "command 'g++' failed: No such file", error(NO_COMPILER),
            f'install a C++ compiler {DEBIAN} g++; Fedora: dnf install gcc-c++)'),
    Problem('make setup', 'fail', 'Could not find a version, ConnectionError', error(NO_INDEX),
            'check the network, and PIP_INDEX_URL, PIP_FIND_LINKS and MMATTN_TORCH_INDEX where '
            'they are set: the index was not reached, or has no such version for this Python'),
)
# fmt: on


def need(distribution: str) -> str:
    """The version specifier of a distribution in mmattn's metadata."""
    return requirements().get(distribution, '')


def cuda(facts: Facts) -> str:
    """The CUDA version of torch's build, or an empty string."""
    found = re.search(r'CUDA ([\d.]+)', facts['torch'])
    return found[1] if found else ''


def compile_mmcv(upstream: bool, again: bool = False) -> str:
    """Command that compiles mmcv; `again` skips pip's cache, which ignores the torch version."""
    name = OPENMMLAB['mmcv'][upstream]
    tools = ('"setuptools<81"' if upstream else 'setuptools') + ' wheel ninja'
    flags = f'--force-reinstall --no-deps --no-cache-dir --no-binary {name} ' if again else ''
    return (
        f'{PIP} install {tools} && MMCV_WITH_OPS=1 CFLAGS="-g0 -O1" {PIP} install '
        f'--no-build-isolation {flags}"{name}{need(name)}"'
    )


def values(part: str, facts: Facts) -> dict[str, str]:
    """Values of the fields in the texts of a problem."""
    name, fork = facts.distribution(part), OPENMMLAB['mmcv'][0]
    wanted = f'"{name}{need(name)}"'
    numbers = release(facts['torch'])
    # torchvision 0.15 belongs to torch 2.0, and both minor versions have risen together since.
    minor = f'==0.{numbers[1] + 15}.*' if numbers[:1] == (2,) else ''
    compiled = compile_mmcv(facts.upstream)
    rebuild = '-e .  (in the working tree)' if facts.editable else 'mmattn'
    return {
        'pip': PIP,
        'found': describe(part, facts),
        'error': facts.error(part).removesuffix(REMEDY),
        'missing': ''.join(re.findall(r"No module named '(\w+)", facts.error(part))),
        'need': need(name),
        'wanted': wanted,
        'install': compiled if part == 'mmcv' else f'{PIP} install {wanted}',
        'both': ' '.join(OPENMMLAB.get(part, ())),
        'cuda': cuda(facts),
        'torch': f'"torch{need("torch")}"',
        'torchvision': f'"torchvision{minor}"',
        'compile': compiled,
        'compile_upstream': compile_mmcv(True),
        'recompile': compile_mmcv(facts.upstream, again=True),
        'remove_fork': f'{PIP} uninstall -y {fork} && ' if fork in facts.distributions else '',
        'toolkit': '' if facts['nvcc'] else f'install the CUDA toolkit {cuda(facts)}, then ',
        'compiler': '' if facts['C++ compiler'] else 'install a C++ compiler (g++), then ',
        'rebuild': f'{PIP} install --force-reinstall --no-deps --no-build-isolation {rebuild}',
    }


def describe(part: str, facts: Facts) -> str:
    """Output of a part, with its distribution's name if there are two."""
    name = f'{facts.distribution(part)} ' if part in OPENMMLAB else ''
    return f'{name}{facts[part]}' if facts[part] else ''
