"""Environments in which something is wrong, one for each problem that the doctor knows.

docs/troubleshooting.md and tests/test_doctor.py are made of them.
"""

import json
from dataclasses import replace

from mmattn.doctor import Facts, Import

HEALTHY = Facts(
    python='3.11.7',
    imports={
        'torch': Import(json.dumps({'version': '2.13.0+cpu', 'cuda': None, 'gpus': []})),
        'numpy': Import('2.2.6'),
        'cv2': Import('4.12.0'),
        'torchvision': Import('0.28.0'),
        'mmengine': Import('0.10.12'),
        'mmcv': Import('2.3.6'),
        'mmcv.ops': Import('not available'),
        'mmdet': Import('3.5.1'),
        'mmseg': Import('1.4.2'),
        'mmpretrain': Import('1.3.6'),
        'mmattn': Import('/somewhere/mmattn/__init__.py'),
        'mmattn.ops': Import(json.dumps({'cpu': '', 'cuda': 'this torch is a CPU build'})),
    },
    distributions={
        'onedl-mmengine': '0.10.12',
        'onedl-mmcv': '2.3.6',
        'onedl-mmdetection': '3.5.1',
        'onedl-mmsegmentation': '1.4.2',
        'onedl-mmpretrain': '1.3.6',
        'mmattn': '0.1.0',
    },
    editable=True,
    compiler='/usr/bin/c++',
)
UPSTREAM = {
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'mmpretrain': '1.2.0',
}
GPU_TORCH = Import(json.dumps({'version': '2.13.0', 'cuda': '13.0', 'gpus': ['NVIDIA H200']}))
NO_OPERATORS = Import(error="ModuleNotFoundError: No module named 'mmcv._ext'")


def facts(imports=None, distributions=None, **changes):
    """A healthy environment but for what is given; a distribution of None is not installed."""
    versions = HEALTHY.distributions | (distributions or {})
    return replace(
        HEALTHY,
        imports=HEALTHY.imports | (imports or {}),
        distributions={name: version for name, version in versions.items() if version},
        **changes,
    )


def upstream(imports=None, **changes):
    """The same with OpenMMLab's own releases."""
    return facts(imports, dict.fromkeys(HEALTHY.distributions) | UPSTREAM | changes)


def missing(module, distribution=None):
    return facts({module: Import()}, {distribution: None} if distribution else None)


def broken(module, error, **changes):
    return facts({module: Import(error=error)}, **changes)


def torch_build(version='2.13.0', cuda='13.0', gpus=()):
    return {'torch': Import(json.dumps({'version': version, 'cuda': cuda, 'gpus': list(gpus)}))}


def compiled(cpu='', cuda=''):
    return {'mmattn.ops': Import(json.dumps({'cpu': cpu, 'cuda': cuda}))}


NO_CPU_LIBRARY = compiled(cpu='_cpu.so was not built with the package')
NO_CUDA_LIBRARY = compiled(cuda='_cuda.so was not built with the package')
NONE_AS_BASE = 'TypeError: NoneType takes no arguments'

