"""Build of the compiled operators, and of configs/ and tools/ inside the package.

One library for each CPU instruction set and, where nvcc is found, one for CUDA, in ``mmattn/ops``.
They use LibTorch's stable ABI and not Python, so one build serves every Python >= 3.10
and torch >= 2.10. Where a compiler is missing or fails, the package installs without them.

    CXX, CXXFLAGS           C++ compiler, and flags appended for compiling and linking
    MAX_JOBS                compilers that run at once
    MMATTN_CUDA=0|1         0 leaves the CUDA library out, 1 makes its failure an error
    CUDA_HOME               CUDA toolkit; by default, that of the nvcc on the PATH
    TORCH_CUDA_ARCH_LIST    GPU architectures in torch's syntax: '8.0;9.0+PTX'

OpenMMLab's tools look into ``<package>/.mim`` for configs, tools and the model index. A wheel gets
copies; an editable install gets links, so that it follows the working tree.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
CSRC = Path('mmattn/ops/csrc')
# Copied or linked into mmattn/.mim, with equal relative paths, by which tools find the configs.
MIM = ('configs', 'tools', 'model-index.yml')
# Not copied: benchmark.py needs benchmarks/, which is in the working tree only.
LEFT_OUT = ('__pycache__', 'benchmark.py')

AVX2 = '-mavx2 -mfma -mf16c'
AVX512 = f'{AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512'
X86 = platform.machine() in ('x86_64', 'AMD64')
INSTRUCTION_SETS = {'default': '', **(dict(avx2=AVX2, avx512=AVX512) if X86 else {})}
FLAGS = '-O3 -DTORCH_TARGET_VERSION=0x020a000000000000'  # the oldest torch that they load in
CPU_FLAGS = f'{FLAGS} -fPIC -g0 -Wall -Wno-unknown-pragmas -fvisibility=hidden -fopenmp-simd'
CPU_FLAGS += ' -fno-math-errno -fno-trapping-math -ffp-contract=fast'
CUDA_FLAGS = f'{FLAGS} -DUSE_CUDA -Xcompiler=-fPIC --threads=2'
CUDA_FLAGS += ' --expt-relaxed-constexpr --expt-extended-lambda'
ARCHITECTURES = ('8.0', '9.0', '10.0')  # by default, those of them that nvcc knows


class BuildError(Exception):
    """A compiler failed; the message has the first error that it printed."""


class BuildOperators(build_ext):
    """Compile the libraries with plain compiler calls, several at a time."""

    def run(self):
        for device, compiler in (('cpu', cpu_compiler), ('cuda', cuda_compiler)):
            libraries = [x for x in self.extensions if x.name.startswith(f'mmattn.ops._{device}')]
            if not libraries:
                continue
            # pip hides what a build prints, so the package keeps the reason of a failure.
            reason = Path(self.get_ext_fullpath(libraries[0].name)).with_name(f'_{device}.txt')
            reason.unlink(missing_ok=True)
            try:
                self.build(libraries, compiler)
            except (OSError, ImportError, BuildError) as error:
                if device == 'cuda' and os.environ.get('MMATTN_CUDA') == '1':
                    raise
                print(f'mmattn: no operators for {device}: {error}', file=sys.stderr)
                reason.parent.mkdir(parents=True, exist_ok=True)
                reason.write_text(f'{error}\n')

    def build(self, libraries, compiler):
        import torch  # for its headers, at build time only

        torch_root = Path(torch.__file__).parent
        headers = [ROOT / 'setup.py', *CSRC.rglob('*.h')]
        link = f'-shared -Xlinker --no-as-needed -L{torch_root}/lib -ltorch -ltorch_cpu'.split()
        compiling, linking = [], []
        for library in libraries:
            command = [*compiler(library.extra_compile_args), '-isystem', f'{torch_root}/include']
            folder = Path(self.build_temp, library.name)
            objects = {folder / f'{Path(x).stem}.o': x for x in library.sources}
            compiling += [([*command, '-c', x], y, [x, *headers]) for y, x in objects.items()]
            target = Path(self.get_ext_fullpath(library.name))
            linking.append(([*command, *map(str, objects), *link], target, list(objects)))
        with ThreadPoolExecutor(int(os.environ.get('MAX_JOBS', os.cpu_count() or 1))) as pool:
            for steps in (compiling, linking):
                list(pool.map(lambda step: self.make(*step), steps))

    def make(self, command, target, inputs):
        """Run a command that writes ``target``, unless that is newer than all ``inputs``."""
        newest = max(os.stat(path).st_mtime for path in inputs)
        if target.exists() and target.stat().st_mtime > newest and not self.force:
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        print(shlex.join([*command, '-o', str(target)]), flush=True)
        done = subprocess.run([*command, '-o', target], stderr=subprocess.PIPE, text=True)
        print(done.stderr, end='', file=sys.stderr, flush=True)
        if done.returncode:
            lines = [x for x in done.stderr.splitlines() if re.search('error|fatal', x)]
            first = lines[0] if lines else f'exit status {done.returncode}'
            raise BuildError(f'{command[0]} failed: {first}')

    def get_ext_filename(self, name):
        return name.replace('.', '/') + '.so'


def cpu_compiler(flags):
    # The last -std counts, and CXXFLAGS may have an older one.
    compiler, extra = os.environ.get('CXX', 'c++'), os.environ.get('CXXFLAGS', '')
    return [*shlex.split(compiler), *flags, *shlex.split(extra), '-std=c++20']


def cuda_compiler(flags):
    if not (nvcc := find_nvcc()):
        raise FileNotFoundError('nvcc was not found; CUDA_HOME says where the CUDA toolkit is')
    named = os.environ.get('TORCH_CUDA_ARCH_LIST', '').replace(';', ' ').split()
    known = subprocess.check_output([nvcc, '--list-gpu-arch'], text=True).split()
    wanted = named or ARCHITECTURES
    names = [x for x in wanted if f'compute_{x.removesuffix("+PTX").replace(".", "")}' in known]
    if named and (unknown := sorted({*named} - {*names})):
        print(f'mmattn: {nvcc} does not know {", ".join(unknown)}: left out', file=sys.stderr)
    if not names:
        raise BuildError(f'{nvcc} knows none of {", ".join(wanted)}, but {", ".join(known)}')
    if not named:
        names[-1] += '+PTX'
    codes = []
    for name in names:
        number = name.removesuffix('+PTX').replace('.', '')
        kinds = ('sm', 'compute') if name.endswith('+PTX') else ('sm',)
        codes += [f'-gencode=arch=compute_{number},code={kind}_{number}' for kind in kinds]
    return [nvcc, *codes, *flags, '-std=c++20']


def find_nvcc():
    """Path of the CUDA compiler, or None."""
    home = os.environ.get('CUDA_HOME', os.environ.get('CUDA_PATH'))
    return shutil.which('nvcc', path=str(Path(home, 'bin'))) if home else shutil.which('nvcc')


class PortableWheel(bdist_wheel):
    """Wheel tagged for every Python from 3.10, as the libraries do not use Python."""

    def get_tag(self):
        return 'cp310', 'abi3', super().get_tag()[2]


class BuildWithMim(build_py):
    def run(self):
        super().run()
        sources = [ROOT / name for name in MIM if (ROOT / name).exists()]
        if self.editable_mode:
            self.link(sources, ROOT / 'mmattn' / '.mim')
            # A copy: without it a deleted working tree would make every `import torch` fail, as
            # the entry point stays. install_lib is here what becomes the editable wheel.
            self.copy_file('mmattn_configs.py', self.get_finalized_command('install').install_lib)
        else:
            self.copy(sources, Path(self.build_lib, 'mmattn', '.mim'))

    def link(self, sources, target):
        # Links of an earlier build, or the folders of a copied tree.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        try:
            for source in sources:
                (target / source.name).symlink_to(Path('..', '..', source.name))
        except OSError as error:  # Windows, without the right to make links
            print(f'mmattn: {target} has copies, as links fail: {error}', file=sys.stderr)
            self.copy(sources, target)

    def copy(self, sources, target):
        # The folder of an earlier build may hold files that were removed since.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for source in sources:
            if source.is_dir():
                ignore = shutil.ignore_patterns(*LEFT_OUT)
                shutil.copytree(source, target / source.name, ignore=ignore)
            else:
                shutil.copy(source, target)


def library(name, pattern, flags):
    sources, headers = (sorted(map(str, CSRC.rglob(x))) for x in (pattern, '*.h'))
    name, flags = f'mmattn.ops._{name}', flags.split()
    return Extension(name, sources, depends=headers, extra_compile_args=flags)


libraries = [
    library(f'cpu_{name}', 'cpu/*.cpp', f'{CPU_FLAGS} {flags}')
    for name, flags in INSTRUCTION_SETS.items()
]
if os.environ.get('MMATTN_CUDA') == '1' or (os.environ.get('MMATTN_CUDA') != '0' and find_nvcc()):
    libraries.append(library('cuda', 'cuda/*.cu', CUDA_FLAGS))
setup(
    ext_modules=libraries,
    cmdclass=dict(bdist_wheel=PortableWheel, build_ext=BuildOperators, build_py=BuildWithMim),
)
