"""GC ViT, DAT and QuadTree attention as OpenMMLab backbones.

``import mmattn`` registers everything in mmengine's root registries.
"""

import sys

from ._dependencies import check_dependencies

__version__ = '0.1.0'


def _is_doctor():
    """Whether this import happens on the way to ``python -m mmattn.doctor``.

    Python imports the package before it runs the module, and the doctor has to run just where this
    import would raise. While the module is being looked up, ``sys.argv[0]`` is ``-m`` and only
    ``sys.orig_argv`` knows its name.
    """
    return sys.argv[:1] == ['-m'] and 'mmattn.doctor' in sys.orig_argv


if not _is_doctor():
    check_dependencies()

    import mmattn_configs

    from ._torchvision import declare_missing_operators

    mmattn_configs.register()
    declare_missing_operators()

    from . import attention, backbones, checkpoint, engine, ops

    __all__ = ["attention", "backbones", "checkpoint", "engine", "ops"]
