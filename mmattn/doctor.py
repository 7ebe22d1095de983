"""``python -m mmattn.doctor [--json]``: look at the environment; for each problem, the command that mends it.

Exit status 1 if the main job (import mmattn, train an mmdet detector with it) cannot run, otherwise 0.

``--json`` prints one object::

    {
        "ok": true,                  false where the exit status is 1
        "checks": [
            {
                "name": "torch",     what was looked at
                "state": "ok",       or "warn": something of lesser weight is wrong; or "fail"
                "found": "2.13.0",   what is there, and what is wrong with it
                "mend": ""           a shell command or an instruction; empty where nothing is wrong
            }, ...
        ]
    }

Probing and judging are apart: `probe` asks the machine and returns `Facts`, the ``check_*`` functions
are pure. Only the standard library is imported here, and every other package in a process of its own,
because this has to run where they are missing, broken or crash.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ._dependencies import IMPORTED, OPENMMLAB, REMEDY, OpenMMLabPackage, at_least, release

PIP = 'python -m pip'
MINIMUM = {dependency.module: dependency.minimum for dependency in IMPORTED}
MMCV = next(package for package in OPENMMLAB if package.module == 'mmcv')

# OpenMMLab sets a class of transformers that it does not find to None, and then derives from it.
NONE_AS_BASE = 'NoneType takes no arguments'

# What mmengine 0.10.7 and the setup.py of mmcv 2.1.0 import; later setuptools no longer have it.
HAS_PKG_RESOURCES = '"setuptools<81"'

# What each process imports, and prints: one line.
PROBES = {
    'torch': (
        'import json, torch; print(json.dumps(dict(version=torch.__version__, cuda=torch.version.cuda,'
        ' gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())])))'
    ),
    'numpy': 'import numpy; print(numpy.__version__)',
    'cv2': 'import cv2; print(cv2.__version__)',
    'torchvision': 'import torchvision; print(torchvision.__version__)',
    # is_installed, which reads `_base_ = 'mmdet::...'`, is where mmengine 0.10.7 imports pkg_resources.
    'mmengine': (
        'import mmengine; mmengine.utils.is_installed("mmengine"); print(mmengine.__version__)'
    ),
    'mmcv': 'import mmcv; print(mmcv.__version__)',
    'mmcv.ops': 'from mmcv.ops import get_compiling_cuda_version as cuda; print(cuda())',
    # The task packages after mmattn, as in a training: it makes a torchvision importable that was built
    # for CUDA and is beside a CPU torch.
    'mmdet': 'import mmattn, mmdet.apis, mmdet.models; print(mmdet.__version__)',
    'mmseg': 'import mmattn, mmseg.apis; print(mmseg.__version__)',
    'mmpretrain': 'import mmattn, mmpretrain.apis, mmpretrain.models; print(mmpretrain.__version__)',
    'mmattn': 'import mmattn; print(mmattn.__file__)',
    # What is wrong with the compiled operators of each device; empty where nothing is.
    'mmattn.ops': (
        'import json; from mmattn.ops import backend_report as report;'
        ' print(json.dumps({device: b.problem for device, b in report().backends.items()}))'
    ),
}


@dataclass(frozen=True)
class Import:
    """What became of an import: what it printed, or the last line of its error; absent has neither."""

    output: str = ''
    error: str = ''

    @property
    def works(self) -> bool:
        return bool(self.output)

    @property
    def absent(self) -> bool:
        return not self.output and not self.error


ABSENT = Import()


@dataclass(frozen=True)
class Facts:
    """All that the checks judge."""

    python: str = ''
    imports: dict[str, Import] = field(default_factory=dict)  # the keys of PROBES
    distributions: dict[str, str] = field(default_factory=dict)  # name: version, of those installed
    editable: bool = False  # whether mmattn is an editable install
    driver: str = ''  # version of the NVIDIA driver
    nvcc: str = ''  # release of the CUDA compiler
    compiler: str = ''  # path of the C++ compiler

    def imported(self, module: str) -> Import:
        return self.imports.get(module, ABSENT)

    @property
    def torch(self) -> dict:
        """`version`, `cuda` (of the build, or None) and `gpus`; empty where torch does not import."""
        return json.loads(self.imported('torch').output or '{}')

    @property
    def torch_cuda(self) -> str:
        return self.torch.get('cuda') or ''

    @property
    def upstream(self) -> bool:
        """Whether OpenMMLab's own releases are used here rather than the forks."""
        names = {p.upstream for p in OPENMMLAB} & set(self.distributions)
        return len(names) > len({p.onedl for p in OPENMMLAB} & set(self.distributions))


