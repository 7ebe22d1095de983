"""``python -m mmattn.doctor [--json]``: look at the environment; for each problem, a remedy.

Exit status 1 if the main job (import mmattn, train an mmdet detector with it) cannot run, else 0.
``--json`` prints ``{"ok": bool, "checks": [{"name", "state", "found", "mend"}, ...]}``: the part;
"ok", "warn" or "fail"; what is there; and a command or an instruction, empty if none is needed.
``--log FILE`` prints the remedy for a failed step of ``make setup``.

Every known problem is a row of `TABLE`, and docs/troubleshooting.md is that table printed. Only the
standard library is imported here, and every other package in a process that may crash.
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
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from ._dependencies import OPENMMLAB, installed
from ._problems import TABLE, Facts, Found, describe, values

# Every part that can be imported, and code that prints its version. The part is absent if the first
# module that the code imports is.
IMPORTS = {
    'torch': (
        'import torch; gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()));'
        ' cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build";'
        ' mps = ["mps"] if torch.backends.mps.is_available() else [];'
        ' print(torch.__version__, cuda, *gpus, *mps, sep=", ")'
    ),
    'numpy': 'import numpy; print(numpy.__version__)',
    'OpenCV': 'import cv2; print(cv2.__version__)',
    'torchvision': 'import torchvision; print(torchvision.__version__)',
    'triton': 'import triton; print(triton.__version__)',
    # is_installed, which reads `_base_ = 'mmdet::...'`, is where 0.10.7 imports pkg_resources.
    'mmengine': 'import mmengine as m; m.utils.is_installed("mmengine"); print(m.__version__)',
    'mmcv': 'import mmcv; print(mmcv.__version__)',
    'mmcv operators': (
        'from mmcv.ops import get_compiling_cuda_version as cuda; print("compiled, CUDA:", cuda())'
    ),
    'mmdet': 'import mmdet.apis, mmdet.models; print(mmdet.__version__)',
    'mmseg': 'import mmseg.apis; print(mmseg.__version__)',
    'mmpretrain': 'import mmpretrain.apis, mmpretrain.models; print(mmpretrain.__version__)',
    'mmattn': (
        'import mmattn, pathlib; folder = mmattn.__path__[0]; mim = pathlib.Path(folder, ".mim");'
        ' print(mmattn.__version__, "in", folder,'
        ' *([] if (mim / "configs").is_symlink() else ["copies in", mim]))'
    ),
    'mmattn operators': (
        'from mmattn.ops import backend_report as report; print('
        '*(f"{d}: {b.problem or \'compiled\'}" for d, b in report().backends.items()), sep="; ")'
    ),
}
# All parts, in the order of repair, and the text for one that may be absent.
PARTS = {
    'Python': '',
    'torch': '',
    'GPU': 'no NVIDIA driver: everything runs on the CPU',
    'nvcc': 'none: only needed to compile CUDA operators',
    'C++ compiler': 'none: mmcv is compiled already',
    'Python headers': 'none: only needed on a GPU',
    'transformers': 'not installed, and not needed',
    **dict.fromkeys(IMPORTS, ''),
    'triton': 'not installed: only needed on a GPU',
    'mmattn operators': 'were not asked: mmattn does not import',
}
OPTIONAL = ('mmseg', 'mmpretrain')  # needed by their configs only


@dataclass(frozen=True)
class Check:
    """A line of the report, as ``--json`` prints it."""

    name: str
    state: str
    found: str
    mend: str = ''


def look(part: str, facts: Facts) -> Check:
    """Judge one part by the first row of the table that fits."""
    for problem in TABLE:
        if part in problem.parts.split(', ') and problem.test(facts, part):
            state = 'warn' if part in OPTIONAL else problem.state
            known = values(part, facts)
            return Check(part, state, problem.symptom.format(**known), problem.mend.format(**known))
    return Check(part, 'ok', describe(part, facts) or PARTS.get(part, ''))


def examine(facts: Facts) -> list[Check]:
    """Judge every part. Failed imports get the remedy of the first failure."""
    checks: list[Check] = []
    for part in PARTS:
        check = look(part, facts)
        earlier = next((other for other in checks if other.state == 'fail'), None)
        if earlier and facts.error(part):
            check = replace(check, mend=earlier.mend)
        checks.append(check)
    return checks


def try_import(part: str) -> Found:
    """Run the code of a part in another process."""
    module = re.split(r'[ .,;]', IMPORTS[part])[1]
    if importlib.util.find_spec(module) is None:
        return Found()
    command = [sys.executable, '-c', IMPORTS[part]]
    done = subprocess.run(command, capture_output=True, text=True, errors='replace')
    if done.returncode == 0:
        return Found(output=done.stdout.splitlines()[-1])
    if done.returncode < 0:
        return Found(error=f'the process was ended by signal {-done.returncode}')
    return Found(error=done.stderr.strip().splitlines()[-1])


def ask(pattern: str, *command: str) -> str:
    """Return the match of `pattern` in the output of a command, or an empty string."""
    if shutil.which(command[0]) is None:
        return ''
    done = subprocess.run(command, capture_output=True, text=True)
    found = re.search(pattern, done.stdout)
    return found[0] if found else ''


def probe() -> Facts:
    """Gather all facts. Imports take some seconds, hence several run at once."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        parts = dict(zip(IMPORTS, pool.map(try_import, IMPORTS), strict=True))
    names = [name for pair in OPENMMLAB.values() for name in pair]
    distributions = installed([*names, 'transformers'])
    nvcc = f'{os.environ.get("CUDA_HOME", "/usr/local/cuda")}/bin/nvcc'  # as torch looks for it
    headers = Path(sysconfig.get_path('include'), 'Python.h')
    mps = "Apple's mps: the references serve" if parts['torch'].output.endswith(', mps') else ''
    compilers = map(shutil.which, (os.environ.get('CXX', 'c++'), 'c++', 'g++', 'clang++'))
    others = {
        'Python': sys.version.split()[0],
        'GPU': ask(r'Driver Version: [\d.]+', 'nvidia-smi') or mps,
        'nvcc': ask(r'(?<=release )[\d.]+', nvcc if shutil.which(nvcc) else 'nvcc', '--version'),
        'C++ compiler': next(filter(None, compilers), ''),
        'Python headers': str(headers) if headers.is_file() else '',
        'transformers': distributions.get('transformers', ''),
    }
    # The .egg-info of setuptools in a working tree is found, too, and has no origin (PEP 610).
    ours = importlib.metadata.distributions(name='mmattn')
    editable = any('"editable": true' in (d.read_text('direct_url.json') or '') for d in ours)
    return Facts(parts | {k: Found(v) for k, v in others.items()}, distributions, editable)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog='python -m mmattn.doctor',
        description='Look at the environment and print, for each problem, its remedy.',
    )
    parser.add_argument('--json', action='store_true', help='print one JSON object')
    parser.add_argument('--log', type=Path, help='print the remedy for this log of `make setup`')
    options = parser.parse_args(arguments)
    if options.log:
        log = Found(error=options.log.read_text(errors='replace'))
        print(look('make setup', Facts({'make setup': log})).mend or f'read {options.log}')
        return 0

    checks = examine(probe())
    ok = all(check.state != 'fail' for check in checks)
    if options.json:
        print(json.dumps({'ok': ok, 'checks': [asdict(check) for check in checks]}, indent=2))
        return 0 if ok else 1
    for check in checks:
        print(f'{check.state:5} {check.name:17} {check.found}')
    mends = dict.fromkeys(check.mend for check in checks if check.mend)
    if mends:
        print('\nTo mend this, in this order:', *mends, sep='\n  ')
    print(f'\nThe main job {"can" if ok else "cannot"} run.')
    return 0 if ok else 1


if __name__ == '__main__':
    sys.exit(main())
