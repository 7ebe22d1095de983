"""CUDA kernels, compiled against a stand-in for CUDA that runs them on the CPU.

``operators()`` compiles all of ``csrc/cuda`` with the C++ compiler (once, under build/) and returns
``torch.ops.mmattn_on_host``, whose operators have the names and schemas of ``torch.ops.mmattn``.
"""

import fcntl
import functools
import hashlib
import os
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

import mmattn  # noqa: F401 -- defines the schemas that are copied

ROOT = Path(__file__).parents[2]
CSRC = ROOT / 'mmattn/ops/csrc'
HERE = Path(__file__).parent


@functools.cache
def operators():
    sources = sorted((CSRC / 'cuda').glob('*.cu'))
    read = [*sources, *sorted(CSRC.rglob('*.h')), HERE / 'cuda_on_host.h']
    digest = hashlib.sha256(b''.join(path.read_bytes() for path in read)).hexdigest()[:16]
    folder = ROOT / 'build' / 'on_host'
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f'{digest}-{torch.__version__}.so'
    with (folder / 'lock').open('w') as lock:  # workers of pytest-xdist compile it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            compile_library(sources, library)
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith('mmattn::'):
            operator = name.removeprefix('mmattn::')
            schema = str(getattr(torch.ops.mmattn, operator).default._schema)
            torch.library.define(f'mmattn_on_host::{operator}', schema[schema.index('(') :])
    torch.ops.load_library(library)
    return torch.ops.mmattn_on_host


def compile_library(sources, library):
    include = Path(torch.__file__).parent / 'include'
    command = [
        *(os.environ.get('CXX', 'c++'), '-std=c++20', '-O1', '-g', '-fPIC', '-w'),
        *('-DMMATTN_ON_HOST', '-DTORCH_TARGET_VERSION=0x020a000000000000'),
        *('-isystem', str(include), '-I', str(HERE)),
    ]
    link = ['-L', str(include.parent / 'lib'), '-ltorch', '-ltorch_cpu']
    with TemporaryDirectory(dir=library.parent) as folder:
        objects = [Path(folder, f'{source.stem}.o') for source in sources]
        running = [
            subprocess.Popen([*command, '-x', 'c++', '-c', source, '-o', target])
            for source, target in zip(sources, objects, strict=True)
        ]
        statuses = [process.wait() for process in running]
        if any(statuses):
            raise RuntimeError('the CUDA kernels do not compile against cuda_on_host.h')
        partial = Path(folder, library.name)
        subprocess.run([command[0], '-shared', *objects, *link, '-o', partial], check=True)
        partial.rename(library)  # atomic, should this be killed


def upstream(output, seed=0):
    """Upstream gradient that comparison.results gives to an operator's first output."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