# (What is wrong, the check that finds it, an environment that has it), in the order in which the doctor looks.
CASES = (
    ('Python is too old', 'Python', facts(python='3.9.18')),
    ('torch is not installed', 'torch', missing('torch')),
    (
        'torch does not import',
        'torch',
        broken('torch', 'OSError: libcudart.so.13: cannot open shared object file'),
    ),
    ('torch is too old', 'torch', facts(torch_build('2.4.1', cuda=None))),
    ('There is a GPU, and torch does not use it', 'GPU', facts(driver='580.65')),
    ('torch sees no GPU', 'GPU', facts(torch_build(), driver='470.1')),
    ('The CUDA compiler is of another CUDA', 'nvcc', facts({'torch': GPU_TORCH}, nvcc='12.4')),
    (
        'There is no C++ compiler',
        'C++ compiler',
        facts({'mmcv.ops': NO_OPERATORS}, compiler=''),
    ),
    ('numpy is not installed', 'numpy', missing('numpy')),
    (
        'numpy does not import',
        'numpy',
        broken('numpy', 'ImportError: libopenblas.so: cannot open shared object file'),
    ),
    ('numpy is too old', 'numpy', facts({'numpy': Import('1.24.4')})),
    ('OpenCV is not installed', 'OpenCV', missing('cv2')),
    (
        'OpenCV wants a desktop',
        'OpenCV',
        broken('cv2', 'ImportError: libGL.so.1: cannot open shared object file'),
    ),
    ('torchvision is not installed', 'torchvision', missing('torchvision')),
    (
        'torchvision was built for another torch',
        'torchvision',
        broken(
            'torchvision',
            'RuntimeError: operator torchvision::nms does not exist',
        ),
    ),
    (
        'torchvision was built for another torch, beside a GPU',
        'torchvision',
        facts(
            {
                'torch': GPU_TORCH,
                'torchvision': Import(
                    error='RuntimeError: operator torchvision::nms does not exist'
                ),
            }
        ),
    ),
    (
        'torchvision does not import',
        'torchvision',
        broken('torchvision', 'ImportError: libcudart.so.12: cannot open shared object file'),
    ),
    (
        'mmdet does not import beside transformers 5',
        'transformers',
        facts({'mmdet': Import(error=NONE_AS_BASE)}, {'transformers': '5.23.0'}),
    ),
    (
        'transformers is too new for some models',
        'transformers',
        facts(distributions={'transformers': '5.23.0'}),
    ),
    (
        'mmengine wants pkg_resources',
        'mmengine',
        upstream(
            {'mmengine': Import(error="ModuleNotFoundError: No module named 'pkg_resources'")}
        ),
    ),
    ('mmdet is not installed', 'mmdet', missing('mmdet', 'onedl-mmdetection')),
    ('mmdet is too old', 'mmdet', facts(distributions={'onedl-mmdetection': '3.5.0'})),
    (
        'Both distributions of mmdet are installed',
        'mmdet',
        facts(distributions={'mmdet': '3.3.0'}),
    ),
    (
        'mmdet 3.3.0 refuses mmcv 2.2.0',
        'mmdet',
        upstream(
            {'mmdet': Import(error='AssertionError: MMCV==2.2.0 is used but incompatible.')},
            mmcv='2.2.0',
        ),
    ),
    (
        "OpenMMLab's mmdet beside the fork of mmcv",
        'mmdet',
        upstream(
            {'mmdet': Import(error='AssertionError: MMCV==2.3.6 is used but incompatible.')},
            **{'mmcv': None, 'onedl-mmcv': '2.3.6'},
        ),
    ),
    (
        'mmseg needs a package that it does not name',
        'mmseg',
        upstream({'mmseg': Import(error="ModuleNotFoundError: No module named 'ftfy'")}),
    ),
    ('mmcv is not installed', 'mmcv operators', missing('mmcv.ops')),
    (
        'mmcv was installed without its operators',
        'mmcv operators',
        facts({'mmcv.ops': NO_OPERATORS}),
    ),
    (
        'mmcv was compiled against another torch',
        'mmcv operators',
        broken('mmcv.ops', 'ImportError: .../mmcv/_ext.so: undefined symbol: _ZN3c10E'),
    ),
    (
        "mmcv's operators do not import",
        'mmcv operators',
        broken('mmcv.ops', 'the process was ended by signal 11'),
    ),
    (
        'mmcv was compiled for the CPU alone',
        'mmcv operators',
        facts({'torch': GPU_TORCH}, driver='580.65'),
    ),
    ('mmattn does not import', 'mmattn', broken('mmattn', 'SyntaxError: invalid syntax')),
    ("mmattn's operators were not compiled", 'mmattn operators', facts(NO_CPU_LIBRARY)),
    (
        "mmattn's operators were compiled for the CPU alone",
        'mmattn operators',
        facts({'torch': GPU_TORCH} | NO_CUDA_LIBRARY),
    ),
)