@dataclass(frozen=True)
class Check:
    name: str
    state: str
    found: str
    mend: str = ''


def check_python(facts: Facts) -> Check:
    if not at_least(facts.python, '3.10'):
        return Check('Python', 'fail', facts.python, 'make an environment with Python >= 3.10')
    return Check('Python', 'ok', facts.python)


def check_torch(facts: Facts) -> Check:
    install = f'{PIP} install --upgrade "torch>={MINIMUM["torch"]}"'
    torch = facts.imported('torch')
    if torch.absent:
        return Check('torch', 'fail', 'not installed', install)
    if torch.error:
        return Check(
            'torch', 'fail', f'does not import: {torch.error}', f'{install} --force-reinstall'
        )
    version = facts.torch['version']
    if not at_least(version, MINIMUM['torch']):
        return Check('torch', 'fail', f'{version}, needs >= {MINIMUM["torch"]}', install)
    build = f'built for CUDA {facts.torch_cuda}' if facts.torch_cuda else 'CPU build'
    return Check('torch', 'ok', f'{version}, {build}')


def check_gpu(facts: Facts) -> Check:
    if not facts.driver:
        return Check('GPU', 'ok', 'no NVIDIA driver: everything runs on the CPU')
    driver = f'NVIDIA driver {facts.driver}'
    if not facts.torch:
        return Check('GPU', 'ok', f'{driver}; torch was not asked')
    if not facts.torch_cuda:
        return Check(
            'GPU',
            'warn',
            f'{driver}, but torch is a CPU build: the GPU is not used',
            f'{PIP} uninstall -y torch && {PIP} install "torch>={MINIMUM["torch"]}" '
            '(from an index of CUDA builds), then compile mmcv again',
        )
    if not facts.torch['gpus']:
        return Check(
            'GPU',
            'warn',
            f'{driver}, but torch for CUDA {facts.torch_cuda} sees no GPU',
            'unset CUDA_VISIBLE_DEVICES if it is set; otherwise update the driver, or install a torch '
            'that was built for an older CUDA',
        )
    return Check('GPU', 'ok', f'{", ".join(facts.torch["gpus"])}; {driver}')


def check_nvcc(facts: Facts) -> Check:
    if not facts.nvcc:
        return Check('nvcc', 'ok', 'none: only needed to compile CUDA operators')
    wanted = release(facts.torch_cuda)[:1]
    if wanted and release(facts.nvcc)[:1] != wanted:
        return Check(
            'nvcc',
            'warn',
            f'{facts.nvcc}, but torch was built for CUDA {facts.torch_cuda}: operators do not compile',
            f'install the CUDA toolkit {facts.torch_cuda} and set CUDA_HOME to its folder',
        )
    return Check('nvcc', 'ok', facts.nvcc)


def check_compiler(facts: Facts) -> Check:
    if facts.compiler:
        return Check('C++ compiler', 'ok', facts.compiler)
    if facts.imported('mmcv.ops').works:
        return Check('C++ compiler', 'ok', 'none: mmcv is compiled already')
    return Check(
        'C++ compiler',
        'warn',
        'none, and mmcv has to be compiled',
        'apt-get install g++ (Debian, Ubuntu) or dnf install gcc-c++ (Fedora)',
    )


