"""Lets a torchvision that was built for CUDA be imported beside a CPU build of torch."""

import importlib.util
import sys
from pathlib import Path

import torch

# The declarations live as long as this object.
_declared = []


def declare_missing_operators():
    """Declare the two operators without which torchvision cannot be imported.

    The package registry holds only torchvision's CUDA builds. Beside a CPU build of torch their
    library does not load; torchvision tolerates that, but then registers shape functions for
    ``torchvision::nms`` and ``torchvision::qnms``, which nobody has declared, and its import fails
    with ``operator torchvision::nms does not exist``. That stops mmpretrain, which uses torchvision's
    transforms, and mmengine's environment report, and so every training. With the two schemas
    declared the import works and so does everything but torchvision's own compiled operators.

    Nothing happens where torchvision is absent, imported already, or sound.
    """
    if _declared or 'torchvision' in sys.modules:
        return
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob('_C*.so'):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    fragment = torch.library.Library('torchvision', 'FRAGMENT')
    for name in ('nms', 'qnms'):
        fragment.define(f'{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _declared.append(fragment)
