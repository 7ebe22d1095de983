"""What pyproject.toml cannot express: the compiled operators, and configs/ and tools/ inside the package.

The operators are two shared libraries in ``mmattn/ops`` on LibTorch's stable ABI: one for the CPU, and
one for CUDA where nvcc is found. They are no Python modules and use nothing of Python, so that one
build serves every Python >= 3.10 and torch >= 2.10. Where a compiler is missing or fails, the package
installs without them and says so at first use.

    CXX, CXXFLAGS                   the C++ compiler, and flags that come last, for compiling and linking
    MMATTN_CUDA=0                   leaves the CUDA library out, =1 makes its failure an error
    MMATTN_CUDA_ARCHS=80,90,100     compute capabilities to compile for; PTX is added for the last one

OpenMMLab's tools look into ``<package>/.mim``: for configs, which is how ``_base_ = 'mmattn::...'``
finds them, for tools, which is what ``mim train mmattn`` starts, and for the model index. A wheel gets
copies; an editable install gets links, so that it always shows what the working tree has.
"""

import os
import platform
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
# What goes into mmattn/.mim, with the paths that it has here: the tools find the configs by them.
MIM = ('configs', 'tools', 'model-index.yml')
# Not copied: setup_env.py and benchmark.py serve the working tree alone.
LEFT_OUT = ('__pycache__', 'setup_env.py', 'benchmark.py')
# The oldest torch that the libraries load in.
TARGET = '-DTORCH_TARGET_VERSION=0x020a000000000000'

X86 = platform.machine() in ('x86_64', 'AMD64')
# Each source of the CPU kernels is compiled once for each; at load time the best is taken. The first
# comes first when linking: inline functions that all have must be those that run everywhere.
INSTRUCTION_SETS = {'baseline': []}
if X86:
    INSTRUCTION_SETS['avx2'] = ['-mavx2', '-mfma', '-mf16c']
    INSTRUCTION_SETS['avx512'] = [
        *INSTRUCTION_SETS['avx2'],
        *(f'-mavx512{part}' for part in ('f', 'bw', 'dq', 'vl')),
        '-mprefer-vector-width=512',
    ]
CPU_FLAGS = [
    *('-std=c++20', '-O3', '-fPIC', '-g0', '-Wall', '-Wno-unknown-pragmas', '-fvisibility=hidden'),
    *('-fno-math-errno', '-fno-trapping-math', '-ffp-contract=fast', '-fopenmp-simd', TARGET),
    *(['-DMMATTN_X86'] if X86 else []),
]
CUDA_FLAGS = [
    *(
        '-std=c++20',
        '-O3',
        '-Xcompiler=-fPIC',
        '--expt-relaxed-constexpr',
        '--expt-extended-lambda',
    ),
    *('-DUSE_CUDA', TARGET),
]