def check_numpy(facts: Facts) -> Check:
    install = f'{PIP} install --upgrade "numpy>={MINIMUM["numpy"]}"'
    numpy = facts.imported('numpy')
    if numpy.absent:
        return Check('numpy', 'fail', 'not installed', install)
    if numpy.error:
        return Check(
            'numpy', 'fail', f'does not import: {numpy.error}', f'{install} --force-reinstall'
        )
    if not at_least(numpy.output, MINIMUM['numpy']):
        return Check('numpy', 'fail', f'{numpy.output}, needs >= {MINIMUM["numpy"]}', install)
    return Check('numpy', 'ok', numpy.output)


def check_opencv(facts: Facts) -> Check:
    """opencv-python needs a desktop's libraries (libGL.so.1), which servers and containers lack."""
    cv2 = facts.imported('cv2')
    if cv2.works:
        return Check('OpenCV', 'ok', cv2.output)
    if cv2.absent:
        return Check('OpenCV', 'fail', 'not installed', f'{PIP} install opencv-python-headless')
    return Check(
        'OpenCV',
        'fail',
        f'does not import: {cv2.error}',
        f'{PIP} install --force-reinstall --no-deps opencv-python-headless',
    )


def requirement(package: OpenMMLabPackage, upstream: bool) -> str:
    """What pip is asked for, in quotes."""
    if upstream:
        return f'"{package.upstream}{package.upstream_requirement}"'
    return f'"{package.onedl}{package.onedl_requirement}"'


def install_command(package: OpenMMLabPackage, upstream: bool) -> str:
    """The command that installs a package in one of its distributions."""
    if package is MMCV:
        return compile_mmcv(upstream)
    return f'{PIP} install {requirement(package, upstream)}'


def compile_mmcv(upstream: bool, anew: bool = False) -> str:
    """The command that compiles mmcv against the torch that is installed.

    `anew`: also where there is an mmcv already, or a wheel in pip's cache, which does not know which
    torch it was compiled against.
    """
    setuptools = HAS_PKG_RESOURCES if upstream else 'setuptools'
    name = MMCV.upstream if upstream else MMCV.onedl
    flags = f'--force-reinstall --no-deps --no-cache-dir --no-binary {name} ' if anew else ''
    return (
        f'{PIP} install {setuptools} wheel ninja && MMCV_WITH_OPS=1 CFLAGS="-g0 -O1" '
        f'{PIP} install --no-build-isolation {flags}{requirement(MMCV, upstream)}'
    )


def check_openmmlab(package: OpenMMLabPackage, facts: Facts) -> Check:
    """One OpenMMLab package: exactly one of its distributions, new enough, and it imports."""
    name = package.module
    # Without mmseg and mmpretrain the main job runs; only their configs do not.
    bad = 'warn' if name in ('mmseg', 'mmpretrain') else 'fail'
    here = [d for d in (package.onedl, package.upstream) if d in facts.distributions]
    imported = facts.imported(name)
    install = install_command(package, facts.upstream)

    if len(here) == 2:
        return Check(
            name,
            bad,
            f'{package.onedl} and {package.upstream} are both installed and overwrite each other',
            f'{PIP} uninstall -y {package.onedl} {package.upstream} && {install}',
        )
    if imported.absent:
        return Check(name, bad, 'not installed', install)
    found = f'{here[0]} {facts.distributions[here[0]]}' if here else imported.output
    if here:
        requirement = (
            package.onedl_requirement if here[0] == package.onedl else package.upstream_requirement
        )
        if not at_least(facts.distributions[here[0]], requirement.lstrip('>=')):
            return Check(name, bad, f'{found}, needs {requirement}', install)
    if imported.error:
        error = imported.error.removesuffix(REMEDY)
        return Check(
            name, bad, f'{found} does not import: {error}'.strip(), mend_import(package, facts)
        )
    return Check(name, 'ok', found)


