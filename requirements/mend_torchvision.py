"""Make a torchvision that was built for another torch importable in this environment.

Where the package index has only torchvision's CUDA builds, their library does not load beside a CPU
build of torch. torchvision tolerates that, but registers shape functions for two operators that the
library would have declared, and its import fails. mmpretrain needs only its transforms. So this
appends the two declarations to the installed ``torchvision/extension.py``, which is imported first.
`make setup` runs it in its own environment; nothing happens where torchvision works or is absent.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

SYMPTOM = 'operator torchvision::nms does not exist'
DECLARATIONS = """

# Written by mmattn's `make setup`: this torchvision was built for another torch.
_declared = torch.library.Library('torchvision', 'FRAGMENT')
for _name in ('nms', 'qnms'):
    if not hasattr(torch.ops.torchvision, _name):
        _declared.define(f'{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
"""


def main():
    spec = importlib.util.find_spec('torchvision')
    if spec is None:
        return
    command = [sys.executable, '-c', 'import torchvision']
    if SYMPTOM not in subprocess.run(command, capture_output=True, text=True).stderr:
        return
    target = Path(spec.origin).with_name('extension.py')
    mended = target.with_suffix('.mended')
    mended.write_text(target.read_text() + DECLARATIONS)
    os.replace(mended, target)
    print(f'declared torchvision::nms and torchvision::qnms in {target}')


if __name__ == '__main__':
    main()