class BuildOperators(build_ext):
    """Compiles both libraries with plain compiler calls, several at a time."""

    def run(self):
        for extension in self.extensions:
            build = {'cpu': self.build_cpu, 'cuda': self.build_cuda}[extension.name.split('_')[-1]]
            try:
                build(extension)
            except (OSError, ImportError, subprocess.CalledProcessError) as error:
                if extension.name.endswith('cuda') and os.environ.get('MMATTN_CUDA') == '1':
                    raise
                print(f'mmattn: {extension.name} was not built: {error}', file=sys.stderr)

    def build_cpu(self, extension):
        compiler = os.environ.get('CXX', 'c++')
        extra = os.environ.get('CXXFLAGS', '').split()
        jobs, objects = [], []
        for isa, flags in INSTRUCTION_SETS.items():
            for source in extension.sources:
                if source.endswith('library.cpp') and isa != 'baseline':
                    continue
                define = [] if source.endswith('library.cpp') else [f'-DMMATTN_ISA={isa}']
                objects.append(self.object_of(source, isa))
                command = [compiler, *CPU_FLAGS, *flags, *define, *include_torch(), *extra]
                jobs.append([*command, '-c', source, '-o', objects[-1]])
        self.compile(jobs)
        self.link([compiler, '-shared', *extra, *objects], extension)

    def build_cuda(self, extension):
        nvcc = find_nvcc()
        architectures = os.environ.get('MMATTN_CUDA_ARCHS', '80,90,100').split(',')
        codes = [f'-gencode=arch=compute_{a},code=sm_{a}' for a in architectures]
        newest = architectures[-1]
        codes.append(f'-gencode=arch=compute_{newest},code=compute_{newest}')
        objects = [self.object_of(source, 'cuda') for source in extension.sources]
        self.compile(
            [nvcc, *CUDA_FLAGS, *codes, '--threads=2', *include_torch(), '-c', source, '-o', target]
            for source, target in zip(extension.sources, objects, strict=True)
        )
        # Through libtorch.so a CUDA build of torch supplies the current stream; a CPU build need not.
        libraries = ['-Xlinker=--no-as-needed', '-ltorch', '-ltorch_cpu']
        self.link([nvcc, '-shared', *objects, *libraries], extension)

    def object_of(self, source, kind):
        path = Path(self.build_temp, kind, Path(source).with_suffix('.o').name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(path)

    def compile(self, commands):
        newest = max(path.stat().st_mtime for path in [ROOT / 'setup.py', *CSRC.rglob('*.h')])

        def run(command):
            *_, source, _, target = command
            made = os.stat(target).st_mtime if os.path.exists(target) else 0
            if made > max(newest, os.stat(source).st_mtime) and not self.force:
                return
            print(' '.join(command), flush=True)
            subprocess.run(command, check=True)

        jobs = int(os.environ.get('MAX_JOBS', os.cpu_count() or 1))
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run, commands))

    def link(self, command, extension):
        import torch

        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(torch.__file__).parent / 'lib'
        command = [*command, f'-L{folder}', '-ltorch', '-ltorch_cpu', '-o', str(target)]
        print(' '.join(command), flush=True)
        subprocess.run(command, check=True)

    def get_ext_filename(self, name):
        return str(Path(*name.split('.'))) + '.so'


class PortableWheel(bdist_wheel):
    """Tagged for every Python from 3.10, as the libraries use nothing of Python."""

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
        target.mkdir(exist_ok=True)
        for source in sources:
            link = target / source.name
            link.unlink(missing_ok=True)
            link.symlink_to(Path('..', '..', source.name))

    def copy(self, sources, target):
        # An earlier build's may hold what is no longer there.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for source in sources:
            if source.is_dir():
                ignore = shutil.ignore_patterns(*LEFT_OUT)
                shutil.copytree(source, target / source.name, ignore=ignore)
            else:
                shutil.copy(source, target)


def include_torch():
    import torch  # at build time only

    return ['-isystem', str(Path(torch.__file__).parent / 'include')]


def find_nvcc():
    """The CUDA compiler's path, or None."""
    home = os.environ.get('CUDA_HOME', os.environ.get('CUDA_PATH'))
    if home:
        return shutil.which('nvcc', path=str(Path(home, 'bin')))
    return shutil.which('nvcc')


def libraries():
    def library(kind, pattern):
        sources = sorted(map(str, CSRC.glob(pattern)))
        headers = sorted(map(str, CSRC.rglob('*.h')))
        return Extension(f'mmattn.ops._{kind}', sources, depends=headers)

    found = [library('cpu', 'cpu/*.cpp')]
    if os.environ.get('MMATTN_CUDA') != '0' and find_nvcc():
        found.append(library('cuda', 'cuda/*.cu'))
    return found


setup(
    ext_modules=libraries(),
    cmdclass={
        'bdist_wheel': PortableWheel,
        'build_ext': BuildOperators,
        'build_py': BuildWithMim,
    },
)