def mend_import(package: OpenMMLabPackage, facts: Facts) -> str:
    """The remedy for a package that is installed and does not import, by the known causes."""
    for cause in (check_torch, check_numpy, check_opencv, check_torchvision):
        check = cause(facts)
        if check.state == 'fail':
            return check.mend
    if (
        NONE_AS_BASE in facts.imported(package.module).error
        and 'transformers' in facts.distributions
    ):
        return check_transformers(facts).mend
    if package is MMCV:
        return compile_mmcv(facts.upstream, anew=True)
    if refuses_mmcv(package, facts):
        fork = f'{PIP} uninstall -y {MMCV.onedl} && ' if MMCV.onedl in facts.distributions else ''
        return fork + compile_mmcv(upstream=True)
    if package.module != 'mmengine' and not facts.imported('mmcv.ops').works:
        return check_operators(facts).mend
    if facts.imported(package.module).error == facts.imported('mmattn').error:
        return check_mmattn(facts).mend
    # mmsegmentation 1.2.2, for one, imports ftfy and regex and does not require them.
    missing = re.search(r"No module named '(\w+)'", facts.imported(package.module).error)
    if missing:
        name = missing.group(1)
        if name == 'torchvision':
            return check_torchvision(facts).mend
        return f'{PIP} install {HAS_PKG_RESOURCES if name == "pkg_resources" else name}'
    return f'{PIP} install --force-reinstall {requirement(package, facts.upstream)}'


def refuses_mmcv(package: OpenMMLabPackage, facts: Facts) -> bool:
    """OpenMMLab's mmdet 3.3.0 and mmseg 1.2.2 assert mmcv < 2.2.0, though 2.2.0 is its last release."""
    if package.module not in ('mmdet', 'mmseg') or package.upstream not in facts.distributions:
        return False
    versions = [facts.distributions.get(name) for name in (MMCV.onedl, MMCV.upstream)]
    return any(version and at_least(version, '2.2') for version in versions)


def check_operators(facts: Facts) -> Check:
    """mmcv's compiled operators, without which mmdet cannot be imported."""
    name = 'mmcv operators'
    operators = facts.imported('mmcv.ops')
    rebuild = compile_mmcv(facts.upstream, anew=True)
    if operators.absent:
        return Check(name, 'fail', 'mmcv is not installed', compile_mmcv(facts.upstream))
    if "No module named 'mmcv._ext'" in operators.error:
        return Check(name, 'fail', f'mmcv was installed without them: {operators.error}', rebuild)
    if 'mmcv/_ext' in operators.error:
        return Check(name, 'fail', f'compiled against another torch: {operators.error}', rebuild)
    if operators.error:
        return Check(name, 'fail', f'do not import: {operators.error}', mend_import(MMCV, facts))
    if operators.output != 'not available':
        return Check(name, 'ok', f'compiled for the CPU and CUDA {operators.output}')
    if facts.torch.get('gpus'):
        toolkit = '' if facts.nvcc else f'install the CUDA toolkit {facts.torch_cuda}, then '
        return Check(name, 'fail', 'compiled for the CPU alone, beside a GPU', toolkit + rebuild)
    return Check(name, 'ok', 'compiled for the CPU')


def check_torchvision(facts: Facts) -> Check:
    """Only mmpretrain needs torchvision, but one that is broken stops every training."""
    name = 'torchvision'
    torchvision = facts.imported(name)
    if torchvision.works:
        return Check(name, 'ok', torchvision.output)
    install = f'{PIP} install --no-deps "torchvision{matching_torchvision(facts)}"'
    if torchvision.absent:
        return Check(
            name, 'warn', 'not installed: mmpretrain needs it, mmdet and mmseg do not', install
        )
    if 'operator torchvision::nms does not exist' in torchvision.error:
        found = 'built for another torch: `import mmattn` makes it importable, for its transforms'
        if facts.torch_cuda:
            return Check(name, 'warn', found, f'{install} --force-reinstall')
        # Beside a CPU torch this is what the package registry gives; nothing better is on offer.
        return Check(name, 'ok', found)
    return Check(
        name,
        'fail',
        f'does not import, and so stops every training: {torchvision.error}',
        f'{PIP} uninstall -y torchvision',
    )


def matching_torchvision(facts: Facts) -> str:
    """torchvision 0.15 came with torch 2.0, and the two have been counted up together since."""
    numbers = release(facts.torch.get('version', ''))
    return f'==0.{numbers[1] + 15}.*' if numbers[:1] == (2,) else ''


def check_transformers(facts: Facts) -> Check:
    """onedl-mmdetection 3.5.1 does not import beside transformers 5: `NoneType takes no arguments`."""
    version = facts.distributions.get('transformers')
    if not version:
        return Check('transformers', 'ok', 'not installed, and not needed')
    downgrade = f'{PIP} install "transformers<5"'
    if not at_least(version, '5'):
        return Check('transformers', 'ok', version)
    if NONE_AS_BASE in facts.imported('mmdet').error:
        return Check(
            'transformers', 'fail', f'{version}: mmdet does not import beside it', downgrade
        )
    found = f'{version}: mmpretrain and multimodal models need 4'
    return Check('transformers', 'warn', found, downgrade)


def check_mmattn(facts: Facts) -> Check:
    mmattn = facts.imported('mmattn')
    if mmattn.works:
        version = facts.distributions.get('mmattn', 'not installed')
        kind = ', editable install' if facts.editable else ''
        return Check('mmattn', 'ok', f'{version}{kind}, in {mmattn.output}')
    return Check(
        'mmattn',
        'fail',
        f'does not import: {mmattn.error.removesuffix(REMEDY)}',
        'mend what is wrong above; if nothing is, install mmattn again, or report this error',
    )


def check_compiled(facts: Facts) -> Check:
    """mmattn's own compiled operators; without them it works, slowly."""
    name = 'mmattn operators'
    operators = facts.imported('mmattn.ops')
    if not operators.works:
        return Check(name, 'ok', 'were not asked: mmattn does not import')
    problems = json.loads(operators.output)
    rebuild = f'{PIP} install --force-reinstall --no-deps --no-build-isolation '
    rebuild += '-e .  (in the working tree)' if facts.editable else 'mmattn'
    if problems['cpu']:
        compiler = '' if facts.compiler else 'install a C++ compiler (g++), then '
        found = f'the literal definitions serve, which are slower: {problems["cpu"]}'
        return Check(name, 'warn', found, compiler + rebuild)
    if facts.torch.get('gpus') and problems['cuda']:
        toolkit = '' if facts.nvcc else f'install the CUDA toolkit {facts.torch_cuda}, then '
        found = f'compiled for the CPU alone, beside a GPU: {problems["cuda"]}'
        return Check(name, 'warn', found, toolkit + rebuild)
    cuda = '' if problems['cuda'] else ' and CUDA'
    return Check(name, 'ok', f'compiled for the CPU{cuda}')


def examine(facts: Facts) -> list[Check]:
    """Every check, in the order in which problems are to be mended."""
    return [
        check_python(facts),
        check_torch(facts),
        check_gpu(facts),
        check_nvcc(facts),
        check_compiler(facts),
        check_numpy(facts),
        check_opencv(facts),
        check_torchvision(facts),
        check_transformers(facts),
        *(check_openmmlab(package, facts) for package in OPENMMLAB),
        check_operators(facts),
        check_mmattn(facts),
        check_compiled(facts),
    ]


def try_import(module: str) -> Import:
    """Run a probe in a process of its own."""
    if importlib.util.find_spec(module.partition('.')[0]) is None:
        return ABSENT
    done = subprocess.run(
        [sys.executable, '-c', PROBES[module]], capture_output=True, text=True, errors='replace'
    )
    if done.returncode == 0:
        return Import(output=done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return Import(error=f'the process was ended by signal {-done.returncode}')
    return Import(error=done.stderr.strip().splitlines()[-1])


def nvidia_driver() -> str:
    """Version of the NVIDIA driver, or nothing."""
    module = Path('/proc/driver/nvidia/version')
    if module.exists():
        version = re.search(r'Module.*?(\d+\.[\d.]+)', module.read_text())
        return version.group(1) if version else 'of unknown version'
    if shutil.which('nvidia-smi') is None:
        return ''
    query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout else ''


def cuda_compiler() -> str:
    """Release of nvcc, or nothing. CUDA_HOME goes first, as it does when torch compiles."""
    home = os.environ.get('CUDA_HOME', '/usr/local/cuda')
    nvcc = shutil.which('nvcc', path=f'{home}/bin') or shutil.which('nvcc')
    if nvcc is None:
        return ''
    done = subprocess.run([nvcc, '--version'], capture_output=True, text=True)
    found = re.search(r'release (\d+\.\d+)', done.stdout)
    return found.group(1) if found else ''


def cpp_compiler() -> str:
    """Path of the C++ compiler that setuptools and torch would take, or nothing."""
    for name in (os.environ.get('CXX', ''), 'c++', 'g++', 'clang++'):
        path = shutil.which(name)
        if path:
            return path
    return ''


def is_editable() -> bool:
    """Whether mmattn is installed from a working tree (PEP 610)."""
    # Run in the working tree there are two: the installed one, and setuptools' .egg-info, which has no origin.
    for distribution in importlib.metadata.distributions(name='mmattn'):
        origin = distribution.read_text('direct_url.json')
        if origin:
            return json.loads(origin).get('dir_info', {}).get('editable', False)
    return False


def installed(names: Iterable[str]) -> dict[str, str]:
    """Version of each distribution that is installed."""
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def probe() -> Facts:
    """Ask the machine. The imports take some seconds, hence several at once."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        imports = dict(zip(PROBES, pool.map(try_import, PROBES), strict=True))
    names = [name for package in OPENMMLAB for name in (package.onedl, package.upstream)]
    return Facts(
        python=sys.version.split()[0],
        imports=imports,
        distributions=installed([*names, 'transformers', 'mmattn']),
        editable=is_editable(),
        driver=nvidia_driver(),
        nvcc=cuda_compiler(),
        compiler=cpp_compiler(),
    )


def print_checks(checks: list[Check]) -> None:
    """As a table where rich is installed, otherwise as plain lines."""
    if importlib.util.find_spec('rich') is None:
        for check in checks:
            print(f'{check.state:5} {check.name:15} {check.found}')
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {'ok': 'green', 'warn': 'yellow', 'fail': 'bold red'}
    table = Table(title='mmattn.doctor')
    for heading in ('', 'what', 'found'):
        table.add_column(heading, overflow='fold')
    for check in checks:
        table.add_row(Text(check.state, colours[check.state]), Text(check.name), Text(check.found))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m mmattn.doctor',
        description='Look at the environment and print, for each problem, the command that mends it.',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    options = parser.parse_args(arguments)

    checks = examine(probe())
    ok = all(check.state != 'fail' for check in checks)
    if options.json:
        print(json.dumps({'ok': ok, 'checks': [asdict(check) for check in checks]}, indent=2))
        return 0 if ok else 1
    print_checks(checks)
    # Commands stand below the table, unwrapped, so that they can be copied.
    mends = dict.fromkeys(check.mend for check in checks if check.mend)
    if mends:
        print('\nTo mend this, in this order:')
        for mend in mends:
            print(f'  {mend}')
    print('\nThe main job can run.' if ok else '\nThe main job cannot run.')
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
